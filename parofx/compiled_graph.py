"""A lowered graph, compiled by Inductor, with the packed tensors it reads besides its inputs.

Dynamo hands parameters to a graph at every call, and lets modules of one class share it. Packed tensors are therefore
kept per set of parameters, and used only while those are as they were when the tensors were packed: an in-place update,
a replaced parameter or another module is seen at the next call and packed then. What is written through
`parameter.data` in place (`p.data.copy_(…)`) leaves no trace that could be seen.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from parofx.dynamo import placeholders, rebind_parameters, static_fakes, unbind_parameters
from parofx.passes.derived import State, unchanged
from parofx.passes.graph import binding, delete_attribute, get_attribute, nodes_calling
from parofx.passes.lower import place_siblings

logger = logging.getLogger("parofx")

#: Elements of a loop that are not worth more than one thread.
SMALL_LOOP = 2**14


class _Packed(NamedTuple):
    """Tensors made from one set of parameters, and the state these had."""

    states: tuple[State, ...]
    tensors: tuple[Tensor, ...]


class CompiledGraph:
    """Call a lowered graph with Dynamo's inputs.

    Args:
        lowered: the LOWERED copy of `source`; it is consumed.
        source: Dynamo's graph, from which packed tensors are made anew.
        names: position → dotted name of the inputs that are parameters.
        example_inputs: of `source`.
        lower: runs the passes on a copy of `source`.
        differentiable: record gradients.
        inductor: options of Inductor.
    """

    def __init__(
        self,
        lowered: GraphModule,
        source: GraphModule,
        names: Mapping[int, str],
        example_inputs: Sequence[Any],
        *,
        lower: Callable[[GraphModule], GraphModule | None],
        differentiable: bool,
        inductor: Mapping[str, Any],
    ) -> None:
        self._source, self._names, self._lower = source, names, lower
        self._differentiable = differentiable
        nodes = placeholders(lowered)
        made_from = lowered.meta.pop("parofx_made_from", set())
        self._watched = [index for index, node in enumerate(nodes) if node in made_from]
        constants = _lift_constants(lowered)
        self._constant_names = tuple(constants)
        # Some parameters are read by nothing any more; other inputs may imply the sizes of what is left.
        read = {node for index, node in enumerate(nodes) if node.users or index not in names}
        self._kept = [index for index, node in enumerate(nodes) if node in read]
        for node in nodes:
            if node not in read:
                lowered.graph.erase_node(node)
        _describe_inputs(lowered, source, self._kept)
        if not differentiable:
            _stay_without_grad(lowered)
        lowered.recompile()
        self._packed: dict[int, _Packed] = {}
        packed = self._remember(example_inputs, tuple(constants.values()))
        # What stays in memory of a graph must not keep the model alive.
        unbind_parameters([*nodes, *placeholders(source)])
        with torch.set_grad_enabled(differentiable):
            self._run = compile_fx(
                lowered,
                [example_inputs[index] for index in self._kept] + static_fakes(packed.tensors),
                config_patches={"cpp.min_chunk_size": _smallest_chunk(lowered), **inductor},
            )
        place_siblings(lowered)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        packed = self._packed.get(self._key(args))
        if packed is None or not unchanged(packed.states, [args[index] for index in self._watched]):
            packed = self._pack(args, known=packed is not None)
        with torch.set_grad_enabled(self._differentiable):
            return self._run(*(args[index] for index in self._kept), *packed.tensors)  # type: ignore[operator]

    def _key(self, args: Sequence[Any]) -> int:
        return id(args[self._watched[0]]) if self._watched else 0

    def _pack(self, args: Sequence[Any], *, known: bool) -> _Packed:
        if known:
            logger.warning("paro: parameters changed since the graph was compiled; packing them anew")
        else:
            logger.info("paro: a compiled graph is called with other parameters; packing them")
        gm = copy_graph(self._source)
        rebind_parameters(gm, self._names, args)
        lowered = self._lower(gm)
        assert lowered is not None
        return self._remember(args, tuple(get_attribute(lowered, name) for name in self._constant_names))

    def _remember(self, args: Sequence[Any], tensors: tuple[Tensor, ...]) -> _Packed:
        self._forget_the_dead()
        packed = _Packed(tuple(State.of(args[index]) for index in self._watched), tensors)
        key = self._key(args)
        if self._watched and key not in self._packed:
            # What was made from parameters goes when they do; the graph itself stays with Dynamo.
            graph = weakref.WeakMethod(self._forget_the_dead)
            weakref.finalize(args[self._watched[0]], lambda: (found := graph()) and found()).atexit = False
        self._packed[key] = packed
        return packed

    def _forget_the_dead(self) -> None:
        # A copy: the garbage collector may run this within itself, and take an entry away.
        for key, packed in self._packed.copy().items():
            if not all(state.alive() for state in packed.states):
                self._packed.pop(key, None)


def _smallest_chunk(lowered: GraphModule) -> int:
    """Return how many elements of a loop Inductor must have for each thread before it wakes them.

    One token's norms and activations are loops of a few thousand elements: less work than it takes to wake a thread.
    Where linears take any number of rows, Inductor goes by those of the example: a few now may be thousands later.
    """
    own = inductor_config.cpp.min_chunk_size
    return own if any(map(_takes_any_number, lowered.graph.nodes)) else max(own, SMALL_LOOP // torch.get_num_threads())


def _takes_any_number(node: Node) -> bool:
    """Say whether a node is an operator of ours on any number of rows."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target.namespace.startswith("parofx"):
        return False
    tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    return any(isinstance(size, torch.SymInt) for one in tensors for size in one.shape)


