"""`normalize`: one form for linears and parameters, wherever the graph came from.

`torch.export` hands ATen operators with `get_attr` parameters; Dynamo hands torch-level calls with parameters as
placeholders. After this pass both have

- every product with a parameter matrix as `aten.linear(x, weight, bias)`: `F.linear`, `addmm`, `mm` and `matmul`;
- `weight` a parameter node, or `aten.t` of one where the parameter is stored `(K, N)` as in `Conv1D`;
- parameters bound to real tensors and names (`passes.graph.binding`);
- `ParoLinear`'s operator split into `parofx.rotate` and `parofx.int4_linear`, one `rotate` for equal arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.graph import (
    INT4_LINEAR,
    LINEAR,
    ROTATE,
    ROTATE_INT4_LINEAR,
    TRANSPOSE,
    binding,
    inherit_meta,
    nodes_calling,
)

aten = torch.ops.aten
_LINEAR_CALLS = frozenset({torch.nn.functional.linear, LINEAR})
_ADDMM_CALLS = frozenset({torch.addmm, aten.addmm.default})
_MATMUL_CALLS = frozenset({torch.matmul, operator.matmul, torch.mm, aten.matmul.default, aten.mm.default})
_TRANSPOSE_CALLS = frozenset({torch.t, TRANSPOSE, aten.numpy_T.default})
_SWAP_CALLS = frozenset({torch.transpose, torch.swapaxes, aten.transpose.int})


@register
@dataclass(frozen=True)
class Normalize:
    """Bring linears and parameters to one form."""

    name: ClassVar[str] = "normalize"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.FLOAT,)
    produces: ClassVar[Stage] = Stage.FLOAT

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        for node in list(gm.graph.nodes):
            if "val" not in node.meta and "example_value" in node.meta:
                node.meta["val"] = node.meta["example_value"]
            if node.op == "call_module" and node.target == "_guards_fn":
                gm.graph.erase_node(node)
                report.changed += 1
        for node in list(gm.graph.nodes):
            operands = _as_linear(node)
            if operands is not None and not _is_normal(node, operands):
                report.matched.append((node.name, f"{_target_name(node)} with a parameter weight"))
                _rewrite(gm, node, operands)
                report.changed += 1
        for node in nodes_calling(gm.graph, ROTATE_INT4_LINEAR):
            _split_rotation(gm, node)
            report.changed += 1
        report.changed += _share_equal_nodes(gm)
        if report.changed:
            gm.graph.eliminate_dead_code()
        set_stage(gm, Stage.CONVERTED if nodes_calling(gm.graph, INT4_LINEAR) else Stage.FLOAT)
        return report


@dataclass(frozen=True)
class _Operands:
    """`x @ weightᵀ + bias`: the parameter node, and whether it is stored `(K, N)`."""

    x: Node
    parameter: Node
    transposed: bool
    bias: Node | None


def _as_linear(node: Node) -> _Operands | None:
    """Return the operands if a node is a product with a two-dimensional parameter, else None."""
    if node.op == "call_method" and node.target in ("matmul", "mm"):
        return _from_matmul(node.args[0], node.args[1])
    if node.op != "call_function":
        return None
    if node.target in _LINEAR_CALLS:
        x, weight, bias = _arguments(node, ("input", "weight", "bias"))
        read = _parameter_matrix(weight)
        return None if read is None else _Operands(x, read[0], read[1], bias)
    if node.target in _MATMUL_CALLS:
        x, other = _arguments(node, ("input", "other"), aliases={"mat2": "other", "self": "input"})
        return _from_matmul(x, other)
    if node.target in _ADDMM_CALLS and not {"alpha", "beta"} & set(node.kwargs):
        bias, x, other = _arguments(node, ("input", "mat1", "mat2"), aliases={"self": "input"})
        operands = _from_matmul(x, other)
        if operands is None or not isinstance(bias, Node) or _dims(bias) != 1:
            return None
        return _Operands(operands.x, operands.parameter, operands.transposed, bias)
    return None


def _from_matmul(x: Any, other: Any) -> _Operands | None:
    read = _parameter_matrix(other)
    if read is None or not isinstance(x, Node):
        return None
    parameter, transposed = read
    return _Operands(x, parameter, not transposed, None)


def _parameter_matrix(value: Any) -> tuple[Node, bool] | None:
    """Return `(parameter node, transposed)` for a parameter matrix or its transpose, else None."""
    if not isinstance(value, Node):
        return None
    bound = binding(value)
    if bound is not None:
        return (value, False) if bound.tensor.dim() == 2 and bound.tensor.is_floating_point() else None
    if _is_transpose(value):
        inner = _parameter_matrix(value.args[0])
        return None if inner is None else (inner[0], not inner[1])
    return None


def _is_transpose(node: Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if (node.op == "call_method" and node.target == "t") or node.target in _TRANSPOSE_CALLS:
        return True
    if node.target in _SWAP_CALLS or (node.op == "call_method" and node.target in ("transpose", "swapaxes")):
        dims = node.args[1:]
        return len(dims) == 2 and all(isinstance(dim, int) for dim in dims) and {d % 2 for d in dims} == {0, 1}  # type: ignore[operator]
    if node.target in (torch.permute, aten.permute.default) or (node.op == "call_method" and node.target == "permute"):
        order = node.args[1] if len(node.args) == 2 else node.args[1:]
        return isinstance(order, list | tuple) and [dim % 2 for dim in order] == [1, 0]  # type: ignore[operator]
    return False


def _is_normal(node: Node, operands: _Operands) -> bool:
    if node.target is not LINEAR or node.kwargs:
        return False
    weight = node.args[1]
    if not operands.transposed:
        return weight is operands.parameter
    return isinstance(weight, Node) and weight.target is TRANSPOSE and weight.args[0] is operands.parameter


def _rewrite(gm: GraphModule, node: Node, operands: _Operands) -> None:
    with gm.graph.inserting_before(node):
        weight = operands.parameter
        if operands.transposed:
            weight = inherit_meta(gm.graph.call_function(TRANSPOSE, (operands.parameter,)), node)
            value = operands.parameter.meta.get("val")
            if value is not None:
                weight.meta["val"] = value.t()
        args = (operands.x, weight) if operands.bias is None else (operands.x, weight, operands.bias)
        linear = gm.graph.call_function(LINEAR, args)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)


def _split_rotation(gm: GraphModule, node: Node) -> None:
    x, pairs, theta, channel_scales, *packed, group_size = node.args
    with gm.graph.inserting_before(node):
        rotated = gm.graph.call_function(ROTATE, (x, pairs, theta, channel_scales, group_size))
        inherit_meta(rotated, node).meta["val"] = x.meta.get("val") if isinstance(x, Node) else None
        linear = gm.graph.call_function(INT4_LINEAR, (rotated, *packed, group_size))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)


def _share_equal_nodes(gm: GraphModule) -> int:
    """Let equal rotations and equal views of one tensor be one node: siblings are found by their common input."""
    pure: set[Callable[..., Any]] = {ROTATE, TRANSPOSE, aten.view.default, aten.reshape.default}
    first: dict[Any, Node] = {}
    shared = 0
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            key: Any = ("get_attr", node.target)
        elif node.op == "call_function" and node.target in pure and not node.kwargs:
            key = (node.target, *(tuple(arg) if isinstance(arg, list) else arg for arg in node.args))
        else:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)
            shared += 1
    return shared


def _arguments(node: Node, names: tuple[str, ...], aliases: dict[str, str] | None = None) -> list[Any]:
    values: dict[str, Any] = dict(zip(names, node.args, strict=False))
    values |= {(aliases or {}).get(key, key): value for key, value in node.kwargs.items()}
    return [values.get(name) for name in names]


def _dims(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else None


def _target_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
