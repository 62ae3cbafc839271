"""What flows through the segments of a calibration run, measured on tensors without memory.

A graph of a model on the meta device runs like any other, and its results have shapes. Batches of equal shapes are run
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from parofx.calibration.stream import BlockStream, Border
from parofx.passes.graph import FAKE_QUANTIZE, ROTATE


@dataclass
class SegmentTraffic:
    """One segment, all batches taken together unless it says otherwise.

    Args:
        transforms: those whose inputs it computes.
        border: bytes of the values in front of it or behind it, whichever are more.
        outputs: bytes of what it returns.
        forward: bytes alive at a time in its largest forward, of one batch.
        saved: bytes of all that its largest forward computes, of one batch.
        flops: of its forwards.
        rows: rows of the largest batch that reach one of its transforms.
        all_rows: those of all batches.
    """

    transforms: tuple[str, ...]
    border: int = 0
    outputs: int = 0
    forward: int = 0
    saved: int = 0
    flops: int = 0
    rows: int = 0
    all_rows: int = 0


def measure_segments(
    gm: GraphModule, batches: Sequence[Mapping[str, Any]], *, whole: bool = False
) -> tuple[SegmentTraffic, ...]:
    """Return what each segment holds that `DataRun` would run.

    Args:
        gm: a PREPARED graph on the meta device.
        batches: on the meta device too.
        whole: whether those behind the last transform run as well, as distillation has it.
    """
    alike = Counter(_shapes(batch) for batch in batches)
    stream = BlockStream(gm, list({_shapes(batch): batch for batch in batches}.values()))
    segments = {name: SegmentTraffic(tuple(stream.transforms_of(name))) for name in stream.segments}
    last = max((index for index, one in enumerate(segments.values()) if whole or one.transforms), default=-1)
    for name, segment in list(segments.items())[: last + 1]:
        module = stream.module(name)
        for border, count in zip(stream.borders, alike.values(), strict=True):
            before = size_of(border)
            runner = _Measuring(module)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                output = runner.run(*stream.arguments(name, border))
            stream.advance(name, border, output)
            segment.border += count * max(before, size_of(border))
            segment.outputs += count * size_of(output)
            segment.flops += count * counter.get_total_flops()
            segment.forward = max(segment.forward, runner.peak)
            segment.saved = max(segment.saved, runner.total)
            segment.rows = max(segment.rows, runner.rows)
            segment.all_rows += count * runner.rows
    return tuple(segments.values())[: last + 1]


def size_of(values: Border | object) -> int:
    """Return the bytes of the tensors among values, each counted for itself."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _shapes(batch: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple((name, tuple(one.shape) if isinstance(one, Tensor) else one) for name, one in sorted(batch.items()))


class _Measuring(Interpreter):
    """Runs a segment, transforms as identities, and adds up what its results take; a view counts as a result."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.total = self.peak = self.rows = 0
        self._alive: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node and count it."""
        if n.target is ROTATE or n.target is FAKE_QUANTIZE:
            value = self.env[n.args[0]]  # type: ignore[index]
            if "parofx_transform" in n.meta:
                self.rows = max(self.rows, value.numel() // value.shape[-1])
            return value
        value = super().run_node(n)
        if n.op.startswith("call"):
            self._alive[n] = size_of(value)
            self.total += self._alive[n]
            self.peak = max(self.peak, sum(self._alive.values()))
        for dead in self.user_to_last_uses.get(n, ()):
            self._alive.pop(dead, None)
        return value
