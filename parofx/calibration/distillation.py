"""Distillation: behind chosen codes, train all linears together until the model predicts what the float model predicts.

Trained are the scales by their logarithm, the angles and the channel scales, a few numbers in a hundred. The loss is
`KL(p ‖ q)` of the float model's distribution p over the vocabulary to the quantized one's, at every position that
counts; an output that is no distribution counts by its rows' squared errors relative to their squared lengths.

The graph runs segment by segment, checkpointed at block borders: the weights of one block exist at a time in fp32,
those of the whole model as small integers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from parofx.calibration.block_fitting import output_norm
from parofx.calibration.block_student import Student, TrainedTransform
from parofx.calibration.block_training import Whole, relative_distance, row_sizes, wholes_of
from parofx.calibration.descent import descend
from parofx.calibration.fitting import FittedTransform
from parofx.calibration.fixed_codes import angle_masks, as_stored, continuous, with_fixed_codes
from parofx.calibration.processes import sum_tensors, together, total, totals
from parofx.calibration.progress import BlockProgress
from parofx.calibration.row_masks import select_rows
from parofx.calibration.sensitivity import first_sequences, output_nodes, unmasked
from parofx.calibration.shares import sequences_of, shares_of
from parofx.calibration.stream import BlockStream, first_held_out
from parofx.config import CalibrationConfig
from parofx.passes.graph import FAKE_QUANTIZE
from parofx.passes.linears import find_embeddings
from parofx.passes.transforms import Transform
from parofx.precision import autocast_while_training, product_precision
from parofx.report import StageReport

_STAGE = "distillation"
#: Elements of logits that one forward may have.
_LOGITS = 1 << 28
#: Elements of logits that are in fp32 at a time; several such parts fit a cache.
_CHUNK_ELEMENTS = 1 << 20

#: Names of linears → what they multiply by, `(N, K)`.
_Weights = Callable[[Sequence[str]], Mapping[str, Tensor]]
_Trained = Mapping[str, TrainedTransform]
#: Sets the rows of an output that do not count to zero.
_Counting = Callable[[Tensor], Tensor]


def few_at_a_time(
    gm: GraphModule, batches: Sequence[Mapping[str, Any]], config: CalibrationConfig
) -> list[Mapping[str, Any]]:
    """Return batches cut to at most a step's sequences, fewer where logits would be the largest thing in memory."""
    lengths = [value.shape[1] for one in batches for value in one.values() if _has_rows(value)]
    logits = max(lengths, default=1) * max((len(table) for table in find_embeddings(gm)), default=1)
    count = max(1, min(config.distill_batch_size, _LOGITS // logits))
    return first_sequences(gm, batches, 1 << 62, at_a_time=count)


def steps_of(parts: Sequence[Mapping[str, Any]], config: CalibrationConfig) -> list[range]:
    """Return the batches, cut by `few_at_a_time`, of each step of an epoch; those held out are behind them."""
    first = first_held_out(parts, config.validation_samples)
    count = max(1, config.distill_batch_size // max(map(sequences_of, parts), default=1))
    return [range(begin, min(begin + count, first)) for begin in range(0, first, count)]


class Distiller:
    """Trains a whole model.

    Args:
        gm: its graph.
        transforms: those of the graph.
        fits: what was fitted for each.
        weights: the linears' float weights by name, `(N, K)`.
        batches: the model's inputs as mappings, all of them in every process.
        config: epochs, learning rate, batch size, sequences to hold out, and seed.
    """

    def __init__(
        self,
        gm: GraphModule,
        transforms: Sequence[Transform],
        fits: Mapping[str, FittedTransform],
        weights: Mapping[str, Tensor],
        batches: Sequence[Mapping[str, Any]],
        config: CalibrationConfig,
    ) -> None:
        self._transforms = transforms
        self._fits = fits
        self._float = weights
        self._config = config
        self._owner = {linear.name: one.name for one in transforms for linear in one.linears}
        self._vocabularies = {len(table) for table in find_embeddings(gm)}
        parts = few_at_a_time(gm, batches, config)
        self._shares = shares_of(gm, parts, cut=True)
        self._stream = BlockStream(gm, self._shares.pieces)
        self._output_nodes = output_nodes(gm)
        self._steps = steps_of(parts, config)
        first = self._steps[-1].stop
        self._validation = range(first, len(parts)) or range(first)
        weight = next(iter(weights.values()))
        self._device, self._dtype = weight.device.type, weight.dtype
        #: By part, for each output that is compared; None where no other process has rows of a part.
        self._wholes: dict[int, list[Whole]] | None = None

    def run(self, progress: BlockProgress) -> tuple[dict[str, FittedTransform], StageReport]:
        """Train; return what that gives as it is stored, if the held-out loss is smaller, and how it went."""
        config = self._config
        trained, codes = with_fixed_codes(self._transforms, self._fits)
        self._wholes = self._measure_parts() if self._shares.is_cut else None
        tensors = continuous(trained.values())
        for tensor in tensors:
            tensor.requires_grad_(True)
        steps = self._steps
        progress.distilling(config.distill_epochs * len(steps))

        def backward(step: int) -> None:
            for piece in self._pieces(steps[step]):
                self._accumulate(trained, piece, 1.0 / len(steps[step]))
            progress.stepped()

        def finished(epoch: int, before: float, now: float) -> None:
            progress.trained(StageReport(_STAGE, before, now, f"epoch {epoch}"))

        found = descend(
            [(tensors, config.distill_learning_rate)], backward, partial(self._held_out_loss, trained),
            batches=len(steps), epochs=config.distill_epochs, seed=config.seed,
            angles=angle_masks(trained.values()), decay=0.0, finished=finished,
        )  # fmt: skip
        stored = as_stored(self._fits, trained, codes)
        trained, _ = with_fixed_codes(self._transforms, stored)
        after = self._held_out_loss(trained)
        if not after < found.before:
            return dict(self._fits), StageReport(_STAGE, found.before, found.before, "as it was")
        errors = self._relative_errors(trained)
        stored = {name: dataclasses.replace(one, errors=errors[name]) for name, one in stored.items()}
        return stored, StageReport(_STAGE, found.before, after, f"epoch {found.epoch} of {config.distill_epochs}")

    def _pieces(self, parts: range) -> list[int]:
        """Return what this process has of parts."""
        return [piece for part in parts for piece in self._shares.of(part)]

    def _measure_parts(self) -> dict[int, list[Whole]]:
        """Return what counts in each output of a part, over the pieces of all processes."""
        own = {}
        with together(), torch.no_grad():
            for piece, part in enumerate(self._shares.places):
                own[part] = [number for one in self._targets(piece) for number in one]
        return {part: wholes_of(numbers) for part, numbers in totals(own).items()}

    def _targets(self, piece: int) -> Iterator[tuple[float, float]]:
        """Yield of each output that is compared how many rows count, and the sum of their squared lengths."""
        for node, target in self._outputs(self._float_weights, self._stream.borders[piece]):
            counting = partial(unmasked, node, masks=self._stream.masks[piece])
            if target.shape[-1] in self._vocabularies:
                yield counting(torch.ones_like(target[..., :1], dtype=torch.float32)).sum().item(), 0.0
            else:
                yield row_sizes(counting(target))

    def _held_out_loss(self, trained: _Trained) -> float:
        with together(), torch.no_grad():
            own = sum(self._compare(trained, piece)[0] for piece in self._pieces(self._validation))
        return total(own) / len(self._validation)

    def _accumulate(self, trained: _Trained, piece: int, share: float) -> None:
        """Add the gradients of a piece's loss, times its part's share of a step."""
        _, outputs, gradients = self._compare(trained, piece)
        # An output may depend on no weight, as an embedding that a model returns.
        depending = [place for place, one in enumerate(outputs) if one.requires_grad]
        if depending:
            scaled = [gradients[place].mul_(share) for place in depending]
            torch.autograd.backward([outputs[place] for place in depending], scaled)

    def _compare(self, trained: _Trained, piece: int) -> tuple[float, list[Tensor], list[Tensor]]:
        """Return the share of its part's loss that a piece makes, the outputs it is of, and its gradients there."""
        border, masks = self._stream.borders[piece], self._stream.masks[piece]
        with torch.no_grad():
            wanted = self._outputs(self._float_weights, border)
        outputs = self._outputs(partial(self._effective_weights, trained), border)
        wholes: Sequence[Whole | None] = [None] * len(outputs)
        if self._wholes is not None:
            wholes = self._wholes[self._shares.places[piece]]
        loss, gradients = 0.0, []
        for (node, output), (_, target), whole in zip(outputs, wanted, wholes, strict=True):
            score = _divergence if output.shape[-1] in self._vocabularies else _relative
            value, gradient = score(output.detach(), target, partial(unmasked, node, masks=masks), whole)
            loss += value
            gradients.append(gradient)
        return loss, [output for _, output in outputs], gradients

    def _relative_errors(self, trained: _Trained) -> dict[str, tuple[float, ...]]:
        """Return by transform its linears' relative squared output errors on held-out inputs of the float model."""
        sums = {one.name: torch.zeros(len(one.linears), 2, dtype=torch.float64) for one in self._transforms}
        by_name = {one.name: one for one in self._transforms}
        for piece in self._pieces(self._validation):

            def record(node: Node, value: Tensor, masks: Mapping[str, Tensor] = self._stream.masks[piece]) -> None:
                one = by_name[node.meta["parofx_transform"]]
                rows, norm = select_rows(node, value, masks).float(), output_norm(one, self._config)
                rows = rows if norm is None else norm.divide(rows)
                for place, (name, weight) in enumerate(trained[one.name].effective_weights().items()):
                    for column, matrix in enumerate((weight - self._float[name], self._float[name])):
                        sums[one.name][place, column] += (rows @ matrix.float().t()).square().sum().cpu()

            with torch.no_grad():
                runner = _Segments(self._stream.split, self._float_weights, record)
                runner.run(*self._stream.borders[piece].values())
        sum_tensors(list(sums.values()))
        return {
            name: tuple((wrong / right).item() if right > 0 else 0.0 for wrong, right in parts)
            for name, parts in sums.items()
        }

    def _outputs(self, weights: _Weights, border: Mapping[str, Any]) -> list[tuple[Node, Tensor]]:
        """Return the distributions that the model gives with these weights, or without one its floating outputs.

        With each comes its node in the model's graph.
        """
        fast = self._config.autocast
        precision = product_precision("fast") if fast else contextlib.nullcontext()
        with precision, autocast_while_training(self._device, self._dtype, enabled=fast):
            leaves = pytree.tree_leaves(_Segments(self._stream.split, weights).run(*border.values()))
        floating = [
            (node, leaf)
            for node, leaf in zip(self._output_nodes, leaves, strict=True)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return [(node, leaf) for node, leaf in floating if leaf.shape[-1] in self._vocabularies] or floating

    def _float_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return {name: self._float[name] for name in names}

    def _effective_weights(self, trained: _Trained, names: Sequence[str]) -> Mapping[str, Tensor]:
        owners = dict.fromkeys(self._owner[name] for name in names)
        return {name: weight for one in owners for name, weight in trained[one].effective_weights().items()}


class _Segments(Interpreter):
    """Runs a graph of segments with other weights; with gradients, each is run again when the backward comes to it."""

    def __init__(
        self, split: GraphModule, weights: _Weights, record: Callable[[Node, Tensor], None] | None = None
    ) -> None:
        super().__init__(split)
        self.extra_traceback = False
        self._weights = weights
        self._record = record
        # Its backward comes right behind it: to run it twice would save nothing.
        self._last = [node.target for node in split.graph.nodes if node.op == "call_module"][-1:]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a segment."""
        module = self.fetch_attr(target)
        names = [str(node.meta["parofx_linear"]) for node in module.graph.nodes if node.target is FAKE_QUANTIZE]

        def run(*given: Any) -> Any:
            return Student(module, self._weights(names), self._record).run(*given)

        if not torch.is_grad_enabled() or target in self._last:
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _divergence(
    output: Tensor, target: Tensor, counting: _Counting, whole: Whole | None = None
) -> tuple[float, Tensor]:
    """Return the mean `KL(p ‖ q)` over the positions that count, and its gradient at q's logits, `q − p`.

    Of positions that are a part of a `whole` it is their share of the whole's mean.
    """
    gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
    logits, wanted = (one.reshape(-1, one.shape[-1]) for one in (output, target))
    counts = counting(torch.ones_like(output[..., :1], dtype=torch.float32)).reshape(-1)
    counts = counts / (counts.sum().clamp(min=1.0) if whole is None else max(whole.rows, 1.0))
    flat, total = gradient.view(logits.shape), 0.0
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        log_q, log_p = (one[part].float().log_softmax(-1) for one in (logits, wanted))
        p = log_p.exp()
        # A logit of minus infinity in both is no difference.
        difference = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)
        total += torch.linalg.vecdot(p, difference).dot(counts[part]).item()
        flat[part] = log_q.exp_().sub_(p).mul_(counts[part, None])
    return total, gradient


def _relative(output: Tensor, target: Tensor, counting: _Counting, whole: Whole | None = None) -> tuple[float, Tensor]:
    """Return the mean relative squared error of rows, and its gradient."""
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        loss = relative_distance(counting(leaf), counting(target), whole)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient
