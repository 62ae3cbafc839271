from __future__ import annotations

import ast
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import graphs
import pytest
import torch
from torch.fx import GraphModule

import parofx
from parofx.errors import PassError
from parofx.passes import (
    Calibrate,
    Convert,
    InsertTransforms,
    Lower,
    MergeSiblings,
    Normalize,
    Pass,
    PassReport,
    Stage,
    registry,
    stage_of,
)
from parofx.passes.base import produced, set_stage
from parofx.passes.graph import FAKE_QUANTIZE, LINEAR, nodes_calling
from parofx.pipeline import Pipeline

CONFIG = graphs.config()


def whole() -> list[Pass]:
    return [InsertTransforms(CONFIG), Calibrate(CONFIG), Convert(), MergeSiblings(), Lower(provider="reference")]


def float_graph() -> GraphModule:
    return graphs.enter("export", graphs.Stack(1).eval(), graphs.rows(3, 64)).gm


@dataclass(frozen=True)
class Broken:
    """A pass with a mistake in it."""

    mistake: str
    name: ClassVar[str] = "broken"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.PREPARED,)
    produces: ClassVar[Stage] = Stage.PREPARED

    def run(self, gm: GraphModule) -> PassReport:
        node = nodes_calling(gm.graph, FAKE_QUANTIZE if self.mistake == "invariant" else LINEAR)[0]
        if self.mistake == "invariant":
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(gm.graph.call_function(torch.relu, (node.args[0],)))
            set_stage(gm, Stage.CONVERTED)
        if self.mistake == "order":
            next(iter(node.users)).append(node)
        if self.mistake == "grid":
            gm.get_submodule("whatever.0.gate.fake_quantize").scales = torch.ones(128, 1)
        return PassReport(self.name, changed=0 if self.mistake == "order" else 1)


def test_passes_run_in_order_and_are_recorded() -> None:
    pipeline = Pipeline(whole())
    gm = float_graph()
    assert pipeline.run(gm) is gm
    assert stage_of(gm) is Stage.LOWERED
    records = pipeline.records()
    assert [record["pass"] for record in records] == [
        "insert_transforms",
        "calibrate",
        "convert",
        "merge_siblings",
        "lower",
    ]
    assert [record["changed"] for record in records] == [3, 2, 3, 3, 2]
    assert all(record["seconds"] >= 0 for record in records)
    assert len(pipeline.seconds) == len(pipeline.reports) == 5


def test_the_graph_is_recompiled() -> None:
    gm, x = float_graph(), graphs.rows(3, 64)
    Pipeline([InsertTransforms(CONFIG)]).run(gm)
    assert "parofx.rotate" in gm.code
    assert gm(x).shape == x.shape


@pytest.mark.parametrize("index", range(1, 5))
def test_a_graph_of_another_stage_is_refused(index: int) -> None:
    one = whole()[index]
    expected = " or ".join(one.consumes)
    with pytest.raises(PassError, match=f"pass {one.name} takes a graph of stage {expected}, got FLOAT"):
        Pipeline([one]).run(float_graph())


def test_a_graph_without_stage_is_refused() -> None:
    gm = torch.fx.symbolic_trace(graphs.Stack(1))
    with pytest.raises(PassError, match=r"the graph carries no stage: pass it through parofx\.capture"):
        Pipeline(whole()).run(gm)


@pytest.mark.parametrize("quantized", [False, True])
def test_normalize_runs_on_any_graph_and_marks_it(quantized: bool, tmp_path: Path) -> None:
    model, x = graphs.Stack(1).eval(), graphs.rows(3, 64)
    if quantized:
        parofx.quantize(model, graphs.config(), example_inputs=x, progress=False)
    gm = torch.export.export(model, (x,)).module()
    pipeline = Pipeline([Normalize()], dump_dir=str(tmp_path))
    assert stage_of(pipeline.run(gm)) is (Stage.CONVERTED if quantized else Stage.FLOAT)
    assert len(pipeline.seconds) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["000_normalize.py"]
    if quantized:
        Pipeline([Normalize(), MergeSiblings(), Normalize()]).run(gm)
        assert stage_of(gm) is Stage.CONVERTED
        message = "pass normalize takes a graph of stage FLOAT or CONVERTED, got LOWERED"
        with pytest.raises(PassError, match=message):
            Pipeline([Lower(provider="reference"), Normalize()]).run(gm)


