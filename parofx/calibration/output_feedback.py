"""Error feedback between the output channels of a linear: rows take over what other rows got wrong.

Let `g` be the gradient of the model's log-likelihood at a linear's output, `S = E[g gᵀ]` and `H = E[x xᵀ]`. What errors
`E = W − Ŵ (N, K)` cost the model's distribution is about `tr(S E H Eᵀ)`, the Kronecker form of its curvature (YAQA,
arXiv 2505.22988). Write `S = L D Lᵀ` with L unit lower triangular in blocks of rows; then

    tr(S E H Eᵀ) = Σ_b tr(D_b F_b H F_bᵀ),    F_b = E_b + Σ_{c>b} L_cbᵀ E_c,

so that blocks are rounded from the last to the first, each as a weight of its own whose target is
`W_b + Σ_{c>b} L_cbᵀ E_c`, with feedback between its columns. Inside a block D_b is taken as diagonal: its rows are
rounded side by side. The rows whose errors cost most come first, as they have all others to correct theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parofx import affine
from parofx.calibration.feedback import ColumnFactor, RoundedWeight, damped, lower_factor, round_with_feedback
from parofx.errors import ShapeError

#: Relative to the mean of S's diagonal: few positions say little of how errors of outputs join.
_DAMPING = 0.3
#: Blocks of rows are at least so large, and so many at most: each takes all steps along the columns.
_LEAST_ROWS = 32
_MOST_BLOCKS = 8


def round_with_output_feedback(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    outputs: Sequence[Tensor],
    bits: int | Tensor,
    group_size: int,
    sweeps: int,
    columns: ColumnFactor | None = None,
) -> RoundedWeight:
    """Round a weight so that the model's distribution, rather than the weight's outputs, stays close.

    By `tr(S E H Eᵀ)` no part of the rows is worse than rounded to nearest.

    Args:
        weight: `(N, K)`, in the space in which it is rounded.
        gram: H in that space, `(K, K)`, positive definite (`damped`).
        scales: fp16 values `(N, K/g)`.
        zeros: integers `(N, K/g)`.
        outputs: S of consecutive rows, `(n, n)` each; their sizes add up to N.
        bits: width of a code, of all rows or of each, `(N,)`.
        group_size: channels per group, g.
        sweeps: as for `round_with_feedback`.
        columns: of `gram`.

    Raises:
        ShapeError: if the tensors do not fit together.
    """
    sizes = [tuple(one.shape) for one in outputs]
    if any(len(one) != 2 or one[0] != one[1] for one in sizes) or sum(one[0] for one in sizes) != len(weight):
        raise ShapeError(f"outputs must be square and their sizes add up to {len(weight)} rows, got {sizes}")
    widths = bits if isinstance(bits, Tensor) else torch.full((len(weight),), bits, device=weight.device)
    weight = weight.to(gram.dtype)
    nearest = affine.quantize(weight, scales, zeros, widths, group_size)
    result = RoundedWeight(nearest.clone(), scales.clone(), zeros)
    errors = torch.zeros_like(weight)
    columns = columns or ColumnFactor.of(gram)
    chains, first = [], 0
    for moments in outputs:
        chains.append(_Chain.of(moments.to(gram), first))
        first += len(moments)
    for turn in reversed(range(max((len(one.blocks) for one in chains), default=0))):
        due = [chain.blocks[turn] for chain in chains if turn < len(chain.blocks)]
        rows = torch.cat([block.rows for block in due])
        target = torch.cat([weight[block.rows] + block.taken_over.t() @ errors[block.later] for block in due])
        rounded = round_with_feedback(
            target,
            gram,
            scales[rows],
            zeros[rows],
            bits=widths[rows],
            group_size=group_size,
            sweeps=sweeps,
            columns=columns,
        )
        result.codes[rows], result.scales[rows] = rounded.codes, rounded.scales
        errors[rows] = weight[rows] - rounded.dequantized()
    plain = weight - RoundedWeight(nearest, scales, zeros).dequantized()
    for chain in chains:
        part = slice(chain.first, chain.first + len(chain.moments))
        if not joint_error(errors[part], gram, chain.moments) <= joint_error(plain[part], gram, chain.moments):
            result.codes[part], result.scales[part] = nearest[part], scales[part]
    return result


def joint_error(error: Tensor, gram: Tensor, moments: Tensor) -> float:
    """Return `tr(S E H Eᵀ)` for an error E `(N, K)`, H `(K, K)` and S `(N, N)`."""
    return ((moments @ error) * (error @ gram)).sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class _Block:
    """Rows that are rounded side by side: they take over `taken_overᵀ (n, later)` of the errors of later ones."""

    rows: Tensor
    later: Tensor
    taken_over: Tensor


@dataclass(frozen=True)
class _Chain:
    """Rows that take over each other's errors: blocks in the order of their factor, and S, damped."""

    first: int
    moments: Tensor
    blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, moments: Tensor, first: int) -> _Chain:
        """Return the chain of the rows from `first` on with moments S `(n, n)`."""
        moments = damped(moments, _DAMPING)
        order = moments.diagonal().argsort()
        factor = lower_factor(moments[order][:, order].double())
        count = min(max(len(moments) // _LEAST_ROWS, 1), _MOST_BLOCKS)
        blocks = []
        for part in torch.arange(len(moments)).tensor_split(count):
            begin, end = int(part[0]), int(part[-1]) + 1
            block = factor[begin:end, begin:end]
            below = torch.linalg.solve_triangular(block, factor[end:, begin:end], upper=False, left=False)
            blocks.append(_Block(order[begin:end] + first, order[end:] + first, below.to(moments.dtype)))
        return cls(first, moments, tuple(blocks))
