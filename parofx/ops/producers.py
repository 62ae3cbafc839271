"""Operators of the fused form: a producer that rotates what it produced, and linears that read rotated tensors.

`fuse_producers` rewrites `rotate_int4_siblings(producer(…), rotations, linears)` to

    *rotated, [total] = rmsnorm_rotate(x, residual, weight, …, rotations)      or silu_mul_rotate(gate, up, rotations)
    outputs           = int4_siblings(rotated, linears)

The references keep what lies between producer and rotation in fp32; only the sum `x + residual` is rounded first, since
it is an output. None has a gradient: a graph that needs one is not fused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parofx import rotation
from parofx.errors import ShapeError
from parofx.ops.linear import check_linear, reference_linear
from parofx.ops.siblings import spread_bias


@torch.library.custom_op("parofx::rmsnorm_rotate", mutates_args=())
def rmsnorm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> list[Tensor]:
    """Return `ROT_i(n ⊙ channel_scales_i)` for each rotation, then `h` where there is a residual.

        h = x + residual        n = h / √(mean(h²) + eps) · (weight + weight_offset)

    `x`, `residual` and every output are `(…, K)` of one dtype; `weight (K,)` and `residual` may be missing.
    """
    check_rmsnorm_rotate(x, residual, weight, pairs, theta, channel_scales, group_size)
    total = x if residual is None else x + residual
    wide = total.to(rotation.compute_dtype(x.dtype))
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * (weight.to(wide.dtype) + weight_offset)
    rotations = zip(pairs, theta, channel_scales, strict=True)
    rotated = [rotation.rotate(normed, *parts, group_size).to(x.dtype).contiguous() for parts in rotations]
    return rotated if residual is None else [*rotated, total.contiguous()]


@rmsnorm_rotate.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> list[Tensor]:
    check_rmsnorm_rotate(x, residual, weight, pairs, theta, channel_scales, group_size)
    return [x.new_empty(x.shape) for _ in range(len(pairs) + (residual is not None))]


@torch.library.custom_op("parofx::silu_mul_rotate", mutates_args=())
def silu_mul_rotate(
    gate: Tensor,
    up: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> list[Tensor]:
    """Return `ROT_i(silu(gate) ⊙ up ⊙ channel_scales_i)`, `(…, K)`, for each rotation."""
    check_silu_mul_rotate(gate, up, pairs, theta, channel_scales, group_size)
    wide = torch.nn.functional.silu(gate.to(rotation.compute_dtype(gate.dtype))) * up
    rotations = zip(pairs, theta, channel_scales, strict=True)
    return [rotation.rotate(wide, *parts, group_size).to(gate.dtype).contiguous() for parts in rotations]


@silu_mul_rotate.register_fake
def _(
    gate: Tensor,
    up: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> list[Tensor]:
    check_silu_mul_rotate(gate, up, pairs, theta, channel_scales, group_size)
    return [gate.new_empty(gate.shape) for _ in pairs]


@torch.library.custom_op("parofx::int4_siblings", mutates_args=())
def int4_siblings(
    x: Sequence[Tensor],
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
) -> list[Tensor]:
    """Return one `(…, N_i)` per linear for rotated inputs `x`: one that all read, or one for each."""
    linears = _pair_with_inputs(x, qweight, qzeros, scales, bias, has_bias, group_size)
    return [reference_linear(*parts) for parts in linears]


@int4_siblings.register_fake
def _(
    x: Sequence[Tensor],
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
) -> list[Tensor]:
    linears = _pair_with_inputs(x, qweight, qzeros, scales, bias, has_bias, group_size)
    return [source.new_empty((*source.shape[:-1], scale.shape[1])) for source, _, _, scale, _ in linears]


def check_rmsnorm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> None:
    """Check that the tensors of `rmsnorm_rotate` fit together.

    Raises:
        ShapeError: saying what was expected and what came.
    """
    _check_rotations(x, pairs, theta, channel_scales, group_size)
    if residual is not None:
        _check_alike("residual", residual, x)
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ShapeError(f"weight must be ({x.shape[-1]},), got {tuple(weight.shape)}")


def check_silu_mul_rotate(
    gate: Tensor,
    up: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> None:
    """Check that the tensors of `silu_mul_rotate` fit together.

    Raises:
        ShapeError: saying what was expected and what came.
    """
    _check_rotations(gate, pairs, theta, channel_scales, group_size)
    _check_alike("up", up, gate)


def _check_alike(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape or tensor.dtype != x.dtype:
        raise ShapeError(
            f"{name} must be {x.dtype} {tuple(x.shape)} as the first input, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_rotations(
    x: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    group_size: int,
) -> None:
    if not x.is_floating_point():
        raise ShapeError(f"the first input must be a floating tensor, got {x.dtype}")
    counts = [len(pairs), len(theta), len(channel_scales)]
    if counts[0] == 0 or len(set(counts)) > 1:
        raise ShapeError(f"pairs, theta and channel_scales must be lists of one length above 0, got {counts}")
    for parts in zip(pairs, theta, channel_scales, strict=True):
        rotation.check_shapes(x.shape[-1], *parts, group_size)


def _pair_with_inputs(
    x: Sequence[Tensor],
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Return `(input, qweight, qzeros, scales, bias)` of each linear.

    Raises:
        ShapeError: if lists or tensors do not fit together.
    """
    counts = [len(qweight), len(qzeros), len(scales), len(has_bias)]
    if counts[0] == 0 or len(set(counts)) > 1 or len(x) not in (1, counts[0]) or sum(has_bias) != len(bias):
        raise ShapeError(
            f"siblings need one input, or one each, and a bias where has_bias says so: got {len(x)} inputs, lists of "
            f"{counts} qweight, qzeros, scales and has_bias, {len(bias)} biases for {sum(has_bias)}"
        )
    sources = [*x] * (counts[0] if len(x) == 1 else 1)
    linears = list(zip(sources, qweight, qzeros, scales, spread_bias(bias, has_bias), strict=True))
    for parts in linears:
        check_linear(*parts, group_size, 4)
    return linears
