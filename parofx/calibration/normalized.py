"""Which linears' outputs are normalized before anything is added to them.

Where that is so, a token's error counts relative to its output: the norm takes the output's size away. Where the output
joins a residual stream first, it does not: there a small output of a token is a small part of what is normalized.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.graph import operator_name
from parofx.passes.transforms import Transform

_NORMALIZED = "parofx_normalized"
#: Operators whose output is normalized.
_NORMS = frozenset({"rms_norm", "layer_norm", "native_layer_norm", "group_norm"})
#: What measures the size of a row: it is normalized where it is divided by that.
_SIZES = frozenset({"norm", "linalg_vector_norm", "var", "std", "var_mean", "std_mean"})
#: What takes the squares together where a size is written out; an activation function may square as well.
_MEANS = frozenset({"mean", "sum"})
_QUOTIENTS = frozenset({"mul", "multiply", "div", "divide", "true_divide"})
_SUMS = frozenset(
    {"add", "sub", "rsub", "subtract", "addcmul", "addcdiv", "addmm", "baddbmm", "lerp", "index_add", "scatter_add"}
)


def mark_normalized(gm: GraphModule, transforms: Iterable[Transform]) -> None:
    """Note at each linear's calls whether all that is computed from its output is normalized before it joins a sum."""
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    order, activations = list(places), _activations(gm)
    for transform in transforms:
        for linear in transform.linears:
            for call in linear.calls:
                call.meta[_NORMALIZED] = _is_normalized(call, order, places, activations)


def counts_relative(transform: Transform) -> bool:
    """Return what `mark_normalized` noted for a transform: whether it holds for all its siblings."""
    return all(call.meta.get(_NORMALIZED, False) for linear in transform.linears for call in linear.calls)


def _is_normalized(call: Node, order: list[Node], places: dict[Node, int], activations: Set[Node]) -> bool:
    """Walk forward in the graph's order, so that of a sum's terms those that stem from the call are known.

    Followed are values that grow with the call's output, and sizes of such; a value over its size is neither.
    """
    values, sizes, normalized = {call}, set[Node](), False
    last = max((places[user] for user in call.users), default=-1)
    for place in range(places[call] + 1, len(order)):
        if place > last:
            break
        node = order[place]
        name = operator_name(node).removesuffix("_")
        # What "expand_as" and its like have of their second argument is the shape.
        inputs = node.all_input_nodes[: 1 if name.endswith("_as") else None]
        from_value, from_size = (not known.isdisjoint(inputs) for known in (values, sizes))
        if node.op == "output" or not (from_value or from_size):
            continue
        if name in _SUMS and any(one in activations and one not in values | sizes for one in inputs):
            return False
        if from_value and (name in _NORMS or (from_size and name in _QUOTIENTS)):
            normalized = True
            continue
        (sizes if not from_value or name in _SIZES or _is_squared(node, name) else values).add(node)
        last = max((last, *(places[user] for user in node.users)))
    return normalized


def _is_squared(node: Node, name: str) -> bool:
    """Return whether a node holds the squares of a row's channels, which are then taken together."""
    arguments = node.args
    squares = (
        name == "square"
        or (name == "pow" and arguments[1:2] == (2,))
        or (name in ("mul", "multiply") and arguments[0] is arguments[1])
    )
    return squares and any(_takes_channels_together(user) for user in node.users)


def _takes_channels_together(node: Node) -> bool:
    """Return whether a node is a sum or mean over the last dimension, and not over tokens alone."""
    if operator_name(node) not in _MEANS:
        return False
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    value = node.all_input_nodes[0].meta.get("val")
    last = {-1, value.dim() - 1} if isinstance(value, Tensor) else {-1}
    return not last.isdisjoint(given if isinstance(given, (list, tuple)) else [given])


def _activations(gm: GraphModule) -> set[Node]:
    """Return the nodes whose values stem from tokens: not parameters, nor what masks and positions alone give."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder" or any(one in found or _is_parameter(one) for one in node.all_input_nodes):
            found.add(node)
    return found


def _is_parameter(node: Node) -> bool:
    """Return whether a node is a tensor of the model's, not a number that code wrote as a tensor."""
    value = node.meta.get("val")
    return node.op == "get_attr" and isinstance(value, Tensor) and value.dim() > 0
