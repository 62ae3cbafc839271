"""The semantic operators `torch.ops.parofx.*`: checkpoint layout, any device, opaque to the compiler.

Each block holds one operator: schema and reference, fake kernel, autograd. Passes match these operators; providers
replace them by operators on kernel layouts. The references compute in fp32 (fp64 for fp64 inputs) and round once.

| operator | returns |
|-|-|
| `rotate(v, pairs, theta, scales, group_size)` | `ROT(v ⊙ scales)` |
| `fake_quantize(w, scales, zeros, bits, group_size)` | `w` rounded to its grid; a copy while `scales` is empty |
| `int4_linear(x, qweight, qzeros, scales, bias, group_size)` | `x @ Wq + bias` |
| `rotate_int4_linear(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size)` | both in one |
| `rotate_int4_siblings(x, pairs[], theta[], …)` | one output per linear that reads the same `x` |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parofx import affine, packing, rotation
from parofx.errors import ShapeError

# --- rotate ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("parofx::rotate", mutates_args=())
def rotate(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return `ROT(v ⊙ scales)`; see `parofx.rotation.rotate`."""
    return rotation.rotate(v, pairs, theta, scales, group_size).contiguous()


@rotate.register_fake
def _(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Tensor:
    rotation.check_shapes(v.shape[-1], pairs, theta, scales, group_size)
    return v.new_empty(v.shape)


@torch.library.custom_op("parofx::rotate_backward", mutates_args=())
def rotate_backward(
    grad: Tensor, v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `rotate` for `v`, `theta` and `scales`."""
    grads = rotation.rotate_backward(grad, v, pairs, theta, scales, group_size)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@rotate_backward.register_fake
def _(
    grad: Tensor, v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), theta.new_empty(theta.shape), scales.new_empty(scales.shape)


def _save_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_rotate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v, pairs, theta, scales = ctx.saved_tensors
    grads = torch.ops.parofx.rotate_backward(grad, v, pairs, theta, scales, ctx.group_size)
    return grads[0], None, grads[1], grads[2], None


rotate.register_autograd(_differentiate_rotate, setup_context=_save_rotate)

# --- fake_quantize --------------------------------------------------------------------------------------------------


@torch.library.custom_op("parofx::fake_quantize", mutates_args=())
def fake_quantize(w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """Round `w (N, K)` to its grid, `scales` and `zeros (N, K/g)`; with empty `scales` (off) return a copy."""
    if scales.numel() == 0:
        return w.clone(memory_format=torch.contiguous_format)
    return affine.fake_quantize(w, scales, zeros, bits, group_size).contiguous()


@fake_quantize.register_fake
def _(w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    return w.new_empty(w.shape)


@torch.library.custom_op("parofx::fake_quantize_backward", mutates_args=())
def fake_quantize_backward(
    grad: Tensor, w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return straight-through gradients of `fake_quantize` for `w`, `scales` and `zeros`."""
    if scales.numel() == 0:
        return grad.clone(memory_format=torch.contiguous_format), torch.zeros_like(scales), torch.zeros_like(zeros)
    grads = affine.fake_quantize_backward(grad, w, scales, zeros, bits, group_size)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@fake_quantize_backward.register_fake
def _(
    grad: Tensor, w: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), scales.new_empty(scales.shape), zeros.new_empty(zeros.shape)


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_fake_quantize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.parofx.fake_quantize_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.group_size)
    return grads[0], grads[1], grads[2], None, None


fake_quantize.register_autograd(_differentiate_fake_quantize, setup_context=_save_fake_quantize)

# --- int4_linear ----------------------------------------------------------------------------------------------------


def _reference_linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    dtype = rotation.compute_dtype(x.dtype)
    weight = packing.dequantize_linear(qweight, qzeros, scales, dtype)
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)


def _check_linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> None:
    packing.check_packed_shapes(qweight, qzeros, scales)
    if x.shape[-1] != qweight.shape[0] or scales.shape[0] * group != qweight.shape[0]:
        raise ShapeError(
            f"x (…, K), qweight (K, N/8) and scales (K/{group}, N) must agree, got {tuple(x.shape)}, "
            f"{tuple(qweight.shape)} and {tuple(scales.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (scales.shape[1],):
        raise ShapeError(f"bias must be ({scales.shape[1]},), got {tuple(bias.shape)}")


@torch.library.custom_op("parofx::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """Return `x @ Wq + bias`, `(…, N)`, with `Wq = (q − z)·scales` and `x (…, K)` already rotated."""
    _check_linear(x, qweight, qzeros, scales, bias, group_size)
    return _reference_linear(x, qweight, qzeros, scales, bias)


@int4_linear.register_fake
def _(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    _check_linear(x, qweight, qzeros, scales, bias, group_size)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.custom_op("parofx::int4_linear_backward", mutates_args=())
def int4_linear_backward(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Return the gradient of `int4_linear` for `x`, `grad @ Wqᵀ`."""
    dtype = rotation.compute_dtype(grad.dtype)
    weight = packing.dequantize_linear(qweight, qzeros, scales, dtype)
    return (grad.to(dtype) @ weight).to(grad.dtype)


@int4_linear_backward.register_fake
def _(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], qweight.shape[0]))


