"""`fuse_producers`: what computes the input of int4 linears also rotates it, in the same kernel.

    rotate_int4_siblings(rms_norm(x + residual), rotations, linears)
        →   int4_siblings(rotated, linears)    with    *rotated, total = rmsnorm_rotate(x, residual, …, rotations)
    rotate_int4_siblings(silu(gate) · up, rotations, linears)
        →   int4_siblings(rotated, linears)    with    *rotated,       = silu_mul_rotate(gate, up, rotations)

Whoever else reads the sum `x + residual` reads `total`. The producer is found by what it computes (`passes.producers`).
Whether to fuse is the provider's decision: for a few rows a rotation inside the product may cost less.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import providers
from parofx.config import Activations
from parofx.passes.base import PassReport, Stage, register
from parofx.passes.graph import (
    INT4_SIBLINGS,
    RMSNORM_ROTATE,
    ROTATE_INT4_SIBLINGS,
    SILU_MUL_ROTATE,
    binding,
    bits_of,
    correction_of,
    erase_unused,
    inherit_meta,
    nodes_calling,
)
from parofx.passes.lower import choose_provider, sibling_call
from parofx.passes.mutation import memory_of, written_memory
from parofx.passes.producers import RmsNorm, SiluMul, find_producer, is_fusible, steps

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


@register
@dataclass(frozen=True)
class FuseProducers:
    """Let RMSNorm and SiLU·mul rotate their result.

    `device`, `provider` and `activations` are those of `lower`. With `always`, fuse wherever the graph allows it,
    whatever the provider says.
    """

    device: torch.device | str | None = None
    provider: str | None = None
    activations: Activations = "float"
    always: bool = False

    name: ClassVar[str] = "fuse_producers"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.CONVERTED,)
    produces: ClassVar[Stage] = Stage.CONVERTED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        written = written_memory(gm)
        for node in nodes_calling(gm.graph, ROTATE_INT4_SIBLINGS):
            source = node.args[0]
            assert isinstance(source, Node)
            producer = find_producer(source)
            reason = why_not(node, producer, written)
            if producer is not None and reason is None and not self.always:
                reason = self._declined(gm, node, producer)
            if producer is None or reason is not None:
                report.skipped.append((node.name, str(reason)))
                continue
            what = "SiLU·mul" if isinstance(producer, SiluMul) else "RMSNorm"
            if isinstance(producer, RmsNorm) and producer.residual is not None:
                what += " and the residual sum before it"
            report.matched.append((node.name, f"{what} of {source.name} rotate what {node.name} reads"))
            rewrite(gm, node, producer)
            report.changed += 1
        if report.changed:
            erase_unused(gm.graph)
        return report

    def _declined(self, gm: GraphModule, node: Node, producer: RmsNorm | SiluMul) -> str | None:
        call = sibling_call(gm, node, self.device, self.activations)
        provider, _ = choose_provider(call, self.provider)
        if not isinstance(provider, providers.FusingProvider):
            return f"provider {provider.name} has no producers that rotate"
        return provider.why_not_fuse(call, launches=sum(map(is_fusible, producer.activations)))


def why_not(node: Node, producer: RmsNorm | SiluMul | None, written: set[int]) -> str | None:
    """Return why a call cannot read its producer's rotated result, or None.

    Args:
        node: the call, `rotate_int4_siblings`.
        producer: what computes its input.
        written: the memory that the graph writes in place.
    """
    source = node.args[0]
    assert isinstance(source, Node)
    if bits_of(node) != 4:
        return f"its weights have {bits_of(node)} bits; behind a fused producer are only linears of 4"
    if correction_of(node) is not None:
        return "its weights have low-rank corrections; behind a fused producer are only linears without"
    if producer is None:
        return f"its input {source.name} is neither RMSNorm nor SiLU·mul"
    if {user for user in source.users if user.target is not _ASSERT} != {node}:
        return f"its input {source.name} is read by others too"
    computed = steps(source, producer.inputs)
    result = _value(source)
    values = [step.meta["val"] for step in computed if isinstance(step.meta.get("val"), Tensor)]
    if isinstance(producer, RmsNorm) and producer.weight is not None:
        weight = binding(producer.weight)
        assert weight is not None
        if weight.tensor.shape != (result.shape[-1],):
            return f"{weight.fqn} has not one value per channel"
    for first in producer.activations:
        if _value(first).dtype != result.dtype:
            return f"{source.name} is computed from {_value(first).dtype} and read as {result.dtype}"
    if any(v.is_floating_point() and torch.promote_types(v.dtype, result.dtype) != v.dtype for v in values):
        return f"{source.name} is computed in fewer bits than it is read in"
    if any(memory_of(step) in written for step in (*computed, *producer.inputs) if binding(step) is None):
        return f"what {source.name} is computed from is written in place"
    return None


def rewrite(gm: GraphModule, node: Node, producer: RmsNorm | SiluMul) -> None:
    """Let `producer` rotate, and the call `node` read rotated inputs."""
    source, pairs, theta, channel_scales, qweight, qzeros, scales, bias, has_bias, group_size, *_ = node.args
    assert isinstance(source, Node)
    assert isinstance(pairs, Sequence)
    # What the exporter asserts of values that are no longer computed would keep them alive.
    for step in steps(source, producer.inputs):
        for user in [user for user in step.users if user.target is _ASSERT]:
            gm.graph.erase_node(user)
    # Where the sum is, which others read, everything that the fused operator reads is there too, but for constants.
    place = producer.total if isinstance(producer, RmsNorm) and producer.total is not None else source
    _constants_before(place, [*_nodes(pairs), *_nodes(theta), *_nodes(channel_scales), *producer.inputs])
    rotations = (pairs, theta, channel_scales, group_size)
    with gm.graph.inserting_before(place):
        if isinstance(producer, SiluMul):
            fused = gm.graph.call_function(SILU_MUL_ROTATE, (producer.gate, producer.up, *rotations))
        else:
            head = (producer.x, producer.residual, producer.weight, producer.weight_offset, producer.eps)
            fused = gm.graph.call_function(RMSNORM_ROTATE, (*head, *rotations))
        rotated = [gm.graph.call_function(operator.getitem, (fused, index)) for index in range(len(pairs))]
        outputs = list(rotated)
        for one in rotated:
            inherit_meta(one, source).meta["val"] = source.meta.get("val")
        if isinstance(producer, RmsNorm) and producer.total is not None:
            total = gm.graph.call_function(operator.getitem, (fused, len(pairs)))
            total.meta = dict(producer.total.meta)
            producer.total.replace_all_uses_with(total)
            outputs.append(total)
    inherit_meta(fused, source).meta["val"] = [one.meta.get("val") for one in outputs]
    with gm.graph.inserting_before(node):
        linears = gm.graph.call_function(INT4_SIBLINGS, (rotated, qweight, qzeros, scales, bias, has_bias, group_size))
    linears.meta = dict(node.meta)
    node.replace_all_uses_with(linears)
    gm.graph.erase_node(node)


def _constants_before(place: Node, nodes: Sequence[Node]) -> None:
    """Move what comes behind `place` in front of it, with all it is computed from: only constants do."""
    order = {node: index for index, node in enumerate(place.graph.nodes)}
    moved: set[Node] = set()

    def move(node: Node) -> None:
        if order[node] > order[place] and node not in moved:
            for source in node.all_input_nodes:
                move(source)
            place.prepend(node)
            moved.add(node)

    for node in nodes:
        move(node)


def _nodes(argument: object) -> list[Node]:
    assert isinstance(argument, Sequence)
    return [node for node in argument if isinstance(node, Node)]


def _value(node: Node) -> Tensor:
    bound = binding(node)
    value = node.meta.get("val") if bound is None else bound.tensor
    assert isinstance(value, Tensor), f"{node.name} has no example value"
    return value
