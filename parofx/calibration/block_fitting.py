"""What becomes of a block: each transform as it was fitted for itself, trained together, rounded, the best kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import affine, rotation
from parofx.calibration.block_student import Student, TrainedTransform
from parofx.calibration.block_training import BlockData, BlockTrainer
from parofx.calibration.feedback import RoundedWeight
from parofx.calibration.fitting import FittedTransform, Rotated, rotate_weight, round_rotated
from parofx.calibration.fixed_codes import as_stored, start_from, storable, with_fixed_codes
from parofx.calibration.normalized import counts_relative
from parofx.calibration.processes import each_by_one, fit_together, together
from parofx.calibration.progress import BlockProgress
from parofx.calibration.rounding import relative_error
from parofx.calibration.row_masks import select_rows
from parofx.calibration.statistics import InputStatistics, OutputNorm
from parofx.config import CalibrationConfig
from parofx.passes.transforms import Transform
from parofx.report import StageReport

#: A transform's name → its statistics, all of them and the held-out part.
Statistics = Mapping[str, tuple[InputStatistics, InputStatistics | None]]
_Fits = dict[str, FittedTransform]


def train_block(
    module: GraphModule,
    transforms: Sequence[Transform],
    fits: Mapping[str, FittedTransform],
    statistics: Statistics,
    data: BlockData,
    config: CalibrationConfig,
    stages: list[StageReport],
    progress: BlockProgress,
) -> _Fits:
    """Train a block from what was fitted and return the best found; never worse than that on the held-out batches.

    Args:
        module: the block's graph.
        transforms: its transforms.
        fits: what was fitted for each for itself.
        statistics: of the float model's inputs to each, in all processes.
        data: the block's inputs and targets.
        config: how to train and to round.
        stages: what was done is appended.
        progress: is told the loss after each stage.
    """
    by_name = {one.name: one for one in transforms}
    trained = {name: start_from(one, fits[name]) for name, one in by_name.items()}
    trainer = BlockTrainer(module, list(trained.values()), data, config)
    start = trainer.loss(quantized_weights(transforms, fits))
    if config.transform_epochs:
        stages.append(trainer.train_transforms())
        progress.trained(stages[-1])
    else:
        for one in trained.values():
            one.freeze_rotation()
    if config.weight_epochs:
        stages.append(trainer.train_weights())
        progress.trained(stages[-1])
    candidates: dict[str, _Fits] = {"as fitted for itself": dict(fits)}
    candidates["trained, to nearest"] = {
        one.name: _round_to_nearest(one, trained[one.name], fits[one.name]) for one in transforms
    }
    if config.rounding == "feedback":
        with together():
            observed = _student_statistics(module, trainer, transforms, data, config)
        candidates["trained, with error feedback"] = fit_together(
            list(by_name), observed,
            lambda name: _round_with_feedback(by_name[name], trained[name], fits[name], observed[name], config),
        )  # fmt: skip
    losses = {name: trainer.loss(quantized_weights(transforms, found)) for name, found in candidates.items()}
    kept = min(losses, key=losses.__getitem__)
    stages.append(StageReport("rounding", start, losses[kept], kept))
    progress.trained(stages[-1])
    found = candidates[kept]
    if config.tune_epochs:
        found, stage = _tune(module, transforms, found, losses[kept], data, config)
        stages.append(stage)
        progress.trained(stage)
    return each_by_one(list(by_name), lambda name: _with_errors(by_name[name], found[name], statistics[name][0]))


def _tune(
    module: GraphModule,
    transforms: Sequence[Transform],
    fits: Mapping[str, FittedTransform],
    before: float,
    data: BlockData,
    config: CalibrationConfig,
) -> tuple[_Fits, StageReport]:
    """Train what is continuous behind the codes of `fits`; what that gives in fp16, if it is better."""
    trained, codes = with_fixed_codes(transforms, fits)
    trainer = BlockTrainer(module, list(trained.values()), data, config)
    stage = trainer.tune()
    found = as_stored(fits, trained, codes)
    after = trainer.loss(quantized_weights(transforms, found))
    if after < before:
        return found, StageReport(stage.name, before, after, stage.kept)
    return dict(fits), StageReport(stage.name, before, before, "as rounded")


def quantized_weights(transforms: Sequence[Transform], fits: Mapping[str, FittedTransform]) -> dict[str, Tensor]:
    """Return the weights that fitted linears multiply by, in the unrotated space, fp32 `(N, K)`."""
    result = {}
    for transform in transforms:
        fitted = fits[transform.name]
        for index, linear in enumerate(transform.linears):
            weight = fitted.weight(index)
            if weight is None:
                parts = (fitted.pairs, fitted.theta, fitted.channel_scales)
                rotated = rotate_weight(linear.weight, *parts, transform.group_size)
                rounded = affine.fake_quantize(rotated, *fitted.grids[index], linear.bits, transform.group_size)
                reciprocal = fitted.channel_scales.float().reciprocal()
                weight = rotation.inverse_rotate(rounded, *parts[:2], reciprocal, transform.group_size)
            result[linear.name] = weight
    return result


def _round_to_nearest(transform: Transform, trained: TrainedTransform, start: FittedTransform) -> FittedTransform:
    """Round trained weights to their trained grids."""
    grids, codes = [], []
    for name, linear in trained.linears.items():
        bits = trained.bits[name]
        grids.append((storable(linear.scales), linear.zeros.round().clamp(0, affine.quant_max(bits))))
        codes.append(affine.quantize(linear.weight, *grids[-1], bits, transform.group_size))
    return dataclasses.replace(
        start,
        theta=trained.theta.half(),
        channel_scales=trained.channel_scales,
        grids=tuple(grids),
        codes=tuple(codes),
        damping=None,
    )


def _round_with_feedback(
    transform: Transform,
    trained: TrainedTransform,
    start: FittedTransform,
    statistics: tuple[InputStatistics, InputStatistics | None],
    config: CalibrationConfig,
) -> FittedTransform:
    """Round trained weights for the inputs that the quantized block has."""
    rotated = Rotated(trained.pairs, trained.theta.half(), trained.channel_scales, transform.group_size)
    weights = [linear.weight for linear in trained.linears.values()]
    losses, bits = (start.loss_before, start.loss_after), [linear.bits for linear in transform.linears]
    return round_rotated(weights, rotated, *statistics, bits=bits, config=config, losses=losses)


def output_norm(transform: Transform, config: CalibrationConfig) -> OutputNorm | None:
    """Return what the rows of a transform's input are divided by; None if they count alike."""
    if config.row_weights == "equal" or not counts_relative(transform):
        return None
    return OutputNorm([linear.weight for linear in transform.linears])


