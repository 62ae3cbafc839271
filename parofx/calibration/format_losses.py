"""What each format of a linear is predicted to cost: the loss of rounding its weight to it, and the bytes it takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parofx import affine
from parofx.calibration.fitting import Rotated
from parofx.calibration.range_objective import fit_transform
from parofx.calibration.rounding import choose_clipped_qparams
from parofx.calibration.sensitivity import Sensitivity
from parofx.calibration.statistics import InputStatistics
from parofx.config import CalibrationConfig
from parofx.linear_tensors import tensor_specs
from parofx.precision import product_precision

#: Optimizer steps of a fit that is only to be compared with others.
_STEPS = 20
#: Output channels that are rounded to tell how well all of them would be, and one of how many shrink factors is tried.
_ROWS = 256
_CLIP_STRIDE = 4


@dataclass(frozen=True, order=True)
class TransformFormat:
    """What siblings have in common: channels per group, and rotation rounds."""

    group_size: int
    krot: int


def stored_bytes(
    in_features: int, out_features: int, form: TransformFormat, bits: int, *, bias: bool, rank: int = 0
) -> int:
    """Return the bytes of a linear's checkpoint tensors, its copy of the rotation and its correction included."""
    rank = min(rank, in_features, out_features)
    specs = tensor_specs(in_features, out_features, form.group_size, form.krot, bias=bias, bits=bits, rank=rank)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


#: By linear and width.
Losses = list[list[float]]


def all_format_losses(
    forms: Sequence[TransformFormat],
    weights: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity | None],
    power: Tensor | None,
    bits: Sequence[Sequence[int]],
    config: CalibrationConfig,
) -> list[Losses]:
    """Return `format_losses` of every form.

    Those that share neither group size nor rounds with the first form are not measured: what smaller groups gain and
    what fewer rounds lose is taken to multiply.
    """
    first = forms[0]
    measured = {
        form: format_losses(weights, sensitivities, power, form, bits, config)
        for form in forms
        if form.group_size == first.group_size or form.krot == first.krot
    }

    def predicted(form: TransformFormat) -> Losses:
        if form in measured:
            return measured[form]
        narrow = measured[TransformFormat(form.group_size, first.krot)]
        slow = measured[TransformFormat(first.group_size, form.krot)]
        return [
            [one * other / base if base > 0 else 0.0 for one, other, base in zip(*parts, strict=True)]
            for parts in zip(narrow, slow, measured[first], strict=True)
        ]

    return [predicted(form) for form in forms]


@product_precision("exact")
def format_losses(
    weights: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity | None],
    power: Tensor | None,
    form: TransformFormat,
    bits: Sequence[Sequence[int]],
    config: CalibrationConfig,
) -> Losses:
    """Return the predicted loss of each sibling at each of its widths, rounded to nearest.

    Error feedback lowers them by factors that differ from linear to linear (ADR 0017), which hardly changes a choice.

    Args:
        weights: the siblings' float weights `(N_i, K)`.
        sensitivities: what errors in each cost; None takes the squared error over the squared weight.
        power: `E[x²]` of the siblings' input, `(K,)`; None without data.
        form: the transform's format.
        bits: widths of each to compare.
        config: how transforms are fitted and grids chosen.
    """
    quick = dataclasses.replace(config, steps=min(config.steps, _STEPS))
    with torch.enable_grad():
        found = fit_transform(
            weights,
            power,
            bits=bits[0][0],
            group_size=form.group_size,
            krot=form.krot,
            config=quick,
            seed=config.seed,
        )
    transform = Rotated(found.pairs, found.theta, found.channel_scales, form.group_size)
    losses = []
    for weight, sensitivity, widths in zip(weights, sensitivities, bits, strict=True):
        rows = slice(None, None, -(-len(weight) // _ROWS))
        rotated = transform.weight(weight[rows])
        if sensitivity is None:
            moments = _white(weight.shape[1], form.group_size)
            unit = 0.5 / weight[rows].float().square().sum(dtype=torch.float64).clamp(min=1e-30)
        else:
            moments, per_row = sensitivity.moments.narrowed(form.group_size), sensitivity.channels
            unit = per_row[rows].to(weight.device) * float(per_row.sum() / per_row[rows].sum().clamp(min=1e-30)) / 2
        gram = transform.block_gram(moments)
        losses.append(
            [(unit * _row_errors(rotated, gram, form.group_size, one, config)).sum().item() for one in widths]
        )
    return losses


def _white(in_features: int, group_size: int) -> InputStatistics:
    """Return moments of inputs that are all alike: by them an error counts as it is behind the inverse transform."""
    moments = InputStatistics(in_features, group_size)
    moments.update(group_size**0.5 * torch.eye(group_size, dtype=torch.float32).repeat(1, in_features // group_size))
    return moments


def _row_errors(rotated: Tensor, gram: Tensor, group_size: int, bits: int, config: CalibrationConfig) -> Tensor:
    """Return `ΔW_n M ΔW_nᵀ` of each row, fp64 `(N,)`."""
    grid = choose_clipped_qparams(
        rotated, bits=bits, group_size=group_size, clip_ratios=config.clip_ratios[::_CLIP_STRIDE], moments=gram
    )
    error = affine.grouped(affine.fake_quantize(rotated, *grid, bits, group_size) - rotated, group_size)
    return (torch.einsum("ngi,gij->ngj", error, gram) * error).sum((1, 2), dtype=torch.float64)
