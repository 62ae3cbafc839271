"""Fit one transform and the grids of the weights behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parofx import affine, rotation
from parofx.calibration.range_objective import fit_transform
from parofx.calibration.rounding import choose_clipped_qparams, relative_error, rotated_block_gram
from parofx.config import CalibrationConfig


@dataclass(frozen=True)
class FittedTransform:
    """What calibration decides for one set of siblings.

    Attributes:
        pairs: int16 `(krot, K)`.
        theta: fp16 `(krot, K/2)`.
        channel_scales: fp16 `(1, K)`.
        grids: `(scales, zeros)` per linear, fp32 `(N_i, K/g)`.
        errors: expected relative squared output error per linear.
        loss_before: the range objective without transform.
        loss_after: with it.
    """

    pairs: Tensor
    theta: Tensor
    channel_scales: Tensor
    grids: tuple[tuple[Tensor, Tensor], ...]
    errors: tuple[float, ...]
    loss_before: float
    loss_after: float

    @property
    def angle_rms(self) -> float:
        """Root mean square of the angles, radians."""
        return float(self.theta.float().square().mean().sqrt()) if self.theta.numel() else 0.0


def fit(
    weights: Sequence[Tensor],
    power: Tensor | None,
    block_gram: Tensor | None,
    *,
    bits: int,
    group_size: int,
    krot: int,
    config: CalibrationConfig,
) -> FittedTransform:
    """Fit θ and channel scales on the siblings' weights `(N_i, K)`, then choose each weight's grid.

    Args:
        weights: the siblings' float weights.
        power: `E[x²]`, `(K,)`; None weighs channels alike.
        block_gram: `E[x xᵀ]` inside groups, `(K/g, g, g)`; None judges rounding by plain squares.
        bits: width of a weight.
        group_size: g.
        krot: rotation rounds.
        config: how to fit and to round.
    """
    device = weights[0].device
    with torch.enable_grad():
        found = fit_transform(
            weights, power, bits=bits, group_size=group_size, krot=krot, config=config, seed=config.seed
        )
    pairs, theta, channel_scales = (one.to(device) for one in (found.pairs, found.theta, found.channel_scales))
    if block_gram is not None:
        block_gram = rotated_block_gram(block_gram, pairs, theta, channel_scales, group_size)
    grids, errors = [], []
    for weight in weights:
        rotated = rotate_weight(weight, pairs, theta, channel_scales, group_size)
        scales, zeros = choose_clipped_qparams(
            rotated, bits=bits, group_size=group_size, clip_ratios=config.clip_ratios, block_gram=block_gram
        )
        rounded = affine.fake_quantize(rotated, scales, zeros, bits, group_size)
        grids.append((scales, zeros))
        errors.append(relative_error(rotated, rounded, block_gram))
    return FittedTransform(
        pairs, theta, channel_scales, tuple(grids), tuple(errors), found.loss_before, found.loss_after
    )


def rotate_weight(weight: Tensor, pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> Tensor:
    """Return `ROT(W ⊘ channel_scales) (N, K)` in fp32, the scales as rounded to fp16."""
    reciprocal = channel_scales.float().reciprocal()
    return rotation.rotate(weight.float(), pairs, theta, reciprocal, group_size)
