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
from parofx.calibration.row_masks import row_mask_of
from parofx.config import CalibrationConfig
from parofx.report import StageReport

#: Added to a target row's squared length, in units of the mean one.
_LEAST_ROW = 1e-3


@dataclass
class BlockData:
    """The batches of one block.

    Args:
        arguments: per batch, what the quantized prefix hands to the block.
        targets: per batch, the floating tensors the float block returns.
        masks: per batch, the masks that nodes of the block may be annotated with, by name.
        held_out: the first of the batches that are kept for choosing; the number of batches if none are.
    """

    arguments: Sequence[list[Any]]
    targets: Sequence[list[Tensor]]
    masks: Sequence[Mapping[str, Tensor]]
    held_out: int

    def training(self) -> range:
        """Return the batches that are trained on."""
        return range(self.held_out)

    def validation(self) -> range:
        """Return the batches that states are compared on; without held-out ones, all."""
        return range(self.held_out, len(self.targets)) or range(len(self.targets))


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

    def loss(self, weights: Mapping[str, Tensor], batches: Iterable[int] | None = None) -> float:
        """Return the mean loss with given weights, on the held-out batches by default."""
        chosen = list(self._data.validation() if batches is None else batches)
        with torch.no_grad():
            return sum(self._loss(weights, index).item() for index in chosen) / len(chosen)

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
            self._loss(self._effective_weights(), batches[batch]).backward()  # type: ignore[no-untyped-call]

        found = descend(
            groups, backward, lambda: self.loss(self.present_weights()), batches=len(batches), epochs=epochs,
            seed=self._config.seed, angles=dummies, decay=decay,
        )  # fmt: skip
        return StageReport(stage, found.before, found.after, f"epoch {found.epoch} of {epochs}")

    def _effective_weights(self) -> dict[str, Tensor]:
        return {name: one for transform in self._transforms for name, one in transform.effective_weights().items()}

    def _loss(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        device = next(iter(weights.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._config.autocast):
            output = Student(self._module, weights).run(*self._data.arguments[index])
        masks, kind = self._data.masks[index], self._config.block_loss
        losses = [
            _distance(_counting_rows(node, value, masks), _counting_rows(node, target, masks), kind)
            for node, value, target in zip(
                self._outputs(output), floating_outputs(output), self._data.targets[index], strict=True
            )
        ]
        return torch.stack(losses).sum()

    def _outputs(self, output: Any) -> list[Node]:
        """Return the nodes of the floating tensors among what the block returns."""
        nodes, values = (pytree.tree_leaves(one) for one in (self._module.graph.output_node().args[0], output))
        return [node for node, value in zip(nodes, values, strict=True) if floating_outputs(value)]


def floating_outputs(output: Any) -> list[Tensor]:
    """Return the floating tensors among what a segment returns."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(output: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "smooth_l1":
        return torch.nn.functional.smooth_l1_loss(output.float(), target.float())
    return relative_distance(output, target)


def relative_distance(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of the squared error relative to the target row's squared length."""
    output, target = output.float(), target.float()
    # Row by row: a few rows of a decoder's residual stream are a thousand times as long as the rest.
    sizes = target.square().sum(-1)
    return ((output - target).square().sum(-1) / (sizes + _LEAST_ROW * sizes.mean()).clamp(min=1e-30)).mean()


def _counting_rows(node: Node, value: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    mask = row_mask_of(node)
    return value if mask is None else mask.select(value, masks)
