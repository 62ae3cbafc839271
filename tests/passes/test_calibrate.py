from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from graphs import Model
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from parofx.calibration.statistics import InputStatistics
from parofx.calibration.store import CalibrationStore
from parofx.config import CalibrationConfig, ParoConfig
from parofx.errors import DataError
from parofx.passes import Calibrate, Convert, InsertTransforms, Stage, census, stage_of
from parofx.passes.calibrate import block_reports_of, reports_of
from parofx.passes.capture import capture
from parofx.passes.transforms import find_transforms

Batch = dict[str, Any]


def settings(**options: Any) -> ParoConfig:
    return ParoConfig(
        krot=3, share_siblings=True, calibration=CalibrationConfig(steps=4, clip_ratios=(1.0,), **options)
    )


def skewed(*shape: int, seed: int = 0) -> Tensor:
    """Return rows of which a few channels are far larger than the rest."""
    return graphs.rows(*shape, seed=seed) * torch.linspace(-1, 1, shape[-1]).mul(3).exp()


def batches(count: int = 3, rows: int = 16) -> list[Batch]:
    return [{"arg0": skewed(rows, 64, seed=seed)} for seed in range(count)]


@functools.cache
def captured_stack(count: int) -> GraphModule:
    return capture(graphs.Stack(count).eval(), skewed(16, 64))


def prepared(model: nn.Module | int = 2, *inputs: Any, config: ParoConfig | None = None) -> GraphModule:
    """Return the PREPARED graph of a model, or of so many layers."""
    if isinstance(model, int):
        gm = graphs.copy_of(captured_stack(model))
    else:
        gm = capture(model.eval(), *(inputs or (skewed(16, 64),)))
    InsertTransforms(config or settings()).run(gm)
    gm.recompile()
    return gm


def state(gm: GraphModule) -> dict[str, Tensor]:
    """Return everything that calibration decides."""
    found = {}
    for transform in find_transforms(gm):
        for name, tensor in zip(("pairs", "theta", "channel_scales"), transform.parameters(gm), strict=True):
            found[f"{transform.name}.{name}"] = tensor
        for linear in transform.linears:
            found[f"{linear.name}.scales"], found[f"{linear.name}.zeros"] = linear.grid(gm)
    return found


def fitted(config: ParoConfig | None = None, data: list[Batch] | None = None) -> dict[str, Tensor]:
    gm = prepared(config=config)
    Calibrate(config or settings(), data).run(gm)
    return state(gm)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("data", [None, batches()], ids=["weights", "data"])
def test_every_transform_is_fitted_and_no_loss_is_worse(data: list[Batch] | None) -> None:
    gm = prepared()
    before = census(gm)
    report = Calibrate(settings(), data).run(gm)
    assert stage_of(gm) is Stage.CALIBRATED
    assert census(gm) == before
    reports = reports_of(gm)
    assert report.changed == len(reports) == len(report.matched) + len(report.skipped) == 4
    assert all(0 < one.loss_after <= one.loss_before for one in reports)
    assert any(one.angle_rms > 0 for one in reports)
    assert set(gm.meta["parofx_relative_errors"]) == {
        f"whatever.{index}.{name}" for index in range(2) for name in ("gate", "up", "down")
    }
    for name, tensor in state(gm).items():
        assert torch.isfinite(tensor).all(), name
        if not name.endswith("pairs"):
            assert torch.equal(tensor, tensor.half().float()), name


def test_data_lowers_the_error_on_that_data() -> None:
    x, model = skewed(64, 64, seed=9), graphs.Stack(1)
    errors = {}
    for name, data in {"weights": None, "data": [{"arg0": x}]}.items():
        gm = prepared(model)
        Calibrate(ParoConfig(calibration=CalibrationConfig(steps=20)), data).run(gm)
        gm.recompile()
        with torch.no_grad():
            errors[name] = float((gm(x) - model(x)).square().mean())
    start = prepared(model)
    graphs.round_to_nearest(start)
    start.recompile()
    with torch.no_grad():
        assert errors["data"] < float((start(x) - model(x)).square().mean())
    assert errors["data"] < errors["weights"] * 1.05


def test_without_steps_the_start_is_kept_and_the_report_says_so() -> None:
    gm = prepared()
    config = ParoConfig(calibration=CalibrationConfig(steps=0))
    report = Calibrate(config).run(gm)
    assert not report.matched
    assert all(reason.startswith("no rotation beat the start; kept it (objective") for _, reason in report.skipped)
    assert all(one.angle_rms == 0 for one in reports_of(gm))


def test_a_seed_fixes_every_bit() -> None:
    assert equal(fitted(data=batches()), fitted(data=batches()))
    assert equal(fitted(), fitted())
    other = settings(seed=1)
    assert not equal(fitted(data=batches()), fitted(other, batches()))


