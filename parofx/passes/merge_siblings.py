"""`merge_siblings`: linears that read one tensor become one operator call, which reads it once.

    int4_linear(rotate(x, …), W₁, b₁), int4_linear(rotate(x, …), W₂, b₂)
        →   rotate_int4_siblings(x, rotations, [W₁, W₂], [b₁, b₂])

Siblings are linears of one block whose codes have one width, all with a low-rank correction or none. Where they read
the same `rotate` node, that is, share a rotation, the call holds one rotation; where each has its own, one for each.
Where only some share, these have a call of their own, so that no rotation is computed twice. A linear without siblings
becomes a call with lists of one, so that lowering knows a single form.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from parofx.ops import stated
from parofx.passes.base import PassReport, Stage, register
from parofx.passes.blocks import block_of, find_blocks
from parofx.passes.graph import (
    INT4_LINEAR,
    ROTATE,
    ROTATE_INT4_SIBLINGS,
    bits_of,
    correction_of,
    erase_unused,
    inherit_meta,
    nodes_calling,
)
from parofx.passes.layouts import is_conversion


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
        order: dict[Node, float] = {node: index for index, node in enumerate(gm.graph.nodes)}
        blocks = find_blocks(gm)
        sets: dict[Any, list[Node]] = {}
        for node in nodes_calling(gm.graph, INT4_LINEAR):
            reason = why_not(node)
            if reason is not None:
                report.skipped.append((node.name, reason))
                continue
            corrected = correction_of(node) is not None
            key = (_rotation(node).args[0], node.args[5], bits_of(node), corrected, block_of(node, blocks))
            sets.setdefault(key, []).append(node)
        for members in sets.values():
            calls = [one for part in _available_together(members, order) for one in _by_rotation(part)]
            for together in calls:
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


def _available_together(members: list[Node], order: dict[Node, float]) -> list[list[Node]]:
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


def _by_rotation(members: list[Node]) -> list[list[Node]]:
    """Split a set where only some members share a rotation: a call holds one rotation, or one for each linear."""
    sharing: dict[Node, list[Node]] = {}
    for member in members:
        sharing.setdefault(_rotation(member), []).append(member)
    if len(sharing) in (1, len(members)):
        return [members]
    alone = [group[0] for group in sharing.values() if len(group) == 1]
    return [*(group for group in sharing.values() if len(group) > 1), *([alone] if alone else [])]


def _tensors(node: Node) -> list[Node]:
    rotation = _rotation(node)
    sources = (*rotation.args[1:4], *node.args[1:5], *(correction_of(node) or ()))
    return [source for source in sources if isinstance(source, Node)]


def _is_constant(node: Node) -> bool:
    """Say whether a node can be moved to the front: it depends on parameters only."""
    return node.op == "get_attr" or (is_conversion(node) and all(map(_is_constant_input, node.all_input_nodes)))


def _is_constant_input(node: Node) -> bool:
    return node.op == "placeholder" or _is_constant(node)


def _move_before(node: Node, first: Node, order: dict[Node, float]) -> None:
    """Move a constant, and what it is converted from, in front of a node that comes earlier."""
    if node.op == "placeholder" or order[node] < order[first]:
        return
    for source in node.all_input_nodes:
        _move_before(source, first, order)
    first.prepend(node)
    order[node] = order[first] - 0.5


def _merge(gm: GraphModule, members: list[Node], order: dict[Node, float]) -> None:
    first = members[0]
    rotations = list(dict.fromkeys(_rotation(member) for member in members))
    for source in [one for member in members for one in _tensors(member)]:
        _move_before(source, first, order)
    x, group_size = rotations[0].args[0], first.args[5]
    biases = [member.args[4] for member in members]
    # All of them have one, or none.
    corrections = [correction_of(member) or (None, None) for member in members]
    down, up = (None if None in halves else list(halves) for halves in zip(*corrections, strict=True))
    args = (
        x,
        *([rotation.args[index] for rotation in rotations] for index in (1, 2, 3)),
        *([member.args[index] for member in members] for index in (1, 2, 3)),
        [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        group_size,
        *stated(bits_of(first), down, up),
    )
    with gm.graph.inserting_before(first):
        merged = gm.graph.call_function(ROTATE_INT4_SIBLINGS, args)
        inherit_meta(merged, first).meta["val"] = [member.meta.get("val") for member in members]
        outputs = [gm.graph.call_function(operator.getitem, (merged, index)) for index in range(len(members))]
    for member, output in zip(members, outputs, strict=True):
        output.meta = dict(member.meta)
        member.replace_all_uses_with(output)
        gm.graph.erase_node(member)
