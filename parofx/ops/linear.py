"""The operators `parofx::int4_linear` and `parofx::rotate_int4_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parofx import packing, rotation
from parofx.errors import ShapeError
from parofx.ops.autocast import cast_activation

#: Width of codes where an operator's call states none.
DEFAULT_BITS = 4


def stated_bits(bits: int) -> tuple[int, ...]:
    """Return the trailing arguments that state a width: none for 4, so that graphs of 4-bit linears show nothing."""
    return () if bits == DEFAULT_BITS else (bits,)


def stated(bits: int, down: Any, up: Any) -> tuple[Any, ...]:
    """Return the trailing arguments that state a width and a low-rank correction: as few as say it."""
    return stated_bits(bits) if down is None else (bits, down, up)


def reference_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return `x @ Wq + (x @ downᵀ) @ up + bias`, computed in fp32 (fp64 for fp64) and rounded once."""
    dtype = rotation.compute_dtype(x.dtype)
    weight = packing.dequantize_linear(qweight, qzeros, scales, dtype)
    bias = None if bias is None else bias.to(dtype)
    wide = x.to(dtype)
    y = torch.nn.functional.linear(wide, weight, bias)
    if down is not None and up is not None:
        y = y + (wide @ down.to(dtype).t()) @ up.to(dtype)
    return y.to(x.dtype)


def check_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    bits: int,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Check that the tensors of one packed linear fit together.

    Raises:
        ShapeError: saying what was expected and what came.
    """
    packing.check_packed_shapes(qweight, qzeros, scales)
    if packing.packed_bits(qweight, scales) != bits:
        raise ShapeError(
            f"qweight (K, {bits}·N/32) and scales (K/g, N) must hold codes of {bits} bits, got {tuple(qweight.shape)} "
            f"and {tuple(scales.shape)}: {packing.packed_bits(qweight, scales)} bits"
        )
    if x.shape[-1] != qweight.shape[0] or scales.shape[0] * group != qweight.shape[0]:
        raise ShapeError(
            f"x (…, K), qweight (K, bits·N/32) and scales (K/{group}, N) must agree, got {tuple(x.shape)}, "
            f"{tuple(qweight.shape)} and {tuple(scales.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (scales.shape[1],):
        raise ShapeError(f"bias must be ({scales.shape[1]},), got {tuple(bias.shape)}")
    if not x.is_floating_point():
        raise ShapeError(f"x must be a floating tensor, got {x.dtype}")
    check_correction(down, up, qweight.shape[0], scales.shape[1])


def check_correction(down: Tensor | None, up: Tensor | None, in_features: int, out_features: int) -> None:
    """Check the halves of a low-rank correction.

    Raises:
        ShapeError: if there is one without the other, or their shapes do not fit the linear.
    """
    shapes = [None if half is None else tuple(half.shape) for half in (down, up)]
    if shapes == [None, None]:
        return
    rank = None if down is None else down.shape[0]
    if shapes != [(rank, in_features), (rank, out_features)]:
        raise ShapeError(f"down must be (r, {in_features}) and up (r, {out_features}), got {shapes[0]} and {shapes[1]}")


@torch.library.custom_op("parofx::int4_linear", mutates_args=())
def int4_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return `x @ Wq + bias`, `(…, N)`, with `Wq = (q − z)·scales` and `x (…, K)` already rotated.

    The name is from when there were four bits only; `bits` says how many the codes have. With `down (r, K)` and
    `up (r, N)`, a low-rank correction, `(x @ downᵀ) @ up` is added.
    """
    check_linear(x, qweight, qzeros, scales, bias, group_size, bits, down, up)
    return reference_linear(x, qweight, qzeros, scales, bias, down, up)


@int4_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    check_linear(x, qweight, qzeros, scales, bias, group_size, bits, down, up)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.custom_op("parofx::int4_linear_backward", mutates_args=())
def int4_linear_backward(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return the gradient of `int4_linear` for `x`, `grad @ Wqᵀ + (grad @ upᵀ) @ down`."""
    dtype = rotation.compute_dtype(grad.dtype)
    weight = packing.dequantize_linear(qweight, qzeros, scales, dtype)
    wide = grad.to(dtype)
    result = wide @ weight
    if down is not None and up is not None:
        result = result + (wide @ up.to(dtype).t()) @ down.to(dtype)
    return result.to(grad.dtype)


@int4_linear_backward.register_fake
def _(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], qweight.shape[0]))


def _grad_bias(ctx: Any, grad: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def _save_int4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, qzeros, scales, bias, _, _, down, up = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(qweight, qzeros, scales, down, up)


def _differentiate_int4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.parofx.int4_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, None, None, _grad_bias(ctx, grad), None, None, None, None


int4_linear.register_autograd(_differentiate_int4_linear, setup_context=_save_int4_linear)
cast_activation(int4_linear)


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
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return `ROT(x ⊙ channel_scales) @ (Wq + downᵀ @ up) + bias`, `(…, N)`, rounded once to `x`'s dtype."""
    check_linear(x, qweight, qzeros, scales, bias, group_size, bits, down, up)
    rotated = rotation.rotate(x.to(rotation.compute_dtype(x.dtype)), pairs, theta, channel_scales, group_size)
    return reference_linear(rotated, qweight, qzeros, scales, bias, down, up).to(x.dtype)


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
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    rotation.check_shapes(x.shape[-1], pairs, theta, channel_scales, group_size)
    check_linear(x, qweight, qzeros, scales, bias, group_size, bits, down, up)
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _save_rotate_int4_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, ctx.group_size, _, down, up = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, pairs, theta, channel_scales, qweight, qzeros, scales, down, up)


def _differentiate_rotate_int4_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, pairs, theta, channel_scales, *packed = ctx.saved_tensors
    grad_rotated = torch.ops.parofx.int4_linear_backward(grad, *packed)
    grads = torch.ops.parofx.rotate_backward(grad_rotated, x, pairs, theta, channel_scales, ctx.group_size)
    return grads[0], None, grads[1], grads[2], None, None, None, _grad_bias(ctx, grad), *[None] * 4


rotate_int4_linear.register_autograd(_differentiate_rotate_int4_linear, setup_context=_save_rotate_int4_linear)
cast_activation(rotate_int4_linear)
