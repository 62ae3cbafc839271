"""One calibration run over data, block by block: what the `calibrate` pass does when it has batches.

The float model's activations flow through the segments of a `BlockStream`. Each transform is fitted on the statistics
of its input after the last segment that computes one. If blocks are trained, a second set of borders follows, of the
quantized model: what a block reads there is its input, what the float block returned its target.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from parofx.calibration.block_fitting import output_norm, quantized_weights, train_block
from parofx.calibration.block_student import Student
from parofx.calibration.block_training import BlockData, counting_outputs
from parofx.calibration.distillation import Distiller
from parofx.calibration.fitting import FittedTransform
from parofx.calibration.normalized import counts_relative, mark_normalized
from parofx.calibration.output_moments import OutputMoments, measure_output_moments
from parofx.calibration.processes import check_alike, fit_together, process_count, together
from parofx.calibration.progress import BlockProgress
from parofx.calibration.shared_store import SharedStore
from parofx.calibration.shares import check_enough, shares_of
from parofx.calibration.statistics import InputStatistics, OutputNorm
from parofx.calibration.store import fingerprint, pack_fit, unpack_fits
from parofx.calibration.stream import BlockStream, Border, first_held_out
from parofx.config import ParoConfig
from parofx.errors import DataError
from parofx.passes.transforms import Transform, TransformedLinear
from parofx.precision import product_precision
from parofx.report import BlockReport, StageReport

logger = logging.getLogger("parofx")

#: Fits one transform on all statistics, on the held-out part of them, and on the moments of gradients at its outputs.
Fit = Callable[[Transform, InputStatistics | None, InputStatistics | None, Sequence[Tensor]], FittedTransform]


class DataRun:
    """A pass over calibration data.

    Args:
        gm: a PREPARED graph; it ends up CALIBRATED.
        transforms: those of the graph.
        batches: the model's inputs as mappings.
        config: what to do.
        fit: fits one transform.
        progress: is told what is done.

    Raises:
        DataError: if there is no batch, or one holds no rows.
    """

    def __init__(
        self,
        gm: GraphModule,
        transforms: Sequence[Transform],
        batches: Sequence[Mapping[str, Any]],
        config: ParoConfig,
        fit: Fit,
        progress: BlockProgress,
    ) -> None:
        self._gm = gm
        self._transforms = {transform.name: transform for transform in transforms}
        self._config = config
        self._fit_transform = fit
        self._progress = progress
        self._batches = list(batches)
        if not self._batches:
            raise DataError("calibration must hold at least one batch, got none; pass calibration=None for data-free")
        for index, batch in enumerate(self._batches):
            _check_batch(index, batch)
        self._full = config.calibration.rounding == "feedback"
        self._statistics: dict[str, InputStatistics] = {}
        self._held_out: dict[str, InputStatistics] = {}
        self._norms: dict[str, OutputNorm | None] = {}
        self._outputs: dict[str, OutputMoments] = {}
        self._first_held_out = first_held_out(self._batches, config.calibration.validation_samples)
        mark_normalized(gm, transforms)
        # What is fitted replaces them in the graph.
        self._weights = {linear.name: linear.weight for one in transforms for linear in one.linears}
        self._digest = _digest(gm, config, self._batches)
        # Each process makes its part of every step on blocks.
        self._shares = shares_of(gm, self._batches, cut=config.calibration.trains_blocks)
        check_enough(self._shares, config.calibration)
        self._piece = 0

    def run(self) -> None:
        """Fit every transform after the last segment that computes one of its inputs."""
        check_alike(self._digest)
        with together():
            stream = BlockStream(self._gm, self._shares.pieces)
        students: list[Border] = []
        if self._config.calibration.trains_blocks:
            students = [dict(border) for border in stream.borders]
        store = self._open_store()
        finished = store.finished if store else 0
        if store and finished:
            logger.info("resuming calibration after %d of %d segments", finished, len(stream.segments))
            borders = store.load_borders()
            count = len(self._shares.pieces)
            stream.borders, students = borders[:count], borders[count:]
        due = {name: stream.last_segment_of(name) for name in self._transforms}
        # Nothing behind the last transform is needed, above all no logits.
        end = 1 + max(map(stream.segments.index, due.values()), default=-1)
        if self._config.calibration.joins_outputs and finished < end:
            late = stream.segments[finished:end]
            self._measure_outputs([name for name, segment in due.items() if segment in late])
        found: dict[str, FittedTransform] = {}
        for index, segment in enumerate(stream.segments[:end]):
            names = [name for name, last in due.items() if last == segment]
            if store and index < finished:
                tensors, stages = store.load_segment(index)
                # They were stored from the CPU; what trains the model goes on where it is.
                fits = {
                    name: one.to(self._weights[self._transforms[name].linears[0].name].device)
                    for name, one in unpack_fits(tensors).items()
                }
                self._note(names, [StageReport(**stage) for stage in stages])
            else:
                fits, stages = self._run_segment(stream, students, segment, names)
                if store:
                    packed = {key: one for name in names for key, one in pack_fit(name, fits[name]).items()}
                    store.save_segment(index, packed, [asdict(stage) for stage in stages])
            for name in names:
                self._progress.fitted(self._transforms[name].apply(self._gm, fits[name]))
            found |= fits
            # Statistics pooled over several segments are not on disk: a run resumes only where none are open.
            if store and index >= finished and not self._statistics:
                store.save_borders(index, [*stream.borders, *students])
        if self._config.calibration.distill_epochs and found:
            self._distill(found)

    def _measure_outputs(self, names: Sequence[str]) -> None:
        """Measure how errors in the outputs of each linear of some transforms join."""
        calibration = self._config.calibration
        self._progress.measuring(calibration.gradient_samples)
        weights = {one.name: one.weight for name in names for one in joined_linears(self._transforms[name])}
        with self._fast_products():
            self._outputs = measure_output_moments(
                self._gm, weights, self._batches, samples=calibration.gradient_samples, seed=calibration.seed
            )

    def _fast_products(self) -> contextlib.AbstractContextManager[None]:
        return product_precision("fast") if self._config.calibration.autocast else contextlib.nullcontext()

    def _distill(self, fits: Mapping[str, FittedTransform]) -> None:
        """Train all linears together."""
        transforms = list(self._transforms.values())
        distiller = Distiller(self._gm, transforms, fits, self._weights, self._batches, self._config.calibration)
        trained, stage = distiller.run(self._progress)
        for transform in transforms:
            transform.apply(self._gm, trained[transform.name])
        self._gm.meta.setdefault("parofx_block_reports", {})["the whole model"] = BlockReport(
            "the whole model", (stage,)
        )

    def _run_segment(
        self, stream: BlockStream, students: Sequence[Border], segment: str, names: Sequence[str]
    ) -> tuple[dict[str, FittedTransform], list[StageReport]]:
        """Run a segment and fit the transforms that are due behind it."""
        self._progress.enter(self._transforms[names[0]].block if names else "")
        open_before = set(self._statistics)
        targets: list[list[Tensor]] = []
        self._piece = 0
        with together(), self._fast_products():
            for output in stream.run(segment, self._record, self._relative()):
                if students:
                    targets.append(counting_outputs(stream.module(segment), output, stream.masks[self._piece]))
                self._piece += 1
                self._progress.forwarded(self._piece, len(self._shares.pieces))
        statistics = {name: (self._statistics.pop(name), self._pop_held_out(name)) for name in names}
        for name in names:
            self._norms.pop(name, None)
        fits = fit_together(names, statistics, lambda name: self._fit(name, *statistics[name]))
        for linear in (one.name for name in names for one in self._transforms[name].linears):
            self._outputs.pop(linear, None)
        stages: list[StageReport] = []
        if students:
            arguments = [stream.arguments(segment, border) for border in students]
            # A transform with inputs in other segments too cannot be trained in one of them.
            own = {name: fits[name] for name in names if name not in open_before}
            transforms = [self._transforms[name] for name in own]
            module = stream.module(segment)
            if own:
                data = BlockData(arguments, targets, stream.masks, self._first_held_out, self._shares)
                fits |= train_block(
                    module, transforms, own, statistics, data, self._config.calibration, stages, self._progress
                )
                self._note(names, stages)
            weights = quantized_weights([self._transforms[name] for name in names], fits)
            for border, given in zip(students, arguments, strict=True):
                with torch.no_grad():
                    stream.advance(segment, border, Student(module, weights).run(*given))
        return fits, stages

    def _note(self, names: Sequence[str], stages: Sequence[StageReport]) -> None:
        if stages:
            block = self._transforms[names[0]].block
            report = BlockReport(block, tuple(stages))
            self._gm.meta.setdefault("parofx_block_reports", {})[block] = report

    def _relative(self) -> dict[str, frozenset[str]]:
        """Return the transforms whose rows count relative to their outputs, and the names of their linears."""
        if self._config.calibration.row_weights == "equal":
            return {}
        relative = (one for one in self._transforms.values() if counts_relative(one))
        return {one.name: frozenset(linear.name for linear in one.linears) for one in relative}

    def _record(self, name: str, rows: Tensor, lengths: Tensor | None) -> None:
        self._observe(self._statistics, name, rows, lengths)
        if self._config.calibration.chooses_damping and self._shares.places[self._piece] >= self._first_held_out:
            self._observe(self._held_out, name, rows, lengths)

    def _observe(self, statistics: dict[str, InputStatistics], name: str, rows: Tensor, lengths: Tensor | None) -> None:
        transform = self._transforms[name]
        if name not in statistics:
            statistics[name] = InputStatistics(rows.shape[-1], transform.group_size, full=self._full)
        if name not in self._norms:
            self._norms[name] = output_norm(transform, self._config.calibration)
        norm = self._norms[name]
        statistics[name].update(rows, relative_to=norm, lengths=lengths, where=f"the input of {name}")

    def _pop_held_out(self, name: str) -> InputStatistics | None:
        """Return the held-out statistics of a transform, empty ones where this process saw no held-out batch."""
        if not self._config.calibration.chooses_damping:
            return None
        transform = self._transforms[name]
        empty = InputStatistics(transform.linears[0].weight.shape[1], transform.group_size, full=self._full)
        return self._held_out.pop(name, empty)

    def _fit(self, name: str, statistics: InputStatistics, held_out: InputStatistics | None) -> FittedTransform:
        transform = self._transforms[name]
        if statistics.count:
            linears = joined_linears(transform) if self._outputs else []
            outputs = [part for one in linears for part in self._outputs[one.name].parts]
            return self._fit_transform(transform, statistics, held_out, outputs)
        logger.warning("no calibration row reaches %s; it is fitted on its weights alone", name)
        return self._fit_transform(transform, None, None, ())

    def _open_store(self) -> SharedStore | None:
        calibration = self._config.calibration
        if calibration.work_dir is None:
            return None
        options = self._config.to_dict()
        options["calibration"] = {k: v for k, v in options["calibration"].items() if k not in ("work_dir", "resume")}
        # Given or as the recipe has it, it is the same run.
        options["share_siblings"] = self._config.shares_transforms
        options["graph"] = self._gm.code
        tensors = itertools.chain(self._gm.named_parameters(), self._gm.named_buffers())
        options["processes"] = process_count()
        digest = fingerprint(options, tensors, self._batches)
        return SharedStore(calibration.work_dir, digest, resume=calibration.resume)


def joined_linears(transform: Transform) -> Sequence[TransformedLinear]:
    """Return those of a transform's linears whose rows take over each other's errors: all, or of an output head none.

    The outputs of a head are the distribution itself.
    """
    return () if any(one.bits_given for one in transform.linears) else transform.linears


def _digest(gm: GraphModule, config: ParoConfig, batches: Sequence[Mapping[str, Any]]) -> str:
    """Return what tells this run from others: options, graph, data and the beginning of each weight."""
    if process_count() == 1:
        return ""
    beginnings = ((name, tensor.detach().flatten()[:1024]) for name, tensor in gm.named_parameters())
    return fingerprint(config.to_dict() | {"graph": gm.code}, beginnings, batches)


def _check_batch(index: int, batch: Mapping[str, Any]) -> None:
    empty = [name for name, value in batch.items() if isinstance(value, Tensor) and value.numel() == 0]
    mask = batch.get("attention_mask")
    if not empty and isinstance(mask, Tensor) and not mask.any():
        empty = ["attention_mask"]
    if empty:
        raise DataError(
            f"a calibration batch must hold rows: batch {index} has none in {', '.join(empty)}; leave it out"
        )