def copy_graph(gm: GraphModule) -> GraphModule:
    """Copy a graph and its module's attributes, sharing tensors."""
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    copied = GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    for node, original in zip(placeholders(copied), placeholders(gm), strict=True):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return copied


def _lift_constants(gm: GraphModule) -> dict[str, Tensor]:
    """Turn `get_attr` tensors into inputs behind the graph's own, and return them in order."""
    constants: dict[str, Tensor] = {}
    lifted: dict[int, Node] = {}
    found = [node for node in gm.graph.nodes if node.op == "get_attr" and binding(node) is not None]
    tensors = [get_attribute(gm, str(node.target)) for node in found]
    inputs = placeholders(gm)
    behind_inputs = inputs[-1].next if inputs else next(iter(gm.graph.nodes))
    for node, tensor in zip(found, tensors, strict=True):
        if id(tensor) not in lifted:
            with gm.graph.inserting_before(behind_inputs):
                lifted[id(tensor)] = gm.graph.placeholder("packed_" + str(node.target).replace(".", "_"))
            constants[str(node.target)] = tensor
        node.replace_all_uses_with(lifted[id(tensor)])
    for node in found:
        gm.graph.erase_node(node)
        delete_attribute(gm, str(node.target))
    return constants


def _describe_inputs(lowered: GraphModule, source: GraphModule, kept: Sequence[int]) -> None:
    """Tell AOTAutograd of the inputs what Dynamo would: where its own come from, and that packed tensors stay.

    CUDA graphs read what stays where it lies, instead of copying it at every call; if it moves, as when parameters
    change, Inductor records anew.
    """
    if "dynamo_compile_id" not in source.meta:
        return
    lowered.meta["dynamo_compile_id"] = source.meta["dynamo_compile_id"]
    lowered._param_name_to_source = {}  # type: ignore[assignment]
    nodes, known = placeholders(lowered), placeholders(source)
    for node, index in zip(nodes, kept, strict=False):
        node._dynamo_source = getattr(known[index], "_dynamo_source", None)
    for node in nodes[len(kept) :]:
        node._dynamo_source = None
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}


def _stay_without_grad(gm: GraphModule) -> None:
    """Remove switches of the grad mode: at the end of a `no_grad` region they would turn it on again."""
    for node in nodes_calling(gm.graph, torch._C._set_grad_enabled):
        gm.graph.erase_node(node)
