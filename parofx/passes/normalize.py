"""`normalize`: one form for linears and parameters, wherever the graph came from.

`torch.export` hands ATen operators with `get_attr` parameters; Dynamo hands torch-level calls with parameters as
placeholders. After this pass both have

- every product with a parameter matrix as `aten.linear(x, weight, bias)`: `F.linear`, `addmm`, `mm` and `matmul`;
- `weight` a parameter node, or `aten.t` of one where the parameter is stored `(K, N)` as in `Conv1D`;
- parameters bound to real tensors and names (`passes.graph.binding`);
- autocast's cast of a linear's input written out, one node for equal ones: what a linear returns has its input's dtype;
- `ParoLinear`'s operator split into `parofx.rotate` and `parofx.int4_linear`, one `rotate` for equal arguments; where
  the module holds a kernel's layout, on tensors that conversions unpack (`passes/layouts.py`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.graph import (
    CAST,
    INT4_LINEAR,
    INT4_SIBLINGS,
    LINEAR,
    ROTATE,
    ROTATE_INT4_LINEAR,
    ROTATE_INT4_SIBLINGS,
    SEMANTIC,
    TRANSPOSE,
    binding,
    erase_unused,
    inherit_meta,
    nodes_calling,
    operator_name,
)
from parofx.passes.layouts import ROTATE_INT4_CPU_LINEAR, expand, is_conversion
from parofx.passes.mutation import memory_of, separate_written_values, written_memory

aten = torch.ops.aten
_LINEAR_CALLS = frozenset({torch.nn.functional.linear, LINEAR})
_ADDMM_CALLS = frozenset({torch.addmm, aten.addmm.default})
_MATMUL_CALLS = frozenset({torch.matmul, operator.matmul, torch.mm, aten.matmul.default, aten.mm.default})
_METHODS = {"matmul": torch.matmul, "__matmul__": torch.matmul, "mm": torch.mm, "addmm": torch.addmm}
_TRANSPOSES = frozenset({"t", "T", "mT", "H", "mH", "adjoint", "numpy_T", "matrix_H"})
_VIEWS = frozenset({"view", "reshape"})
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims"})


@register
@dataclass(frozen=True)
class Normalize:
    """Bring linears and parameters to one form, and mark the graph: CONVERTED if it holds `ParoLinear`s, else FLOAT."""

    name: ClassVar[str] = "normalize"
    consumes: ClassVar[tuple[Stage | None, ...]] = (None, Stage.FLOAT, Stage.CONVERTED)
    produces: ClassVar[tuple[Stage, ...]] = (Stage.FLOAT, Stage.CONVERTED)

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        for node in list(gm.graph.nodes):
            if "val" not in node.meta and "example_value" in node.meta:
                node.meta["val"] = node.meta["example_value"]
            if isinstance(node.target, torch._ops.OpOverloadPacket) and node.target.overloads() == ["default"]:  # type: ignore[no-untyped-call]
                # Dynamo keeps the name a program calls; passes match overloads.
                node.target = node.target.default
            if (node.target in SEMANTIC or node.target is ROTATE_INT4_CPU_LINEAR) and node.kwargs:
                node.args, node.kwargs = _positional(node), {}
            if node.op == "call_module" and node.target == "_guards_fn":
                gm.graph.erase_node(node)
                report.changed += 1
        for node in list(gm.graph.nodes):
            operands = _as_linear(node)
            if operands is not None and not _is_normal(node, operands):
                report.matched.append((node.name, f"{operator_name(node)} with a parameter weight"))
                _rewrite(gm, node, operands)
                report.changed += 1
        report.changed += expand(gm)
        report.changed += _write_casts(gm)
        for node in nodes_calling(gm.graph, ROTATE_INT4_LINEAR):
            _split_rotation(gm, node)
            report.changed += 1
        report.changed += separate_written_values(gm)
        report.changed += _share_equal_nodes(gm)
        if report.changed:
            erase_unused(gm.graph)
        quantized = nodes_calling(gm.graph, INT4_LINEAR, ROTATE_INT4_SIBLINGS, INT4_SIBLINGS)
        set_stage(gm, Stage.CONVERTED if quantized else Stage.FLOAT)
        return report


@dataclass(frozen=True)
class _Operands:
    """`x @ weightᵀ + bias`: the parameter node, and whether it is stored `(K, N)`."""

    x: Node
    parameter: Node
    transposed: bool
    bias: Node | None

    @property
    def broadcasts_bias(self) -> bool:
        """Whether the bias is anything but one value for each output channel."""
        value = None if self.bias is None else _value(self.bias)
        out_features = _value(self.parameter).shape[1 if self.transposed else 0]  # type: ignore[union-attr]
        return value is not None and (value.dim() != 1 or value.numel() == 1 != out_features)


def _as_linear(node: Node) -> _Operands | None:
    """Return the operands if a node is a product with a two-dimensional parameter, else None."""
    target = _METHODS.get(str(node.target)) if node.op == "call_method" else node.target
    if node.op not in ("call_function", "call_method") or {"alpha", "beta", "out"} & set(node.kwargs):
        return None
    if target in _LINEAR_CALLS:
        x, weight, bias = _arguments(node, ("input", "weight", "bias"))
        read = _parameter_matrix(weight)
        return None if read is None else _Operands(x, read[0], read[1], bias)
    if target in _MATMUL_CALLS:
        x, other = _arguments(node, ("input", "other"), aliases={"mat2": "other", "self": "input"})
        return _from_matmul(x, other)
    if target in _ADDMM_CALLS:
        bias, x, other = _arguments(node, ("input", "mat1", "mat2"), aliases={"self": "input"})
        operands = _from_matmul(x, other)
        value = _value(bias) if isinstance(bias, Node) else None
        if operands is None or value is None or value.dim() != 1:
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
    inner = _parameter_matrix(_transposed_input(value))
    return None if inner is None else (inner[0], not inner[1])


def _transposed_input(node: Node) -> object:
    """Return what a node transposes, or None if it does something else."""
    if node.op not in ("call_function", "call_method"):
        return None
    source, *dims = [*node.args, *node.kwargs.values()]
    name = dims.pop() if node.target is getattr else operator_name(node)
    if name in _TRANSPOSES:
        return source
    order = dims[0] if len(dims) == 1 else dims
    if name not in (*_SWAPS, "permute") or not isinstance(order, list | tuple):
        return None
    axes = [dim % 2 for dim in order if isinstance(dim, int)]
    if len(axes) != 2:
        return None
    first, second = axes
    # Swapping two axes does not depend on their order; a permutation lists them.
    swaps = first != second if name in _SWAPS else (first, second) == (1, 0)
    return source if swaps else None


def _is_normal(node: Node, operands: _Operands) -> bool:
    if node.target is not LINEAR or node.kwargs or operands.broadcasts_bias:
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
        alone = operands.bias is None or operands.broadcasts_bias
        linear = gm.graph.call_function(LINEAR, (operands.x, weight) if alone else (operands.x, weight, operands.bias))
        linear.meta = dict(node.meta)
        result = linear
        if operands.broadcasts_bias:
            result = gm.graph.call_function(aten.add.Tensor, (linear, operands.bias))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _write_casts(gm: GraphModule) -> int:
    """Write out what autocast does to the inputs of linears: passes and providers go by an input's dtype."""
    written = 0
    for node in nodes_calling(gm.graph, LINEAR, ROTATE_INT4_LINEAR, INT4_LINEAR):
        x = node.args[0]
        given, result = x.meta.get("val") if isinstance(x, Node) else None, node.meta.get("val")
        if not isinstance(given, torch.Tensor) or not isinstance(result, torch.Tensor) or given.dtype == result.dtype:
            continue
        with gm.graph.inserting_before(node):
            cast = gm.graph.call_function(CAST, (x, result.dtype))
        inherit_meta(cast, node).meta["val"] = given.to(result.dtype)
        node.args = (cast, *node.args[1:])
        written += 1
    return written


