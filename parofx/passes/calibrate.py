"""`calibrate`: PREPARED → CALIBRATED. Fit every transform and choose the grid its weights are rounded to.

With batches, the graph's blocks run in order and each transform is fitted on the statistics of its own input;
without, on the weights alone. The structure stays; θ, channel scales, and the scales and zeros of `fake_quantize`
change. A transform that could not be improved keeps its start, and the report says so.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from parofx.calibration.fitting import FittedTransform, fit
from parofx.calibration.progress import BlockProgress
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.store import CalibrationStore, fingerprint, pack_fit, unpack_fits
from parofx.calibration.stream import BlockStream
from parofx.config import ParoConfig
from parofx.errors import DataError
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.derived import derived
from parofx.passes.transforms import Transform, find_transforms
from parofx.report import TransformReport

logger = logging.getLogger("parofx")


@register
@dataclass(frozen=True)
class Calibrate:
    """Fit rotations, channel scales and rounding grids.

    `batches` are the model's inputs as mappings, all of one form; None fits on weights alone. With `reuse`, what was
    fitted on weights alone is kept for the next graph that holds the same ones.
    """

    config: ParoConfig = field(default_factory=ParoConfig)
    batches: Sequence[Mapping[str, Any]] | None = None
    progress: bool = False
    reuse: bool = False

    name: ClassVar[str] = "calibrate"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.PREPARED,)
    produces: ClassVar[Stage] = Stage.CALIBRATED

    def run(self, gm: GraphModule) -> PassReport:
        """Fit every transform of `gm`, in place.

        Raises:
            DataError: naming a weight, input or batch that is not finite, empty or of another form.
        """
        transforms = find_transforms(gm)
        _check_weights(transforms)
        with torch.no_grad(), BlockProgress(transforms, enabled=self.progress) as progress:
            if self.batches is None or self.config.calibration.recipe == "data-free":
                for transform in transforms:
                    progress.enter(transform.block)
                    progress.fitted(transform.apply(gm, self._fit_weights(gm, transform)))
            else:
                _DataRun(self, gm, transforms, progress).run()
        set_stage(gm, Stage.CALIBRATED)
        report = PassReport(self.name, changed=len(transforms))
        for one in reports_of(gm):
            change = f"range objective {one.loss_before:.3e} → {one.loss_after:.3e}"
            if one.loss_after < one.loss_before:
                report.matched.append((one.name, change))
            else:
                report.skipped.append((one.name, f"no rotation beat the start; kept it ({change})"))
        return report

    def fit(
        self, gm: GraphModule, transform: Transform, power: Tensor | None, block_gram: Tensor | None
    ) -> FittedTransform:
        """Fit one transform on given statistics."""
        return fit(
            [linear.weight for linear in transform.linears],
            power,
            block_gram,
            bits=transform.bits,
            group_size=transform.group_size,
            krot=transform.krot(gm),
            config=self.config.calibration,
        )

    def _fit_weights(self, gm: GraphModule, transform: Transform) -> FittedTransform:
        def make() -> FittedTransform:
            return self.fit(gm, transform, None, None)

        if not self.reuse:
            return make()
        options = (transform.bits, transform.group_size, transform.krot(gm), self.config.calibration)
        return derived(("fit", options), [linear.parameter for linear in transform.linears], make)


def reports_of(gm: GraphModule) -> tuple[TransformReport, ...]:
    """Return what calibration noted of each transform of a graph."""
    return tuple(gm.meta.get("parofx_transform_reports", {}).values())


def _check_weights(transforms: Sequence[Transform]) -> None:
    weights = [linear for transform in transforms for linear in transform.linears]
    wrong = [linear.name for linear in weights if not torch.isfinite(linear.weight).all()]
    if wrong:
        names = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DataError(
            f"the weight of {names} must be finite, got NaN or infinity; repair the model or add it to "
            "modules_to_not_convert"
        )


class _DataRun:
    """One pass over calibration data, block by block."""

    def __init__(
        self, settings: Calibrate, gm: GraphModule, transforms: Sequence[Transform], progress: BlockProgress
    ) -> None:
        self._settings = settings
        self._gm = gm
        self._transforms = {transform.name: transform for transform in transforms}
        self._progress = progress
        self._batches = list(settings.batches or ())
        if not self._batches:
            raise DataError("calibration must hold at least one batch, got none; pass calibration=None for data-free")
        for index, batch in enumerate(self._batches):
            _check_batch(index, batch)
        self._statistics: dict[str, InputStatistics] = {}

    def run(self) -> None:
        """Fit every transform after the last segment that computes one of its inputs."""
        stream = BlockStream(self._gm, self._batches)
        store = self._open_store()
        finished = store.finished() if store else 0
        if store and finished:
            logger.info("resuming calibration after %d of %d segments", finished, len(stream.segments))
            stream.borders = store.load_borders()
        due = {name: stream.last_segment_of(name) for name in self._transforms}
        for index, segment in enumerate(stream.segments):
            names = [name for name, last in due.items() if last == segment]
            if store and index < finished:
                fits = unpack_fits(store.load_segment(index))
                for name in names:
                    self._apply(name, fits[name])
                continue
            self._progress.enter(self._transforms[names[0]].block if names else "")
            for batch in stream.run(segment, self._record):
                self._progress.forwarded(batch + 1, len(self._batches))
            fits = {name: self._fit(name) for name in names}
            if store:
                store.save_segment(
                    index, {key: one for name in fits for key, one in pack_fit(name, fits[name]).items()}
                )
                # Statistics pooled over several segments are not on disk: a run resumes only where none are open.
                if not self._statistics:
                    store.save_borders(index, stream.borders)

    def _record(self, name: str, rows: Tensor) -> None:
        found = self._statistics.get(name)
        if found is None:
            group_size = self._transforms[name].group_size
            found = self._statistics[name] = InputStatistics(rows.shape[-1], group_size)
        found.update(rows, where=f"the input of {name}")

    def _fit(self, name: str) -> FittedTransform:
        statistics = self._statistics.pop(name)
        device = self._transforms[name].parameters(self._gm)[0].device
        power: Tensor | None = None
        gram: Tensor | None = None
        if statistics.count:
            gram, power = statistics.block_gram.to(device), statistics.power.to(device)
        else:
            logger.warning("no calibration row reaches %s; it is fitted on its weights alone", name)
        fitted = self._settings.fit(self._gm, self._transforms[name], power, gram)
        self._apply(name, fitted)
        return fitted

    def _apply(self, name: str, fitted: FittedTransform) -> None:
        self._progress.fitted(self._transforms[name].apply(self._gm, fitted))

    def _open_store(self) -> CalibrationStore | None:
        calibration = self._settings.config.calibration
        if calibration.work_dir is None:
            return None
        options = self._settings.config.to_dict()
        options["calibration"] = {k: v for k, v in options["calibration"].items() if k not in ("work_dir", "resume")}
        options["graph"] = self._gm.code
        tensors = itertools.chain(self._gm.named_parameters(), self._gm.named_buffers())
        digest = fingerprint(options, tensors, self._batches)
        return CalibrationStore(calibration.work_dir, digest, resume=calibration.resume)


def _check_batch(index: int, batch: Mapping[str, Any]) -> None:
    empty = [name for name, value in batch.items() if isinstance(value, Tensor) and value.numel() == 0]
    mask = batch.get("attention_mask")
    if not empty and isinstance(mask, Tensor) and not mask.any():
        empty = ["attention_mask"]
    if empty:
        raise DataError(
            f"a calibration batch must hold rows: batch {index} has none in {', '.join(empty)}; leave it out"
        )
