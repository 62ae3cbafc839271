"""Which rows of an activation an attention mask leaves out, found from the graph.

A mask `(batch, sequence)` speaks of the rows of the tensors that were computed from the inputs it comes with, and only
where their leading dimensions are `(batch, sequence)`, in either order, or both in one. Sizes are compared as the
capture knows them: symbols, which tell a batch from a sequence of the same length, or numbers where it is static.

| mask | comes with |
|-|-|
| `attention_mask` | the inputs of its shape that no other mask comes with, `input_ids` and `inputs_embeds` first |
| `encoder_attention_mask` | `encoder_…` |
| `decoder_attention_mask` | `decoder_…` |

Where that leaves a doubt, every row counts, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.graph import LINEAR, ROTATE, operator_name

logger = logging.getLogger("parofx")

_ROW_MASK = "parofx_row_mask"
_MASK = "attention_mask"
_STREAMS = ("encoder_", "decoder_")
_TOKENS = ("input_ids", "inputs_embeds")
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "alias"})
#: Operators besides the pointwise ones whose output has the rows of their first input.
_ROW_WISE = frozenset(
    {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "softmax", "_softmax", "dropout", "contiguous"}
)

#: Two sizes as text, symbols as they print.
_Sizes = tuple[str, str]


@dataclass(frozen=True)
class RowMask:
    """A mask that speaks of a tensor's rows: the input that holds it, and whether its sequence comes first there."""

    mask: str
    transposed: bool

    def select(self, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the rows `(M, K)` of a value that count; `masks` are those of its batch, by name."""
        return value[self.counting(value, masks)]

    def counting(self, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which rows of a value `(…, K)` count, bool `(…)`."""
        mask = masks[self.mask].to(device=value.device, dtype=torch.bool)
        mask = mask.t() if self.transposed else mask
        rows = value.shape[:-1]
        return mask[..., None].expand(*mask.shape, rows.numel() // max(mask.numel(), 1)).reshape(rows)


@dataclass(frozen=True)
class _Reach:
    """What a mask may speak of.

    Args:
        owner: the first of the inputs it comes with.
        sizes: of `(batch, sequence)`.
        computed: the nodes computed from the inputs it comes with.
        alike: the nodes computed from inputs of these sizes with which it does not come.
    """

    owner: str
    sizes: _Sizes
    computed: set[Node]
    alike: set[Node]


def row_mask_of(node: Node) -> RowMask | None:
    """Return the mask that `RowMasks.annotate` found for a tensor, also on a copy of its node; None if it has none."""
    found: RowMask | None = node.meta.get(_ROW_MASK)
    return found


def select_rows(node: Node, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Return the rows `(M, K)` that count of a node's value; `masks` are those of the batch, by name."""
    mask = row_mask_of(node)
    return value.reshape(-1, value.shape[-1]) if mask is None else mask.select(value, masks)


class RowMasks:
    """The masks among a graph's inputs, and the tensors whose rows each speaks of."""

    def __init__(self, gm: GraphModule) -> None:
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and _leading(node) is not None]
        masks = [node for node in inputs if node.name in _mask_names() and _value(node).dim() == 2]
        self._known: dict[str, _Reach] = {}
        for mask in masks:
            stream = mask.name.removesuffix(_MASK)
            candidates = [
                node
                for node in inputs
                if not node.name.endswith(_MASK) and _stream(node) == stream and _hints(node) == _hints(mask)
            ]
            owners = _owners(mask, candidates)
            if owners:
                sizes = _leading(owners[0])
                assert sizes is not None
                others = [node for node in inputs if node not in candidates and not node.name.endswith(_MASK)]
                alike = [node for node in others if _leading(node) in (sizes, sizes[::-1])]
                self._known[mask.name] = _Reach(owners[0].name, sizes, _computed_from(owners), _computed_from(alike))
            else:
                what = f"{', '.join(node.name for node in candidates)} equally" if candidates else "no input's shape"
                logger.warning("%s fits %s: no row is left out of the statistics for it", mask.name, what)
        self._told = False

    @property
    def names(self) -> tuple[str, ...]:
        """The masks that speak of some tensor."""
        return tuple(self._known)

    def annotate(self, gm: GraphModule) -> None:
        """Note the mask of every activation on its node, where `row_mask_of` finds it."""
        for node in gm.graph.nodes if self._known else ():
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
                node.meta[_ROW_MASK] = self.of(node)

    def why_not(self, inputs: Mapping[str, Any]) -> str | None:
        """Return why the masks of a batch cannot speak of its inputs, by placeholder name; None if they can."""
        for name, reach in self._known.items():
            expected, given = tuple(inputs[reach.owner].shape[:2]), tuple(inputs[name].shape)
            if given != expected:
                return f"{name} must have the shape {expected} of {reach.owner}, got {given}"
        return None

    def of(self, node: Node) -> RowMask | None:
        """Return the mask that speaks of a tensor's rows; None if every row counts."""
        found = [
            RowMask(name, transposed)
            for name, reach in self._known.items()
            if node in reach.computed
            for transposed in _orders(node, reach.sizes)
        ]
        if not found or (len(found) == 1 and node not in self._known[found[0].mask].alike):
            return found[0] if found else None
        if not self._told and "parofx_transform" in node.meta:
            names = " or ".join(sorted({one.mask for one in found}))
            logger.warning("which rows of %s %s masks is not clear: all of them count", node.name, names)
            self._told = True
        return None


def _mask_names() -> set[str]:
    return {_MASK, *(stream + _MASK for stream in _STREAMS)}


def _stream(node: Node) -> str:
    return next((stream for stream in _STREAMS if node.name.startswith(stream)), "")


def _owners(mask: Node, candidates: list[Node]) -> list[Node]:
    """Return the inputs a mask comes with: all of one pair of sizes, or none if that is not clear."""
    tied = [node for node in candidates if _leading(node) == _leading(mask)]
    tokens = [node for node in candidates if node.name.removeprefix(_stream(node)) in _TOKENS]
    for chosen in (tokens, tied, candidates):
        if chosen and len({_leading(node) for node in chosen}) == 1:
            # Two inputs of static sizes may be of one shape by chance.
            static = all(size.isdigit() for size in _leading(chosen[0]) or ())
            return chosen if not static or chosen is tokens or len(chosen) == 1 else []
    return []


def _computed_from(owners: Iterable[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = list(owners)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.users
    return found


def _orders(node: Node, sizes: _Sizes) -> set[bool]:
    """Return the orders in which a tensor's rows run over `(batch, sequence)`: False as it is, True transposed."""
    found: set[bool] = set()
    seen: set[Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        leading = _leading(one)
        orders = {transposed for transposed in (False, True) if leading == (sizes[::-1] if transposed else sizes)}
        found |= orders
        if not orders:
            pending += _inputs_of_equal_rows(one)
    return found


def _inputs_of_equal_rows(node: Node) -> list[Node]:
    """Return the inputs whose rows are a node's rows in the same order; none if that is not known."""
    sources = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    name = operator_name(node)
    if name in _VIEWS or name in _ROW_WISE or node.target in (LINEAR, ROTATE):
        sources = sources[:1]
    elif not (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags):
        return []
    rows = _rows(node)
    return [source for source in sources if _rows(source) == rows]


def _value(node: Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _leading(node: Node) -> _Sizes | None:
    """Return the first two sizes of a tensor with rows in at least two dimensions, or of a matrix that is an input."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < (2 if node.op == "placeholder" else 3):
        return None
    return str(value.shape[0]), str(value.shape[1])


def _hints(node: Node) -> tuple[int, ...]:
    """Return the first two sizes that the example inputs had."""
    return tuple(_hint(size) for size in _value(node).shape[:2])


def _rows(node: Node) -> int:
    """Return the number of rows that the example inputs gave a tensor, over its first two dimensions of many."""
    value = _value(node)
    sizes = [_hint(size) for size in value.shape]
    return sizes[0] * sizes[1] if len(sizes) > 2 else sizes[0] if sizes else 1


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else size
