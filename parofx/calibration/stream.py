"""The calibration data flowing through a graph, block by block.

The graph is cut at block borders. Each sub-graph runs for all batches before the next one starts, so that what lies in
memory is one block's working set and the values that cross one border: about `2 × samples × seqlen × hidden`
elements for a decoder. Position embeddings and masks cross borders as ordinary values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from parofx.calibration.row_masks import RowMasks, select_rows
from parofx.calibration.segment import SegmentInterpreter
from parofx.errors import DataError
from parofx.passes.blocks import split_at_blocks
from parofx.passes.graph import FAKE_QUANTIZE, LINEAR, ROTATE, get_attribute
from parofx.passes.guards import why_not_served

#: Called with the transform's name, the rows `(M, K)` that reach it, and the lengths `(M,)` of what its linears make of
#: them, fp32; None where they are not wanted, or not all computed from these rows in the same segment without a bias.
Recorder = Callable[[str, Tensor, Tensor | None], None]
#: The values alive at a border, by node name, of one batch.
Border = dict[str, Any]


class BlockStream:
    """Runs a PREPARED graph on batches, one segment after another, with its transforms taken as identities."""

    def __init__(self, gm: GraphModule, batches: Sequence[Mapping[str, Any]]) -> None:
        masks = RowMasks(gm)
        masks.annotate(gm)
        #: A graph of one sub-graph per segment.
        self.split = split_at_blocks(gm, gm.meta.get("parofx_blocks", ()))
        _take_no_gradients(self.split)
        # Nobody asks for the model's outputs, so that being one of them keeps no value alive.
        nodes = [node for node in self.split.graph.nodes if node.op != "output"]
        self.segments: tuple[str, ...] = tuple(str(node.target) for node in nodes if node.op == "call_module")
        self._nodes = nodes
        self._last_use: dict[str, int] = {}
        for index, node in enumerate(nodes):
            self._last_use |= {source.name: index for source in node.all_input_nodes}
        self.borders: list[Border] = [bind_inputs(gm, batch) for batch in batches]
        _check_inputs(gm, masks, self.borders)
        #: Per batch, the masks that speak of some tensor, by name.
        self.masks = [{name: border[name] for name in masks.names} for border in self.borders]

    def transforms_of(self, segment: str) -> list[str]:
        """Return the names of the transforms whose inputs a segment computes."""
        graph = getattr(self.split, segment).graph
        names = [node.meta.get("parofx_transform") for node in graph.nodes if node.target is ROTATE]
        return list(dict.fromkeys(name for name in names if name is not None))

    def last_segment_of(self, transform: str) -> str:
        """Return the segment after which all of a transform's inputs have been seen."""
        return next(segment for segment in reversed(self.segments) if transform in self.transforms_of(segment))

    def run(
        self, segment: str, record: Recorder, measured: Mapping[str, frozenset[str]] = MappingProxyType({})
    ) -> Iterator[Any]:
        """Run one segment for all batches, replacing the borders; yields what it returns, batch by batch.

        `measured` are the transforms whose outputs' lengths are wanted, with the names of all their linears.
        """
        module = self.module(segment)
        for index, border in enumerate(self.borders):
            runner = _Recorder(module, record, self.masks[index], measured)
            with torch.no_grad():
                output = runner.run(*self.arguments(segment, border))
            self.advance(segment, border, output)
            yield output

    def module(self, segment: str) -> GraphModule:
        """Return a segment's graph."""
        module = getattr(self.split, segment)
        assert isinstance(module, GraphModule)
        return module

    def arguments(self, segment: str, border: Border) -> list[Any]:
        """Return what a segment reads at a border."""
        return [self._value(source, border) for source in self._node(segment).args]

    def advance(self, segment: str, border: Border, output: Any) -> None:
        """Move a border behind a segment that returned `output`: take that apart, drop what no later node reads."""
        node = self._node(segment)
        border[node.name] = output
        end = self._nodes.index(node) + 1
        while end < len(self._nodes) and self._nodes[end].op == "call_function":
            node = self._nodes[end]
            source, index = node.args
            assert isinstance(source, Node)
            border[node.name] = border[source.name][index]
            end += 1
        for name in [name for name in border if self._last_use.get(name, -1) < end]:
            del border[name]

    def _node(self, segment: str) -> Node:
        found: Node = next(node for node in self._nodes if node.op == "call_module" and node.target == segment)
        return found

    def _value(self, source: Any, border: Border) -> Any:
        if source.op == "get_attr":
            return get_attribute(self.split, str(source.target))
        return border[source.name]