def _student_statistics(
    module: GraphModule,
    trainer: BlockTrainer,
    transforms: Sequence[Transform],
    data: BlockData,
    config: CalibrationConfig,
) -> dict[str, tuple[InputStatistics, InputStatistics | None]]:
    """Return the statistics of the inputs that the trained block's linears have, and of those held out to choose by."""
    found: dict[str, tuple[InputStatistics, ...]] = {}
    norms = {one.name: output_norm(one, config) for one in transforms}
    for one in transforms:
        in_features = one.linears[0].weight.shape[1]
        sets = 1 + config.chooses_damping
        found[one.name] = tuple(InputStatistics(in_features, one.group_size, full=True) for _ in range(sets))
    weights = trainer.present_weights()
    for index, given in enumerate(data.arguments):
        masks = data.masks[index]
        seen = slice(0, 2 if data.shares.places[index] >= data.held_out else 1)

        def record(node: Node, value: Tensor, masks: Mapping[str, Tensor] = masks, seen: slice = seen) -> None:
            name = node.meta["parofx_transform"]
            for statistics in found.get(name, ())[seen]:
                rows = select_rows(node, value, masks)
                statistics.update(rows, relative_to=norms[name], where=f"the input of {name}")

        with torch.no_grad():
            Student(module, weights, record).run(*given)
    return {name: (sets[0], sets[1] if len(sets) > 1 else None) for name, sets in found.items()}


def _with_errors(transform: Transform, fitted: FittedTransform, statistics: InputStatistics) -> FittedTransform:
    """Return what was kept with the errors it makes on the float model's inputs, against the float weights."""
    if fitted.codes is None or not statistics.count:
        return fitted
    rotated = Rotated(fitted.pairs, fitted.theta, fitted.channel_scales, transform.group_size)
    gram = rotated.gram(statistics)[None] if statistics.full else rotated.block_gram(statistics)
    errors = tuple(
        relative_error(rotated.weight(linear.weight), RoundedWeight(codes, *grid).dequantized(), gram)
        for linear, codes, grid in zip(transform.linears, fitted.codes, fitted.grids, strict=True)
    )
    return dataclasses.replace(fitted, errors=errors)
