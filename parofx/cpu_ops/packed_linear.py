"""A linear held in the CPU kernels' layout: its operators, and the layout `ParoLinear` knows.

    rotate_int4_cpu_linear(x, rotation, theta, weight, scales, zeros, bias, g, bits, down, up)
        = rotate_int4_linear(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, g, bits, down, up)
      where qweight, qzeros, scales = unpack_cpu_weight(weight, scales, zeros, bits)
            pairs, channel_scales   = unpack_cpu_rotation(rotation, theta, g)

This equality is what a pass rewrites by, so that a graph knows one linear whatever the layout, and what a lowering
undoes. The operator runs the kernels where they serve and its right-hand side elsewhere: it is right on every device.
`theta` is what `rotation` holds the cosines and sines of; only the way back to the checkpoint reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parofx import cpu_ops, kernel_layouts, ops
from parofx.config import Activations
from parofx.cpu_ops import layout
from parofx.cpu_ops.layouts import PACK, UNPACK
from parofx.errors import LoweringError
from parofx.ops.autocast import as_autocast
from parofx.packing import words_per_row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The kernels' `activation_mode`.
ACTIVATION_MODES: dict[Activations, int] = {"float": 0, "int8": 1}


@torch.library.custom_op("parofx::unpack_cpu_weight", mutates_args=())
def unpack_cpu_weight(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checkpoint's `(qweight, qzeros, scales)` of `weight (N, bits·K/8)`, `scales` and `zeros (N, K/g)`."""
    out_features, in_features = weight.shape[0], 8 * weight.shape[1] // bits
    group_size = in_features // scales.shape[1]
    unpacked = UNPACK[bits](weight, scales, zeros, group_size, in_features, out_features)
    # A single block of columns is not reordered, and an operator's outputs are its own.
    sources = {weight.data_ptr(), scales.data_ptr(), zeros.data_ptr()}
    qweight, qzeros, steps = (part.clone() if part.data_ptr() in sources else part for part in unpacked)
    return qweight, qzeros, steps


