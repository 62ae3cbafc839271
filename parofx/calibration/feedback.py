"""Rounding with error feedback: each column takes over what the columns before it got wrong.

With errors `e = w − ŵ` of one row and the inputs' second moments H the expected squared output error is `e H eᵀ`.
Write `H = L D Lᵀ` with L unit lower triangular; then

    e H eᵀ = Σ_k D_k (e_k + Σ_{j>k} e_j L_jk)²,

so that columns rounded from the last to the first, each to the grid point nearest `w_k + Σ_{j>k} e_j L_jk`, leave only
their own rounding error (GPTQ, arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304). The columns of largest power
come first: they have no errors to take over, and all later ones to correct theirs.

What the greedy order misses, *sweeps* of coordinate descent find: every weight moves to its best grid point while all
others rest. Between sweeps the *scales* of each row are refitted to its codes, a least-squares problem of K/g unknowns.
Both only ever lower `e H eᵀ`. Rows are independent of each other.

Tensors are kept channels first, `(K, N)`, because one column of the weight is worked on at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parofx import affine
from parofx.affine import quant_maxima
from parofx.calibration import column_blocks
from parofx.calibration.column_blocks import ColumnBlock, Grid
from parofx.errors import ConfigError, ShapeError

#: Elements of the weight worked on at a time.
_CHUNK_ELEMENTS = 1 << 25
#: A refitted scale is kept within these factors of the one that the range gave.
_SCALE_BOUNDS = (0.5, 1.5)
#: Weight of the present scales in the refit, relative to the mean curvature: keeps groups of zero codes solvable.
_SCALE_RIDGE = 1e-3


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as it is stored: codes uint8 `(N, K)`, fp32 scales (fp16 values) and zeros (integers) `(N, K/g)`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantized(self) -> Tensor:
        """Return `(codes − zeros)·scales (N, K)`, fp32."""
        return affine.dequantize(self.codes, self.scales, self.zeros, self.codes.shape[1] // self.scales.shape[1])


@dataclass(frozen=True)
class ColumnFactor:
    """How errors of columns are taken over by others: `H[order][:, order] = L D Lᵀ`, L unit lower triangular.

    Attributes:
        order: of the columns; the last ones are rounded first.
        lower: L.
        residual: D's diagonal, of each column where it stands in H: what the columns behind cannot make up for.
    """

    order: Tensor
    lower: Tensor
    residual: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> ColumnFactor:
        """Factor damped moments `(K, K)`, the columns of largest power last."""
        order = gram.diagonal().argsort()
        factor = lower_factor(gram[order][:, order].double())
        sizes = factor.diagonal()
        residual = torch.empty_like(gram[0]).index_copy_(0, order, sizes.square().to(gram.dtype))
        return cls(order, (factor / sizes).to(gram.dtype), residual)


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return `gram + damping · mean(diag) · I`; the identity for inputs that are silent.

    Args:
        gram: `E[x xᵀ]`, `(K, K)`.
        damping: relative to the mean power, above 0. It stands for what more text would have shown.

    Raises:
        ConfigError: if the damping is not positive: moments of few rows, or of a dead channel, are singular.
    """
    if not damping > 0:
        raise ConfigError(f"damping must be positive, got {damping!r}")
    mean = gram.diagonal().double().mean().item()
    # Divided by the mean power, so that nothing that follows can overflow.
    result = gram / mean if mean > 0 else torch.zeros_like(gram)
    result.diagonal().add_(damping if mean > 0 else 1.0)
    return result


