"""Layout conversions in a graph: a linear held in a kernel's layout is the semantic linear of unpacked tensors.

    rotate_int4_cpu_linear(x, rotation, θ, weight, scales, zeros, b)
        →   qweight, qzeros, s = unpack_cpu_weight(weight, scales, zeros);   P, c = unpack_cpu_rotation(rotation, θ)
            rotate_int4_linear(x, P, θ, c, qweight, qzeros, s, b)

`normalize` rewrites so, and passes know one form. A provider that reads the kernel's layout asks for what was unpacked
(`packed_weight`, `packed_rotation`): packing what was just unpacked is the identity, and the conversions drop out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from parofx.cpu_ops import packed_linear as _packed_linear  # noqa: F401  (registers the operators)
from parofx.passes.graph import ROTATE_INT4_LINEAR, binding, nodes_calling

ROTATE_INT4_CPU_LINEAR = torch.ops.parofx.rotate_int4_cpu_linear.default
UNPACK_WEIGHT = torch.ops.parofx.unpack_cpu_weight.default
UNPACK_ROTATION = torch.ops.parofx.unpack_cpu_rotation.default
CONVERSIONS = frozenset({UNPACK_WEIGHT, UNPACK_ROTATION})


def expand(gm: GraphModule) -> int:
    """Rewrite linears on kernel layouts to semantic ones on unpacked tensors; return how many."""
    nodes = nodes_calling(gm.graph, ROTATE_INT4_CPU_LINEAR)
    for node in nodes:
        x, rotation, theta, weight, scales, zeros, bias, group_size, *rest = node.args
        with gm.graph.inserting_before(node):
            packed = _unpacked(gm, UNPACK_WEIGHT, (weight, scales, zeros, *rest[:1]), 3)
            pairs, channel_scales = _unpacked(gm, UNPACK_ROTATION, (rotation, theta, group_size), 2)
            args = (x, pairs, theta, channel_scales, *packed, bias, group_size, *rest)
            linear = gm.graph.call_function(ROTATE_INT4_LINEAR, args)
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
    return len(nodes)


def is_conversion(node: Node) -> bool:
    """Say whether a node is a layout conversion or one of its outputs."""
    return node.target in CONVERSIONS or _conversion(node) is not None


def packed_weight(nodes: Sequence[Node]) -> tuple[Node, ...] | None:
    """Return `(weight, scales, zeros)` that `(qweight, qzeros, scales)` were unpacked from, or None."""
    source = _conversion(nodes[0])
    if source is None or source.target is not UNPACK_WEIGHT or not _are_outputs(nodes, source):
        return None
    return tuple(node for node in source.args if isinstance(node, Node))


def packed_rotation(pairs: Node, theta: Node, channel_scales: Node) -> Node | None:
    """Return the `rotation` that these were unpacked from, or None."""
    source = _conversion(pairs)
    if source is None or source.target is not UNPACK_ROTATION or not _are_outputs((pairs, channel_scales), source):
        return None
    rotation = source.args[0]
    return rotation if source.args[1] is theta and isinstance(rotation, Node) else None


def roots(node: Node) -> list[Node]:
    """Return the nodes a tensor is converted from: itself, where it is not."""
    source = node if node.target in CONVERSIONS else _conversion(node)
    return [node] if source is None else [root for one in source.all_input_nodes for root in roots(one)]


def tensor_of(node: Node) -> Tensor:
    """Return the real tensor behind a parameter node, or convert those behind a conversion's."""
    source = _conversion(node)
    if source is None:
        bound = binding(node)
        assert bound is not None
        return bound.tensor
    arguments = [tensor_of(one) if isinstance(one, Node) else one for one in source.args]
    converted: Tensor = source.target(*arguments)[node.args[1]]  # type: ignore[operator]
    return converted


def _unpacked(gm: GraphModule, target: Any, args: tuple[Any, ...], count: int) -> list[Node]:
    call = gm.graph.call_function(target, args)
    values = [one.meta.get("val") if isinstance(one, Node) else one for one in args]
    known = all(isinstance(value, FakeTensor | int) for value in values)
    call.meta["val"] = target(*values) if known else None
    outputs = [gm.graph.call_function(operator.getitem, (call, index)) for index in range(count)]
    for index, output in enumerate(outputs):
        output.meta["val"] = call.meta["val"][index] if known else None
    return outputs


def _conversion(node: Node) -> Node | None:
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target in CONVERSIONS else None


def _are_outputs(nodes: Sequence[Node], source: Node) -> bool:
    return all(_conversion(node) is source and node.args[1] == index for index, node in enumerate(nodes))