def test_error_feedback_writes_the_rounded_weights_to_the_graph_alone() -> None:
    model = graphs.Stack(2)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gm, x = prepared(model), skewed(5, 64, seed=11)
    Calibrate(settings(damping=(0.03, 0.3)), batches()).run(gm)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    linears = [linear for transform in find_transforms(gm) for linear in transform.linears]
    for linear in linears:
        assert not torch.equal(linear.weight, weights[f"{linear.name}.weight"])
    assert set(gm.meta["parofx_nearest_errors"]) == {linear.name for linear in linears}
    assert all(one.damping in (0.03, 0.3) for one in reports_of(gm))
    gm.recompile()
    with torch.no_grad():
        rounded = gm(x)
        Convert().run(gm)
        gm.recompile()
        assert graphs.relative(gm(x), rounded) < graphs.EXACT_IN_FP32


def test_error_feedback_lowers_the_error_of_the_output() -> None:
    x, model = skewed(256, 64, seed=9), graphs.Stack(2)
    errors = []
    for rounding in ("nearest", "feedback"):
        gm = prepared(model)
        Calibrate(settings(rounding=rounding), [{"arg0": x}]).run(gm)
        gm.recompile()
        with torch.no_grad():
            errors.append(float((gm(x) - model(x)).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_recipes_that_train_blocks_report_their_stages(recipe: str) -> None:
    tuned = {"tune_epochs": 3, "distill_epochs": 0} if recipe == "best" else {}
    config = settings(recipe=recipe, transform_epochs=2, weight_epochs=1, samples=3, **tuned)
    gm = prepared(config=config)
    report = Calibrate(config, batches()).run(gm)
    blocks = block_reports_of(gm)
    assert [block.name for block in blocks] == ["whatever.0", "whatever.1"]
    for block in blocks:
        assert [stage.name for stage in block.stages] == ["transforms", "weights", "rounding", *["tune"] * bool(tuned)]
        assert all(stage.after <= stage.before for stage in block.stages)
    said = [text for name, text in (*report.matched, *report.skipped) if name == "whatever.0"]
    assert sorted(said) == sorted(str(stage) for stage in blocks[0].stages)
    for name, tensor in state(gm).items():
        assert torch.isfinite(tensor).all(), name
        if not name.endswith("pairs"):
            assert torch.equal(tensor, tensor.half().float()), name


def test_data_is_not_used_by_the_data_free_recipe() -> None:
    config = settings(recipe="data-free")
    assert equal(fitted(config, batches()), fitted(config, None))
    assert not equal(fitted(settings(), batches()), fitted(settings(), None))


def test_how_data_is_split_into_batches_does_not_matter_much() -> None:
    whole = torch.cat([batch["arg0"] for batch in batches()])
    first, second = fitted(data=batches()), fitted(data=[{"arg0": whole}])
    for name in first:
        if name.endswith("theta"):
            assert torch.allclose(first[name], second[name], atol=0.02), name


class Masked(nn.Module):
    """Reads a mask, as language models do, but computes rows on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = graphs.Stack(1)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(hidden) * attention_mask[..., None]


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_masked_rows_do_not_enter_statistics(dtype: torch.dtype) -> None:
    hidden, mask = skewed(2, 8, 64), torch.ones(2, 8)
    mask[0, :3] = mask[1, 6:] = 0
    garbage = torch.where(mask[..., None] == 0, 1e3 * graphs.rows(2, 8, 64, seed=7), hidden)
    float_graph = capture(Masked().eval(), {"hidden": hidden, "attention_mask": mask.to(dtype)})

    def run(values: Tensor) -> dict[str, Tensor]:
        inputs = {"hidden": values, "attention_mask": mask.to(dtype)}
        gm = graphs.copy_of(float_graph)
        InsertTransforms(settings()).run(gm)
        Calibrate(settings(), [inputs]).run(gm)
        return state(gm)

    assert equal(run(hidden), run(garbage))


class TestBadData:
    def test_no_batch(self) -> None:
        with pytest.raises(DataError, match="must hold at least one batch, got none; pass calibration=None"):
            Calibrate(settings(), []).run(prepared())

    def test_an_empty_batch(self) -> None:
        data = [*batches(2), {"arg0": torch.empty(0, 64)}]
        with pytest.raises(DataError, match="must hold rows: batch 2 has none in arg0; leave it out"):
            Calibrate(settings(), data).run(prepared())

    def test_a_batch_that_is_masked_out(self) -> None:
        inputs = {"hidden": skewed(2, 8, 64), "attention_mask": torch.ones(2, 8)}
        data = [inputs, inputs | {"attention_mask": torch.zeros(2, 8)}]
        with pytest.raises(DataError, match="batch 1 has none in attention_mask"):
            Calibrate(settings(), data).run(prepared(Masked(), inputs))

    def test_a_weight_that_is_not_finite(self) -> None:
        model = graphs.Stack(2)
        model.whatever[1].up.weight.data[3, 5] = torch.nan
        for data in (None, batches()):
            with pytest.raises(
                DataError, match=r"the weight of whatever\.1\.up must be finite, got NaN .* add it to modules_to"
            ):
                Calibrate(settings(), data).run(prepared(model))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_an_input_that_is_not_finite(self, value: float) -> None:
        data = batches()
        data[1]["arg0"][3, 5] = value
        with pytest.raises(
            DataError, match=r"the input of whatever.0.gate: rows must be finite, got .* of 1024; run the [^\n]*$"
        ):
            Calibrate(settings(), data).run(prepared())

    @pytest.mark.parametrize(
        ("batch", "missing", "unexpected"),
        [
            ({}, ["arg0"], []),
            ({"arg0": torch.ones(4, 64), "arg1": torch.ones(1)}, [], ["arg1"]),
            ({"hidden": torch.ones(4, 64)}, ["arg0"], ["hidden"]),
        ],
    )
    def test_other_inputs_than_the_captured_ones(self, batch: Batch, missing: list[str], unexpected: list[str]) -> None:
        expected = rf"captured with, \['arg0'\]: missing {missing}, unexpected {unexpected}".replace("[]", r"\[\]")
        expected = expected.replace("missing ['", r"missing \['").replace("unexpected ['", r"unexpected \['")
        with pytest.raises(DataError, match=expected.replace("']", r"'\]").replace(r"\\]", r"\]")):
            Calibrate(settings(), [*batches(1), batch]).run(prepared())


def test_a_linear_that_no_row_reaches_is_fitted_on_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(lambda m, x: m.a(x[:, :0]).sum(1) + m.b(x).sum(1), a=graphs.linear(), b=graphs.linear(seed=1)).eval()
    inputs = skewed(4, 3, 64)
    gm = prepared(model, inputs)
    with caplog.at_level(logging.WARNING, "parofx"):
        Calibrate(settings(), [{"arg0": inputs}]).run(gm)
    assert [record.message for record in caplog.records if record.name == "parofx"] == [
        "no calibration row reaches a; it is fitted on its weights alone"
    ]
    assert all(torch.isfinite(tensor).all() for tensor in state(gm).values())


def test_statistics_of_a_shared_weight_are_pooled() -> None:
    """Two blocks of one shared linear: its transform is fitted once, on the rows of both calls."""

    class Block(nn.Module):
        def __init__(self, shared: nn.Module, seed: int) -> None:
            super().__init__()
            self.shared, self.own = shared, graphs.linear(seed=seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(torch.tanh(self.shared(x)))

    shared = graphs.linear()
    model = nn.Sequential(*(Block(shared, seed) for seed in (1, 2))).eval()
    data = batches(2)
    gm = prepared(model, data[0]["arg0"])
    first = find_transforms(gm)[0]
    assert len(first.inputs) == 2
    Calibrate(settings(), data).run(gm)
    statistics = InputStatistics(64, first.group_size, full=True)
    for batch in data:
        x = batch["arg0"]
        statistics.update(x)
        with torch.no_grad():
            statistics.update(model[0](x))
    again = prepared(model, data[0]["arg0"])
    transform = find_transforms(again)[0]
    with torch.no_grad():
        expected = Calibrate(settings()).fit(again, transform, statistics)
    _, theta, channel_scales = first.parameters(gm)
    assert torch.allclose(theta, expected.theta.float(), atol=0.02)
    assert torch.allclose(channel_scales, expected.channel_scales.float(), rtol=0.02)


class Widths(TorchDispatchMode):
    """Collects the last dimension of every tensor that is computed."""

    def __init__(self, found: set[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim():
            self.found.add(result.shape[-1])
        return result


@pytest.mark.parametrize("epochs", [0, 1])
def test_what_lies_behind_the_last_transform_is_not_computed(epochs: int) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table = graphs.Stack(2), nn.Embedding(4104, 64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.body(x), self.table.weight)

    config = replace(settings(tune_epochs=epochs), modules_to_not_convert=("table",))
    gm = prepared(Headed(), config=config)
    widths: set[int] = set()
    with Widths(widths):
        Calibrate(config, batches()).run(gm)
    assert 64 in widths
    assert 4104 not in widths


def test_what_is_fitted_on_weights_alone_is_reused() -> None:
    model = graphs.Stack(1)
    grids = []
    for _ in range(2):
        gm = prepared(model)
        Calibrate(settings(), reuse=True).run(gm)
        grids.append(find_transforms(gm)[0].linears[0].grid(gm)[0])
    assert grids[0] is grids[1]
    with torch.no_grad():
        model.whatever[0].gate.weight.mul_(2)
    gm = prepared(model)
    Calibrate(settings(), reuse=True).run(gm)
    assert not torch.equal(find_transforms(gm)[0].linears[0].grid(gm)[0], grids[0])


class TestWorkDir:
    """What a run leaves on disk, and what a later one makes of it."""

    @staticmethod
    def config(folder: Path, **options: Any) -> ParoConfig:
        return settings(work_dir=str(folder), **options)

    @staticmethod
    def run(config: ParoConfig, monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None) -> tuple[int, Any]:
        """Calibrate, failing at one fit if asked; return the number of fits made and what was decided."""
        from parofx.passes import calibrate

        fits = 0
        original = calibrate.fit

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal fits
            if fits == fail_at:
                raise KeyboardInterrupt
            fits += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(calibrate, "fit", counting)
            gm = prepared(2, config=config)
            try:
                Calibrate(config, batches()).run(gm)
            except KeyboardInterrupt:
                assert fail_at is not None
        noted = {key: value for key, value in gm.meta.items() if key.startswith("parofx_") and "error" in key}
        return fits, (state(gm), (reports_of(gm), block_reports_of(gm)), noted)

    @pytest.mark.parametrize(("recipe", "fail_at"), [("fast", 1), ("fast", 3), ("best", 3)])
    def test_a_killed_run_goes_on_and_ends_with_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, fail_at: int
    ) -> None:
        options = {"recipe": recipe} | ({"transform_epochs": 1, "weight_epochs": 1} if recipe == "best" else {})
        config = self.config(tmp_path / "run", **options)
        _, (expected, reports, errors) = self.run(settings(**options), monkeypatch)
        done, _ = self.run(config, monkeypatch, fail_at=fail_at)
        assert done == fail_at
        remaining, (found, resumed_reports, resumed_errors) = self.run(config, monkeypatch)
        assert remaining == 4 - fail_at // 2 * 2  # two transforms a block; finished blocks are not fitted again
        assert equal(found, expected)
        assert resumed_reports == reports
        assert resumed_errors == errors
        assert self.run(config, monkeypatch)[0] == 0

    def test_another_fingerprint_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = self.config(tmp_path)
        self.run(config, monkeypatch)
        assert self.run(config, monkeypatch)[0] == 0
        assert self.run(replace(config, share_siblings=None), monkeypatch)[0] == 0  # the recipe shares as well
        for changed in (
            replace(config, krot=2),
            self.config(tmp_path, seed=3),
            self.config(tmp_path, seed=3, resume=False),
        ):
            assert self.run(changed, monkeypatch)[0] == 4

    @pytest.mark.parametrize("change", ["buffer", "operator"])
    def test_a_graph_that_differs_in_more_than_its_weights_starts_over(self, tmp_path: Path, change: str) -> None:
        class Scaled(nn.Module):
            def __init__(self, factor: float, activation: Any) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
                self.activation = activation
                self.register_buffer("factor", torch.tensor(factor))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.second(self.activation(self.first(x)) * self.factor)

        def fingerprint_of(factor: float, activation: Any) -> str:
            gm = prepared(Scaled(factor, activation).eval())
            Calibrate(self.config(tmp_path), batches()).run(gm)
            return json.loads((tmp_path / "run.json").read_text())["fingerprint"]

        other = (2.0, torch.tanh) if change == "buffer" else (1.0, torch.sigmoid)
        assert fingerprint_of(1.0, torch.tanh) == fingerprint_of(1.0, torch.tanh) != fingerprint_of(*other)

    def test_foreign_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(DataError, match=r"work_dir must be empty or hold an earlier run: .* choose another folder"):
            Calibrate(self.config(tmp_path), batches()).run(prepared())
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_a_broken_header_starts_over_and_spares_other_files(self, tmp_path: Path) -> None:
        CalibrationStore(tmp_path, "one", resume=True)
        (tmp_path / "run.json").write_text("{")
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "segment-000.safetensors").write_bytes(b"old")
        store = CalibrationStore(tmp_path, "one", resume=True)
        assert store.borders() == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_calibrated_then_converted_equals_the_fake_quantized_output() -> None:
    gm, x = prepared(), skewed(5, 64, seed=11)
    Calibrate(settings(), batches()).run(gm)
    gm.recompile()
    with torch.no_grad():
        rounded = gm(x)
        Convert().run(gm)
        gm.recompile()
        assert graphs.relative(gm(x), rounded) < graphs.EXACT_IN_FP32
