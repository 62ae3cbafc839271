"""Questions every pass asks of an fx graph: which node is a parameter, a linear, part of which module."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from parofx.ops import DEFAULT_BITS

#: The one form of a linear layer after `normalize`: `aten.linear(x, weight (N, K), bias)`.
LINEAR = torch.ops.aten.linear.default
#: A weight stored as `(K, N)` is read through this node.
TRANSPOSE = torch.ops.aten.t.default
#: The cast of a linear's input under autocast.
CAST = torch.ops.aten.to.dtype
ROTATE = torch.ops.parofx.rotate.default
FAKE_QUANTIZE = torch.ops.parofx.fake_quantize.default
INT4_LINEAR = torch.ops.parofx.int4_linear.default
#: Look-ups in an embedding table.
EMBEDDING = (torch.ops.aten.embedding.default, torch.nn.functional.embedding)
ROTATE_INT4_LINEAR = torch.ops.parofx.rotate_int4_linear.default
ROTATE_INT4_SIBLINGS = torch.ops.parofx.rotate_int4_siblings.default
#: What `fuse_producers` makes: producers that rotate, and the linears behind them.
RMSNORM_ROTATE = torch.ops.parofx.rmsnorm_rotate.default
SILU_MUL_ROTATE = torch.ops.parofx.silu_mul_rotate.default
INT4_SIBLINGS = torch.ops.parofx.int4_siblings.default
#: Operators that the lowering must replace.
SEMANTIC = frozenset(
    {
        ROTATE, FAKE_QUANTIZE, INT4_LINEAR, ROTATE_INT4_LINEAR, ROTATE_INT4_SIBLINGS,
        RMSNORM_ROTATE, SILU_MUL_ROTATE, INT4_SIBLINGS,
    }
)  # fmt: skip

#: Where calls of packed linears state the width of their codes, if they do.
_BITS_ARGUMENT = {INT4_LINEAR: 6, ROTATE_INT4_LINEAR: 9, ROTATE_INT4_SIBLINGS: 10}

#: Metadata of a parameter that stays float whatever reads it: the `FloatReason`.
STAYS_FLOAT = "parofx_stays_float"

_BINDING = "parofx_binding"
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
#: Python's operators that write to their first operand, by the names that functions and methods have.
_WRITING_OPERATORS = {form.format(name) for name in _BINARY for form in ("i{}", "__i{}__")} | {"setitem", "__setitem__"}


@dataclass(frozen=True)
class Binding:
    """A graph value that is a parameter or buffer of the model: its name and the real tensor."""

    fqn: str
    tensor: Tensor

    @property
    def module(self) -> str:
        """The name of the module that owns the tensor."""
        return self.fqn.rpartition(".")[0]


def bind(node: Node, fqn: str, tensor: Tensor) -> None:
    """Note that a node stands for a parameter or buffer (Dynamo passes them as placeholders)."""
    node.meta[_BINDING] = Binding(fqn, tensor)


def unbind(node: Node) -> None:
    """Forget what `bind` noted."""
    node.meta.pop(_BINDING, None)


def binding(node: object) -> Binding | None:
    """Return the parameter or buffer a node stands for, or None."""
    if not isinstance(node, Node):
        return None
    known: Binding | None = node.meta.get(_BINDING)
    if known is None and node.op == "get_attr":
        value = get_attribute(node.graph.owning_module, str(node.target))
        return Binding(str(node.target), value) if isinstance(value, Tensor) else None
    return known


def weight_binding(node: object) -> tuple[Binding, bool] | None:
    """Return a linear's weight parameter and whether it is read transposed, or None if it is no parameter."""
    transposed = isinstance(node, Node) and node.target is TRANSPOSE
    bound = binding(node.args[0] if transposed and isinstance(node, Node) else node)
    return None if bound is None else (bound, transposed)


def parameter_node(weight: Node) -> Node:
    """Return the parameter that a linear's weight reads, transposed or not."""
    source = weight.args[0] if weight.target is TRANSPOSE else weight
    assert isinstance(source, Node)
    return source


