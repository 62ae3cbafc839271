"""The reference provider: dequantizes on every call. Right everywhere, fast nowhere."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from parofx import ops
from parofx.providers.base import SiblingCall
from parofx.providers.fusing import FusedCall, unfuse


@torch.library.custom_op("parofx::reference_int4_siblings", mutates_args=(), schema=ops.SIBLINGS_SCHEMA)
def reference_int4_siblings(
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
    """Compute what `rotate_int4_siblings` means, in a lowered graph."""
    return ops.rotate_int4_siblings(  # type: ignore[no-any-return]
        x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, has_bias, group_size, bits, down, up
    )


@reference_int4_siblings.register_fake
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
    return [x.new_empty((*x.shape[:-1], scale.shape[1])) for scale in scales]


reference_int4_siblings.register_autograd(ops.differentiate_siblings, setup_context=ops.save_siblings)


class ReferenceProvider:
    """Serves every device, dtype and shape, with the activations as they are."""

    name = "reference"

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why the reference does not serve a call, or None."""
        return None if call.activations == "float" else f"it does not quantize activations to {call.activations}"

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert the reference operator on the checkpoint's tensors."""
        graph = call.gm.graph
        merged = graph.call_function(torch.ops.parofx.reference_int4_siblings.default, call.node.args)
        merged.meta = dict(call.node.meta)
        return [graph.call_function(operator.getitem, (merged, index)) for index in range(len(call.weights))]

    def why_not_fuse(self, call: SiblingCall, launches: int) -> str | None:
        """Return that nothing is gained: the reference fuses nothing."""
        return "the reference has nothing to gain"

    def emit_fused(self, fused: FusedCall) -> tuple[list[Node], Node | None]:
        """Insert the producer as ATen operators and the reference operator behind it."""
        x, total = unfuse(fused)
        call, graph = fused.call, fused.call.gm.graph
        rotations = [list(nodes) for nodes in zip(*call.rotations, strict=True)]
        with graph.inserting_before(call.node):
            args = (x, *rotations, *call.node.args[1:])
            merged = graph.call_function(torch.ops.parofx.reference_int4_siblings.default, args)
            merged.meta = dict(call.node.meta)
            outputs = [graph.call_function(operator.getitem, (merged, index)) for index in range(len(call.weights))]
        return outputs, total
