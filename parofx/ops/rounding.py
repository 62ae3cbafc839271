"""The operator `parofx::fake_quantize` and its straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parofx import affine


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
