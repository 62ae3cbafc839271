"""`merge_siblings`: linears that read one tensor become one operator call, which reads it once.

    int4_linear(rotate(x, …), W₁, b₁), int4_linear(rotate(x, …), W₂, b₂)
        →   rotate_int4_siblings(x, rotations, [W₁, W₂], [b₁, b₂])

Where the linears read the same `rotate` node, that is, share a rotation, the call holds one rotation; otherwise one for
each. A linear without siblings becomes a call with lists of one, so that lowering knows a single form.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from parofx.passes.base import PassReport, Stage, register
from parofx.passes.graph import INT4_LINEAR, ROTATE, ROTATE_INT4_SIBLINGS, erase_unused, inherit_meta, nodes_calling


@register
@dataclass(frozen=True)
class MergeSiblings:
    """Merge the int4 linears that read one tensor."""

    name: ClassVar[str] = "merge_siblings"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.CONVERTED,)
    produces: ClassVar[Stage] = Stage.CONVERTED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        sets: dict[Any, list[Node]] = {}
        for node in nodes_calling(gm.graph, INT4_LINEAR):
            reason = why_not(node)
            if reason is not None:
                report.skipped.append((node.name, reason))
                continue
            sets.setdefault((_rotation(node).args[0], node.args[5]), []).append(node)
        for members in sets.values():
            for together in _available_together(members, order):
                rotations = len({_rotation(member) for member in together})
                names = ", ".join(member.name for member in together)
                report.matched.append((together[0].name, f"one call for {names} with {rotations} rotation(s)"))
                report.changed += len(together)
                _merge(gm, together, order)
        if report.changed:
            erase_unused(gm.graph)
        return report


def why_not(node: Node) -> str | None:
    """Return why an int4 linear cannot be part of a merged call, or None."""
    source = node.args[0]
    if not isinstance(source, Node) or source.target is not ROTATE:
        return "its input is not rotated"
    return None


def _rotation(node: Node) -> Node:
    assert isinstance(node.args[0], Node)
    return node.args[0]


def _available_together(members: list[Node], order: dict[Node, int]) -> list[list[Node]]:
    """Split a set where a member needs what is computed only after the set's first call (a computed bias)."""
    together: list[Node] = []
    apart: list[list[Node]] = []
    for member in members:
        late = any(order[source] > order[members[0]] and not _is_constant(source) for source in _tensors(member))
        if late:
            apart.append([member])
        else:
            together.append(member)
    return [together, *apart] if together else apart


def _tensors(node: Node) -> list[Node]:
    rotation = _rotation(node)
    return [source for source in (*rotation.args[1:4], *node.args[1:5]) if isinstance(source, Node)]


def _is_constant(node: Node) -> bool:
    return node.op == "get_attr"


def _merge(gm: GraphModule, members: list[Node], order: dict[Node, int]) -> None:
    first = members[0]
    rotations = list(dict.fromkeys(_rotation(member) for member in members))
    if len(rotations) > 1:
        rotations = [_rotation(member) for member in members]
    for source in [one for member in members for one in _tensors(member)]:
        if order[source] > order[first]:
            first.prepend(source)
    x, group_size = rotations[0].args[0], first.args[5]
    biases = [member.args[4] for member in members]
    args = (
        x,
        *([rotation.args[index] for rotation in rotations] for index in (1, 2, 3)),
        *([member.args[index] for member in members] for index in (1, 2, 3)),
        [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        group_size,
    )
    with gm.graph.inserting_before(first):
        merged = gm.graph.call_function(ROTATE_INT4_SIBLINGS, args)
        inherit_meta(merged, first).meta["val"] = [member.meta.get("val") for member in members]
        outputs = [gm.graph.call_function(operator.getitem, (merged, index)) for index in range(len(members))]
    for member, output in zip(members, outputs, strict=True):
        output.meta = dict(member.meta)
        member.replace_all_uses_with(output)
        gm.graph.erase_node(member)
