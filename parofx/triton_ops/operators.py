"""The operators `torch.ops.parofx.triton_*` on kernel layouts: what the lowering for CUDA puts into a graph.

On CUDA they launch kernels; on a CPU they compute the same with PyTorch, so that a graph lowered for CUDA can be run,
exported and tested anywhere. Siblings lie side by side along N and come back as one tensor; a rotation of several
gives a tensor with S in front. Importing this module does not import Triton.

| operator | returns |
|-|-|
| `triton_rotate_int4_linear(x (…, K), rotation, weight, bias, ends, locks)` | `(…, N)` |
| `triton_int4_linear(x (S, …, K), weight, bias, ends, group_size, locks)` | `(…, N)` |
| `triton_rmsnorm_rotate(x (…, K), residual, weight, weight_offset, eps, rotation)` | `(S, …, K)`, and the sum |
| `triton_silu_mul_rotate(gate (…, K), up, rotation)` | `(S, …, K)` |

`rotation` stands for `coefficients, order`, `weight` for `words, qparams`; see `layout`. `locks` are zero before and
after every call, so no operator counts as writing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from parofx import packing
from parofx.triton_ops.layout import PackedRotation, PackedWeight, unpack_weight


@torch.library.custom_op("parofx::triton_rotate_int4_linear", mutates_args=(), device_types="cuda")
def triton_rotate_int4_linear(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
) -> Tensor:
    """Return `ROT(x ⊙ channel_scales) @ Wq + bias`, `(…, N)`."""
    from parofx.triton_ops import launch

    rotation, weight = PackedRotation(coefficients, order), PackedWeight(words, qparams)
    out = launch.rotate_int4_linear(x, rotation, weight, bias, ends, locks)
    return out.reshape(*x.shape[:-1], words.shape[1])


@triton_rotate_int4_linear.register_kernel("cpu")
def _(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
) -> Tensor:
    rotated = _rotated(x.float(), coefficients, order).to(x.dtype)
    return _linear(rotated, words, qparams, bias, ends, order.shape[-1])


@triton_rotate_int4_linear.register_fake
def _(
    x: Tensor,
    coefficients: Tensor,
    order: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[1]))


@torch.library.custom_op("parofx::triton_int4_linear", mutates_args=(), device_types="cuda")
def triton_int4_linear(
    x: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    locks: Tensor,
) -> Tensor:
    """Return `x_s @ Wq + bias`, `(…, N)`, for `x (S, …, K)`, rotated already."""
    from parofx.triton_ops import launch

    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    out = launch.int4_linear(rows, PackedWeight(words, qparams), bias, ends, group_size, locks)
    return out.reshape(*x.shape[1:-1], words.shape[1])


@triton_int4_linear.register_kernel("cpu")
def _(
    x: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    locks: Tensor,
) -> Tensor:
    return _linear(x, words, qparams, bias, ends, group_size)


@triton_int4_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    qparams: Tensor,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    locks: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[1:-1], words.shape[1]))


@torch.library.custom_op("parofx::triton_rmsnorm_rotate", mutates_args=(), device_types="cuda")
def triton_rmsnorm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    coefficients: Tensor,
    order: Tensor,
) -> list[Tensor]:
    """Return the normed and rotated sum `(S, …, K)`, and with a residual the sum."""
    from parofx.triton_ops import launch_producers as launch

    return launch.rmsnorm_rotate(x, residual, weight, weight_offset, eps, PackedRotation(coefficients, order))


@triton_rmsnorm_rotate.register_kernel("cpu")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    coefficients: Tensor,
    order: Tensor,
) -> list[Tensor]:
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * (weight.float() + weight_offset)
    rotated = _rotated(normed, coefficients, order).to(x.dtype)
    return [rotated] if residual is None else [rotated, total.contiguous()]


@triton_rmsnorm_rotate.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    coefficients: Tensor,
    order: Tensor,
) -> list[Tensor]:
    rotated = x.new_empty((order.shape[0], *x.shape))
    return [rotated] if residual is None else [rotated, x.new_empty(x.shape)]


@torch.library.custom_op("parofx::triton_silu_mul_rotate", mutates_args=(), device_types="cuda")
def triton_silu_mul_rotate(gate: Tensor, up: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:
    """Return the rotated product `(S, …, K)`."""
    from parofx.triton_ops import launch_producers as launch

    return launch.silu_mul_rotate(gate, up, PackedRotation(coefficients, order))


@triton_silu_mul_rotate.register_kernel("cpu")
def _(gate: Tensor, up: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:
    product = torch.nn.functional.silu(gate.float()) * up
    return _rotated(product, coefficients, order).to(gate.dtype)


@triton_silu_mul_rotate.register_fake
def _(gate: Tensor, up: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:
    return gate.new_empty((order.shape[0], *gate.shape))


def _rotated(x: Tensor, coefficients: Tensor, order: Tensor) -> Tensor:
    """Return `(S, …, K)`, fp32, of `x (…, K)`: the kernels' rounds on their layout."""
    rotations, groups, rounds, group_size = order.shape
    index = order.long()
    rows = x.reshape(1, -1, groups, group_size).expand(rotations, -1, -1, -1)
    values = _reorder(rows, index[:, :, 0]) * coefficients[:, None, :, 0]
    for r in range(1, rounds):
        cos, sin = coefficients[:, None, :, r].unflatten(-1, (-1, 2)).unbind(-1)
        first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((cos * first + sin * second, cos * second - sin * first), dim=-1)
        values = _reorder(turned.flatten(-2), index[:, :, r])
    return values.reshape(rotations, *x.shape)


def _reorder(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None].expand_as(values))


def _linear(
    x: Tensor, words: Tensor, qparams: Tensor, bias: Tensor | None, ends: Sequence[int], group_size: int
) -> Tensor:
    """Return `(…, N)` of `x (S, …, K)`, computed in fp32 and rounded once."""
    unpacked = unpack_weight(PackedWeight(words, qparams), group_size, x.shape[-1])
    weight = packing.dequantize_linear(*unpacked, torch.float32)
    starts = (0, *ends[:-1])
    parts = [rows.float() @ weight[start:end].t() for rows, start, end in zip(x, starts, ends, strict=True)]
    out = torch.cat(parts, dim=-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)