def _split_rotation(gm: GraphModule, node: Node) -> None:
    x, pairs, theta, channel_scales, *rest = node.args
    with gm.graph.inserting_before(node):
        rotated = gm.graph.call_function(ROTATE, (x, pairs, theta, channel_scales, node.args[8]))
        inherit_meta(rotated, node).meta["val"] = x.meta.get("val") if isinstance(x, Node) else None
        linear = gm.graph.call_function(INT4_LINEAR, (rotated, *rest))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    gm.graph.erase_node(node)


def _share_equal_nodes(gm: GraphModule) -> int:
    """Let equal rotations and equal views of one tensor be one node: siblings are found by their common input."""
    first: dict[Any, Node] = {}
    written = written_memory(gm)
    shared = 0
    for node in list(gm.graph.nodes):
        key = _content(node)
        if key is None or memory_of(node) in written:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)
            shared += 1
    return shared


def _content(node: Node) -> Any:
    """Return a key that is equal for nodes of equal value, or None for those that are never shared."""
    if node.op == "get_attr":
        return "get_attr", node.target
    if (node.target in (ROTATE, TRANSPOSE, CAST) or is_conversion(node)) and not node.kwargs:
        return node.target, *node.args
    value = node.meta.get("val")
    if operator_name(node) in _VIEWS and node.op != "placeholder" and isinstance(value, torch.Tensor):
        # Whatever the sizes were computed from, a view is given by those it has in the end.
        return operator_name(node), node.args[0], str(value.shape), value.dtype
    return None


def _arguments(node: Node, names: tuple[str, ...], aliases: dict[str, str] | None = None) -> list[Any]:
    values: dict[str, Any] = dict(zip(names, node.args, strict=False))
    values |= {(aliases or {}).get(key, key): value for key, value in node.kwargs.items()}
    return [values.get(name) for name in names]


def _positional(node: Node) -> tuple[Any, ...]:
    """Return what an operator is called with, by position, up to the last argument that the call gives."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((one.name for one in arguments), node.args, strict=False)) | node.kwargs
    last = max(index for index, one in enumerate(arguments) if one.name in given)
    return tuple(given.get(one.name, one.default_value) for one in arguments[: last + 1])


def _value(node: Node) -> torch.Tensor | None:
    bound = binding(node)
    value = node.meta.get("val") if bound is None else bound.tensor
    return value if isinstance(value, torch.Tensor) else None
