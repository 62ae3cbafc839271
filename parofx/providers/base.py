"""What a provider is asked, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.derived import derived
from parofx.passes.graph import binding, buffer_node


@dataclass(frozen=True)
class SiblingCall:
    """One `rotate_int4_siblings` node with the real tensors behind it.

    `rotations` holds `(pairs, theta, channel_scales)` once, or per linear; `weights` `(qweight, qzeros, scales)` and
    `biases` are per linear. `rows` is M, or None where it is dynamic.
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

    @property
    def in_features(self) -> int:
        """K."""
        return self.tensor(self.weights[0][0]).shape[0]

    @property
    def out_features(self) -> tuple[int, ...]:
        """N of each linear."""
        return tuple(self.tensor(weight[2]).shape[1] for weight in self.weights)

    def is_bound(self) -> bool:
        """Say whether every packed tensor is known when the graph is lowered."""
        nodes = [node for group in (*self.rotations, *self.weights) for node in group]
        return all(binding(node) is not None for node in nodes)

    def tensor(self, node: Node) -> Tensor:
        """Return the real tensor behind a node."""
        bound = binding(node)
        assert bound is not None
        return bound.tensor

    def constants(
        self, layout: str, sources: Sequence[Node], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Node, ...]:
        """Return `get_attr` nodes for tensors made from `sources`, computed once and shared between graphs.

        Args:
            layout: names what is made; part of the key.
            sources: the nodes whose tensors it is made from, the one that stands for it first.
            make: returns the tensors.
        """
        tensors = derived(layout, [self.tensor(source) for source in sources], make)
        label = self.tensor_name(sources[0])
        nodes = []
        for index, tensor in enumerate(tensors):
            path = f"parofx_packed.{label}.{layout}_{index}"
            nodes.append(buffer_node(self.gm, path, tensor))
        inputs = {source for source in sources if source.op == "placeholder"}
        self.gm.meta.setdefault("parofx_made_from", set()).update(inputs)
        return tuple(nodes)

    def tensor_name(self, node: Node) -> str:
        """Return the dotted name of the tensor behind a node."""
        bound = binding(node)
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
