"""Values that are written in place: what a graph reads after a write becomes another node.

Passes take a node for a value: linears that read one node read one tensor. After `x.add_(y)` a graph may go on reading
`x`, which then holds something else, and no pass may share what was computed from `x` before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.graph import CAST, LINEAR, ROTATE, inherit_meta, writes

aten = torch.ops.aten
#: The readers that passes share or move.
_READERS = frozenset({CAST, LINEAR, ROTATE, aten.view.default, aten.reshape.default})


def written_inputs(node: Node) -> list[Node]:
    """Return the inputs that a node writes in place."""
    if not writes(node):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        written = [
            node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            for index, argument in enumerate(node.target._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    else:
        written = [node.kwargs.get("out") or (node.args[0] if node.args else node.kwargs.get("input"))]
    return [one for value in written for one in _nodes(value)]


def written_memory(gm: GraphModule) -> set[int]:
    """Return the memory (`memory_of`) that some node of a graph writes in place."""
    return {memory for node in gm.graph.nodes for value in written_inputs(node) if (memory := memory_of(value))}


def separate_written_values(gm: GraphModule) -> int:
    """Let readers behind an in-place write read another node than those before it; return how many do."""
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    changed = 0
    for writer in list(order):
        written = written_inputs(writer)
        memory = {memory_of(value) for value in written} - {None}
        if not memory:
            continue
        for value in [one for one in list(order) if order[one] < order[writer] and memory_of(one) in memory]:
            late = [user for user in value.users if order.get(user, -1) > order[writer] and user.target in _READERS]
            if late:
                with gm.graph.inserting_after(writer):
                    alias = gm.graph.call_function(aten.alias.default, (value,))
                inherit_meta(alias, writer).meta["val"] = value.meta.get("val")
                order[alias] = order[writer]
                for user in late:
                    user.replace_input_with(value, alias)
                changed += len(late)
    return changed


def memory_of(node: Node) -> int | None:
    """Identify the memory of an activation; parameters are not written while a graph runs."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _nodes(value: Any) -> list[Node]:
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, Node)]
