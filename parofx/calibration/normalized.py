"""Which linears' outputs are normalized before anything is added to them.

Where that is so, a token's error counts relative to its output: the norm takes the output's size away. Where the output
joins a residual stream first, it does not: there a small output of a token is a small part of what is normalized.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.graph import operator_name
from parofx.passes.transforms import Transform

_NORMALIZED = "parofx_normalized"
#: Norms that are one operator.
_NORMS = frozenset({"rms_norm", "layer_norm", "native_layer_norm", "group_norm", "norm", "linalg_vector_norm"})
#: What takes the squares together in a norm that is written out; an activation function may square as well.
_MEANS = frozenset({"mean", "sum"})
_SUMS = frozenset({"add", "sub"})


def mark_normalized(gm: GraphModule, transforms: Iterable[Transform]) -> None:
    """Note at each linear's calls whether all that is computed from its output is normalized before it joins a sum."""
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    order = list(places)
    for transform in transforms:
        for linear in transform.linears:
            for call in linear.calls:
                call.meta[_NORMALIZED] = _is_normalized(call, order, places)


def counts_relative(transform: Transform) -> bool:
    """Return what `mark_normalized` noted for a transform: whether it holds for all its siblings."""
    return all(call.meta.get(_NORMALIZED, False) for linear in transform.linears for call in linear.calls)


def _is_normalized(call: Node, order: list[Node], places: dict[Node, int]) -> bool:
    """Walk forward in the graph's order, so that of a sum's terms those that stem from the call are known."""
    carried, last = {call}, max((places[user] for user in call.users), default=-1)
    normalized = False
    for place in range(places[call] + 1, len(order)):
        if place > last:
            return normalized
        node = order[place]
        if not carried.intersection(node.all_input_nodes):
            continue
        if _is_norm(node):
            normalized = True  # what else is computed from the value that is normalized: its division by the norm
            continue
        if node.op == "output" or _joins(node, carried):
            return normalized
        carried.add(node)
        last = max((last, *(places[user] for user in node.users)))
    return normalized


def _is_norm(node: Node) -> bool:
    """Return whether a node is a norm, or the squares that one begins with."""
    name, arguments = operator_name(node), node.args
    if name in _NORMS:
        return True
    squares = (
        name == "square"
        or (name == "pow" and arguments[1:2] == (2,))
        or (name in ("mul", "multiply") and arguments[0] is arguments[1])
    )
    return squares and any(operator_name(user) in _MEANS for user in node.users)


def _joins(node: Node, carried: set[Node]) -> bool:
    """Return whether a node adds another activation to what it carries."""
    return operator_name(node) in _SUMS and any(
        other not in carried and other.op != "get_attr" and isinstance(other.meta.get("val"), Tensor)
        for other in node.all_input_nodes
    )
