"""Pictures of a quantization: a layer's weights before and after its rotation, and the error of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parofx import affine, rotation
from parofx.errors import ParoError, ShapeError
from parofx.nn import ParoLinear
from parofx.report import LinearReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE, _AFTER = "#b0413e", "#27647b"


def rotated_weight(weight: Tensor, linear: ParoLinear) -> Tensor:
    """Return a float weight `(N, K)` in the coordinates in which `linear` quantizes it, fp32."""
    tensors = linear.checkpoint_tensors()
    reciprocal = tensors["channel_scales"].float().reciprocal()
    return rotation.rotate(weight.float(), tensors["pairs"], tensors["theta"], reciprocal, linear.group_size)


def plot_weights(
    before: Tensor, after: Tensor, *, bits: int, group_size: int, title: str, path: str | Path | None = None
) -> Figure:
    """Draw a weight before and after its transform: a group and its grid, and the steps of all groups.

    The error of rounding grows with the square of a group's step, which is its range over `2^bits − 1`. The group drawn
    is one whose step shrinks more than nine in ten do.

    Args:
        before: float weight `(N, K)`.
        after: the same weight scaled and rotated, `(N, K)` (`rotated_weight`).
        bits: width of the codes.
        group_size: input channels that share a step.
        title: of the figure, usually the layer's name.
        path: where to write the figure, in the format that its suffix names.

    Raises:
        ShapeError: if the two differ in shape.
    """
    if before.shape != after.shape:
        raise ShapeError(f"before and after must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    figure = _figure(11, 6.5)
    grid = figure.add_gridspec(2, 2)
    row, group = _group_that_shrinks(before, after, bits, group_size)
    first = None
    for column, (weight, name, color) in enumerate(
        zip((before, after), ("before", "rotated and scaled"), (_BEFORE, _AFTER), strict=True)
    ):
        part = weight[row : row + 1, group * group_size : (group + 1) * group_size].detach().float().cpu()
        part = part / part.square().mean().sqrt().clamp(min=1e-30)
        scales, zeros = affine.choose_qparams(part, bits, group_size)
        first = axes = figure.add_subplot(grid[0, column], sharey=first)
        for code in range(affine.quant_max(bits) + 1):
            axes.axhline(float((code - zeros) * scales), color="0.82", linewidth=0.7, zorder=0)
        axes.vlines(range(group_size), 0, part[0].numpy(), color=color, linewidth=1)
        axes.plot(part[0].numpy(), ".", color=color, markersize=4)
        axes.set_title(f"one group {name}, lines where codes lie: step {float(scales):.2f}", fontsize=10)
        axes.set_xlabel("input channel of the group")
        axes.set_ylabel("in root mean squares of the group" if column == 0 else "")

    axes = figure.add_subplot(grid[1, :])
    steps = [_relative_steps(weight, bits, group_size) for weight in (before, after)]
    bins = torch.linspace(0, float(torch.cat(steps).quantile(0.999)), 120).tolist()
    for values, name, color in zip(steps, ("before", "after"), (_BEFORE, _AFTER), strict=True):
        label = f"{name}: mean square {float(values.square().mean()):.4f}"
        axes.hist(values.numpy(), bins=bins, histtype="stepfilled", alpha=0.45, color=color, label=label)
    axes.set_title(f"steps of all groups, {bits} bit, groups of {group_size}", fontsize=10)
    axes.set_xlabel("step, in root mean squares of the weight")
    axes.set_ylabel("groups")
    axes.legend(frameon=False)
    figure.suptitle(title)
    finished: Figure = _finish(figure, path)
    return finished


def plot_errors(runs: Mapping[str, Sequence[LinearReport]], *, path: str | Path | None = None) -> Figure:
    """Draw the relative error of each layer, one panel per kind of layer, one line per run.

    A kind is the last part of a layer's name; its layers are drawn in the order of the report.

    Args:
        runs: label → the layers of its report (`QuantizationReport.linears`).
        path: where to write the figure, in the format that its suffix names.

    Raises:
        ParoError: if there is no layer to draw.
    """
    kinds = list(dict.fromkeys(linear.name.rpartition(".")[2] for linears in runs.values() for linear in linears))
    if not kinds:
        raise ParoError("expected at least one quantized layer to draw, got none")
    columns = min(len(kinds), 4)
    rows = -(-len(kinds) // columns)
    figure = _figure(3 * columns + 0.5, 2.6 * rows + 0.5)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    colors = [_BEFORE, _AFTER, "#6b8f3c", "#8a6bb0"]
    for panel, kind in zip(panels, kinds, strict=False):
        for index, (label, linears) in enumerate(runs.items()):
            errors = [linear.relative_error for linear in linears if linear.name.rpartition(".")[2] == kind]
            panel.semilogy(errors, marker=".", color=colors[index % len(colors)], label=label)
        panel.set_title(kind, fontsize=10)
        panel.grid(alpha=0.25, which="both")
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("layer, from input to output")
    figure.supylabel("expected squared error of the output,\nrelative to the output")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(runs), frameon=False)
    finished: Figure = _finish(figure, path)
    return finished


def _group_that_shrinks(before: Tensor, after: Tensor, bits: int, group_size: int) -> tuple[int, int]:
    """Return output channel and index of a group whose step, over its own weights, shrinks more than nine in ten do."""
    steps = []
    for weight in (before, after):
        weight = weight.detach().float().cpu()
        size = affine.grouped(weight, group_size).square().mean(2).sqrt().clamp(min=1e-30)
        steps.append(affine.choose_qparams(weight, bits, group_size)[0].float() / size)
    ratios = (steps[1] / steps[0]).flatten()
    chosen = int(ratios.argsort()[len(ratios) // 10])
    return divmod(chosen, steps[0].shape[1])


def _relative_steps(weight: Tensor, bits: int, group_size: int) -> Tensor:
    weight = weight.detach().float().cpu()
    scales, _ = affine.choose_qparams(weight, bits, group_size)
    return scales.flatten() / weight.square().mean().sqrt()


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ParoError("drawing needs matplotlib: pip install 'parofx[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the machine's default backend is
    return figure


def _finish(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.new{target.suffix}")
        figure.savefig(temporary, dpi=130)
        temporary.replace(target)
    return figure
