"""Whether a linear of the graph is a whole module, so that another module can take its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from parofx.passes.graph import EMBEDDING, TRANSPOSE, Binding, binding, module_calls, module_stack, operator_name

#: What a module that is nothing but a linear may do to its activation, if the shape is the same in the end.
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "alias"})


def is_module(weight: Binding, name: str, calls: Sequence[Node], *, tied: bool = False) -> bool:
    """Say whether the calls that read a weight are all that reads it, each the whole of the module `name`.

    With `tied` the weight belongs to an embedding, whose look-ups may read it too: they go on with the float table.
    """
    readers = _readers(weight.tensor, calls[0].graph)
    if tied:
        readers = {node for node in readers if node.target not in EMBEDDING}
    elif weight.fqn != f"{name}.weight":
        return False
    return readers == set(calls) and all(_is_whole(call, name) for call in calls)


def _readers(tensor: Tensor, graph: Graph) -> set[Node]:
    """Return every node that reads a parameter, looked at through transposition."""
    readers: set[Node] = set()
    for node in graph.nodes:
        bound = binding(node) if node.op in ("get_attr", "placeholder") else None
        if bound is not None and bound.tensor is tensor:
            for user in node.users:
                readers |= set(user.users) if user.target is TRANSPOSE else {user}
    return readers


def _is_whole(call: Node, name: str) -> bool:
    """Say whether the call's innermost module is the one of that name and does nothing else.

    Nothing else is: only views stand beside the linear, and the module maps `(…, K)` to `(…, N)`.
    """
    calls = module_calls(call)
    if not calls or module_stack(call)[-1][0] != name:
        return False
    inside = {
        node for node in call.graph.nodes if node.op == "call_function" and module_calls(node)[-1:] == calls[-1:]
    } | {call}
    sources = {source for node in inside for source in node.all_input_nodes} - inside
    entering = [_shape(source) for source in sources if binding(source) is None and _shape(source) is not None]
    leaving = [_shape(node) for node in inside if not inside.issuperset(node.users)]
    leaving = [shape for shape in leaving if shape is not None]
    return (
        all(node is call or _is_view(node) for node in inside)
        and len(entering) == len(leaving) == 1
        and entering[0][:-1] == leaving[0][:-1]  # type: ignore[index]
    )


def _is_view(node: Node) -> bool:
    """Say whether a node is a view of an activation, the transposed weight, or arithmetic on sizes."""
    if node.target is TRANSPOSE:
        return binding(node.args[0]) is not None
    return operator_name(node) in _VIEWS or _shape(node) is None


def _shape(node: Node) -> list[str] | None:
    """Return the sizes of a tensor as text, symbols as they print; None for anything else."""
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else None
