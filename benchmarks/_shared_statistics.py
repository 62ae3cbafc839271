"""Runs on one model and one text share what they gather from both: only what follows is done anew.

A run on a CPU spends about half its time on the float model's activations and their second moments, which are the same
for most options. Times of runs that found them are of the rest, plus what gathering took the run that did it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

import parofx.quantization
from parofx.calibration.fitting import FittedTransform
from parofx.calibration.store import fingerprint
from parofx.passes.base import PassReport, Stage, set_stage
from parofx.passes.calibrate import Calibrate
from parofx.passes.transforms import Transform, find_transforms


@dataclass
class _Gathered:
    """What `Calibrate.fit` was given for each transform, and the wall and CPU seconds that it took to gather it."""

    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    wall: float = 0.0
    cpu: float = 0.0


class SharedStatistics:
    """The statistics of the last run that gathered some, and the options they depend on: several would fill memory."""

    def __init__(self) -> None:
        self._key: Hashable | None = None
        self._gathered = _Gathered()
        #: Wall and CPU seconds that the last run would have taken longer on its own.
        self.saved = (0.0, 0.0)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """While it is on, `parofx.quantize` gathers statistics only where no earlier run did."""
        owner = self
        noted: _Gathered | None = None
        self.saved = (0.0, 0.0)

        class Sharing(Calibrate):
            def run(self, gm: GraphModule) -> PassReport:
                nonlocal noted
                key = _key(self, find_transforms(gm))
                if key is None:
                    return super().run(gm)
                if key == owner._key:
                    return self._repeat(gm, owner._gathered)
                owner._key = None  # until all is there
                noted = owner._gathered = _Gathered()
                start = time.perf_counter(), time.process_time()
                report = super().run(gm)
                noted.wall += time.perf_counter() - start[0]
                noted.cpu += time.process_time() - start[1]
                owner._key = key
                return report

            def _repeat(self, gm: GraphModule, gathered: _Gathered) -> PassReport:
                with torch.no_grad():
                    for transform in find_transforms(gm):
                        transform.apply(gm, self.fit(gm, transform, *gathered.arguments[transform.name]))
                set_stage(gm, Stage.CALIBRATED)
                owner.saved = (gathered.wall, gathered.cpu)
                return PassReport(self.name, changed=len(gathered.arguments))

            def fit(self, gm: GraphModule, transform: Transform, *given: Any) -> FittedTransform:
                start = time.perf_counter(), time.process_time()
                fitted = super().fit(gm, transform, *given)
                if noted is not None:
                    noted.arguments[transform.name] = given
                    noted.wall -= time.perf_counter() - start[0]
                    noted.cpu -= time.process_time() - start[1]
                return fitted

        with mock.patch.object(parofx.quantization, "Calibrate", Sharing):
            yield


def _key(calibrate: Calibrate, transforms: Sequence[Transform]) -> Hashable | None:
    """Return what the statistics of a run depend on; None where a run needs more than them."""
    options = calibrate.config.calibration
    batches = calibrate.batches
    if batches is None or options.recipe == "data-free" or options.trains or options.work_dir is not None:
        return None
    beginnings = ((linear.name, linear.weight.flatten()[:1024]) for one in transforms for linear in one.linears)
    data = fingerprint({"autocast": options.autocast, "full": options.rounding == "feedback"}, beginnings, batches)
    places = tuple((one.name, one.group_size, tuple(linear.name for linear in one.linears)) for one in transforms)
    gradients = (options.gradient_samples, options.seed) if options.joins_outputs else 0
    held_out = options.validation_samples if options.chooses_damping else 0
    return data, places, options.row_weights, held_out, gradients
