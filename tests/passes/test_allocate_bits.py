from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import graphs
import pytest
import tiny
import torch
from torch import nn
from torch.fx import GraphModule

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.errors import ConfigError, DataError
from parofx.passes import AllocateBits, Calibrate, InsertTransforms, Stage, stage_of, verify_stage
from parofx.passes.capture import capture
from parofx.passes.transforms import find_transforms


def config(budget: float | None, **options: Any) -> ParoConfig:
    fitting = {name: options.pop(name) for name in ("recipe",) if name in options}
    calibration = CalibrationConfig(steps=2, clip_ratios=(1.0, 0.8), bits_budget=budget, **fitting)
    return ParoConfig(**({"group_size": 64, "krot": 2} | options), calibration=calibration)


def batches(count: int = 2, rows: int = 16) -> list[dict[str, Any]]:
    return [{"arg0": graphs.rows(rows, 64, seed=seed)} for seed in range(count)]


@functools.cache
def captured() -> GraphModule:
    return capture(graphs.Stack(2).eval(), graphs.rows(16, 64))


def prepared(options: ParoConfig) -> GraphModule:
    gm = graphs.copy_of(captured())
    InsertTransforms(options).run(gm)
    gm.recompile()
    return gm


def formats(gm: GraphModule) -> dict[str, tuple[int, int, int]]:
    """Return bits, group size and krot of each linear."""
    return {
        linear.name: (linear.bits, one.group_size, one.krot(gm))
        for one in find_transforms(gm)
        for linear in one.linears
    }


@pytest.mark.parametrize("data", [None, batches()], ids=["weights", "data"])
def test_formats_change_and_nothing_else(data):
    options = config(5.5)
    gm = prepared(options)
    x = graphs.rows(5, 64, seed=9)
    before = gm(x)
    report = AllocateBits(options, data).run(gm)
    gm.recompile()
    verify_stage(gm)
    assert stage_of(gm) is Stage.PREPARED
    torch.testing.assert_close(gm(x), before, rtol=1e-5, atol=1e-5)
    found = formats(gm)
    assert report.changed == sum(one != (4, 64, 2) for one in found.values()) > 0
    assert len({bits for bits, _, _ in found.values()}) > 1
    assert dict(report.matched).keys() == found.keys()
    for name, told in report.matched:
        bits, group_size, krot = found[name]
        assert told.startswith(f"{bits} bits, group_size {group_size}, krot {krot}; predicted loss ")
    again = AllocateBits(options, data).run(gm)
    assert again.changed == 0
    assert formats(gm) == found


def test_siblings_have_one_transform():
    gm = prepared(config(5.0))
    AllocateBits(config(5.0)).run(gm)
    for one in find_transforms(gm):
        pairs, theta, channel_scales = one.parameters(gm)
        assert pairs.shape == (one.krot(gm), 64 if one.name.endswith("gate") else pairs.shape[1])
        assert theta.abs().sum() == 0
        assert torch.equal(channel_scales, torch.ones_like(channel_scales))


@pytest.mark.parametrize("budget", [4.0, 5.0, 6.5])
def test_what_is_stored_stays_within_the_budget_and_uses_it(budget):
    model = graphs.Stack(2).eval()
    report = parofx.quantize(
        model,
        config(budget),
        calibration=[graphs.rows(16, 64, seed=1)],
        example_inputs=graphs.rows(16, 64),
        progress=False,
    )
    assert report.bits_per_weight <= budget
    assert report.bits_per_weight > budget - 0.35
    assert all(one.predicted_loss > 0 for one in report.linears)
    assert model(graphs.rows(5, 64)).isfinite().all()


def test_more_bits_are_predicted_to_lose_less():
    totals = []
    for budget in (4.0, 4.5, 5.0, 6.0, 8.0):
        gm = prepared(config(budget))
        AllocateBits(config(budget), batches()).run(gm)
        totals.append(sum(gm.meta["parofx_predicted_losses"].values()))
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 20


