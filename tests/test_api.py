from __future__ import annotations

import copy
from typing import Any

import graphs
import pytest
import tiny
import torch
from graphs import Model
from torch import Tensor, nn

import parofx
from parofx.api import ExplainedLinear, calibrate, capture, convert, explain, lower, prepare
from parofx.errors import DataError, PassError
from parofx.passes import Stage, stage_of


def float_graph(model: nn.Module | None = None) -> torch.fx.GraphModule:
    return capture((model or graphs.Stack(1)).eval(), graphs.rows(3, 64))


def test_each_function_takes_and_returns_the_graph() -> None:
    gm, x = float_graph(), graphs.rows(3, 64)
    expected = graphs.eager(gm, x)
    for stage, function in (
        (Stage.PREPARED, lambda gm: prepare(gm)),
        (Stage.CALIBRATED, lambda gm: calibrate(gm, config=graphs.config())),
        (Stage.CONVERTED, convert),
        (Stage.LOWERED, lower),
    ):
        assert function(gm) is gm
        assert stage_of(gm) is stage
        assert gm(x).shape == expected.shape
    assert float((graphs.eager(gm, x) - expected).norm() / expected.norm()) < 0.2


def test_they_are_public() -> None:
    for name in ("capture", "prepare", "calibrate", "convert", "lower", "explain"):
        assert getattr(parofx, name) is globals()[name]


def test_a_stage_cannot_be_left_out() -> None:
    with pytest.raises(PassError, match="pass convert takes a graph of stage CALIBRATED, got PREPARED"):
        convert(prepare(float_graph()))


def test_a_provider_can_be_forced() -> None:
    gm = convert(calibrate(prepare(float_graph()), config=graphs.config()))
    assert lower(gm, "cpu", provider="reference").meta["parofx_providers"] == {"reference": 2}


class TestBatches:
    @pytest.mark.parametrize(
        "batch", [graphs.rows(5, 64), (graphs.rows(5, 64),), [graphs.rows(5, 64)], {"arg0": graphs.rows(5, 64)}]
    )
    def test_positional_inputs_in_any_form(self, batch: Any) -> None:
        gm = calibrate(prepare(float_graph()), [batch, batch], graphs.config())
        assert stage_of(gm) is Stage.CALIBRATED

    def test_keyword_inputs_are_completed_as_for_the_capture(self) -> None:
        class Seq2Seq(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.body = nn.Embedding(40, 64), graphs.Stack(1)

            def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, use_cache: bool = True) -> Tensor:
                assert not use_cache
                return self.body(self.embedding(input_ids) + self.embedding(decoder_input_ids))

        inputs = {"input_ids": torch.arange(12).view(3, 4)}
        gm = prepare(capture(Seq2Seq(), inputs))
        assert stage_of(calibrate(gm, [inputs], graphs.config())) is Stage.CALIBRATED

    @pytest.mark.parametrize("batch", ["text", 5, None, iter([])])
    def test_what_is_no_batch(self, batch: object) -> None:
        kind = type(batch).__name__
        with pytest.raises(DataError, match=f"must be a mapping, a tuple or a tensor, got {kind}; pass the inputs"):
            calibrate(prepare(float_graph()), [batch])

    def test_a_generator_of_batches(self) -> None:
        gm = calibrate(prepare(float_graph()), (graphs.rows(5, 64, seed=seed) for seed in range(2)), graphs.config())
        assert stage_of(gm) is Stage.CALIBRATED