@unpack_cpu_weight.register_fake
def _(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    out_features, in_features = weight.shape[0], 8 * weight.shape[1] // bits
    groups, words = scales.shape[1], words_per_row(out_features, bits)
    return (
        weight.new_empty((in_features, words), dtype=torch.int32),
        weight.new_empty((groups, words), dtype=torch.int32),
        scales.new_empty((groups, out_features)),
    )


@torch.library.custom_op("parofx::unpack_cpu_rotation", mutates_args=())
def unpack_cpu_rotation(rotation: Tensor, theta: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the checkpoint's `(pairs, channel_scales)` of `rotation` and its `theta (krot, K/2)`."""
    return layout.unpack_rotation(rotation, theta, group_size)


@unpack_cpu_rotation.register_fake
def _(rotation: Tensor, theta: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    krot, in_features = theta.shape[0], 2 * theta.shape[1]
    return (
        rotation.new_empty((krot, in_features), dtype=torch.int16),
        rotation.new_empty((1, in_features), dtype=torch.float16),
    )


@torch.library.custom_op("parofx::rotate_int4_cpu_linear", mutates_args=())
def rotate_int4_cpu_linear(
    x: Tensor,
    rotation: Tensor,
    theta: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return `rotate_int4_linear` of the tensors that these are packed from, `(…, N)`, in `x`'s dtype."""
    if _kernels_serve(x):
        return _run_kernels(x, rotation, weight, scales, zeros, bias, group_size, bits, down, up)
    qweight, qzeros, unpacked = torch.ops.parofx.unpack_cpu_weight(weight, scales, zeros, bits)
    pairs, channel_scales = torch.ops.parofx.unpack_cpu_rotation(rotation, theta, group_size)
    result: Tensor = torch.ops.parofx.rotate_int4_linear(
        x, pairs, theta, channel_scales, qweight, qzeros, unpacked, bias, group_size, bits, down, up
    )
    return result


@rotate_int4_cpu_linear.register_fake
def _(
    x: Tensor,
    rotation: Tensor,
    theta: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, ctx.group_size, ctx.bits, down, up = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*tensors, down, up)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rotation, theta, *packed, down, up = ctx.saved_tensors
    unpacked = torch.ops.parofx.unpack_cpu_weight(*packed, ctx.bits)
    pairs, channel_scales = torch.ops.parofx.unpack_cpu_rotation(rotation, theta, ctx.group_size)
    grad_rotated = torch.ops.parofx.int4_linear_backward(grad, *unpacked, down, up)
    grads = torch.ops.parofx.rotate_backward(grad_rotated, x, pairs, theta, channel_scales, ctx.group_size)
    grad_bias = None if ctx.bias_dtype is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grads[0], None, None, None, None, None, grad_bias, *[None] * 4


rotate_int4_cpu_linear.register_autograd(_differentiate, setup_context=_save)
ops.cast_activation(rotate_int4_cpu_linear)


def _kernels_serve(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.device.type == "cpu" and cpu_ops.is_available()


def _run_kernels(
    x: Tensor,
    rotation: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int,
    down: Tensor | None = None,
    up: Tensor | None = None,
    activations: Activations = "float",
) -> Tensor:
    result: Tensor = torch.ops.parofx_cpu.rotate_linear.default(
        x, rotation, weight, scales, zeros, bias, bits, group_size, ACTIVATION_MODES[activations], down, up
    )
    return result


def _quantizable(x: Tensor) -> Tensor:
    """Return `x` as the kernels take it to quantize it: cast where autocast asks for that.

    Raises:
        LoweringError: if it requires a gradient, or the kernels do not serve it.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise LoweringError(
            "int8 activations have no gradient, and the input requires one: call the model under torch.no_grad(), or "
            "parofx.set_eager_activations(model, 'float') first"
        )
    if torch.is_autocast_enabled("cpu"):
        x = as_autocast(x, "cpu")
    if not _kernels_serve(x):
        raise LoweringError(
            f"int8 activations are quantized on cpu, from one of {DTYPES}: got {x.dtype} on {x.device}; convert the "
            "input, or call parofx.set_eager_activations(model, 'float') first"
        )
    return x


class CpuLayout:
    """Hold linears on CPU as the native kernels read them."""

    name = "cpu"
    buffers: tuple[str, ...] = ("cpu_rotation", "cpu_theta", "cpu_weight", "cpu_scales", "cpu_zeros")
    weight_buffers: tuple[str, ...] = ("cpu_weight", "cpu_scales", "cpu_zeros")

    def why_not(self, device: torch.device, group_size: int) -> str | None:
        """Return why linears on a device are not held in this layout, or None."""
        if device.type != "cpu":
            return f"device {device.type} is not cpu"
        if group_size not in layout.GROUP_SIZES:
            return f"group_size {group_size} is not one of {layout.GROUP_SIZES}"
        if not cpu_ops.is_available():
            return f"the kernels are not available: {cpu_ops.why_unavailable()}"
        return None

    def pack(self, tensors: Mapping[str, Tensor], group_size: int, bits: int) -> dict[str, Tensor]:
        """Return the kernels' tensors; siblings with one rotation hold one copy of it."""
        theta = tensors["theta"]
        rotation = layout.pack_rotation(tensors["pairs"], theta, tensors["channel_scales"], group_size)
        weight = PACK[bits](tensors["qweight"], tensors["qzeros"], tensors["scales"], group_size)
        # Copied, since the checkpoint's may be written while a sibling is packed already.
        shared = kernel_layouts.share("cpu_rotation", rotation), kernel_layouts.share("cpu_theta", theta.clone())
        return dict(zip(self.buffers, (*shared, *weight), strict=True))

    def unpack(self, packed: Mapping[str, Tensor], group_size: int, bits: int) -> dict[str, Tensor]:
        """Invert `pack`: fresh tensors, equal to the last bit."""
        rotation, theta, *weight = (packed[name] for name in self.buffers)
        qweight, qzeros, scales = torch.ops.parofx.unpack_cpu_weight(*weight, bits)
        pairs, channel_scales = torch.ops.parofx.unpack_cpu_rotation(rotation, theta, group_size)
        return {
            "qweight": qweight,
            "qzeros": qzeros,
            "scales": scales,
            "theta": theta.clone(),
            "pairs": pairs,
            "channel_scales": channel_scales,
        }

    def linear(
        self,
        x: Tensor,
        packed: Mapping[str, Tensor],
        bias: Tensor | None,
        group_size: int,
        bits: int,
        eager_activations: Activations = "float",
    ) -> Tensor:
        """Return `(…, N)` for `x (…, K)`; differentiable in `x`, and one operator call where a graph is traced.

        Raises:
            LoweringError: if activations are to be quantized, and `x` requires a gradient or is not for the kernels.
        """
        weight = (packed["cpu_weight"], packed["cpu_scales"], packed["cpu_zeros"])
        correction = packed.get("compensation_down"), packed.get("compensation_up")
        arguments = (packed["cpu_rotation"], *weight, bias, group_size, bits, *correction)
        if eager_activations == "int8" and not torch.compiler.is_compiling():
            return _run_kernels(_quantizable(x), *arguments, "int8")
        # Outside of graphs, with no gradient to record and nothing to cast, the kernel is called directly.
        direct = not (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and x.requires_grad)
            or torch.is_autocast_enabled("cpu")
        )
        if direct and _kernels_serve(x):
            return _run_kernels(x, *arguments)
        result: Tensor = torch.ops.parofx.rotate_int4_cpu_linear(
            x, packed["cpu_rotation"], packed["cpu_theta"], *weight, bias, group_size, *ops.stated(bits, *correction)
        )
        return result


kernel_layouts.register(CpuLayout())
