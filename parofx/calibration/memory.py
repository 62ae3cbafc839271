"""How much memory and disk calibration takes at most, from shapes: the terms that docs/calibration.md lists.

Every term is a bound, and their sum is one although no two of them need be largest at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parofx.calibration.output_moments import WIDEST
from parofx.calibration.sensitivity import SCORE_CHUNK
from parofx.calibration.statistics import OUTPUT_CHUNK
from parofx.calibration.traffic import SegmentTraffic
from parofx.config import CalibrationConfig, ParoConfig

#: Copies in fp32 of the siblings' weights while they are fitted: joined, rotated, rounded, their errors and products.
_FITTED_COPIES = 10
#: Matrices of 8·K² bytes in error feedback: moments, factors and products, held out and not.
_FEEDBACK_MATRICES = 10
#: Copies in fp32 of a block's weights while it is trained: with gradients, two moments, the best, and what was rounded.
_TRAINED_COPIES = 14
#: Copies in fp32 of a block's weights while the model is distilled: effective, rounded, rotated back, and gradients.
_DISTILLED_COPIES = 8
#: fp32 copies of the rows of a batch while their products are summed.
_ROW_COPIES = 5


@dataclass(frozen=True)
class TransformShape:
    """A transform's sizes: input channels, the siblings' output channels in all, channels per group, rounds."""

    name: str
    block: str
    in_features: int
    out_features: int
    group_size: int
    krot: int

    @property
    def weights(self) -> int:
        """Weights behind the transform."""
        return self.in_features * self.out_features

    @property
    def fitted_bytes(self) -> int:
        """Bytes of `pairs`, `theta`, `channel_scales`, and of every linear's scales, zeros (fp32) and codes."""
        rotation = self.in_features * (2 * self.krot + self.krot + 2)
        return rotation + 8 * self.weights // self.group_size + self.weights


def memory_terms(
    config: ParoConfig,
    shapes: Sequence[TransformShape],
    segments: Sequence[SegmentTraffic],
    *,
    model_bytes: int,
    packed_bytes: int,
    itemsize: int,
    distilled: Sequence[SegmentTraffic] = (),
    probed: Sequence[SegmentTraffic] = (),
    joined: Sequence[TransformShape] = (),
    widened: int = 0,
) -> dict[str, int]:
    """Return the largest number of bytes that each part of a run holds at a time.

    Args:
        config: of the run.
        shapes: its transforms.
        segments: what flows through the graph; none without data.
        model_bytes: of the float model.
        packed_bytes: of the quantized linears.
        itemsize: bytes of one float weight.
        distilled: what flows through the graph while the whole model is trained; none without that.
        probed: what one sequence makes flow while gradients are taken; none without that.
        joined: the transforms whose linears' outputs have moments then.
        widened: bytes of weights in fp32 at a time where 16-bit products are made of them.
    """
    calibration = config.calibration
    by_name = {shape.name: shape for shape in shapes}
    feedback = bool(segments) and calibration.rounding == "feedback"
    trains = bool(segments) and calibration.trains_blocks
    border = max((one.border for one in segments), default=0)
    terms = {
        "model": model_bytes,
        "borders": border * (1 + trains) * (1 + (calibration.work_dir is not None)),
        "statistics": _statistics(segments, by_name, feedback, calibration) * (1 + trains),
        "forward": max((one.forward for one in segments), default=0),
        "fit": max((_fit(shape, feedback) for shape in shapes), default=0),
        "results": 2 * packed_bytes
        + sum(
            8 * one.weights // one.group_size + _rounded_weights(one, itemsize, feedback or trains) for one in shapes
        ),
    }
    if widened and segments:
        terms["weights in fp32"] = widened
    if trains:
        blocks = [[by_name[name] for name in one.transforms] for one in segments]
        terms["training"] = max(
            one.outputs + 2 * one.saved + _TRAINED_COPIES * 4 * sum(shape.weights for shape in block)
            for one, block in zip(segments, blocks, strict=True)
        )
    if distilled:
        blocks_weights = [sum(by_name[name].weights for name in one.transforms) for one in distilled]
        share = max((one.rows / one.all_rows for one in distilled if one.all_rows), default=1.0)
        # Codes as 16-bit integers at most, and what both models return of each block, with gradients.
        terms["distillation"] = (
            2 * sum(shape.weights for shape in shapes)
            + 4 * _DISTILLED_COPIES * max(blocks_weights)
            + 2 * max(one.saved for one in distilled)
            + math.ceil(3 * share * sum(one.outputs for one in distilled))
        )
    if probed:
        # Borders and logits, these with their gradients; one block's forward and backward; parts of logits in fp32.
        terms["gradients"] = (
            3 * sum(one.outputs for one in probed)
            + 2 * max(one.saved for one in probed)
            + 2 * 4 * min(SCORE_CHUNK, max(one.outputs for one in probed))
        )
        terms["output moments"] = 4 * sum(one.out_features * min(one.out_features, WIDEST) for one in joined)
    return terms


def _rounded_weights(shape: TransformShape, itemsize: int, rounded: bool) -> int:
    """Return the bytes of the rounded weights that the graph reads in place of the model's own, and their codes."""
    return shape.weights * (itemsize + 1) if rounded else 0


def disk_bytes(
    config: ParoConfig, shapes: Sequence[TransformShape], segments: Sequence[SegmentTraffic], processes: int = 1
) -> int:
    """Return the bytes of a run in its `work_dir`: what was fitted, and one border beside the one that replaces it.

    `segments` are what flows through the graph in one process.
    """
    if config.calibration.work_dir is None or not segments:
        return 0
    border = max(one.border for one in segments) * (1 + config.calibration.trains_blocks)
    return sum(shape.fitted_bytes for shape in shapes) + 2 * border * processes


def _statistics(
    segments: Sequence[SegmentTraffic],
    shapes: Mapping[str, TransformShape],
    full: bool,
    calibration: CalibrationConfig,
) -> int:
    """Return the bytes of all statistics that are open in one segment, with the rows that are being added."""
    uses: dict[str, list[int]] = {}
    for index, segment in enumerate(segments):
        for name in segment.transforms:
            uses.setdefault(name, []).append(index)
    largest = 0
    for index, segment in enumerate(segments):
        alive = [shapes[name] for name, at in uses.items() if at[0] <= index <= at[-1]]
        sets = 1 + calibration.chooses_damping
        sums = sum((8 * sets * one.in_features if full else 8 * one.group_size) * one.in_features for one in alive)
        if calibration.row_weights == "relative":
            # Outputs in fp32, for their lengths.
            sums += max((4 * segment.rows * one.out_features for one in alive), default=0)
            if calibration.trains_blocks:
                # Products of the weights with themselves where they are smaller, else the weights in fp32.
                sums += sum(4 * one.in_features * min(one.in_features, one.out_features) for one in alive)
                sums += max((4 * one.in_features * min(one.out_features, OUTPUT_CHUNK) for one in alive), default=0)
        widest = max((one.in_features for one in alive), default=0)
        # Products of 256 columns at a time, in fp32 and in fp64, or those inside groups.
        products = 12 * 256 * widest
        largest = max(largest, sums + products + _ROW_COPIES * 4 * segment.rows * widest)
    return largest


def _fit(shape: TransformShape, feedback: bool) -> int:
    rounds = 12 * (shape.krot + 2) * shape.in_features * shape.group_size
    matrices = _FEEDBACK_MATRICES * 8 * shape.in_features**2 if feedback else 0
    return _FITTED_COPIES * 4 * shape.weights + rounds + matrices