class TestExplain:
    def test_one_row_per_linear(self) -> None:
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.head(m.stack(x)) @ m.w

        parts = {"stack": graphs.Stack(2), "head": graphs.linear(64, 12), "w": graphs.matrix(12, 64)}
        found = explain(Model(forward, **parts).eval(), graphs.rows(3, 64))
        assert found.blocks == ("stack.whatever.0", "stack.whatever.1")
        shared = "shares one transform with its siblings: {0}.gate, {0}.up; group_size 64; {1}"
        merged = "one call for {0}.gate, {0}.up with 1 rotation(s)"
        expected = []
        for block in found.blocks:
            expected += [
                ExplainedLinear(f"{block}.{name}", "quantize", shared.format(block, merged.format(block)))
                for name in ("gate", "up")
            ]
            expected.append(ExplainedLinear(f"{block}.down", "quantize", "own transform; group_size 64"))
        expected += [
            ExplainedLinear(
                "head",
                "keep float",
                "out_features fill no whole 32-bit words (12 out_features; 4 bits need a multiple of 8)",
            ),
            ExplainedLinear(
                "w",
                "keep float",
                "the weight is read by code other than one linear module (w is read outside of one linear module)",
            ),
        ]
        assert list(found.rows) == expected
        lines = str(found).splitlines()
        assert lines[0] == "2 blocks: stack.whatever.0, stack.whatever.1"
        assert (
            " ".join(lines[-2].split())
            == "head keep float out_features fill no whole 32-bit words (12 out_features; 4 bits need a multiple of 8)"
        )

    def test_nothing_is_changed(self) -> None:
        model = graphs.Stack(1).train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        explain(model, graphs.rows(3, 64))
        assert model.training
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_the_config_decides(self) -> None:
        config = graphs.config(share_siblings=False, modules_to_not_convert=("down",), group_size=32)
        found = explain(graphs.Stack(1), graphs.rows(3, 64), config=config)
        merged = "one call for whatever.0.gate, whatever.0.up with 2 rotation(s)"
        assert [(row.name, row.reason) for row in found.rows] == [
            (f"whatever.0.{name}", f"own transform; group_size 32; {merged}") for name in ("gate", "up")
        ] + [
            ("whatever.0.down", "excluded by modules_to_not_convert (matches 'down')"),
        ]
        assert str(found).startswith("0 blocks: the whole graph\n")

    def test_a_linear_that_no_input_reaches(self) -> None:
        model = Model(lambda m, x: m.a(x), a=graphs.linear(), unused=graphs.linear(seed=1)).eval()
        rows = explain(model, graphs.rows(3, 64)).rows
        assert rows[1] == ExplainedLinear("unused", "keep float", "the example inputs never reach it")
        report = parofx.quantize(model, graphs.config(), example_inputs=graphs.rows(3, 64), progress=False)
        assert [one.name for one in report.kept_float] == ["unused"]

    def test_a_quantized_model(self) -> None:
        parts = {"stack": graphs.Stack(1), "head": graphs.linear(64, 12), "unused": nn.Identity()}
        model, x = Model(lambda m, x: m.head(m.stack(x)), **parts).eval(), graphs.rows(3, 64)
        parofx.quantize(model, graphs.config(krot=2), example_inputs=x, progress=False)
        model.unused = copy.deepcopy(model.stack.whatever[0].down)
        found = explain(model, x)
        assert found.blocks == ()
        held = "4 bit; group_size 64; krot 2"
        block = "stack.whatever.0"
        merged = f"one call for {block}.gate, {block}.up with 1 rotation(s)"
        rows = [(row.name, row.action, row.reason.partition("; lowered to ")) for row in found.rows]
        assert [(name, action, reason[0]) for name, action, reason in rows] == [
            (f"{block}.gate", "quantized", f"{held}; {merged}"),
            (f"{block}.up", "quantized", f"{held}; {merged}"),
            (f"{block}.down", "quantized", held),
            ("head", "keep float", "the model holds it float"),
            ("unused", "quantized", f"{held}; the example inputs never reach it"),
        ]
        assert [reason[2].partition(" (")[2] for *_, reason in rows[:3]] == ["2 linears)", "2 linears)", "1 linears)"]

    def test_a_transformers_model_describes_its_inputs(self) -> None:
        model = tiny.model()
        assert [row.action for row in explain(model).rows] == ["quantize"] * 14 + ["keep float"]

    def test_a_model_without_linears(self) -> None:
        assert str(explain(nn.ReLU(), graphs.rows(3, 64))) == "0 blocks: the whole graph"
