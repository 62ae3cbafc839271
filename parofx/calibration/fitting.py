"""Fit one transform, and round the weights behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from parofx import affine, rotation
from parofx.calibration.activation_energy import FeedbackEnergy
from parofx.calibration.feedback import ColumnFactor, RoundedWeight, damped, output_error, round_with_feedback
from parofx.calibration.output_feedback import round_with_output_feedback
from parofx.calibration.range_objective import fit_transform
from parofx.calibration.rounding import (
    choose_clipped_qparams,
    relative_error,
    relative_errors,
    rotated_block_gram,
    rotated_gram,
)
from parofx.calibration.statistics import InputStatistics
from parofx.config import CalibrationConfig
from parofx.precision import product_precision

#: Output channels on which the candidates of damping are compared.
_DAMPING_ROWS = 256


@dataclass(frozen=True)
class FittedTransform:
    """What calibration decides for one set of siblings.

    Attributes:
        pairs: int16 `(krot, K)`.
        theta: fp16 `(krot, K/2)`.
        channel_scales: fp16 `(1, K)`.
        grids: `(scales, zeros)` per linear, fp32 `(N_i, K/g)`.
        errors: expected relative squared output error per linear.
        loss_before: the objective without transform.
        loss_after: with it.
        codes: uint8 `(N_i, K)` per linear; None where they are the nearest ones to the model's own weight.
        nearest_errors: `errors` of the same grids with the nearest codes.
        damping: of error feedback; None without.
        corrections: `(up (N_i, r), down (r, K))` per linear, fp16, added to the rounded rotated weight; None without.
        uncorrected_errors: `errors` without them.
        joins_rows: whether rows took over errors of other rows.
    """

    pairs: Tensor
    theta: Tensor
    channel_scales: Tensor
    grids: tuple[tuple[Tensor, Tensor], ...]
    errors: tuple[float, ...]
    loss_before: float
    loss_after: float
    codes: tuple[Tensor, ...] | None = None
    nearest_errors: tuple[float, ...] | None = None
    damping: float | None = None
    corrections: tuple[tuple[Tensor, Tensor], ...] | None = None
    uncorrected_errors: tuple[float, ...] | None = None
    joins_rows: bool = False

    @property
    def angle_rms(self) -> float:
        """Root mean square of the angles, radians."""
        return float(self.theta.float().square().mean().sqrt()) if self.theta.numel() else 0.0

    def to(self, device: torch.device | str) -> FittedTransform:
        """Return it with its tensors on a device."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return FittedTransform(**pytree.tree_map_only(Tensor, lambda one: one.to(device), values))

    def weight(self, index: int) -> Tensor | None:
        """Return what a linear's weight was rounded to, fp32 `(N, K)` in the unrotated space; None where it stays."""
        if self.codes is None:
            return None
        group_size = self.pairs.shape[1] // self.grids[index][0].shape[1]
        rounded = RoundedWeight(self.codes[index], *self.grids[index]).dequantized()
        reciprocal = self.channel_scales.float().reciprocal()
        return rotation.inverse_rotate(rounded, self.pairs, self.theta, reciprocal, group_size)


def fit(
    weights: Sequence[Tensor],
    statistics: InputStatistics | None,
    held_out: InputStatistics | None = None,
    *,
    bits: Sequence[int],
    group_size: int,
    krot: int,
    config: CalibrationConfig,
    outputs: Sequence[Tensor] = (),
) -> FittedTransform:
    """Fit θ and channel scales on the siblings' weights `(N_i, K)`, then round each weight.

    Args:
        weights: the siblings' float weights.
        statistics: of their input; None weighs channels alike and judges rounding by plain squares.
        held_out: of the part of that input by which choices are made.
        bits: width of each one's codes. The rotation does not depend on it: the objective only changes scale.
        group_size: g.
        krot: rotation rounds.
        config: how to fit and to round.
        outputs: moments of the gradients at the siblings' outputs, by which error feedback joins rows; none rounds
            each row for itself.
    """
    device = weights[0].device
    with torch.enable_grad():
        found = fit_transform(
            weights,
            None if statistics is None else statistics.power.to(device),
            bits=bits[0],
            group_size=group_size,
            krot=krot,
            config=config,
            seed=config.seed,
            energy=energy_of(statistics, group_size, config, device),
        )
    pairs, theta, channel_scales = (one.to(device) for one in (found.pairs, found.theta, found.channel_scales))
    transform = Rotated(pairs, theta, channel_scales, group_size)
    rotated = [transform.weight(weight) for weight in weights]
    losses = (found.loss_before, found.loss_after)
    return round_rotated(
        rotated, transform, statistics, held_out, bits=bits, config=config, losses=losses, outputs=outputs
    )


