"""The report of a run as one HTML page: drawn from its JSON form, with nothing to load from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; font-family: ui-monospace, monospace; font-size: 13px; }
.chart { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
.before { stroke: #b0413e; fill: #b0413e; color: #b0413e; } .after { stroke: #27647b; fill: #27647b; color: #27647b; }
polyline { fill: none !important; stroke-width: 1.5; }
svg text { font-size: 11px; fill: #555; stroke: none; }
"""
_WIDTH, _HEIGHT, _MARGIN = 260, 150, 34


def save_page(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a report, `QuantizationReport.to_dict()` or what was stored of it."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(render_page(report), encoding="utf-8")
    unfinished.replace(path)


def render_page(report: Mapping[str, Any]) -> str:
    """Return the page of a report as HTML."""
    linears, transforms = report.get("linears", ()), report.get("transforms", ())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>parofx report</title>",
        f"<style>{_STYLE}</style><h1>Quantization report</h1>",
        f"<p>{len(linears)} linears, {len(transforms)} transforms, {report.get('bits_per_weight', 0):.3f} bits per "
        f"weight, {report.get('seconds', 0):.0f} s, recipe "
        f"{escape(str(report.get('config', {}).get('calibration', {}).get('recipe', '')))}.</p>",
        "<h2>Error of the output, relative to the output</h2>",
        "<p><span class=before>rounded to nearest in the same rotation</span>, <span class=after>as stored</span>; "
        "layers from input to output.</p>",
        *_error_charts(linears),
        *_block_tables(report.get("blocks", ())),
        "<h2>Transforms</h2>",
        _table(
            ("transform", "objective", "after", "factor", "angles (rms)", "damping", "feedback"),
            [
                (
                    one["name"],
                    f"{one['loss_before']:.3e}",
                    f"{one['loss_after']:.3e}",
                    _factor(one["loss_before"], one["loss_after"]),
                    f"{one['angle_rms']:.3f}",
                    "–" if one.get("damping") is None else f"{one['damping']:g}",
                    _feedback(one),
                )
                for one in transforms
            ],
        ),
        "<h2>Linears</h2>",
        _table(
            ("linear", "N × K", "bits", "group size", "krot", "error, nearest", "error, stored"),
            [
                (
                    one["name"],
                    f"{one['out_features']} × {one['in_features']}",
                    str(one["bits"]),
                    str(one["group_size"]),
                    str(one["krot"]),
                    "–" if one.get("nearest_error") is None else f"{one['nearest_error']:.2e}",
                    f"{one['relative_error']:.2e}",
                )
                for one in linears
            ],
        ),
    ]
    kept = report.get("kept_float", ())
    if kept:
        rows = [(one["name"], one["reason"] + (f" ({one['detail']})" if one["detail"] else "")) for one in kept]
        parts += ["<h2>Kept float</h2>", _table(("linear", "reason"), rows)]
    return "\n".join(parts) + "\n</html>\n"


def _error_charts(linears: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one chart per kind of linear, which is the last part of its name."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in linears:
        kinds.setdefault(one["name"].rpartition(".")[2], []).append(one)
    return [
        _chart(
            kind,
            {
                "before": [one.get("nearest_error") for one in members],
                "after": [one["relative_error"] for one in members],
            },
        )
        for kind, members in kinds.items()
    ]


def _block_tables(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the stages of trained blocks, as charts over the blocks and as a table."""
    if not blocks:
        return []
    stages: dict[str, dict[str, list[float | None]]] = {}
    for block in blocks:
        for stage in block["stages"]:
            series = stages.setdefault(stage["name"], {"before": [], "after": []})
            series["before"].append(stage["before"])
            series["after"].append(stage["after"])
    rows = [
        (
            block["name"],
            stage["name"],
            f"{stage['before']:.3e}",
            f"{stage['after']:.3e}",
            _factor(stage["before"], stage["after"]),
            stage["kept"] + ("" if stage["after"] < stage["before"] else ": no improvement"),
        )
        for block in blocks
        for stage in block["stages"]
    ]
    heading = (
        "<h2>Blocks</h2><p>Loss of the block's output on held-out data <span class=before>before</span> and "
        "<span class=after>after</span> each stage.</p>"
    )
    charts = [_chart(name, series) for name, series in stages.items()]
    return [heading, *charts, _table(("block", "stage", "before", "after", "factor", "kept"), rows)]


def _chart(title: str, series: Mapping[str, Sequence[float | None]]) -> str:
    """Return a line chart with a logarithmic axis; values that are missing or zero are left out."""
    logs = {
        name: [None if value is None or value <= 0 else math.log10(value) for value in values]
        for name, values in series.items()
    }
    present = [value for values in logs.values() for value in values if value is not None] or [0.0]
    low, high = min(present), max(present)
    span = max(high - low, 1e-9)
    lines = []
    for name, values in logs.items():
        points = [
            (
                _MARGIN + (_WIDTH - 2 * _MARGIN) * index / max(len(values) - 1, 1),
                _HEIGHT - 20 - (_HEIGHT - 44) * (value - low) / span,
            )
            for index, value in enumerate(values)
            if value is not None
        ]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points)
        lines.append(f'<g class="{name}"><polyline points="{drawn}"/>{dots}</g>')
    labels = f'<text x="2" y="28">{10**high:.0e}</text><text x="2" y="{_HEIGHT - 16}">{10**low:.0e}</text>'
    caption = f'<text x="{_MARGIN}" y="12">{escape(title)}</text>'
    return f'<svg class=chart width="{_WIDTH}" height="{_HEIGHT}">{caption}{labels}{"".join(lines)}</svg>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _feedback(transform: Mapping[str, Any]) -> str:
    """Return between what rounding errors were fed back."""
    if transform.get("damping") is None:
        return "–"
    return "columns and rows" if transform.get("joins_rows") else "columns"


def _factor(before: float, after: float) -> str:
    return f"{after / before:.3f}" if before else "–"