class _Recorder(SegmentInterpreter):
    """Runs a segment; rotations hand their input on, and report it if it is an activation, once their linears ran."""

    def __init__(
        self,
        module: GraphModule,
        record: Recorder,
        masks: Mapping[str, Tensor],
        measured: Mapping[str, frozenset[str]],
    ) -> None:
        super().__init__(module)
        self._record = record
        self._masks = masks
        self._measured = measured
        #: Lengths `(…, 1)` of the outputs so far, one of each linear, by rotation.
        self._lengths: dict[Node, list[Tensor]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is ROTATE or n.target is FAKE_QUANTIZE:
            value = self.env[n.args[0]]  # type: ignore[index]
            if n.meta.get("parofx_transform") is not None:
                if self._is_measured(n):
                    self._lengths[n] = []
                else:
                    self._report(n, value, None)
            return value
        output = super().run_node(n)
        if n.target is LINEAR and n.args[0] in self._lengths:
            self._add_output(n, output)
        return output

    def _is_measured(self, rotation: Node) -> bool:
        """Return whether each linear of its transform reads a rotation, once, and adds nothing to the product."""
        wanted = self._measured.get(rotation.meta["parofx_transform"])
        if wanted is None or any(
            user.target is not LINEAR or user.kwargs or user.args[2:] not in ((), (None,)) for user in rotation.users
        ):
            return False
        names = [user.args[1].meta.get("parofx_linear") for user in rotation.users]  # type: ignore[union-attr]
        return len(names) == len(wanted) and wanted == set(names)

    def _add_output(self, linear: Node, output: Tensor) -> None:
        rotation = linear.args[0]
        assert isinstance(rotation, Node)
        lengths = self._lengths[rotation]
        lengths.append(torch.linalg.vector_norm(output.float(), dim=-1, keepdim=True))
        if len(lengths) == len(rotation.users):
            self._report(rotation, self.env[rotation], functools.reduce(torch.hypot, self._lengths.pop(rotation)))

    def _report(self, rotation: Node, value: Tensor, lengths: Tensor | None) -> None:
        rows = select_rows(rotation, value, self._masks)
        selected = None if lengths is None else select_rows(rotation, lengths, self._masks)[:, 0]
        self._record(rotation.meta["parofx_transform"], rows, selected)


def _take_no_gradients(split: GraphModule) -> None:
    """Hold the model's tensors detached: what is trained is handed in, and a backward must leave the model as it is."""
    for module in split.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def _check_inputs(gm: GraphModule, masks: RowMasks, batches: Sequence[Border]) -> None:
    """Refuse batches for which the model would compute something else than the graph does.

    Raises:
        DataError: naming the first of them and what it breaks.
    """
    for index, inputs in enumerate(batches):
        reason = why_not_served(gm, inputs) or masks.why_not(inputs)
        if reason is not None:
            raise DataError(
                f"every calibration batch must be one that the captured graph serves: batch {index} is not, {reason}; "
                "give batches of one kind, or example_inputs of theirs"
            )


def first_held_out(batches: Sequence[Mapping[str, Any]], samples: int) -> int:
    """Return the first of the trailing batches that hold about so many samples; half the batches stay in front."""
    first = len(batches)
    while samples > 0 and first > max(1, len(batches) - len(batches) // 2):
        first -= 1
        tensors = (value for value in batches[first].values() if isinstance(value, Tensor) and value.dim())
        samples -= max(map(len, tensors), default=1)
    return first


def bind_inputs(gm: GraphModule, batch: Mapping[str, Any]) -> Border:
    """Return the graph's placeholders bound to a batch.

    Raises:
        DataError: naming the inputs that are missing or that the captured model does not take.
    """
    count, names = gm.meta["parofx_inputs"]
    positional = tuple(batch[f"arg{i}"] for i in range(count) if f"arg{i}" in batch)
    expected = [*(f"arg{i}" for i in range(count)), *names]
    missing = [name for name in expected if name not in batch]
    unexpected = sorted(set(batch) - set(expected))
    if missing or unexpected:
        raise DataError(
            f"every calibration batch must have the inputs the model was captured with, {expected}: "
            f"missing {missing}, unexpected {unexpected}"
        )
    leaves = pytree.tree_leaves((positional, {name: batch[name] for name in names}), is_leaf=lambda leaf: leaf is None)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(leaves):
        raise DataError(f"the captured graph takes {len(placeholders)} inputs, a calibration batch has {len(leaves)}")
    return {node.name: value for node, value in zip(placeholders, leaves, strict=True)}