def energy_of(
    statistics: InputStatistics | None, group_size: int, config: CalibrationConfig, device: torch.device
) -> FeedbackEnergy | None:
    """Return what rounding steps cost under error feedback; None where a fit expects rounding to nearest."""
    expects_feedback = config.objective == "ldl" and config.rounding == "feedback"
    if not expects_feedback or statistics is None or not statistics.full:
        return None
    return FeedbackEnergy(statistics.gram.to(device), group_size, _middle(config.damping))


@dataclass(frozen=True)
class Rotated:
    """The coordinates of a fitted transform: `pairs`, `theta` and `channel_scales` as they will be stored."""

    pairs: Tensor
    theta: Tensor
    channel_scales: Tensor
    group_size: int

    def weight(self, weight: Tensor) -> Tensor:
        """Return a weight in these coordinates."""
        return rotate_weight(weight, self.pairs, self.theta, self.channel_scales, self.group_size)

    def gram(self, statistics: InputStatistics) -> Tensor:
        """Return full second moments in these coordinates, `(K, K)`."""
        gram = statistics.gram.to(self.pairs.device)
        return rotated_gram(gram, self.pairs, self.theta, self.channel_scales, self.group_size)

    def block_gram(self, statistics: InputStatistics) -> Tensor:
        """Return the second moments inside groups in these coordinates, `(K/g, g, g)`."""
        gram = statistics.block_gram.to(self.pairs.device)
        return rotated_block_gram(gram, self.pairs, self.theta, self.channel_scales, self.group_size)


def round_rotated(
    rotated: Sequence[Tensor],
    transform: Rotated,
    statistics: InputStatistics | None,
    held_out: InputStatistics | None,
    *,
    bits: Sequence[int],
    config: CalibrationConfig,
    losses: tuple[float, float],
    outputs: Sequence[Tensor] = (),
) -> FittedTransform:
    """Choose grids and codes of rotated weights `(N_i, K)`: to nearest, or with error feedback on full statistics."""
    with product_precision("exact"):
        return _round_rotated(rotated, transform, statistics, held_out, bits, config, losses, outputs)


