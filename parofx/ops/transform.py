"""The operator `parofx::rotate` and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parofx import rotation


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