def get_attribute(root: nn.Module | None, path: str) -> Any:
    """Return `root.a.b.c` for the path `"a.b.c"`."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def set_buffer(gm: GraphModule, path: str, tensor: Tensor) -> None:
    """Register or replace a buffer of a graph module under a dotted path."""
    *parents, name = path.split(".")
    module: nn.Module = gm
    for part in parents:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    if name in module._parameters:
        del module._parameters[name]
    module.register_buffer(name, tensor)


def delete_attribute(gm: GraphModule, path: str) -> None:
    """Drop a parameter or buffer of a graph module, if it is there."""
    parent, _, name = path.rpartition(".")
    module = get_attribute(gm, parent) if parent else gm
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)


def free_path(gm: GraphModule, path: str, tensor: Tensor, *, replaces: Node | None = None) -> str:
    """Return `path`, with underscores added where it or a parent of it names something else that the graph reads.

    What only the node `replaces` reads is not in the way, nor is `tensor` itself.
    """
    *parents, name = path.split(".")
    module: nn.Module | None = gm
    for index, part in enumerate(parents):
        while isinstance(getattr(module, part, None), Tensor):
            part += "_"
        parents[index] = part
        module = None if module is None else module._modules.get(part)
    if module is None:
        return ".".join([*parents, name])
    reads = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr" and node is not replaces}
    while name in module._modules or (
        getattr(module, name, tensor) is not tensor and ".".join([*parents, name]) in reads
    ):
        name += "_"
    return ".".join([*parents, name])


def buffer_node(gm: GraphModule, path: str, tensor: Tensor, *, replaces: Node | None = None) -> Node:
    """Register a buffer and return a `get_attr` node for it at the graph's insertion point.

    It is named `path`, or alike where that name is taken (`free_path`).
    """
    path = free_path(gm, path, tensor, replaces=replaces)
    set_buffer(gm, path, tensor)
    node = gm.graph.get_attr(path)
    node.meta["val"] = tensor
    return node


def nodes_calling(graph: Graph, *targets: object) -> list[Node]:
    """Return the `call_function` nodes with one of the targets, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def operator_name(node: Node) -> str:
    """Return the bare name of what a node calls: `"add"` for `aten.add.Tensor`, `torch.add` and `x.add`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def bits_of(node: Node) -> int:
    """Return the width of the codes that a packed linear, or a merged call of such, multiplies."""
    stated = node.args[_BITS_ARGUMENT[node.target] :][:1]  # type: ignore[index]
    bits = stated[0] if stated else DEFAULT_BITS
    assert isinstance(bits, int)
    return bits


def correction_of(node: Node) -> tuple[Any, Any] | None:
    """Return the low-rank correction `(down, up)` of a packed linear, or those of a merged call, or None."""
    down, up = (*node.args[_BITS_ARGUMENT[node.target] + 1 :], None, None)[:2]  # type: ignore[index]
    return None if down is None else (down, up)


def inherit_meta(node: Node, source: Node) -> Node:
    """Give a new node the provenance of the one it stands for."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    return node


def module_stack(node: Node) -> list[tuple[str, str]]:
    """Return `(path, class name)` of the modules a node was traced in, outermost first.

    Export and Dynamo spell paths differently; both become `a.b.0`, with the repeat mark of a module that is called
    again (`layer@1`) removed.
    """
    stack = node.meta.get("nn_module_stack") or {}
    result = []
    for path, kind in stack.values():
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        result.append((plain_path(path), name))
    return result


def module_calls(node: Node) -> list[str]:
    """Return the keys of the module calls a node was traced in; two calls of one module have different keys."""
    return [f"{key}|{path}" for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]


def plain_path(path: str) -> str:
    """Return a module path or tensor source as a dotted name."""
    path = re.sub(r"@\d+", "", path)
    path = re.sub(r"\._(modules|parameters|buffers)\[", "[", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    path = path.replace("._modules.", ".")
    return re.sub(r"^(L\.\w+|L__self__|self)\.?", "", path)


def writes(node: Node) -> bool:
    """Say whether a node may change a tensor in place. Unused, it still counts: fx takes methods to be pure."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # `operator.and_` ends in an underscore because `and` is a keyword.
    in_place = name.endswith("_") and not name.endswith("__") and getattr(node.target, "__module__", "") != "_operator"
    overwrites = "out" in node.kwargs or _asks_for_in_place(node)
    return node.is_impure() or in_place or overwrites or name in _WRITING_OPERATORS


def _asks_for_in_place(node: Node) -> bool:
    """Say whether a call of `torch.nn.functional` has `inplace=True`, by keyword or position."""
    if not inspect.isfunction(node.target) or "inplace" not in inspect.signature(node.target).parameters:
        return False
    return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))


def erase_unused(graph: Graph) -> None:
    """Erase nodes that nothing uses and that write nothing; a static cache's `index_copy_` stays."""
    graph.eliminate_dead_code(is_impure_node=writes)


def remove_dead_code(gm: GraphModule) -> None:
    """Erase unused pure nodes, and the tensors that nothing reads any more."""
    erase_unused(gm.graph)
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if name not in used:
            delete_attribute(gm, name)
