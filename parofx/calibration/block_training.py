"""Train a block so that its output, on what the quantized blocks before it compute, is the float block's output.

Stage 1 trains angles and channel scales, the grid following each step as the range of the rotated weight; stage 2
trains the rotated weights, their scales and float zeros. Source: ParoQuant (arXiv 2511.10645) §4. Stage 3 is ours:
behind the codes that rounding has chosen it trains what is still continuous. All run AdamW with a cosine schedule and
keep the state with the smallest loss on held-out batches, which may be the one they started from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from parofx.calibration.block_student import Student, TrainedTransform
from parofx.calibration.descent import Groups, descend
from parofx.calibration.fixed_codes import angle_masks, continuous
from parofx.calibration.processes import together, total, totals
from parofx.calibration.row_masks import row_mask_of
from parofx.calibration.shares import Shares
from parofx.config import CalibrationConfig
from parofx.precision import autocast_while_training
from parofx.report import StageReport

#: Added to a target row's squared length, in units of the mean one.
_LEAST_ROW = 1e-3


@dataclass(frozen=True)
class Whole:
    """What rows are a part of, where other processes have the rest: how many rows, and their mean squared length."""

    rows: float
    mean_size: float


@dataclass
class BlockData:
    """What this process has of the batches of one block.

    Args:
        arguments: per piece, what the quantized prefix hands to the block.
        targets: per piece, `counting_outputs` of the float block.
        masks: per piece, the masks that nodes of the block may be annotated with, by name.
        held_out: the first of the batches that are kept for choosing; the number of batches if none are.
        shares: which batch each piece is of.
    """

    arguments: Sequence[list[Any]]
    targets: Sequence[list[Tensor]]
    masks: Sequence[Mapping[str, Tensor]]
    held_out: int
    shares: Shares

    def training(self) -> range:
        """Return the batches that are trained on."""
        return range(self.held_out)

    def validation(self) -> range:
        """Return the batches that states are compared on; without held-out ones, all."""
        return range(self.held_out, self.shares.batches) or range(self.shares.batches)


class BlockTrainer:
    """Trains the transforms of one block.

    Args:
        module: the block's graph.
        transforms: what is trained in it.
        data: its inputs and targets.
        config: epochs, learning rates, loss and seed.
    """

    def __init__(
        self, module: GraphModule, transforms: Sequence[TrainedTransform], data: BlockData, config: CalibrationConfig
    ) -> None:
        self._module = module
        self._transforms = transforms
        self._data = data
        self._config = config
        self._wholes = _wholes(data) if data.shares.is_cut else None

    def train_transforms(self) -> StageReport:
        """Stage 1: train angles and channel scales."""
        rate = self._config.transform_learning_rate
        for transform in self._transforms:
            transform.theta.requires_grad_(transform.theta.numel() > 0)
            transform.log_alpha.requires_grad_(True)
        tensors = [one for transform in self._transforms for one in (transform.theta, transform.log_alpha)]
        dummies = angle_masks(self._transforms)
        report = self._train("transforms", [(tensors, rate)], self._config.transform_epochs, dummies)
        for transform in self._transforms:
            transform.freeze_rotation()
        return report

    def train_weights(self) -> StageReport:
        """Stage 2: train rotated weights, scales and zeros; `train_transforms` or `freeze_rotation` comes before."""
        linears = [linear for transform in self._transforms for linear in transform.linears.values()]
        weights = [linear.weight for linear in linears]
        grids = [tensor for linear in linears for tensor in (linear.scales, linear.zeros)]
        for tensor in (*weights, *grids):
            tensor.requires_grad_(True)
        groups = [(weights, self._config.weight_learning_rate), (grids, self._config.grid_learning_rate)]
        report = self._train("weights", groups, self._config.weight_epochs, ())
        for tensor in (*weights, *grids):
            tensor.requires_grad_(False)
        return report

    def tune(self) -> StageReport:
        """Stage 3: train scales, angles and channel scales behind fixed codes; exact gradients, nothing is rounded."""
        tensors = continuous(self._transforms)
        for tensor in tensors:
            tensor.requires_grad_(True)
        rate, dummies = self._config.tune_learning_rate, angle_masks(self._transforms)
        report = self._train("tune", [(tensors, rate)], self._config.tune_epochs, dummies, decay=0.0)
        for tensor in tensors:
            tensor.requires_grad_(False)
        return report

    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Return the mean loss with given weights on the held-out batches."""
        chosen = self._data.validation()
        with together(), torch.no_grad():
            own = sum(self._loss(weights, piece).item() for batch in chosen for piece in self._data.shares.of(batch))
        return total(own) / len(chosen)

    def present_weights(self) -> dict[str, Tensor]:
        """Return what the linears multiply by as things are."""
        with torch.no_grad():
            return self._effective_weights()

    def _train(
        self,
        stage: str,
        groups: Groups,
        epochs: int,
        dummies: Iterable[tuple[Tensor, Tensor]],
        decay: float = 0.01,
    ) -> StageReport:
        batches = self._data.training()

        def backward(batch: int) -> None:
            for piece in self._data.shares.of(batches[batch]):
                self._loss(self._effective_weights(), piece).backward()  # type: ignore[no-untyped-call]

        found = descend(
            groups, backward, lambda: self.loss(self.present_weights()), batches=len(batches), epochs=epochs,
            seed=self._config.seed, angles=dummies, decay=decay,
        )  # fmt: skip
        return StageReport(stage, found.before, found.after, f"epoch {found.epoch} of {epochs}")

    def _effective_weights(self) -> dict[str, Tensor]:
        return {name: one for transform in self._transforms for name, one in transform.effective_weights().items()}

    def _loss(self, weights: Mapping[str, Tensor], piece: int) -> Tensor:
        """Return the loss on a piece: its share of its batch's loss."""
        device = next(iter(weights.values())).device.type
        dtype = next((one.dtype for one in self._data.targets[piece]), torch.float32)
        with autocast_while_training(device, dtype, enabled=self._config.autocast):
            output = Student(self._module, weights).run(*self._data.arguments[piece])
        outputs = counting_outputs(self._module, output, self._data.masks[piece])
        wholes: Sequence[Whole | None] = [None] * len(outputs)
        if self._wholes is not None:
            wholes = self._wholes[self._data.shares.places[piece]]
        losses = [
            _distance(one, target, self._config.block_loss, whole)
            for one, target, whole in zip(outputs, self._data.targets[piece], wholes, strict=True)
        ]
        return torch.stack(losses).sum()


