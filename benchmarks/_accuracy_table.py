"""What `benchmarks.accuracy` shows of its results: a table on the terminal or in Markdown, and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: Half the width of a 95 % interval, in standard errors.
_INTERVAL = 1.96
_HEADINGS = (
    "weights", "bits", "perplexity", "gap", "of GPTQ's", "KL", "KL 99 %", "top-1", "s", "CPU s", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class AccuracyTable:
    """Rows by name, that of the float model among them.

    Attributes:
        rows: what `benchmarks.accuracy` keeps of each: bits, means over its runs, and the runs.
        title: of table and plot.
        gptq: the row to whose gap the others' are compared; it may be missing.
    """

    rows: dict[str, Any]
    title: str
    gptq: str

    def print(self) -> None:
        """Show the table."""
        table = Table(title=self.title)
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == "weights" else "right")
        for name in self.rows:
            table.add_row(*self._cells(name))
        Console(width=160).print(table)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = "|-|" + "-:|" * (len(_HEADINGS) - 1)
        lines = [f"| {' | '.join(cells)} |" for cells in (_HEADINGS, *map(self._cells, self.rows))]
        return "\n".join([lines[0], rule, *lines[1:]]) + "\n"

    def _cells(self, name: str) -> tuple[str, ...]:
        row = self.rows[name]
        gap, spread = self._gap(row["perplexity"]), row["perplexity_spread"]
        of_gptq = self.gptq in self.rows and gap / self._gap(self.rows[self.gptq]["perplexity"])
        is_float, compared = name == "float", row["kl_mean"] is not None
        return (
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f} ± {_INTERVAL * (row['perplexity_error'] or 0.0):.2f}",
            "" if is_float else f"{gap:.2f}" + ("" if spread is None else f" (σ {spread:.2f})"),
            f"{of_gptq:.2f}" if of_gptq and not is_float else "",
            f"{row['kl_mean']:.4f} ± {_INTERVAL * (row['kl_error'] or 0.0):.4f}" if compared else "",
            f"{row['kl_p99']:.3f}" if compared else "",
            f"{row['top1_agreement']:.3f}" if compared else "",
            f"{row['quantize_seconds']:.0f}",
            f"{row['quantize_cpu_seconds']:.0f}",
            str(len(row["seeds"])),
        )

    def _gap(self, perplexity: float) -> float:
        return float(perplexity - self.rows["float"]["perplexity"])

    def plot(self, path: Path) -> None:
        """Draw every quantized row's perplexity gap, with what the seeds gave."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        names = [name for name in self.rows if name != "float"]
        figure = Figure(figsize=(9, 1 + 0.35 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for position, name in enumerate(reversed(names)):
            axes.barh(position, self._gap(self.rows[name]["perplexity"]), color="#27647b", alpha=0.6)
            gaps = [self._gap(run["perplexity"]) for run in self.rows[name]["seeds"]]
            axes.plot(gaps, [position] * len(gaps), "k.", markersize=4)
        labels = [f"{name} ({self.rows[name]['bits_per_weight']:.2f} bit)" for name in reversed(names)]
        axes.set_yticks(range(len(names)), labels)
        axes.set_xlabel(f"perplexity above float ({self.rows['float']['perplexity']:.2f})")
        axes.set_title(self.title)
        figure.savefig(path, dpi=130)
