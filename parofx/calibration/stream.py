"""The calibration data flowing through a graph, block by block.

The graph is cut at block borders. Each sub-graph runs for all batches before the next one starts, so that what lies in
memory is one block's working set and the values that cross one border: about `2 × samples × seqlen × hidden`
elements for a decoder. Position embeddings and masks cross borders as ordinary values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from parofx.errors import DataError
from parofx.passes.blocks import split_at_blocks
from parofx.passes.graph import FAKE_QUANTIZE, ROTATE, get_attribute

#: Called with the transform's name and the rows `(M, K)` that reach it.
Recorder = Callable[[str, Tensor], None]
#: The values alive at a border, by node name, of one batch.
Border = dict[str, Any]


class BlockStream:
    """Runs a PREPARED graph on batches, one segment after another, with its transforms taken as identities."""

    def __init__(self, gm: GraphModule, batches: Sequence[Mapping[str, Any]]) -> None:
        self._split = split_at_blocks(gm, gm.meta.get("parofx_blocks", ()))
        # Nobody asks for the model's outputs: a language model's logits alone would outweigh all else in memory.
        nodes = [node for node in self._split.graph.nodes if node.op != "output"]
        self._nodes = nodes
        self._last_use: dict[Node, int] = {}
        for index, node in enumerate(nodes):
            self._last_use |= dict.fromkeys(node.all_input_nodes, index)
        segments = [str(node.target) for node in nodes if node.op == "call_module"]
        while segments and not self.transforms_of(segments[-1]):
            segments.pop()
        #: The segments to run; those behind the last transform are left out.
        self.segments: tuple[str, ...] = tuple(segments)
        if segments:
            setattr(self._split, segments[-1], _until_last_rotation(getattr(self._split, segments[-1])))
        self._masks = [_row_mask(batch) for batch in batches]
        self.borders: list[Border] = [_bind_inputs(gm, nodes, batch) for batch in batches]

    def transforms_of(self, segment: str) -> list[str]:
        """Return the names of the transforms whose inputs a segment computes."""
        graph = getattr(self._split, segment).graph
        names = [node.meta.get("parofx_transform") for node in graph.nodes if node.target is ROTATE]
        return list(dict.fromkeys(name for name in names if name is not None))

    def last_segment_of(self, transform: str) -> str:
        """Return the segment after which all of a transform's inputs have been seen."""
        return next(segment for segment in reversed(self.segments) if transform in self.transforms_of(segment))

    def run(self, segment: str, record: Recorder) -> Iterator[int]:
        """Run one segment for all batches, replacing the borders; yields the index of each batch when it is done."""
        start = next(i for i, node in enumerate(self._nodes) if node.op == "call_module" and node.target == segment)
        node = self._nodes[start]
        module = getattr(self._split, segment)
        for index, border in enumerate(self.borders):
            runner = _Recorder(module, record, self._masks[index])
            with torch.no_grad():
                border[node.name] = runner.run(*(self._value(source, border) for source in node.args))
            if segment == self.segments[-1]:
                border.clear()  # it gave nothing back, and no segment is left to read the rest
            else:
                self._advance(start + 1, border)
            yield index

    def _value(self, source: Any, border: Border) -> Any:
        if source.op == "get_attr":
            return get_attribute(self._split, str(source.target))
        return border[source.name]

    def _advance(self, position: int, border: Border) -> None:
        """Take apart what a segment returned and drop what no later node reads."""
        end = position
        while end < len(self._nodes) and self._nodes[end].op == "call_function":
            node = self._nodes[end]
            source, index = node.args
            assert isinstance(source, Node)
            border[node.name] = border[source.name][index]
            end += 1
        by_name = {node.name: node for node in self._nodes}
        for name in [name for name in border if self._last_use.get(by_name[name], -1) < end]:
            del border[name]


class _Recorder(Interpreter):
    """Runs a segment; rotations hand their input on, and report it if it is an activation."""

    def __init__(self, module: GraphModule, record: Recorder, mask: Tensor | None) -> None:
        super().__init__(module)
        # What is raised names the transform; the traceback of the model's own code would only hide it.
        self.extra_traceback = False
        self._record = record
        self._mask = mask

    def run_node(self, n: Node) -> Any:
        if n.target is ROTATE or n.target is FAKE_QUANTIZE:
            value = self.env[n.args[0]]  # type: ignore[index]
            name = n.meta.get("parofx_transform")
            if name is not None:
                self._record(name, _select_rows(value, self._mask))
            return value
        return super().run_node(n)


def _until_last_rotation(module: GraphModule) -> GraphModule:
    """Return a segment that ends at its last rotation and gives nothing back."""
    nodes = list(module.graph.nodes)
    end = max(index for index, node in enumerate(nodes) if node.target is ROTATE)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in nodes[: end + 1]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    # The interpreter asks for every argument that the segment is called with.
    for node in nodes[end + 1 :]:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    graph.output(None)
    return GraphModule(module, graph)


def _select_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])
    # A mask over encoder tokens says nothing of tensors with another number of rows.
    return rows if mask is None or mask.numel() != len(rows) else rows[mask.to(rows.device)]


def _row_mask(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if not isinstance(mask, Tensor) or mask.dim() != 2 else mask.reshape(-1).bool()


def _bind_inputs(gm: GraphModule, nodes: Sequence[Node], batch: Mapping[str, Any]) -> Border:
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
    placeholders = [node for node in nodes if node.op == "placeholder"]
    if len(placeholders) != len(leaves):
        raise DataError(f"the captured graph takes {len(placeholders)} inputs, a calibration batch has {len(leaves)}")
    return {node.name: value for node, value in zip(placeholders, leaves, strict=True)}