def test_bits_go_where_the_output_minds():
    class Uneven(nn.Module):
        """Two alike linears, of whose outputs one hardly counts."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loud, self.faint = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.loud(x) + 1e-3 * self.faint(x + 1)

    model = Uneven()
    report = parofx.quantize(
        model, config(7.2), calibration=[graphs.rows(64, 64)], example_inputs=graphs.rows(16, 64), progress=False
    )
    bits = {one.name: one.bits for one in report.linears}
    assert bits["loud"] > bits["faint"]


def test_a_quantized_head_keeps_its_width(tmp_path):
    model = tiny.model(vocab_size=32)
    report = parofx.quantize(model, config(7.0, lm_head=8, recipe="data-free"), progress=False)
    bits = {one.name: one.bits for one in report.linears}
    assert bits["lm_head"] == 8
    assert len(set(bits.values())) > 1
    parofx.save_pretrained(model, tmp_path)
    loaded = parofx.load_pretrained(tmp_path)
    ids = torch.arange(3, 10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_weight_that_is_not_finite_is_named_and_not_the_data():
    model = graphs.Stack(2).eval()
    model.whatever[0].down.weight.data[3, 5] = float("nan")
    gm = capture(model, graphs.rows(16, 64))
    InsertTransforms(config(5.0)).run(gm)
    with pytest.raises(DataError, match=r"the weight of whatever\.0\.down must be finite, got NaN or infinity"):
        AllocateBits(config(5.0), batches()).run(gm)


def test_inference_mode_is_left_where_gradients_are_needed():
    model = graphs.Stack(2).eval()
    with torch.inference_mode():
        given = {"calibration": [graphs.rows(16, 64)], "example_inputs": graphs.rows(16, 64)}
        report = parofx.quantize(model, config(5.0), progress=False, **given)
    assert all(one.predicted_loss > 0 for one in report.linears)
    assert not any(buffer.is_inference() for buffer in model.buffers())


class WiderHead(nn.Module):
    """A head of more rows than the table of tokens, and linears with as many as the table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 64), nn.Embedding(64, 64)
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 24)

    def forward(self, ids):
        return self.head(self.inner(self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))))

    def get_output_embeddings(self):
        return self.head


def test_heads_keep_their_width_whatever_tables_there_are():
    report = parofx.quantize(
        WiderHead().eval(),
        config(9.0, lm_head=4),
        calibration=[torch.arange(20)[None]],
        example_inputs=torch.arange(20)[None],
        progress=False,
    )
    assert {one.name: one.bits for one in report.linears} == {"inner": 8, "head": 4}


def test_a_budget_is_met_to_the_byte():
    gm = prepared(config(None))
    weights = sum(linear.weight.numel() for one in find_transforms(gm) for linear in one.linears)
    least, most = AllocateBits(config(10**400)).byte_range(gm)
    assert least < most
    for stored in range(least, least + 50):
        assert AllocateBits(config(8 * stored / weights)).byte_range(gm) == (least, stored)


def test_without_a_budget_nothing_changes():
    gm = prepared(config(None))
    report = AllocateBits(config(None), batches()).run(gm)
    assert (report.changed, report.matched) == (0, [])
    assert set(formats(gm).values()) == {(4, 64, 2)}


def test_a_budget_that_cannot_be_met_is_refused_with_the_smallest():
    gm = prepared(config(3.0))
    with pytest.raises(ConfigError, match=r"bits_budget must be at least (\d\.\d+) for this model, got 3.0") as error:
        AllocateBits(config(3.0)).run(gm)
    assert set(formats(gm).values()) == {(4, 64, 2)}
    least = float(str(error.value).split("at least ")[1].split()[0])
    AllocateBits(config(least)).run(gm)
    with pytest.raises(ConfigError, match="bits_budget must be at least"):
        AllocateBits(config(least - 0.001)).run(prepared(config(least)))


def test_a_run_with_chosen_formats_is_resumed(tmp_path, monkeypatch):
    options = config(5.0)
    options = replace(options, calibration=replace(options.calibration, work_dir=str(tmp_path)))

    def run() -> torch.Tensor:
        model = graphs.Stack(2).eval()
        given = {"calibration": [graphs.rows(16, 64)], "example_inputs": graphs.rows(16, 64)}
        parofx.quantize(model, options, progress=False, **given)
        return model(graphs.rows(5, 64))

    first = run()
    monkeypatch.setattr(Calibrate, "fit", lambda *args: pytest.fail("fitted again"))
    assert torch.equal(run(), first)


def test_chosen_formats_are_fitted():
    options = config(5.0)
    gm = prepared(options)
    AllocateBits(options, batches()).run(gm)
    found = formats(gm)
    gm = prepared(options)
    parofx.calibrate(gm, [one["arg0"] for one in batches()], options)
    assert formats(gm) == found
    for one in find_transforms(gm):
        for linear in one.linears:
            scales, zeros = linear.grid(gm)
            assert scales.shape == (len(linear.weight), linear.weight.shape[1] // one.group_size)
            assert zeros.max() <= 2**linear.bits - 1