def _grad_bias(ctx: Any, grad: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def _save_int4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, qzeros, scales, bias, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qweight, qzeros, scales)


def _differentiate_int4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.parofx.int4_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, None, None, _grad_bias(ctx, grad), None


int4_linear.register_autograd(_differentiate_int4_linear, setup_context=_save_int4_linear)

# --- rotate_int4_linear ---------------------------------------------------------------------------------------------


@torch.library.custom_op("parofx::rotate_int4_linear", mutates_args=())
def rotate_int4_linear(
    x: Tensor,
    pairs: Tensor,
    theta: Tensor,
    channel_scales: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """Return `ROT(x ⊙ channel_scales) @ Wq + bias`, `(…, N)`, rounded once to `x`'s dtype."""
    _check_linear(x, qweight, qzeros, scales, bias, group_size)
    rotated = rotation.rotate(x.to(rotation.compute_dtype(x.dtype)), pairs, theta, channel_scales, group_size)
    return _reference_linear(rotated, qweight, qzeros, scales, bias).to(x.dtype)


@rotate_int4_linear.register_fake
def _(
    x: Tensor,
    pairs: Tensor,
    theta: Tensor,
    channel_scales: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    rotation.check_shapes(x.shape[-1], pairs, theta, channel_scales, group_size)
    _check_linear(x, qweight, qzeros, scales, bias, group_size)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _save_rotate_int4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, ctx.group_size = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, pairs, theta, channel_scales, qweight, qzeros, scales)


def _differentiate_rotate_int4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, pairs, theta, channel_scales, *packed = ctx.saved_tensors
    grad_rotated = torch.ops.parofx.int4_linear_backward(grad, *packed)
    grads = torch.ops.parofx.rotate_backward(grad_rotated, x, pairs, theta, channel_scales, ctx.group_size)
    return grads[0], None, grads[1], grads[2], None, None, None, _grad_bias(ctx, grad), None


rotate_int4_linear.register_autograd(_differentiate_rotate_int4_linear, setup_context=_save_rotate_int4_linear)

# --- rotate_int4_siblings -------------------------------------------------------------------------------------------


@torch.library.custom_op("parofx::rotate_int4_siblings", mutates_args=())
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
) -> list[Tensor]:
    """Return one `(…, N_i)` per linear that reads `x`: one rotation for all (lists of one), or one for each.

    `bias` holds the biases of those linears for which `has_bias` is true, in order.
    """
    _check_siblings(x, (pairs, theta, channel_scales), (qweight, qzeros, scales), bias, has_bias, group_size)
    wide = x.to(rotation.compute_dtype(x.dtype))
    rotations = zip(pairs, theta, channel_scales, strict=True)
    rotated = [rotation.rotate(wide, *parts, group_size) for parts in rotations] * _repeats(pairs, qweight)
    linears = zip(rotated, qweight, qzeros, scales, spread_bias(bias, has_bias), strict=True)
    return [_reference_linear(*parts).to(x.dtype) for parts in linears]


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
) -> list[Tensor]:
    _check_siblings(x, (pairs, theta, channel_scales), (qweight, qzeros, scales), bias, has_bias, group_size)
    return [x.new_empty((*x.shape[:-1], scale.shape[1])) for scale in scales]


def _check_siblings(
    x: Tensor,
    rotations: tuple[Sequence[Tensor], ...],
    linears: tuple[Sequence[Tensor], ...],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
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
    for qweight, qzeros, scales, one_bias in zip(*linears, spread_bias(bias, has_bias), strict=True):
        _check_linear(x, qweight, qzeros, scales, one_bias, group_size)


def spread_bias(bias: Sequence[Tensor], has_bias: Sequence[bool]) -> list[Tensor | None]:
    """Return one entry per linear: its bias, or None."""
    present = iter(bias)
    return [next(present) if has else None for has in has_bias]


def _repeats(pairs: Sequence[Tensor], qweight: Sequence[Tensor]) -> int:
    return len(qweight) if len(pairs) == 1 else 1


def save_siblings(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep what `differentiate_siblings` needs."""
    x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, ctx.has_bias, ctx.group_size = inputs
    ctx.bias_dtypes = [one.dtype for one in bias]
    ctx.counts = (len(pairs), len(qweight))
    ctx.save_for_backward(x, *pairs, *theta, *channel_scales, *qweight, *qzeros, *scales)


def differentiate_siblings(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Return the gradients of `rotate_int4_siblings` for x, θ, channel scales and biases."""
    x, *rest = ctx.saved_tensors
    rotations, linears = ctx.counts
    pairs, theta, channel_scales = (rest[i * rotations : (i + 1) * rotations] for i in range(3))
    rest = rest[3 * rotations :]
    packed = list(zip(*(rest[i * linears : (i + 1) * linears] for i in range(3)), strict=True))
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
    return grad_x, [None] * rotations, grad_theta, grad_scales, none, none, none, grad_bias, None, None


rotate_int4_siblings.register_autograd(differentiate_siblings, setup_context=save_siblings)
