"""What a provider is asked, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.config import Activations
from parofx.passes.derived import derived
from parofx.passes.graph import binding, buffer_node
from parofx.passes.layouts import roots, tensor_of


@dataclass(frozen=True)
class SiblingCall:
    """One `rotate_int4_siblings` node with the real tensors behind it.

    The nodes stand for the checkpoint's tensors. Where a module holds a kernel's layout they are outputs of a
    conversion; a provider of that layout reads what they were converted from (`passes.layouts`), any other need not
    know. `rotations` holds `(pairs, theta, channel_scales)` once, or per linear; `weights` `(qweight, qzeros, scales)`
    and `biases` are per linear. All codes have `bits` bits, and all linears have low-rank `corrections`, `down` of each
    and `up` of each, or none has. `rows` is M, or None where it is dynamic. With `activations` `"int8"`, rotated
    activations are quantized per (row, group) before they are multiplied.
    """

    gm: GraphModule
    node: Node
    x: Node
    device: torch.device
    dtype: torch.dtype
    rows: int | None
    rotations: tuple[tuple[Node, Node, Node], ...]
    weights: tuple[tuple[Node, Node, Node], ...]
    biases: tuple[Node | None, ...]
    group_size: int
    bits: int = 4
    corrections: tuple[tuple[Node, ...], tuple[Node, ...]] | None = None
    activations: Activations = "float"

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.x.meta["val"].shape[-1])

    @property
    def out_features(self) -> tuple[int, ...]:
        """N of each linear."""
        return tuple(int(value.shape[-1]) for value in self.node.meta["val"])

    def is_bound(self) -> bool:
        """Say whether every packed tensor is known when the graph is lowered."""
        nodes = [node for group in (*self.rotations, *self.weights, *(self.corrections or ())) for node in group]
        return all(binding(root) is not None for node in nodes for root in roots(node))

    def tensor(self, node: Node) -> Tensor:
        """Return the real tensor behind a node, in the checkpoint's layout; converted at each call if it must be."""
        return tensor_of(node)

    def constants(
        self, layout: str, sources: Sequence[Node], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Node, ...]:
        """Return `get_attr` nodes for tensors made from `sources`, computed once and shared between graphs.

        Args:
            layout: names what is made; part of the key.
            sources: the nodes whose tensors it is made from, the one that stands for it first.
            make: returns the tensors.
        """
        bound = [root for source in sources for root in roots(source)]
        tensors = derived(layout, [tensor_of(root) for root in bound], make)
        label = self.tensor_name(sources[0])
        nodes = []
        for index, tensor in enumerate(tensors):
            path = f"parofx_packed.{label}.{layout}_{index}"
            nodes.append(buffer_node(self.gm, path, tensor))
        inputs = {root for root in bound if root.op == "placeholder"}
        self.gm.meta.setdefault("parofx_made_from", set()).update(inputs)
        return tuple(nodes)

    def place_together(
        self, linears: Sequence[Sequence[Node]], place: Callable[[list[tuple[Tensor, ...]]], object]
    ) -> None:
        """Ask for the packed tensors of the call's linears to be moved into one buffer once the graph is compiled.

        Args:
            linears: the parameter nodes of each linear.
            place: called with their tensors; gives these other memory that holds the same.
        """
        tensors = [tuple(map(tensor_of, nodes)) for nodes in linears]
        once = list({id(parts[0]): parts for parts in tensors}.values())  # a weight may be called twice
        if len(once) > 1:
            self.gm.meta.setdefault("parofx_placements", []).append(partial(place, once))

    def tensor_name(self, node: Node) -> str:
        """Return the dotted name of the tensor behind a node, or of the first it is converted from."""
        bound = binding(roots(node)[0])
        assert bound is not None
        return bound.fqn


class Provider(Protocol):
    """Emits the operators that compute a merged call on one kind of device."""

    name: str

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why this provider does not serve a call, or None; pure."""
        ...

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert operators at the graph's insertion point and return one output node per linear."""
        ...
