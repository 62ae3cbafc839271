"""`convert`: CALIBRATED → CONVERTED. Fake-quantized weights become packed ones; no float weight is left.

linear(rotate(x, P, θ, c), fake_quantize(rotate(W, P, θ, 1/c), s, z), b)
    →   int4_linear(rotate(x, P, θ, c), qweight, qzeros, scales, b)

A low-rank correction of the fake-quantized weight (`passes.compensation`) becomes arguments of the packed linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import affine, packing
from parofx.calibration.fitting import rotate_weight
from parofx.errors import PassError
from parofx.linear_tensors import COMPENSATION_NAMES
from parofx.ops import stated
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.derived import derived
from parofx.passes.graph import INT4_LINEAR, binding, buffer_node, remove_dead_code
from parofx.passes.transforms import Transform, TransformedLinear, find_transforms


@register
@dataclass(frozen=True)
class Convert:
    """Pack every fake-quantized weight; with `reuse`, once for all graphs that hold it with the same grid."""

    reuse: bool = False

    name: ClassVar[str] = "convert"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.CALIBRATED,)
    produces: ClassVar[Stage] = Stage.CONVERTED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        with torch.no_grad():
            for transform in find_transforms(gm):
                for linear in transform.linears:
                    reason = why_not(gm, linear)
                    if reason is not None:
                        raise PassError(f"{linear.name} cannot be converted: {reason}")
                    report.changed += rewrite(gm, transform, linear, self._packed(gm, transform, linear))
                # Calibration has rounded them before it chose the grid.
                transform.halve_parameters(gm)
        remove_dead_code(gm)
        set_stage(gm, Stage.CONVERTED)
        return report

    def _packed(
        self, gm: GraphModule, transform: Transform, linear: TransformedLinear
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the checkpoint's `(qweight, qzeros, scales)`."""
        scales, zeros = linear.grid(gm)

        def make() -> tuple[Tensor, Tensor, Tensor]:
            rotated = rotate_weight(linear.weight, *transform.parameters(gm), transform.group_size)
            codes = affine.quantize(rotated, scales, zeros, linear.bits, transform.group_size)
            return packing.pack_linear(codes, scales, zeros, bits=linear.bits)

        if not self.reuse:
            return make()
        # A grid that was fitted once and kept is the same tensor again.
        return derived(("packed", id(scales), linear.bits), [linear.parameter, scales], make)


def why_not(gm: GraphModule, linear: TransformedLinear) -> str | None:
    """Return why a linear cannot be packed, or None."""
    scales, zeros = linear.grid(gm)
    if scales.numel() == 0:
        return "its grid is empty; run calibrate first"
    if not torch.equal(scales, scales.half().float()) or not torch.equal(zeros, zeros.round()):
        return "its scales must be fp16 values and its zeros integers"
    halves = linear.correction(gm) or ()
    if not all(bool(torch.isfinite(half).all()) for half in halves):
        return "its low-rank correction must be finite in fp16"
    return None


def rewrite(
    gm: GraphModule, transform: Transform, linear: TransformedLinear, packed: tuple[Tensor, Tensor, Tensor]
) -> int:
    """Let every call of a linear read packed tensors."""
    parameter = linear.parameter_node
    if parameter.op == "placeholder":
        gm.meta.setdefault("parofx_made_from", set()).add(parameter)
    with gm.graph.inserting_before(linear.calls[0]):
        nodes = [
            buffer_node(gm, f"{linear.name}.{name}", tensor)
            for name, tensor in zip(("qweight", "qzeros", "scales"), packed, strict=True)
        ]
        halves = zip(COMPENSATION_NAMES, linear.correction(gm) or (), strict=False)
        down, up = (*(buffer_node(gm, f"{linear.name}.{name}", half) for name, half in halves), None, None)[:2]
    biases: dict[Node, Node] = {}
    for call in linear.calls:
        bias = call.args[2] if len(call.args) > 2 else None
        if isinstance(bias, Node) and bias not in biases:
            biases[bias] = _half_bias(gm, linear, call, bias, len(biases))
        with gm.graph.inserting_before(call):
            bias = biases[bias] if isinstance(bias, Node) else None
            trailing = stated(linear.bits, down, up)
            arguments = (call.args[0], *nodes, bias, transform.group_size, *trailing)
            node = gm.graph.call_function(INT4_LINEAR, arguments)
        node.meta = {**call.meta, "parofx_linear": linear.name}
        call.replace_all_uses_with(node)
        gm.graph.erase_node(call)
    return len(linear.calls)


def _half_bias(gm: GraphModule, linear: TransformedLinear, call: Node, bias: Node, index: int) -> Node:
    """Return the node of the bias as the checkpoint stores it, fp16; what is computed or an input stays as it is."""
    bound = binding(bias)
    if bound is None or bias.op == "placeholder":
        return bias
    value: Tensor = bound.tensor.detach().half()
    if not torch.isfinite(value).all():
        raise PassError(
            f"the bias of {linear.name} must fit fp16 to be stored, its largest value is "
            f"{float(bound.tensor.detach().abs().max()):.3g}; add it to modules_to_not_convert"
        )
    only_here = all(user in linear.calls for user in bias.users)
    with gm.graph.inserting_before(linear.calls[0] if index == 0 else call):
        path = f"{linear.name}.bias" if index == 0 else f"{linear.name}.bias_{index}"
        return buffer_node(gm, path, value, replaces=bias if only_here else None)
