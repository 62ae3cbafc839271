"""The pipeline runs passes: check the stage, run, lint, verify, recompile, dump, time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from parofx.errors import PassError
from parofx.passes.base import Pass, PassReport, Stage, has_stage, set_stage, stage_of
from parofx.passes.verify import verify_stage

logger = logging.getLogger("parofx")


@dataclass
class Pipeline:
    """A sequence of passes.

    Args:
        passes: run in order.
        verify: check each stage's invariants after its pass.
        dump_dir: folder for the graph after each pass as readable Python; `PAROFX_DUMP` by default.

    After `run`, `reports` holds one `PassReport` per pass and `seconds` its time.
    """

    passes: Sequence[Pass]
    verify: bool = True
    dump_dir: str | None = field(default_factory=lambda: os.environ.get("PAROFX_DUMP"))
    reports: list[PassReport] = field(default_factory=list, init=False)
    seconds: list[float] = field(default_factory=list, init=False)

    def run(self, gm: GraphModule) -> GraphModule:
        """Run every pass on `gm`, in place, and return it.

        Raises:
            PassError: if a pass does not take the graph's stage, or leaves a graph that breaks its invariants.
        """
        for index, one in enumerate(self.passes):
            self._check_stage(gm, one)
            start = time.perf_counter()
            report = one.run(gm)
            if report.changed:
                gm.graph.lint()
            gm.recompile()
            self.seconds.append(time.perf_counter() - start)
            self.reports.append(report)
            if isinstance(one.produces, Stage):
                set_stage(gm, one.produces)
            if self.verify:
                verify_stage(gm)
            self._log(report)
            if self.dump_dir:
                self._dump(gm, index, one.name)
        return gm

    def records(self) -> tuple[dict[str, Any], ...]:
        """Return name, changes and seconds of each pass that ran."""
        return tuple(
            {"pass": report.name, "changed": report.changed, "seconds": round(seconds, 4)}
            for report, seconds in zip(self.reports, self.seconds, strict=True)
        )

    def _check_stage(self, gm: GraphModule, one: Pass) -> None:
        if None in one.consumes and not has_stage(gm):
            return
        stage = stage_of(gm)
        if stage not in one.consumes:
            expected = " or ".join(stage for stage in one.consumes if stage is not None)
            raise PassError(f"pass {one.name} takes a graph of stage {expected}, got {stage}")

    def _log(self, report: PassReport) -> None:
        logger.info(
            "%s: %d changed, %d skipped, %.3f s", report.name, report.changed, len(report.skipped), self.seconds[-1]
        )
        for name, what in report.matched:
            logger.debug("%s: %s: %s", report.name, name, what)
        for name, reason in report.skipped:
            logger.debug("%s: skipped %s: %s", report.name, name, reason)

    def _dump(self, gm: GraphModule, index: int, name: str) -> None:
        folder = Path(self.dump_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        count = len(list(folder.glob("*.py")))
        text = gm.print_readable(print_output=False, include_stride=False)
        (folder / f"{count:03d}_{name}.py").write_text(text)