def test_a_pass_that_breaks_an_invariant_is_caught() -> None:
    pipeline = Pipeline([InsertTransforms(CONFIG), Broken("grid")])
    with pytest.raises(PassError, match=r"invariants of PREPARED:\n  - fake quantization of whatever.0.gate is on"):
        pipeline.run(float_graph())


def test_a_pass_that_claims_a_stage_is_caught_by_what_it_produces() -> None:
    gm = float_graph()
    Pipeline([InsertTransforms(CONFIG), Broken("invariant")], verify=False).run(gm)
    assert stage_of(gm) is Stage.PREPARED


def test_a_graph_out_of_order_is_caught_though_the_pass_reports_no_change() -> None:
    pipeline = Pipeline([InsertTransforms(CONFIG), Broken("order")])
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        pipeline.run(float_graph())


def test_verification_can_be_left_out() -> None:
    gm = float_graph()
    Pipeline([InsertTransforms(CONFIG), Broken("grid")], verify=False).run(gm)
    assert stage_of(gm) is Stage.PREPARED


def test_dumps_are_readable_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = float_graph()
    monkeypatch.setenv("PAROFX_DUMP", str(tmp_path / "dumps" / "here"))
    Pipeline(whole()).run(gm)
    files = sorted((tmp_path / "dumps" / "here").iterdir())
    assert [path.name for path in files] == [
        "000_insert_transforms.py",
        "001_calibrate.py",
        "002_convert.py",
        "003_merge_siblings.py",
        "004_lower.py",
    ]
    for path in files:
        ast.parse(path.read_text())
    assert "torch.ops.parofx.fake_quantize" in files[0].read_text()
    assert "torch.ops.parofx.reference_int4_siblings" in files[-1].read_text()
    float_graph()
    assert (tmp_path / "dumps" / "here" / "005_normalize.py").exists()


def test_nothing_is_dumped_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAROFX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    Pipeline([InsertTransforms(CONFIG)]).run(float_graph())
    assert list(tmp_path.iterdir()) == []


def test_matches_and_skips_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    gm = float_graph()
    with caplog.at_level(logging.DEBUG, "parofx"):
        Pipeline([InsertTransforms(graphs.config(modules_to_not_convert=("down",)))]).run(gm)
    messages = [record.message for record in caplog.records if record.name == "parofx"]
    assert messages[0].startswith("insert_transforms: 2 changed, 1 skipped, ")
    assert any(one.startswith("insert_transforms: whatever.0.gate: shares one transform") for one in messages)
    assert "insert_transforms: skipped whatever.0.down: excluded by modules_to_not_convert (matches 'down')" in messages


def test_the_catalogue_lists_every_pass_in_the_order_of_stages() -> None:
    names = [one.name for one in registry()]
    assert names[:4] == ["normalize", "insert_transforms", "allocate_bits", "calibrate"]
    assert names[4:] == ["convert", "merge_siblings", "fuse_producers", "lower"]


@pytest.mark.parametrize("one", registry(), ids=lambda one: one.name)
def test_a_pass_is_a_frozen_dataclass_that_explains_itself(one: type[Pass]) -> None:
    made = one()
    assert isinstance(made, Pass)
    assert one.__doc__
    assert not one.__doc__.startswith(one.__name__ + "(")
    assert one.__dataclass_params__.frozen
    assert {item.name for item in fields(one)}.isdisjoint({"name", "consumes", "produces"})
    assert all(isinstance(stage, Stage) for stage in produced(one))
    assert all(stage is None or isinstance(stage, Stage) for stage in one.consumes)
    assert any(one.consumes)
