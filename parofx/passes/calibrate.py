"""`calibrate`: PREPARED → CALIBRATED. Fit every transform and choose the grid its weights are rounded to.

With batches, the graph's blocks run in order and each transform is fitted on the statistics of its own input;
without, on the weights alone. The structure stays; θ, channel scales, and the scales and zeros of `fake_quantize`
change. A transform that could not be improved keeps its start, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from parofx.allocation import keeping_pages
from parofx.calibration.compensation import fit_corrections
from parofx.calibration.data_run import DataRun
from parofx.calibration.fitting import FittedTransform, fit
from parofx.calibration.processes import process_index, together
from parofx.calibration.progress import BlockProgress
from parofx.calibration.statistics import InputStatistics
from parofx.config import ParoConfig
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.derived import derived
from parofx.passes.transforms import Transform, check_weights, find_transforms
from parofx.report import BlockReport, TransformReport


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
        check_weights(transforms)
        shown = self.progress and process_index() == 0
        with torch.no_grad(), keeping_pages(), BlockProgress(transforms, enabled=shown) as progress:
            if self.batches is None or self.config.calibration.recipe == "data-free":
                for transform in transforms:
                    progress.enter(transform.block)
                    progress.fitted(transform.apply(gm, self._fit_weights(gm, transform)))
            else:
                with together():
                    DataRun(gm, transforms, self.batches, self.config, partial(self.fit, gm), progress).run()
        set_stage(gm, Stage.CALIBRATED)
        report = PassReport(self.name, changed=len(transforms))
        for one in reports_of(gm):
            change = f"objective {one.loss_before:.3e} → {one.loss_after:.3e}"
            if one.loss_after < one.loss_before:
                report.matched.append((one.name, change))
            else:
                report.skipped.append((one.name, f"no rotation beat the start; kept it ({change})"))
        for block in block_reports_of(gm):
            for stage in block.stages:
                (report.matched if stage.improved else report.skipped).append((block.name, str(stage)))
        return report

    def fit(
        self,
        gm: GraphModule,
        transform: Transform,
        statistics: InputStatistics | None,
        held_out: InputStatistics | None = None,
        outputs: Sequence[Tensor] = (),
    ) -> FittedTransform:
        """Fit one transform on given statistics."""
        weights = [linear.weight for linear in transform.linears]
        bits, config = [linear.bits for linear in transform.linears], self.config.calibration
        sizes = {"group_size": transform.group_size, "krot": transform.krot(gm)}
        fitted = fit(weights, statistics, held_out, bits=bits, **sizes, config=config, outputs=outputs)
        if not config.compensation_rank:
            return fitted
        return fit_corrections(fitted, weights, statistics, held_out, bits=bits, config=config)

    def _fit_weights(self, gm: GraphModule, transform: Transform) -> FittedTransform:
        def make() -> FittedTransform:
            return self.fit(gm, transform, None)

        if not self.reuse:
            return make()
        widths = tuple(linear.bits for linear in transform.linears)
        options = (widths, transform.group_size, transform.krot(gm), self.config.calibration)
        return derived(("fit", options), [linear.parameter for linear in transform.linears], make)


def reports_of(gm: GraphModule) -> tuple[TransformReport, ...]:
    """Return what calibration noted of each transform of a graph."""
    return tuple(gm.meta.get("parofx_transform_reports", {}).values())


def block_reports_of(gm: GraphModule) -> tuple[BlockReport, ...]:
    """Return what calibration noted of each block it trained."""
    return tuple(gm.meta.get("parofx_block_reports", {}).values())
