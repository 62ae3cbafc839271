"""The progress bar of calibration: blocks done, and the objective of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from parofx.passes.transforms import Transform
from parofx.report import StageReport, TransformReport


class BlockProgress:
    """Shows one bar over all transforms, naming the block and how far its objective fell."""

    def __init__(self, transforms: Sequence[Transform], *, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("[bold]calibrate[/]"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            # On a narrow terminal the block's name is cut, never the counts.
            TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=Console(stderr=True),
            disable=not (enabled and transforms),
        )
        self._task = self._bar.add_task("", total=len(transforms), status="")
        self._block = ""
        self._ratios: list[float] = []

    def __enter__(self) -> BlockProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def enter(self, block: str) -> None:
        """Name the block that runs next."""
        if block != self._block:
            self._block, self._ratios = block, []

    def measuring(self, sequences: int) -> None:
        """Say that gradients are taken."""
        self._bar.update(self._task, status=f"the whole model: gradients of {sequences} sequences")

    def forwarded(self, done: int, total: int) -> None:
        """Say that the block ran on `done` of `total` batches."""
        self._bar.update(self._task, status=f"{self._block or 'graph'}: statistics {done}/{total}")

    def trained(self, stage: StageReport) -> None:
        """Show what a stage of training made of the block's loss."""
        ratio = stage.after / stage.before if stage.before else 1.0
        self._bar.update(self._task, status=f"{self._block or 'graph'}: {stage.name} ×{ratio:.3f}")

    def distilling(self, steps: int) -> None:
        """Count the steps of distillation from here on."""
        self._block = "the whole model"
        self._bar.reset(self._task, total=steps, status=f"{self._block}: distillation")

    def stepped(self) -> None:
        """Count one of them."""
        self._bar.update(self._task, advance=1)

    def fitted(self, report: TransformReport) -> None:
        """Count a fitted transform."""
        self._ratios.append(report.loss_after / report.loss_before if report.loss_before else 1.0)
        mean = sum(self._ratios) / len(self._ratios)
        status = f"{self._block or 'graph'}: objective ×{mean:.3f}"
        self._bar.update(self._task, advance=1, status=status)
