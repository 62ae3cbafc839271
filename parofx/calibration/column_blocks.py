"""Columns of a weight rounded one after the other, each to its best grid point after what came before it.

Tensors are channels first, `(columns, N)`. What the columns d before a column c changed moves it by
`Σ_d coupling[c, d]·change[d]`. On CPUs the loop is compiled; elsewhere, or without a compiler, it is a loop of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parofx.calibration import compiled

#: Columns between two updates of all others; the compiled loop takes no more.
BLOCK = 128


@dataclass(frozen=True)
class Grid:
    """The grid points of a weight: `steps·scale` with `low ≤ steps ≤ high`, integers; tensors `(K/g, N)`."""

    scales: Tensor
    low: Tensor
    high: Tensor
    group_size: int


@dataclass(frozen=True)
class ColumnBlock:
    """What a block of columns is rounded by.

    Attributes:
        channels: which of the K channels they are, int64 on the CPU.
        base: what they are without the others' changes, `(columns, N)`; it may be overwritten.
        coupling: `(columns, columns)`, contiguous.
    """

    channels: Tensor
    base: Tensor
    coupling: Tensor


def feed_back(steps: Tensor, changes: Tensor, block: ColumnBlock, grid: Grid, exact: Tensor) -> None:
    """Round columns to what is nearest, the last one first; the others take over what is left of `exact`.

    Args:
        steps: of all channels, `(K, N)`; those of the block are written.
        changes: `(columns, N)`, is given `exact − steps·scale`.
        block: the columns.
        grid: of all channels.
        exact: the columns of the weight, `(columns, N)`.
    """
    if compiled.has_loops_for(steps):
        _round_columns(steps, changes, block, grid, exact, None)
        return
    for column, channel in reversed(list(enumerate(block.channels.tolist()))):
        group, own = channel // grid.group_size, steps[channel]
        torch.div(block.base[column], grid.scales[group], out=own)
        own.round_().clamp_(grid.low[group], grid.high[group])
        torch.addcmul(exact[column], own, grid.scales[group], value=-1, out=changes[column])
        block.base[:column].addr_(block.coupling[:column, column], changes[column])


def descend(steps: Tensor, changes: Tensor, block: ColumnBlock, grid: Grid, curvature: Tensor) -> None:
    """Move columns to where the error is least while all others rest, the first one first.

    Args:
        steps: of all channels, `(K, N)`; those of the block are moved.
        changes: `(columns, N)`, is given what the columns moved by.
        block: the columns; `base` is the slope of half the error, downwards.
        grid: of all channels.
        curvature: of half the error, `(columns,)` on the CPU.
    """
    if compiled.has_loops_for(steps):
        _round_columns(steps, changes, block, grid, None, curvature[None])
        return
    for column, (channel, bend) in enumerate(zip(block.channels.tolist(), curvature.tolist(), strict=True)):
        group, own = channel // grid.group_size, steps[channel]
        best = torch.addcdiv(own, block.base[column], grid.scales[group], value=1 / bend)
        best.round_().clamp_(grid.low[group], grid.high[group])
        torch.mul(best - own, grid.scales[group], out=changes[column])
        own.copy_(best)
        block.base[column + 1 :].addr_(block.coupling[column + 1 :, column], changes[column])


def _round_columns(
    steps: Tensor, changes: Tensor, block: ColumnBlock, grid: Grid, exact: Tensor | None, curvature: Tensor | None
) -> None:
    torch.ops.parofx_cpu.round_columns(
        steps,
        changes,
        block.base,
        block.coupling,
        block.channels,
        grid.scales,
        grid.low,
        grid.high,
        grid.group_size,
        exact,
        curvature,
    )
