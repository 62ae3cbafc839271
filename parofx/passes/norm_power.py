"""What a graph says of the mean squares of a transform's input, without data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from parofx.passes.graph import binding, operator_name

_CASTS = frozenset({"to", "_to_copy", "type_as", "float"})
#: What may stand between a norm and the linears that read it.
_KEEPS_CHANNELS = _CASTS | {"dropout", "view", "reshape", "contiguous", "clone", "alias"}
_PRODUCTS = ("mul", "multiply")


def norm_power(rotated_input: Node) -> Tensor | None:
    """Return `E[x²] (K,)` of a transform's input as far as the graph tells without data, or None.

    Where the input is a normalized tensor times a gain made of parameters alone (RMSNorm, LayerNorm), its channels
    have unit mean square before the gain, so `E[x²] = gain² (+ shift²)`. A gain on anything else says nothing.
    """
    source = rotated_input.args[0]
    assert isinstance(source, Node)
    value = source.meta.get("val")
    channels = value.shape[-1] if isinstance(value, Tensor) else None
    node = _behind(source, _KEEPS_CHANNELS)
    shift = None
    if operator_name(node) in ("layer_norm", "rms_norm"):
        gain = _constant(_argument(node, 2, "weight"))
        shift = _constant(_argument(node, 3, "bias")) if operator_name(node) == "layer_norm" else None
    elif operator_name(node) in _PRODUCTS:
        gain = _gain_of_norm(node)
    else:
        return None
    if gain is None or gain.numel() != channels:
        return None
    return gain.square() if shift is None else gain.square() + shift.square()


def _gain_of_norm(product: Node) -> Tensor | None:
    """Return the gain if a product is `normalized · gain`, in either order."""
    for gain, normalized in (product.args[:2], product.args[1::-1]):
        if isinstance(normalized, Node) and _is_normalized(_behind(normalized, _KEEPS_CHANNELS)):
            found = _constant(gain)
            if found is not None:
                return found
    return None


def _is_normalized(node: Node) -> bool:
    """Say whether a node is `x · rsqrt(…)` or `x / sqrt(…)`, or a norm without gain."""
    operands = [_behind(operand, _CASTS) for operand in node.args[:2] if isinstance(operand, Node)]
    if operator_name(node) in _PRODUCTS:
        return any(
            operator_name(one) == "rsqrt" or (operator_name(one) == "pow" and one.args[1] == -0.5) for one in operands
        )
    if operator_name(node) in ("div", "truediv", "true_divide"):
        return operator_name(operands[-1]) == "sqrt"
    return operator_name(node) in ("layer_norm", "rms_norm") and _argument(node, 2, "weight") is None


def _behind(node: Node, passing: frozenset[str]) -> Node:
    """Follow the first operand while a node is one of those that let its values pass."""
    while operator_name(node) in passing and node.op != "placeholder" and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _constant(value: object) -> Tensor | None:
    """Evaluate a node that depends on parameters alone, `(K,)` in fp32, or return None."""
    if not isinstance(value, Node):
        return None
    bound = binding(value)
    if bound is not None:
        return bound.tensor.detach().float().flatten()
    if value.op == "placeholder" or not value.all_input_nodes:
        return None
    name = operator_name(value)
    if name in _CASTS:
        return _constant(value.args[0])
    if name not in ("add", *_PRODUCTS) or value.kwargs:
        return None
    first, second = (one if isinstance(one, int | float) else _constant(one) for one in value.args)
    if first is None or second is None:
        return None
    return torch.as_tensor(first + second if name == "add" else first * second)


def _argument(node: Node, index: int, key: str) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(key)
