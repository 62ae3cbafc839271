"""The native CPU kernels as a provider of the lowering."""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from parofx import cpu_ops
from parofx.cpu_ops.layout import GROUP_SIZES, pack_rotation, place_together
from parofx.cpu_ops.layouts import PACK
from parofx.cpu_ops.packed_linear import ACTIVATION_MODES, DTYPES
from parofx.ops import stated
from parofx.passes.layouts import packed_rotation, packed_weight

if TYPE_CHECKING:
    # The package of the providers imports this module.
    from parofx.providers.base import SiblingCall


class CpuProvider:
    """Serves every dtype, shape and number of rows on CPU, where a compiler is at hand."""

    name = "cpu"

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why the native kernels do not serve a call, or None."""
        if call.device.type != "cpu":
            return f"device {call.device.type} is not cpu"
        if call.dtype not in DTYPES:
            return f"{call.dtype} is not one of {DTYPES}"
        if call.group_size not in GROUP_SIZES:
            return f"group_size {call.group_size} is not one of {GROUP_SIZES}"
        if not call.is_bound():
            return "the packed tensors are not known when the graph is lowered"
        if not cpu_ops.is_available():
            return f"the kernels are not available: {cpu_ops.why_unavailable()}"
        return None

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert one operator call: on the modules' own tensors where they are packed, else on constants."""
        graph = call.gm.graph
        rotations = [self._rotation(call, *nodes) for nodes in call.rotations]
        weights = [self._weight(call, nodes) for nodes in call.weights]
        mode = ACTIVATION_MODES[call.activations]
        down, up = call.corrections or (None, None)
        if len(weights) == 1:
            correction = () if down is None or up is None else (down[0], up[0])
            # An operator without lists, which take longer to pass than the rest of a call.
            sizes = (call.bits, call.group_size, mode)
            one: tuple[Any, ...] = (call.x, rotations[0], *weights[0], call.biases[0], *sizes, *correction)
            output = graph.call_function(torch.ops.parofx_cpu.rotate_linear.default, one)
            output.meta = dict(call.node.meta)
            return [output]
        if all(packed_weight(nodes) is not None for nodes in call.weights):
            call.place_together(weights, place_together)
        packed: list[Any] = [[weight[index] for weight in weights] for index in range(3)]
        args = (call.x, rotations, *packed, list(call.biases), call.group_size, mode, *stated(call.bits, down, up))
        merged = graph.call_function(torch.ops.parofx_cpu.rotate_int4_linear.default, args)
        merged.meta = dict(call.node.meta)
        return [graph.call_function(operator.getitem, (merged, index)) for index in range(len(weights))]

    def _rotation(self, call: SiblingCall, pairs: Node, theta: Node, channel_scales: Node) -> Node:
        held = packed_rotation(pairs, theta, channel_scales)
        if held is not None:
            return held
        tensors = call.tensor(pairs), call.tensor(theta), call.tensor(channel_scales)
        make = partial(_pack_rotation, *tensors, call.group_size)
        return call.constants("cpu_rotation", (theta, pairs, channel_scales), make)[0]

    def _weight(self, call: SiblingCall, nodes: tuple[Node, Node, Node]) -> tuple[Node, ...]:
        held = packed_weight(nodes)
        if held is not None:
            return held
        qweight, qzeros, scales = map(call.tensor, nodes)
        return call.constants("cpu_weight", nodes, partial(PACK[call.bits], qweight, qzeros, scales, call.group_size))


def _pack_rotation(pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> tuple[Tensor]:
    return (pack_rotation(pairs, theta, channel_scales, group_size),)
