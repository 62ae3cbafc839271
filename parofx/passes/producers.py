"""Producers of a linear's input that can rotate it themselves: RMSNorm, with a residual sum before it, and SiLU·mul.

They are found by what they compute, as ATen or torch-level calls, with operands in any order and casts anywhere:

    n = h · rsqrt(mean(h², −1) + eps) [· (weight [+ offset])]        h = x [+ residual]
    n = silu(gate) · up
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parofx.passes.graph import binding, operator_name

_CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"})
_PRODUCTS = frozenset({"mul", "multiply"})
_QUOTIENTS = frozenset({"div", "truediv", "divide", "true_divide"})


@dataclass(frozen=True)
class RmsNorm:
    """`x + residual`, normed over the last dimension and scaled by `weight + weight_offset`.

    `total` is the node of the sum, where there is a residual.
    """

    x: Node
    residual: Node | None
    total: Node | None
    weight: Node | None
    weight_offset: float
    eps: float

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes it is computed from."""
        return tuple(node for node in (self.x, self.residual, self.weight) if node is not None)


@dataclass(frozen=True)
class SiluMul:
    """`silu(gate) ⊙ up`."""

    gate: Node
    up: Node

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes it is computed from."""
        return self.gate, self.up


def find_producer(node: Node) -> RmsNorm | SiluMul | None:
    """Return what a node computes, if it is one of the producers; None otherwise."""
    top = _without_casts(node)
    return _rms_norm(top) or _silu_mul(top)


def steps(node: Node, inputs: Iterable[Node]) -> set[Node]:
    """Return the nodes that compute `node` from `inputs`, itself included."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        step = pending.pop()
        if step not in found and step not in inputs:
            found.add(step)
            pending += step.all_input_nodes
    return found


def _rms_norm(top: Node) -> RmsNorm | None:
    whole = _normed_by_operator(top)
    if whole is not None:
        return _with_residual(*whole)
    for normed, scale in _factors(top):
        found, weight = _normed(_without_casts(normed)), _weight(scale)
        if found is not None and weight is not None:
            return _with_residual(found[0], *weight, found[1])
    found = _normed(top)
    return None if found is None else _with_residual(found[0], None, 0.0, found[1])


def _with_residual(source: Node, weight: Node | None, weight_offset: float, eps: float) -> RmsNorm:
    operands = _summands(source)
    if operands is None:
        return RmsNorm(source, None, None, weight, weight_offset, eps)
    return RmsNorm(*operands, source, weight, weight_offset, eps)


def _summands(node: Node) -> tuple[Node, Node] | None:
    """Return the two activations that a node adds, if both have the sum's shape and dtype."""
    operands = _operands(node) if operator_name(node) == "add" else None
    if operands is None:
        return None
    kinds = {_kind(one) for one in (node, *operands)}
    return operands if len(kinds) == 1 and None not in kinds else None


def _normed_by_operator(node: Node) -> tuple[Node, Node | None, float, float] | None:
    """Return input, weight, its offset and eps of a call of `rms_norm` over the last dimension."""
    if operator_name(node) != "rms_norm":
        return None
    source, shape, weight, eps = (
        _argument(node, position, name) for position, name in enumerate(("input", "normalized_shape", "weight", "eps"))
    )
    value = _value(source)
    if value is None or len(shape) != 1 or not (weight is None or _is_channel_parameter(weight)):
        return None
    return source, weight, 0.0, torch.finfo(value.dtype).eps if eps is None else float(eps)


def _normed(node: Node) -> tuple[Node, float] | None:
    """Return `(h, eps)` if a node is `h · (mean(h²) + eps)^(−1/2)` or `h / sqrt(mean(h²) + eps)`."""
    candidates = [(h, _under_inverse_root(root)) for h, root in _factors(node)]
    quotient = _operands(node) if operator_name(node) in _QUOTIENTS else None
    if quotient is not None:
        candidates.append((quotient[0], _under_root(quotient[1])))
    for h, inner in candidates:
        found = None if inner is None else _mean_square(inner)
        if found is not None and found[0] is _without_casts(h):
            return found
    return None


