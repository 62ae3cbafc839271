"""The parts of the benchmarks that can be wrong without anybody noticing: what peers compute, what runs share."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch

import parofx
from benchmarks import _ggml, _tiles, accuracy
from benchmarks._cpu_peers import PEERS, Codes, output_of
from benchmarks._shared_statistics import SharedStatistics
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration import data_run
from parofx.evaluation import EvalResult

#: Relative errors: of blocks with 6-bit scales, and of blocks that have no zero point.
_TOLERANCES = {"torch bf16": 5e-3, "aten int4pack": 5e-3, "ggml Q4_K": 3e-2, "ggml Q4_0": 8e-2}


def _codes(in_features: int, out_features: int) -> Codes:
    random = torch.Generator().manual_seed(0)
    groups = in_features // 128
    codes = torch.randint(0, 16, (in_features, out_features), generator=random, dtype=torch.uint8)
    zeros = torch.randint(4, 12, (groups, out_features), generator=random, dtype=torch.uint8)
    return Codes(codes, zeros, (0.01 + 0.01 * torch.rand(groups, out_features, generator=random)).half(), 128)


@pytest.mark.parametrize("name", _TOLERANCES)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_peer_computes_the_product(name: str, rows: int) -> None:
    peer = next(each for each in PEERS if each.name == name)
    # Only ggml's package may be absent; what torch brings may not.
    if name.startswith("ggml") and peer.missing():
        pytest.skip(f"absent: {peer.missing()}")
    weight = _codes(512, 96)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = x.double() @ weight.dense(torch.float64)
    # The copy is what the benchmark calls; others compute with AMX on the same threads in between.
    call = peer.bind(peer.clone(peer.prepare(weight)), x, 1)
    for _ in range(2):
        difference = output_of(call()).double() - expected
        assert float(difference.norm() / expected.norm()) < _TOLERANCES[name]
        torch.nn.functional.linear(x.repeat(64, 1), x.repeat(64, 1))


def test_a_ggml_that_ends_the_process_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    _ggml.why_not.cache_clear()
    for code, expected in ((0, None), (-11, "it ends the process; compile it anew")):
        monkeypatch.setattr(subprocess, "run", lambda *_, code=code, **__: subprocess.CompletedProcess([], code))
        why_not = _ggml.why_not()
        assert why_not is None if expected is None else why_not is not None and why_not.startswith(expected)
        _ggml.why_not.cache_clear()


def test_ggml_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _ggml._ggml.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install llama-cpp-python"):
        _ggml.describe()


def test_tiles_are_configured_anew() -> None:
    if not torch.cpu._init_amx():
        pytest.skip("the processor has no AMX")
    _tiles.restore(1)
    assert _tiles.current() == _tiles.CONFIGURATION


def test_resumed_tables_have_rows_of_one_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(resume=True, **dict.fromkeys(accuracy._COMMON, "same"))
    target, rows = tmp_path / "accuracy.json", dict[str, Any]()
    result = EvalResult(tokens=8, windows=2, seconds=1.0, perplexity=2.7, perplexity_error=0.1)
    accuracy._note(rows, "float", result, 16.0, (0.0, 0.0))
    accuracy._note(rows, "a peer 1.0", result, 4.2, (1.0, 1.0))
    for seed in range(2):
        settings = accuracy._settings_of("parofx fast")
        accuracy._note(rows, "parofx fast", result, 4.4, (1.0, 1.0), seed, settings=settings)
    accuracy._save(rows, options, target)
    assert accuracy._earlier_rows(options, target) == rows
    assert [run["seed"] for run in rows["parofx fast"]["seeds"]] == [0, 1]

    others = {name: rows[name] for name in ("float", "a peer 1.0")}
    config, with_data = accuracy.ROWS["parofx fast"]
    for changed in ((replace(config, krot=3), with_data), (config, not with_data)):
        monkeypatch.setitem(accuracy.ROWS, "parofx fast", changed)
        assert accuracy._earlier_rows(options, target) == others
        assert "left out: parofx fast" in capsys.readouterr().out
    monkeypatch.setitem(accuracy.ROWS, "parofx fast", (config, with_data))
    monkeypatch.setattr("parofx.config.UNSHARED", frozenset({"fast"}))
    assert accuracy._earlier_rows(options, target) == others
    monkeypatch.undo()
    monkeypatch.delitem(accuracy.ROWS, "parofx fast")  # as if it had another name now
    assert accuracy._earlier_rows(options, target) == others
    accuracy._save({"parofx fast": rows["parofx fast"]}, options, target)
    assert accuracy._earlier_rows(options, target) == {}
    assert json.loads((tmp_path / "accuracy.earlier.json").read_text())["rows"] == rows  # not what came later


def test_runs_that_share_statistics_find_what_they_find_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def codes(shared: SharedStatistics | None, **options: object) -> list[torch.Tensor]:
        calibration = CalibrationConfig(
            steps=3, samples=8, seqlen=16, batch_size=2, validation_samples=2, clip_ratios=(1.0,), **options
        )
        model = graphs.Stack(2).eval()
        batches = [graphs.rows(2, 8, 64, seed=seed) for seed in range(4)]
        with shared.shared() if shared else contextlib.nullcontext():
            parofx.quantize(
                model, ParoConfig(group_size=32, krot=2, calibration=calibration), calibration=batches, progress=False
            )
        return [module.qweight for module in model.modules() if isinstance(module, parofx.ParoLinear)]

    runs = []
    true_run = data_run.DataRun.run
    monkeypatch.setattr(data_run.DataRun, "run", lambda self: runs.append(1) or true_run(self))
    shared = SharedStatistics()
    for options, gathered in (
        ({"seed": 1}, True),
        ({"seed": 2, "sweeps": 0}, False),
        ({"seed": 2, "work_dir": str(tmp_path / "work")}, True),
        ({"seed": 2, "autocast": False}, True),
        ({"seed": 2, "row_weights": "equal"}, True),
        ({"gradient_samples": 2}, True),
        ({"distill_epochs": 1}, True),
        ({"gradient_samples": 2, "sweeps": 0}, False),
        ({"seed": 1}, True),
    ):
        before = len(runs)
        found = codes(shared, **options)
        assert len(runs) - before == gathered
        assert (shared.saved == (0.0, 0.0)) == gathered
        assert all(torch.equal(one, two) for one, two in zip(found, codes(None, **options), strict=True))