def _round_rotated(
    rotated: Sequence[Tensor],
    transform: Rotated,
    statistics: InputStatistics | None,
    held_out: InputStatistics | None,
    bits: Sequence[int],
    config: CalibrationConfig,
    losses: tuple[float, float],
    outputs: Sequence[Tensor],
) -> FittedTransform:
    parts = (transform.pairs, transform.theta, transform.channel_scales)
    if statistics is None or not statistics.full or config.rounding == "nearest":
        gram = None if statistics is None else transform.block_gram(statistics)
        grids = _choose_grids(rotated, gram, transform.group_size, bits, config)
        nearest = _nearest(rotated, grids, transform.group_size, bits)
        errors = tuple(relative_error(one, codes, gram) for one, codes in zip(rotated, nearest, strict=True))
        return FittedTransform(*parts, grids, errors, *losses)
    gram = transform.gram(statistics)
    damping = _middle(config.damping)
    columns = ColumnFactor.of(damped(gram, damping))
    grids = _choose_grids(rotated, columns.residual.view(-1, transform.group_size), transform.group_size, bits, config)
    weight, sizes = torch.cat(list(rotated)), [len(one) for one in rotated]
    widths = torch.tensor(bits, device=weight.device).repeat_interleave(torch.tensor(sizes, device=weight.device))
    scales, zeros = (torch.cat(one) for one in zip(*grids, strict=True))
    if config.chooses_damping and held_out is not None and 0 < held_out.count < statistics.count:
        share = held_out.count / statistics.count
        held = transform.gram(held_out)
        rest = (gram - share * held) / (1 - share)
        chosen = choose_damping(weight, scales, zeros, rest, held, bits=widths, config=config)
        if chosen != damping:
            damping, columns = chosen, ColumnFactor.of(damped(gram, chosen))
    feedback = partial(round_with_output_feedback, outputs=outputs) if outputs else round_with_feedback
    rounded = feedback(
        weight,
        damped(gram, damping),
        scales,
        zeros,
        bits=widths,
        group_size=transform.group_size,
        sweeps=config.sweeps,
        columns=columns,
    )
    parts_of = (torch.split(part, sizes) for part in (rounded.codes, rounded.scales, rounded.zeros))
    codes, scales_of, zeros_of = parts_of
    forms = zip(codes, scales_of, zeros_of, strict=True)
    both = [
        relative_errors(one, (RoundedWeight(*form).dequantized(), near), gram[None])
        for one, form, near in zip(rotated, forms, _nearest(rotated, grids, transform.group_size, bits), strict=True)
    ]
    return FittedTransform(
        *parts,
        tuple(zip(scales_of, zeros_of, strict=True)),
        tuple(one[0] for one in both),
        *losses,
        codes=codes,
        nearest_errors=tuple(one[1] for one in both),
        damping=damping,
        joins_rows=bool(outputs),
    )


def _choose_grids(
    rotated: Sequence[Tensor],
    moments: Tensor | None,
    group_size: int,
    bits: Sequence[int],
    config: CalibrationConfig,
) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(
        choose_clipped_qparams(one, bits=width, group_size=group_size, clip_ratios=config.clip_ratios, moments=moments)
        for one, width in zip(rotated, bits, strict=True)
    )


def _nearest(
    rotated: Sequence[Tensor], grids: Sequence[tuple[Tensor, Tensor]], group_size: int, bits: Sequence[int]
) -> Iterator[Tensor]:
    """Yield the weights rounded to nearest."""
    for one, grid, width in zip(rotated, grids, bits, strict=True):
        yield affine.fake_quantize(one, *grid, width, group_size)


def _middle(candidates: Sequence[float]) -> float:
    return sorted(candidates)[len(candidates) // 2]


def choose_damping(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    gram: Tensor,
    held_out: Tensor,
    *,
    bits: int | Tensor,
    config: CalibrationConfig,
) -> float:
    """Return the candidate of `config.damping` whose rounding has the smallest error on held-out moments `(K, K)`.

    `bits` are those of all rows, or of each, `(N,)`.

    It is judged on a sample of output channels, without the sweeps, which cost more than they would tell.
    """
    sample = slice(None, None, -(-len(weight) // _DAMPING_ROWS))
    weight, scales, zeros = weight[sample], scales[sample], zeros[sample]
    bits = bits[sample] if isinstance(bits, Tensor) else bits
    group_size = weight.shape[1] // scales.shape[1]

    def error(damping: float) -> float:
        rounded = round_with_feedback(
            weight, damped(gram, damping), scales, zeros, bits=bits, group_size=group_size, sweeps=0
        )
        return output_error(weight, rounded.dequantized(), held_out).sum().item()

    return min(config.damping, key=error)


def rotate_weight(weight: Tensor, pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> Tensor:
    """Return `ROT(W ⊘ channel_scales) (N, K)` in fp32, the scales as rounded to fp16."""
    reciprocal = channel_scales.float().reciprocal()
    return rotation.rotate(weight.float(), pairs, theta, reciprocal, group_size)