def lower_factor(gram: Tensor) -> Tensor:
    """Return the Cholesky factors of damped moments `(…, K, K)`.

    Raises:
        ConfigError: if they are singular in this precision.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed.any():
        raise ConfigError(
            "the inputs' second moments are singular: error feedback needs a larger CalibrationConfig.damping "
            "(0.1 by default), or calibration text that uses more of its input channels"
        )
    return factor


def round_with_feedback(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int | Tensor,
    group_size: int,
    sweeps: int,
    columns: ColumnFactor | None = None,
) -> RoundedWeight:
    """Round a weight so that its outputs, rather than its entries, stay close; never worse than to nearest.

    Args:
        weight: `(N, K)`, in the space in which it is rounded.
        gram: second moments of the inputs in that space, `(K, K)`, positive definite (`damped`).
        scales: fp16 values `(N, K/g)`.
        zeros: integers `(N, K/g)`.
        bits: width of a code, of all rows or of each, `(N,)`.
        group_size: channels per group, g.
        sweeps: rounds of coordinate descent, each followed by a refit of the scales.
        columns: of `gram`, where several weights are rounded by it.

    Raises:
        ShapeError: if the tensors do not fit together.
    """
    in_features = weight.shape[1]
    if tuple(gram.shape) != (in_features, in_features):
        raise ShapeError(
            f"gram must be {(in_features, in_features)} for a weight {tuple(weight.shape)}, got {tuple(gram.shape)}"
        )
    codes = affine.quantize(weight, scales, zeros, bits, group_size)
    scales, zeros = scales.clone(), zeros.clone()
    columns = columns or ColumnFactor.of(gram)
    rows = max(1, _CHUNK_ELEMENTS // in_features)
    for first in range(0, len(weight), rows):
        chunk = slice(first, first + rows)
        start = RoundedWeight(codes[chunk], scales[chunk], zeros[chunk])
        widths = bits[chunk] if isinstance(bits, Tensor) else bits
        problem = _Problem(weight[chunk], gram, start, widths, group_size)
        nearest = problem.steps
        problem.feed_back(columns)
        problem.keep_better(nearest)
        for _ in range(sweeps):
            problem.sweep()
            problem.refit_scales()
        codes[chunk], scales[chunk] = problem.codes(), problem.scales.t()
    return RoundedWeight(codes, scales, zeros)


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """Return `e H eᵀ` of each row, fp64 `(N,)`, for two matrices `(N, K)`."""
    error = (weight.float() - rounded.float()).to(gram.dtype)
    return ((error @ gram) * error).double().sum(1)


class _Problem:
    """The rows of one weight while they are rounded, channels first; `steps` are codes minus zeros, `(K, N)`."""

    def __init__(self, weight: Tensor, gram: Tensor, start: RoundedWeight, bits: int | Tensor, group_size: int) -> None:
        self.target = weight.to(gram.dtype).t().contiguous()
        self.gram = gram
        self.scales, self.zeros = (one.to(gram.dtype).t().contiguous() for one in (start.scales, start.zeros))
        self.group_size = group_size
        self.low, self.high = -self.zeros, quant_maxima(bits) - self.zeros
        self.steps = start.codes.t().to(gram.dtype).contiguous() - self.zeros.repeat_interleave(group_size, 0)
        self._slope: Tensor | None = None

    def codes(self) -> Tensor:
        """Return the codes `(N, K)`, uint8."""
        return (self.steps + self.zeros.repeat_interleave(self.group_size, 0)).t().to(torch.uint8)

    def feed_back(self, columns: ColumnFactor) -> None:
        """Round all columns, the last of their order first."""
        factor, channels = columns.lower, columns.order.cpu()
        self.steps = torch.empty_like(self.target)
        exact = self.target[columns.order]
        pending = exact.clone()
        errors = torch.empty_like(pending[: column_blocks.BLOCK])
        for begin, end in reversed(_blocks(len(pending))):
            coupling = factor[begin:end, begin:end].t().contiguous()
            block = ColumnBlock(channels[begin:end], pending[begin:end], coupling)
            column_blocks.feed_back(self.steps, errors[: end - begin], block, self._grid(), exact[begin:end])
            pending[:begin].addmm_(factor[begin:end, :begin].t(), errors[: end - begin])

    def sweep(self) -> None:
        """Move every weight to its best grid point, one after the other."""
        slope = self._slope_of(self.steps) if self._slope is None else self._slope
        self._slope = None
        curvature, channels = self.gram.diagonal().cpu().contiguous(), torch.arange(len(slope))
        moves = torch.empty_like(slope[: column_blocks.BLOCK])
        for begin, end in _blocks(len(slope)):
            block = ColumnBlock(
                channels[begin:end], slope[begin:end], self.gram[begin:end, begin:end].neg().contiguous()
            )
            column_blocks.descend(self.steps, moves[: end - begin], block, self._grid(), curvature[begin:end])
            slope[end:].addmm_(self.gram[end:, begin:end], moves[: end - begin], alpha=-1)

    def refit_scales(self) -> None:
        """Take the least-squares scales of each row's codes, rounded to fp16, where that lowers its error.

        A row's error is a quadratic in its scales, `sᵀ A s − 2 bᵀ s + …`.
        """
        groups, count = self.scales.shape
        shape = (groups, self.group_size, count)
        grouped = self.steps.view(shape)
        curvature = self.steps.new_empty(count, groups, groups)
        for group in range(groups):
            first, end = group * self.group_size, (group + 1) * self.group_size
            spread = (self.gram[:end, first:end] @ self.steps[first:end]).view(group + 1, self.group_size, count)
            shared = spread.mul_(grouped[: group + 1]).sum(1).t()
            curvature[:, : group + 1, group] = curvature[:, group, : group + 1] = shared
        present = self.scales.t()
        slope = (self._projected.view(shape) * grouped).sum(1).t() - torch.einsum("nab,nb->na", curvature, present)
        ridge = _SCALE_RIDGE * curvature.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
        move = torch.linalg.solve(curvature + torch.diag_embed(ridge[:, None].expand(-1, groups)), slope)
        low, high = _SCALE_BOUNDS
        fitted = (present + move).clamp(affine.SMALLEST_SCALE, affine.LARGEST_SCALE).half().to(present.dtype)
        fitted = torch.where((fitted > low * present) & (fitted < high * present), fitted, present)
        move = fitted - present
        change = ((torch.einsum("nab,nb->na", curvature, move) - 2 * slope) * move).sum(1, keepdim=True)
        self.scales = torch.where(change < 0, fitted, present).t().contiguous()

    def keep_better(self, steps: Tensor) -> None:
        """Return to other steps in the rows where those have no larger error."""
        slope, other = self._slope_of(self.steps), self._slope_of(steps)
        better = self._row_errors(self.steps, slope) < self._row_errors(steps, other)
        self.steps = torch.where(better, self.steps, steps)
        self._slope = torch.where(better, slope, other)

    @cached_property
    def _projected(self) -> Tensor:
        return self.gram @ self.target

    def _grid(self) -> Grid:
        return Grid(self.scales, self.low, self.high, self.group_size)

    def _error(self, steps: Tensor) -> Tensor:
        shape = (len(self.scales), self.group_size, -1)
        error = torch.addcmul(self.target.view(shape), steps.view(shape), self.scales[:, None], value=-1)
        return error.view(steps.shape)

    def _slope_of(self, steps: Tensor) -> Tensor:
        """Return `H eᵀ (K, N)`, half the slope of `e H eᵀ`, of the errors that steps leave."""
        return self.gram @ self._error(steps)

    def _row_errors(self, steps: Tensor, slope: Tensor) -> Tensor:
        return (slope * self._error(steps)).sum(0)


def _blocks(columns: int) -> list[tuple[int, int]]:
    size = column_blocks.BLOCK
    return [(begin, min(begin + size, columns)) for begin in range(0, columns, size)]
