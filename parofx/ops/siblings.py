"""The operator `parofx::rotate_int4_siblings`: linears that read one tensor, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parofx import rotation
from parofx.errors import ShapeError
from parofx.ops.autocast import cast_activation
from parofx.ops.linear import check_linear, reference_linear, stated_bits

#: Written out because an optional list of tensors is not inferred.
SIBLINGS_SCHEMA = (
    "(Tensor x, Tensor[] pairs, Tensor[] theta, Tensor[] channel_scales, Tensor[] qweight, Tensor[] qzeros, "
    "Tensor[] scales, Tensor[] bias, bool[] has_bias, SymInt group_size, SymInt bits=4, Tensor[]? down=None, "
    "Tensor[]? up=None) -> Tensor[]"
)


@torch.library.custom_op("parofx::rotate_int4_siblings", mutates_args=(), schema=SIBLINGS_SCHEMA)
def rotate_int4_siblings(
    x: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
    bits: int = 4,
    down: Sequence[Tensor] | None = None,
    up: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return one `(…, N_i)` per linear that reads `x`: one rotation for all (lists of one), or one for each.

    `bias` holds the biases of those linears for which `has_bias` is true, in order. All have codes of `bits` bits,
    and each a low-rank correction if `down` and `up` are given.
    """
    _check_siblings(
        x, (pairs, theta, channel_scales), (qweight, qzeros, scales), bias, has_bias, group_size, bits, down, up
    )
    wide = x.to(rotation.compute_dtype(x.dtype))
    rotations = zip(pairs, theta, channel_scales, strict=True)
    rotated = [rotation.rotate(wide, *parts, group_size) for parts in rotations] * _repeats(pairs, qweight)
    corrections = spread_corrections(down, up, len(qweight))
    linears = zip(rotated, qweight, qzeros, scales, spread_bias(bias, has_bias), *corrections, strict=True)
    return [reference_linear(*parts).to(x.dtype) for parts in linears]


@rotate_int4_siblings.register_fake
def _(
    x: Tensor,
    pairs: Sequence[Tensor],
    theta: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
    bits: int = 4,
    down: Sequence[Tensor] | None = None,
    up: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    _check_siblings(
        x, (pairs, theta, channel_scales), (qweight, qzeros, scales), bias, has_bias, group_size, bits, down, up
    )
    return [x.new_empty((*x.shape[:-1], scale.shape[1])) for scale in scales]


def _check_siblings(
    x: Tensor,
    rotations: tuple[Sequence[Tensor], ...],
    linears: tuple[Sequence[Tensor], ...],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
    bits: int,
    down: Sequence[Tensor] | None,
    up: Sequence[Tensor] | None,
) -> None:
    counts = [len(tensors) for tensors in (*rotations, *linears)]
    count = counts[3]
    if count == 0 or counts[0] not in (1, count) or counts != [counts[0]] * 3 + [count] * 3:
        raise ShapeError(
            "siblings need one rotation, or one each: got lists of "
            f"{counts[:3]} pairs, theta and channel_scales for {counts[3:]} qweight, qzeros and scales"
        )
    if len(has_bias) != count or sum(has_bias) != len(bias):
        raise ShapeError(f"has_bias must name {len(bias)} of {count} linears, got {list(has_bias)}")
    for pairs, theta, channel_scales in zip(*rotations, strict=True):
        rotation.check_shapes(x.shape[-1], pairs, theta, channel_scales, group_size)
    if (down is None) != (up is None) or (down is not None and up is not None and {len(down), len(up)} != {count}):
        found = [None if halves is None else len(halves) for halves in (down, up)]
        raise ShapeError(f"down and up must both be None or lists of {count}, got lengths {found}")
    corrections = spread_corrections(down, up, count)
    members = zip(*linears, spread_bias(bias, has_bias), *corrections, strict=True)
    for qweight, qzeros, scales, one_bias, one_down, one_up in members:
        check_linear(x, qweight, qzeros, scales, one_bias, group_size, bits, one_down, one_up)


def spread_bias(bias: Sequence[Tensor], has_bias: Sequence[bool]) -> list[Tensor | None]:
    """Return one entry per linear: its bias, or None."""
    present = iter(bias)
    return [next(present) if has else None for has in has_bias]


def spread_corrections(
    down: Sequence[Tensor] | None, up: Sequence[Tensor] | None, count: int
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Return the halves of each linear's correction, or None for each."""
    return ([None] * count, [None] * count) if down is None or up is None else (down, up)


def _repeats(pairs: Sequence[Tensor], qweight: Sequence[Tensor]) -> int:
    return len(qweight) if len(pairs) == 1 else 1


def save_siblings(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what `differentiate_siblings` needs."""
    x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, ctx.has_bias, ctx.group_size, *rest = inputs
    ctx.bits, down, up = rest
    ctx.corrected = down is not None
    ctx.bias_dtypes = [one.dtype for one in bias]
    ctx.counts = (len(pairs), len(qweight))
    ctx.save_for_backward(x, *pairs, *theta, *channel_scales, *qweight, *qzeros, *scales, *(down or ()), *(up or ()))


def differentiate_siblings(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients of `rotate_int4_siblings` for x, θ, channel scales and biases."""
    x, *rest = ctx.saved_tensors
    rotations, linears = ctx.counts
    pairs, theta, channel_scales = (rest[i * rotations : (i + 1) * rotations] for i in range(3))
    rest = rest[3 * rotations :]
    packed = list(zip(*(rest[i * linears : (i + 1) * linears] for i in range(len(rest) // linears)), strict=True))
    grad_rotated: list[Tensor | None] = [None] * rotations
    for index, (grad, tensors) in enumerate(zip(grads, packed, strict=True)):
        if grad is None:
            continue
        term = torch.ops.parofx.int4_linear_backward(grad, *tensors)
        which = 0 if rotations == 1 else index
        present = grad_rotated[which]
        grad_rotated[which] = term if present is None else present + term
    grad_x: Tensor | None = None
    grad_theta: list[Tensor | None] = [None] * rotations
    grad_scales: list[Tensor | None] = [None] * rotations
    for index, gradient in enumerate(grad_rotated):
        if gradient is None:
            continue
        term, grad_theta[index], grad_scales[index] = torch.ops.parofx.rotate_backward(
            gradient, x, pairs[index], theta[index], channel_scales[index], ctx.group_size
        )
        grad_x = term if grad_x is None else grad_x + term
    with_bias = [grad for grad, has in zip(grads, ctx.has_bias, strict=True) if has]
    grad_bias = [
        None if grad is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)
        for dtype, grad in zip(ctx.bias_dtypes, with_bias, strict=True)
    ]
    none = [None] * linears
    # The dispatcher drops a trailing argument that has its default, and wants no gradient for it.
    rest_grads = [None, None, None, none, none] if ctx.corrected else [None] * (2 + len(stated_bits(ctx.bits)))
    return grad_x, [None] * rotations, grad_theta, grad_scales, none, none, none, grad_bias, *rest_grads


rotate_int4_siblings.register_autograd(differentiate_siblings, setup_context=save_siblings)
cast_activation(rotate_int4_siblings)
