import dataclasses
import json
from collections import Counter

import pytest

from parofx.config import ParoConfig
from parofx.report import FloatLinear, FloatReason, LinearReport, QuantizationReport, TransformReport


def linear(name, in_features, out_features, packed_bytes):
    return LinearReport(
        name=name,
        in_features=in_features,
        out_features=out_features,
        bits=4,
        group_size=128,
        krot=8,
        transform="t0",
        block="layers.0",
        relative_error=0.01,
        packed_bytes=packed_bytes,
    )


@pytest.fixture
def report():
    return QuantizationReport(
        config=ParoConfig(),
        linears=(linear("q", 128, 128, 9000), linear("k", 128, 64, 4000)),
        transforms=(TransformReport("t0", ("q", "k"), "layers.0", 1.0, 0.8, 0.1),),
        kept_float=(
            FloatLinear("lm_head", FloatReason.OUTPUT_HEAD),
            FloatLinear("a", FloatReason.IN_FEATURES, "100"),
            FloatLinear("b", FloatReason.IN_FEATURES, "36"),
        ),
        seconds=1.5,
        peak_memory_bytes=1 << 20,
        passes=({"name": "capture", "changed": 2},),
    )


def test_bits_per_weight_counts_all_packed_bytes(report):
    assert report.bits_per_weight == 8 * 13000 / (128 * 128 + 128 * 64)


def test_an_empty_report_has_no_bits(report):
    empty = dataclasses.replace(report, linears=(), kept_float=())
    assert empty.bits_per_weight == 0
    assert "quantized 0 linears" in str(empty)
    assert str(empty).endswith("kept float: none")


def test_reasons_are_counted(report):
    assert report.reasons() == Counter({FloatReason.IN_FEATURES: 2, FloatReason.OUTPUT_HEAD: 1})


def test_reasons_are_closed_and_distinct():
    assert len({reason.value for reason in FloatReason}) == len(FloatReason) == 10


def test_str_is_one_line_with_the_counts(report):
    text = str(report)
    assert "\n" not in text
    assert text.startswith("quantized 2 linears with 1 transforms, 4.232 bits per weight, in 1.5 s")
    assert "1 output head, 2 no group size divides in_features" in text


def test_save_writes_what_to_dict_says_and_no_other_file(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("an earlier report")
    report.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert ParoConfig.from_dict(saved["config"]) == report.config
    assert saved["linears"][0]["name"] == "q"
    assert saved["kept_float"][1] == {"name": "a", "reason": "no group size divides in_features", "detail": "100"}
    assert saved["passes"] == [{"name": "capture", "changed": 2}]
    assert {"bits_per_weight", "seconds", "peak_memory_bytes", "transforms"} <= saved.keys()


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(report, tmp_path):
    path = tmp_path / "report.json"
    report.save(str(path))
    before = path.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(report, passes=({"node": object()},)).save(path)
    assert path.read_text() == before