def counting_outputs(module: GraphModule, output: Any, masks: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the rows that count of the floating tensors among what a segment returns."""
    nodes, values = (pytree.tree_leaves(one) for one in (module.graph.output_node().args[0], output))
    return [
        _counting_rows(node, value, masks)
        for node, value in zip(nodes, values, strict=True)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


def row_sizes(target: Tensor) -> tuple[float, float]:
    """Return how many rows a tensor has, and the sum of their squared lengths."""
    return target.numel() / max(target.shape[-1], 1), target.float().square().sum(-1).sum(dtype=torch.float64).item()


def _wholes(data: BlockData) -> dict[int, list[Whole]]:
    """Return by batch, for each output, what the pieces of all processes make up."""
    own = {
        place: [number for target in targets for number in row_sizes(target)]
        for place, targets in zip(data.shares.places, data.targets, strict=True)
    }
    return {place: wholes_of(numbers) for place, numbers in totals(own).items()}


def wholes_of(numbers: Sequence[float]) -> list[Whole]:
    """Return what summed `row_sizes`, one after the other, say."""
    return [Whole(rows, size / max(rows, 1.0)) for rows, size in zip(numbers[::2], numbers[1::2], strict=True)]


def _distance(output: Tensor, target: Tensor, kind: str, whole: Whole | None) -> Tensor:
    if kind == "relative":
        return relative_distance(output, target, whole)
    output, target = output.float(), target.float()
    if whole is None:
        return torch.nn.functional.smooth_l1_loss(output, target)
    return torch.nn.functional.smooth_l1_loss(output, target, reduction="sum") / (whole.rows * target.shape[-1])


def relative_distance(output: Tensor, target: Tensor, whole: Whole | None = None) -> Tensor:
    """Return the mean over rows of the squared error relative to the target row's squared length.

    Of rows that are a part of a `whole` it is their share of the whole's mean.
    """
    output, target = output.float(), target.float()
    # Row by row: a few rows of a decoder's residual stream are a thousand times as long as the rest.
    sizes = target.square().sum(-1)
    mean_size = sizes.mean() if whole is None else whole.mean_size
    errors = (output - target).square().sum(-1) / (sizes + _LEAST_ROW * mean_size).clamp(min=1e-30)
    return errors.mean() if whole is None else errors.sum() / whole.rows


def _counting_rows(node: Node, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    mask = row_mask_of(node)
    return value if mask is None else mask.select(value, masks)
