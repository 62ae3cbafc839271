"""Transforms whose codes are decided: what is still continuous behind them, and what of it is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from parofx import affine
from parofx.calibration.block_student import TrainedTransform
from parofx.calibration.fitting import FittedTransform, rotate_weight
from parofx.pairing import trainable_angles
from parofx.passes.transforms import Transform


def start_from(transform: Transform, fitted: FittedTransform) -> TrainedTransform:
    """Return a transform to train, at what was fitted; its grids follow its weights."""
    weights = {linear.name: linear.weight for linear in transform.linears}
    parts = (fitted.pairs, fitted.theta, fitted.channel_scales)
    bits = {linear.name: linear.bits for linear in transform.linears}
    return TrainedTransform(*parts, weights, bits=bits, group_size=transform.group_size)


def with_fixed_codes(
    transforms: Iterable[Transform], fits: Mapping[str, FittedTransform]
) -> tuple[dict[str, TrainedTransform], dict[str, tuple[Tensor, ...]]]:
    """Return each transform to train behind the codes that were fitted, and these codes `(N_i, K)`."""
    trained, codes = {}, {}
    for one in transforms:
        fitted = fits[one.name]
        found = fitted.codes or tuple(
            affine.quantize(
                rotate_weight(linear.weight, fitted.pairs, fitted.theta, fitted.channel_scales, one.group_size),
                *grid, linear.bits, one.group_size,
            )
            for linear, grid in zip(one.linears, fitted.grids, strict=True)
        )  # fmt: skip
        trained[one.name], codes[one.name] = start_from(one, fitted), found
        for linear, own, grid in zip(one.linears, found, fitted.grids, strict=True):
            trained[one.name].fix_codes(linear.name, own, *grid)
    return trained, codes


def continuous(trained: Iterable[TrainedTransform]) -> list[Tensor]:
    """Return the tensors that fixed codes leave to train: scales, angles and channel scales."""
    found = []
    for transform in trained:
        found += [linear.scales for linear in transform.linears.values()]
        found += [one for one in (transform.theta, transform.log_alpha) if one.numel()]
    return found


def angle_masks(trained: Iterable[TrainedTransform]) -> list[tuple[Tensor, Tensor]]:
    """Return each transform's angles with what tells those of real pairs from those of dummies."""
    return [(one.theta, trainable_angles(one.pairs, one.group_size)) for one in trained]


def as_stored(
    fits: Mapping[str, FittedTransform],
    trained: Mapping[str, TrainedTransform],
    codes: Mapping[str, Sequence[Tensor]],
) -> dict[str, FittedTransform]:
    """Return fits with what was trained, in the precision that it is stored in."""
    return {
        name: dataclasses.replace(
            fits[name],
            theta=one.theta.detach().half(),
            channel_scales=one.channel_scales,
            grids=tuple((storable(linear.scales.detach().exp()), linear.zeros) for linear in one.linears.values()),
            codes=tuple(codes[name]),
        )
        for name, one in trained.items()
    }


def storable(scales: Tensor) -> Tensor:
    """Return scales as fp16 holds them, in fp32."""
    return scales.clamp(affine.SMALLEST_SCALE, affine.LARGEST_SCALE).half().float()
