"""Low-rank correction: what rounding took from a weight, as far as a product of two thin matrices can give it back.

With the error `E = W − Ŵ (N, K)` of a rotated weight and the second moments `H = L Lᵀ` of its inputs, a correction
`U V` leaves the expected squared output error `|(E − U V) L|²`. The best of rank r is the truncated singular value
decomposition of `E L`, with `V L` in place of its right factor. What it does not give back, `W − U V`, is then rounded
anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from parofx import affine
from parofx.calibration.feedback import RoundedWeight, damped
from parofx.calibration.fitting import FittedTransform, Rotated, round_rotated
from parofx.calibration.rounding import relative_error
from parofx.calibration.statistics import InputStatistics
from parofx.config import CalibrationConfig
from parofx.precision import product_precision

#: Dimensions and power iterations by which the randomized decomposition exceeds the rank asked for.
_OVERSAMPLING = 8
_ITERATIONS = 3
#: Damping of moments that no error feedback has chosen one for.
_DAMPING = 0.1


def fit_corrections(
    fitted: FittedTransform,
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    held_out: InputStatistics | None,
    *,
    bits: Sequence[int],
    config: CalibrationConfig,
) -> FittedTransform:
    """Return a fitted transform with a correction for each sibling, behind which weights are rounded anew if that pays.

    Args:
        fitted: the transform and what rounding made of the weights.
        weights: the siblings' float weights `(N_i, K)`.
        statistics: of their input; None for plain squares.
        held_out: of the part of it by which choices are made.
        bits: width of each one's codes.
        config: `compensation_rank` and how to round.
    """
    with product_precision("exact"):
        group_size = fitted.pairs.shape[1] // fitted.grids[0][0].shape[1]
        transform = Rotated(fitted.pairs, fitted.theta, fitted.channel_scales, group_size)
        rotated = [transform.weight(weight) for weight in weights]
        gram = _moments(transform, statistics)
        factor = torch.linalg.cholesky(damped(gram, fitted.damping or _DAMPING).double()).float()
        corrections = tuple(
            low_rank(one - found, factor, config.compensation_rank, seed=config.seed)
            for one, found in zip(rotated, _rounded(fitted, rotated, bits), strict=True)
        )
        products = [up.float() @ down.float() for up, down in corrections]
        rest = [one - product for one, product in zip(rotated, products, strict=True)]
        if fitted.damping is not None:
            config = dataclasses.replace(config, damping=(fitted.damping,))
        losses = (fitted.loss_before, fitted.loss_after)
        again = round_rotated(rest, transform, statistics, held_out, bits=bits, config=config, losses=losses)
        measure = None if statistics is None else gram[None] if statistics.full else transform.block_gram(statistics)
        candidates = []
        for found, given in ((again, rest), (fitted, rotated)):
            errors = tuple(
                relative_error(one, rounded + product, measure)
                for one, rounded, product in zip(rotated, _rounded(found, given, bits), products, strict=True)
            )
            candidates.append(dataclasses.replace(found, errors=errors, codes=_codes(found, given, bits)))
    best = min(candidates, key=lambda found: sum(found.errors))
    return dataclasses.replace(
        best, nearest_errors=fitted.nearest_errors, corrections=corrections, uncorrected_errors=fitted.errors
    )


def low_rank(error: Tensor, factor: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return `U (N, r)` and `V (r, K)`, fp16, that lower `|(E − U V) L|²` most, of rank `min(rank, N, K)`.

    Args:
        error: E, `(N, K)`.
        factor: L, lower triangular `(K, K)`.
        rank: r.
        seed: of the directions that the decomposition starts from.
    """
    rank = min(rank, *error.shape)
    weighted = error @ factor
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = min(rank + _OVERSAMPLING, *weighted.shape)
        left, values, right = torch.svd_lowrank(weighted, q=size, niter=_ITERATIONS)
    up = left[:, :rank] * values[:rank]
    down = torch.linalg.solve_triangular(factor, right[:, :rank].t().contiguous(), upper=False, left=False)
    # Both halves of one magnitude: neither leaves the range of fp16.
    tiny = torch.finfo(torch.float32).tiny
    balance = (down.abs().amax(1).clamp(min=tiny) / up.abs().amax(0).clamp(min=tiny)).sqrt()
    balance = torch.where(values[:rank] > 0, balance, 0.0)
    return (up * balance).half(), (down / balance.clamp(min=tiny)[:, None] * (balance > 0)[:, None]).half()


def _moments(transform: Rotated, statistics: InputStatistics | None) -> Tensor:
    """Return the rotated inputs' second moments, `(K, K)`, as far as they were kept."""
    if statistics is None:
        return torch.eye(transform.pairs.shape[1], device=transform.pairs.device)
    if statistics.full:
        return transform.gram(statistics)
    blocks: Tensor = torch.block_diag(*transform.block_gram(statistics))  # type: ignore[no-untyped-call]
    return blocks


def _codes(fitted: FittedTransform, rotated: Sequence[Tensor], bits: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the codes of each weight, `(N_i, K)`: those that were chosen, or the nearest ones."""
    if fitted.codes is not None:
        return fitted.codes
    return tuple(
        affine.quantize(one, *grid, width, one.shape[1] // grid[0].shape[1])
        for one, grid, width in zip(rotated, fitted.grids, bits, strict=True)
    )


def _rounded(fitted: FittedTransform, rotated: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
    """Return what the weights `(N_i, K)` were rounded to."""
    codes = _codes(fitted, rotated, bits)
    return [RoundedWeight(one, *grid).dequantized() for one, grid in zip(codes, fitted.grids, strict=True)]