def _under_inverse_root(node: Node) -> Node | None:
    """Return `v` if a node is `v^(−1/2)`."""
    node = _without_casts(node)
    name, source = operator_name(node), _argument(node, 0, "input")
    if not isinstance(source, Node):
        return None
    if name == "reciprocal":
        return _under_root(source)
    return source if name == "rsqrt" or (name == "pow" and _argument(node, 1, "exponent") == -0.5) else None


def _under_root(node: Node) -> Node | None:
    source = _argument(node, 0, "input")
    return source if operator_name(node) == "sqrt" and isinstance(source, Node) else None


def _mean_square(node: Node) -> tuple[Node, float] | None:
    """Return `(h, eps)` if a node is `mean(h², −1, keepdim=True) + eps`."""
    found = _plus_number(node)
    if found is None:
        return None
    mean, eps = found
    squared = _argument(mean, 0, "input")
    if operator_name(mean) != "mean" or _argument(mean, 2, "keepdim") is not True or not isinstance(squared, Node):
        return None
    if not _is_last(_argument(mean, 1, "dim"), squared):
        return None
    source = _squared(squared)
    return None if source is None else (_without_casts(source), eps)


def _squared(node: Node) -> Node | None:
    """Return `v` if a node is `v²`."""
    name, source = operator_name(node), _argument(node, 0, "input")
    product = _operands(node) if name in _PRODUCTS else None
    if product is not None and product[0] is product[1]:
        return product[0]
    if not isinstance(source, Node):
        return None
    return source if name == "square" or (name == "pow" and _argument(node, 1, "exponent") == 2) else None


def _weight(node: Node) -> tuple[Node, float] | None:
    """Return `(parameter, offset)` if a node is a parameter with one value per channel, plus a number."""
    node = _without_casts(node)
    found = (node, 0.0) if _is_channel_parameter(node) else _plus_number(node)
    if found is None:
        return None
    parameter = _without_casts(found[0])
    return (parameter, found[1]) if _is_channel_parameter(parameter) else None


def _silu_mul(top: Node) -> SiluMul | None:
    for activated, up in _factors(top):
        gate = _under_silu(_without_casts(activated))
        if gate is not None:
            return SiluMul(_without_casts(gate), _without_casts(up))
    return None


def _under_silu(node: Node) -> Node | None:
    """Return `g` if a node is `silu(g)` or `g · sigmoid(g)`."""
    source = _argument(node, 0, "input")
    if operator_name(node) == "silu":
        return source if isinstance(source, Node) else None
    for gate, gated in _factors(node):
        if operator_name(gated) == "sigmoid" and _argument(gated, 0, "input") is gate:
            return gate
    return None


def _factors(node: Node) -> list[tuple[Node, Node]]:
    """Return the two operands of a product of nodes in both orders; nothing for anything else."""
    operands = _operands(node) if operator_name(node) in _PRODUCTS else None
    return [] if operands is None else [operands, operands[::-1]]


def _operands(node: Node) -> tuple[Node, Node] | None:
    """Return the operands of a plain call of two nodes."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(one, Node) for one in node.args):
        return None
    return node.args[0], node.args[1]  # type: ignore[return-value]


def _plus_number(node: Node) -> tuple[Node, float] | None:
    """Return `(value, number)` if a node adds a number to a value."""
    if operator_name(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    for value, number in (node.args, node.args[::-1]):
        if isinstance(value, Node) and isinstance(number, int | float):
            return value, float(number)
    return None


def _without_casts(node: Node) -> Node:
    """Return what a chain of casts between floating dtypes casts."""
    while operator_name(node) in _CASTS:
        source = _argument(node, 0, "input")
        after, before = _value(node), _value(source)
        if after is None or before is None or not (after.is_floating_point() and before.is_floating_point()):
            break
        if after.shape != before.shape or after.device != before.device:
            break
        node = source
    return node


def _is_channel_parameter(node: object) -> bool:
    bound = binding(node)
    return bound is not None and bound.tensor.dim() == 1 and bound.tensor.is_floating_point()


def _is_last(dim: object, node: Node) -> bool:
    value = _value(node)
    dims = list(dim) if isinstance(dim, list | tuple) else [dim]
    return value is not None and dims in ([-1], [value.dim() - 1])


def _kind(node: Node) -> tuple[str, torch.dtype] | None:
    """Return shape, symbols as they print, and dtype."""
    value = _value(node)
    return None if value is None else (str(tuple(value.shape)), value.dtype)


def _value(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
