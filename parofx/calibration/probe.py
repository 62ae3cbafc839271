"""How long calibration takes on this machine, estimated from short measurements.

A piece of each kind of work is timed: one product of matrices, one update of statistics, and, for every distinct shape
of a transform, a few steps of its fit and the rounding of some of its output channels. The times are multiplied by how
often each is due. What else runs on the machine counts as well; expect a factor of two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from parofx.calibration.fitting import Rotated, energy_of, round_rotated
from parofx.calibration.memory import TransformShape
from parofx.calibration.range_objective import TransformFit, fit_transform
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.traffic import SegmentTraffic
from parofx.config import CalibrationConfig
from parofx.precision import linear, product_precision

#: What is timed at most: rows of a product, optimizer steps, output channels.
_ROWS = 512
_STEPS = 4
_OUT_FEATURES = 512
#: A backward takes about two forwards.
_TRAINING_FORWARDS = 3
#: Blocks run twice, and the float model once besides; weights are computed anew each time.
_DISTILLED_FORWARDS = 6
#: Forward twice, and backward to inputs alone.
_PROBED_FORWARDS = 3


def estimate_seconds(
    config: CalibrationConfig,
    shapes: Sequence[TransformShape],
    segments: Sequence[SegmentTraffic],
    *,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
    distilled: Sequence[SegmentTraffic] = (),
    probed: Sequence[SegmentTraffic] = (),
    processes: int = 1,
) -> float:
    """Return the seconds of fits, forwards and statistics; what processes tell each other is not counted.

    Args:
        config: of the run.
        shapes: its transforms.
        segments: what flows through the graph; none without data.
        bits: width of a weight.
        dtype: of the model.
        device: where the run will be.
        distilled: what flows through the graph while the whole model is trained; none without that.
        probed: what one sequence makes flow while gradients are taken; none without that.
        processes: how many share the fits; what flows is the share of one.
    """
    if not shapes:
        return 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        by_size = Counter((one.in_features, one.out_features, one.group_size, one.krot) for one in shapes)
        example = {(one.in_features, one.out_features, one.group_size, one.krot): one for one in shapes}
        seconds = sum(
            count * _fit(example[size], config, bool(segments), bits, device) for size, count in by_size.items()
        )
        if segments:
            seconds /= processes
        if not segments:
            return seconds
        widest = max(shapes, key=lambda one: one.weights)
        per_flop = _product(widest, dtype, device, fast=config.autocast)
        full = config.rounding == "feedback"
        per_product = _update(widest, full, device)
        # What rows are relative to is computed for the purpose, in fp32.
        exact = _product(widest, torch.float32, device, fast=False) if config.row_weights == "relative" else 0.0
    sizes = {one.name: one for one in shapes}
    for one in segments:
        for name in one.transforms:
            width = sizes[name].in_features if full else sizes[name].group_size
            seconds += per_product * one.all_rows * sizes[name].in_features * width
            narrow = min(sizes[name].in_features, sizes[name].out_features)
            seconds += exact * one.all_rows * 2 * sizes[name].in_features * narrow
    passes = 1 + config.trains_blocks
    epochs = config.transform_epochs + config.weight_epochs + config.tune_epochs
    seconds += per_flop * sum(one.flops for one in segments) * (passes + _TRAINING_FORWARDS * epochs)
    seconds += per_flop * sum(one.flops for one in distilled) * _DISTILLED_FORWARDS * config.distill_epochs
    gradient_samples = -(-config.gradient_samples // processes)
    return seconds + per_flop * sum(one.flops for one in probed) * _PROBED_FORWARDS * gradient_samples


def _fit(shape: TransformShape, config: CalibrationConfig, with_data: bool, bits: int, device: torch.device) -> float:
    """Return the seconds of one transform: its steps, and its rounding."""
    rows = min(shape.out_features, _OUT_FEATURES)
    weight = torch.randn(max(rows, min(shape.out_features, config.rows)), shape.in_features, device=device)
    statistics = InputStatistics(shape.in_features, shape.group_size, full=config.rounding == "feedback")
    statistics.update(torch.randn(_ROWS, shape.in_features, device=device))
    steps = min(config.steps, _STEPS)

    energy = energy_of(statistics if with_data else None, shape.group_size, config, device)

    def fitted(steps: int) -> TransformFit:
        return fit_transform(
            [weight],
            statistics.power,
            bits=bits,
            group_size=shape.group_size,
            krot=shape.krot,
            config=dataclasses.replace(config, steps=steps),
            seed=config.seed,
            energy=energy,
        )

    found = fitted(0)
    transform = Rotated(found.pairs, found.theta, found.channel_scales, shape.group_size)
    rotated = [transform.weight(weight[:rows])]
    outputs = [torch.eye(rows, device=device)] if with_data and config.joins_outputs else []

    def rounding() -> object:
        given = statistics if with_data else None
        return round_rotated(
            rotated, transform, given, None, bits=[bits], config=config, losses=(0.0, 0.0), outputs=outputs
        )

    in_steps = _timed(lambda: fitted(steps), device) - _timed(lambda: fitted(0), device)
    per_step = max(0.0, in_steps) / max(steps, 1)
    return per_step * config.steps + _timed(rounding, device) * shape.out_features / rows


def _product(shape: TransformShape, dtype: torch.dtype, device: torch.device, *, fast: bool) -> float:
    """Return the seconds per floating-point operation of the model's products."""
    rows = torch.randn(_ROWS, shape.in_features, device=device).to(dtype)
    weight = torch.randn(shape.out_features, shape.in_features, device=device).to(dtype)
    with product_precision("fast") if fast else contextlib.nullcontext():
        return _timed(lambda: linear(rows, weight), device) / (2 * _ROWS * shape.weights)


def _update(shape: TransformShape, full: bool, device: torch.device) -> float:
    """Return the seconds per row and product of two channels."""
    statistics = InputStatistics(shape.in_features, shape.group_size, full=full)
    rows = torch.randn(_ROWS, shape.in_features, device=device)
    width = shape.in_features if full else shape.group_size
    return _timed(lambda: statistics.update(rows), device) / (_ROWS * shape.in_features * width)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a second run; the first one may compile, allocate or wake threads."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
