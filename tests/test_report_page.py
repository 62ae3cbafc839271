"""The page says what the report says, and is well-formed and self-contained."""

import re
from html.parser import HTMLParser

import pytest

from parofx.config import ParoConfig
from parofx.report import (
    BlockReport,
    FloatLinear,
    FloatReason,
    LinearReport,
    QuantizationReport,
    StageReport,
    TransformReport,
)
from parofx.report_page import render_page, save_page


def linear(name, error, nearest):
    return LinearReport(name, 128, 64, 4, 64, 8, "t", "layers.0", error, 9000, nearest)


@pytest.fixture
def report():
    return QuantizationReport(
        config=ParoConfig(),
        linears=(linear("layers.0.q", 0.001, 0.002), linear("layers.0.<k>", 0.0, None), linear("layers.1.q", 0.1, 0.2)),
        transforms=(
            TransformReport("layers.0.q", ("layers.0.q",), "layers.0", 0.02, 0.005, 0.25, 0.1),
            TransformReport("layers.0.k", ("layers.0.k",), "layers.0", 0.02, 0.005, 0.25, 0.1, joins_rows=True),
            TransformReport("zero", (), "", 0.0, 0.0, 0.0),
        ),
        kept_float=(FloatLinear("lm_head", FloatReason.OUTPUT_HEAD), FloatLinear("odd", FloatReason.IN_FEATURES, "36")),
        seconds=12.0,
        peak_memory_bytes=1,
        blocks=(
            BlockReport(
                "layers.0",
                (
                    StageReport("transforms", 0.04, 0.02, "epoch 1 of 2"),
                    StageReport("weights", 0.02, 0.02, "epoch 0 of 2"),
                ),
            ),
        ),
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_everything_is_on_the_page(report):
    page = render_page(report.to_dict())
    for expected in ("layers.0.q", "layers.0.&lt;k&gt;", "2.00e-03", "1.00e-03", "0.250", "lm_head", "output head",
                     "no group size divides in_features (36)", "epoch 1 of 2", "epoch 0 of 2: no improvement", "12 s",
                     "recipe fast"):  # fmt: skip
        assert expected in page, expected
    assert "<k>" not in page


def test_it_draws_a_chart_per_kind_and_stage_and_loads_nothing(report):
    page = render_page(report.to_dict())
    tags = Tags()
    tags.feed(page)
    assert sum(tag == "svg" for tag, _ in tags.found) == 4  # q, <k>; transforms, weights
    assert not any("src" in attributes or "href" in attributes for _, attributes in tags.found)
    coordinates = [float(value) for value in re.findall(r'c[xy]="([-\d.]+)"', page)]
    assert coordinates
    assert all(0 <= value <= 260 for value in coordinates)


def test_its_words_have_the_colours_of_the_lines(report):
    page = render_page(report.to_dict())
    colours = dict(re.findall(r"\.(before|after) { stroke: (#\w+); fill: \2; color: \2; }", page))
    assert set(colours) == {"before", "after"}
    assert page.count("<span class=before>") == page.count("<span class=after>") == 2  # of errors and of blocks


def test_a_report_of_an_earlier_version_is_drawn(report):
    old = report.to_dict()
    del old["blocks"]
    for one in old["linears"]:
        del one["nearest_error"]
    for one in old["transforms"]:
        del one["damping"], one["joins_rows"]
    assert "Blocks" not in render_page(old)
    assert "Quantization report" in render_page({})


def test_it_tells_between_what_errors_were_fed_back(report):
    table = render_page(report.to_dict()).split("<h2>Transforms</h2>")[1].split("</table>")[0]
    for name, words in (("layers.0.q", "columns"), ("layers.0.k", "columns and rows"), ("zero", "–")):
        (row,) = [one for one in table.split("<tr>") if f"<td>{name}<" in one]
        assert re.findall(r"<td[^>]*>([^<]*)", row)[-1] == words


def test_it_is_written_whole(report, tmp_path):
    save_page(report.to_dict(), tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page(report.to_dict())
