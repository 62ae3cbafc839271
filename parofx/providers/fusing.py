"""Providers whose producers rotate: what `fuse_producers` asks them, and what `lower` hands them.

A provider that has no such kernels is a plain `Provider`; nothing is fused for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch.fx import Node

from parofx.passes.graph import RMSNORM_ROTATE
from parofx.providers.base import Provider, SiblingCall


@dataclass(frozen=True)
class FusedCall:
    """An `int4_siblings` node and the producer, `rmsnorm_rotate` or `silu_mul_rotate`, of its inputs.

    `call` describes both together: its `x` is the producer's first input, its rotations are the producer's.
    """

    call: SiblingCall
    producer: Node

    @property
    def has_total(self) -> bool:
        """Whether the producer returns a residual sum, behind the rotated tensors."""
        return self.producer.target is RMSNORM_ROTATE and self.producer.args[1] is not None


@runtime_checkable
class FusingProvider(Provider, Protocol):
    """A provider that also serves fused calls."""

    def why_not_fuse(self, call: SiblingCall) -> str | None:
        """Return why the producer of a call's input should not rotate it, or None; pure."""
        ...

    def emit_fused(self, fused: FusedCall) -> tuple[list[Node], Node | None]:
        """Insert operators before the producer, and before the call, and return one output per linear and the sum."""
        ...


def unfuse(fused: FusedCall) -> tuple[Node, Node | None]:
    """Insert the producer as ATen operators, without rotation; return its result and the sum."""
    aten = torch.ops.aten
    graph, producer = fused.call.gm.graph, fused.producer

    def call(target: object, *args: object) -> Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {key: value for key, value in producer.meta.items() if key != "val"}
        node.meta["val"] = value
        return node

    first = producer.args[0]
    assert isinstance(first, Node)
    value = first.meta["val"]
    with graph.inserting_before(producer):
        if producer.target is not RMSNORM_ROTATE:
            gate, up = producer.args[:2]
            return call(aten.mul.Tensor, call(aten.silu.default, gate), up), None
        x, residual, weight, weight_offset, eps = producer.args[:5]
        total = None if residual is None else call(aten.add.Tensor, x, residual)
        if weight is not None and weight_offset:
            weight = call(aten.add.Scalar, weight, weight_offset)
            weight.meta["val"] = weight.args[0].meta["val"]  # type: ignore[union-attr]
        source = x if total is None else total
        return call(aten.rms_norm.default, source, [value.shape[-1]], weight, eps), total
