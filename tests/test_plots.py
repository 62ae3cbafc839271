"""The figures show what they were given, and are written whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from parofx import affine, pairing, plots
from parofx.errors import ParoError, ShapeError
from parofx.nn import ParoLinear
from parofx.report import LinearReport

pytest.importorskip("matplotlib")


def linear_report(name: str, error: float) -> LinearReport:
    return LinearReport(name, 64, 64, 4, 32, 8, "t", "block", error, 1)


def test_rotated_weight_is_what_the_layer_quantizes() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    linear = ParoLinear(64, 16, group_size=32, krot=3, bias=False)
    linear.pairs.copy_(pairing.make_pairs(64, 32, 3, seed=0))
    linear.theta.copy_(torch.randn(3, 32, generator=generator))
    linear.channel_scales.copy_(torch.rand(1, 64, generator=generator) + 0.5)
    rotated = plots.rotated_weight(weight, linear)
    x = torch.randn(5, 64, generator=generator)
    rotated_x = torch.ops.parofx.rotate(x, linear.pairs, linear.theta, linear.channel_scales, 32)
    torch.testing.assert_close(rotated_x @ rotated.t(), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_weights_are_drawn_with_their_steps(tmp_path: Path) -> None:
    before = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    after = 3 * before.clone()
    figure = plots.plot_weights(before, after, bits=4, group_size=32, title="layer", path=tmp_path / "w.png")
    assert [path.name for path in tmp_path.iterdir()] == ["w.png"]
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    for axes, weight in zip(figure.axes, (before, after), strict=False):
        *levels, dots = axes.get_lines()
        drawn = torch.tensor(dots.get_ydata())
        groups = affine.grouped(weight, 32) / affine.grouped(weight, 32).square().mean(2, keepdim=True).sqrt()
        assert (groups - drawn).abs().amax(2).min() < 1e-6
        heights = torch.tensor([line.get_ydata()[0] for line in levels])
        assert len(heights) == 16
        assert (drawn[:, None] - heights).abs().amin(1).max() <= heights.diff().amax() / 2 + 1e-3
    steps = affine.choose_qparams(before, 4, 32)[0] / before.square().mean().sqrt()
    label = f"before: mean square {float(steps.square().mean()):.4f}"
    assert label in [text.get_text() for axes in figure.axes if (legend := axes.get_legend()) for text in legend.texts]


def test_errors_have_a_panel_for_each_kind_and_a_line_for_each_run(tmp_path: Path) -> None:
    names = [f"layers.{index}.{kind}" for index in range(3) for kind in ("up", "down")]
    runs = {
        label: [linear_report(name, factor * (1 + index)) for index, name in enumerate(names)]
        for label, factor in (("nearest", 0.2), ("parofx", 0.1))
    }
    figure = plots.plot_errors(runs, path=tmp_path / "errors.svg")
    assert (tmp_path / "errors.svg").read_text().startswith("<?xml")
    assert [axes.get_title() for axes in figure.axes] == ["up", "down"]
    lines = figure.axes[1].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [
        pytest.approx([0.4, 0.8, 1.2]),
        pytest.approx([0.2, 0.4, 0.6]),
    ]


def test_a_fifth_kind_begins_a_row() -> None:
    figure = plots.plot_errors({"run": [linear_report(f"layer.{kind}", 0.1) for kind in "abcde"]})
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 5


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ParoError, match="at least one quantized layer"):
        plots.plot_errors({"run": []})


def test_two_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"one shape, got \(2, 32\) and \(2, 64\)"):
        plots.plot_weights(torch.zeros(2, 32), torch.zeros(2, 64), bits=4, group_size=32, title="")


def test_matplotlib_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ParoError, match=r"pip install 'parofx\[plots\]'"):
        plots.plot_errors({"run": [linear_report("layer", 0.1)]})
