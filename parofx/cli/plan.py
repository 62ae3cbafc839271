"""The plan of `parofx quantize --dry-run`, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from parofx.cli.common import console, size

if TYPE_CHECKING:
    from parofx.planning import QuantizationPlan


def print_plan(plan: QuantizationPlan) -> None:
    """Print what a run would do and take."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    reasons = ", ".join(f"{count} {reason}" for reason, count in plan.reasons().items())
    table.add_row("quantized", f"{len(plan.linears)} linears with {plan.transforms} transforms in {plan.blocks} blocks")
    table.add_row("kept float", reasons or "none")
    table.add_row("data", f"{plan.sequences} sequences, {plan.tokens} tokens" if plan.sequences else "weights alone")
    if plan.processes > 1:
        table.add_row("processes", f"{plan.processes}; memory is that of each")
    table.add_row("steps", f"{plan.steps} of the optimizer, {plan.transforms} fits")
    most = "at most " if plan.budget_bytes else ""
    table.add_row(
        "checkpoint", f"{most}{size(plan.checkpoint_bytes)}, {plan.bits_per_weight:.3f} bits per quantized weight"
    )
    if plan.budget_bytes:
        least, largest = plan.budget_bytes
        table.add_row("formats", f"chosen in the run, between {size(least)} and {size(largest)} of quantized linears")
    memory = ", ".join(f"{name} {size(count)}" for name, count in plan.memory.items() if count)
    table.add_row("memory", f"at most {size(plan.peak_memory_bytes)} of tensors: {memory}")
    table.add_row("work folder", size(plan.disk_bytes) if plan.disk_bytes else "none")
    seconds = f"about {_duration(plan.seconds)} on {plan.device}, from short measurements here"
    table.add_row("time", seconds)
    console.print(table)


def _duration(seconds: float) -> str:
    """Return seconds for people: `2 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
