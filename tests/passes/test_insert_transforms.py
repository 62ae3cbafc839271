from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, EXACT_IN_FP32, Model
from torch import Tensor, nn

from parofx.config import ParoConfig
from parofx.passes import InsertTransforms, Normalize, Stage, census, stage_of
from parofx.passes.graph import FAKE_QUANTIZE, LINEAR, ROTATE, module_stack, nodes_calling
from parofx.passes.transforms import find_transforms
from parofx.pipeline import Pipeline


def attention() -> Model:
    parts = {name: graphs.linear(seed=index, bias=name != "k") for index, name in enumerate("qkvo")}
    return Model(lambda m, x: m.o(m.q(x) * m.k(x) + m.v(x)), **parts).eval()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("share", [True, False])
def test_the_output_stays_whatever_the_transforms_are(door: str, share: bool) -> None:
    model, x = attention(), graphs.rows(3, 64)
    captured = graphs.enter(door, model, x)
    before = census(captured.gm)
    report = InsertTransforms(graphs.config(share_siblings=share)).run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert (report.changed, len(report.matched), report.skipped) == (4, 4, [])
    assert stage_of(captured.gm) is Stage.PREPARED
    rotations = 2 if share else 4
    assert census(captured.gm) - before == {
        str(ROTATE): rotations + 4,
        str(FAKE_QUANTIZE): 4,
        "aten.reciprocal.default": rotations,
    }
    expected = graphs.eager(model, x)
    assert graphs.relative(captured(x), expected) < EXACT_IN_FP32
    for seed in range(3):
        graphs.randomize(captured.gm, seed)
        assert graphs.relative(captured(x), expected) < EXACT_IN_FP32


def test_in_fp64_the_output_is_exact() -> None:
    model, x = attention().double(), graphs.rows(3, 64).double()
    captured = graphs.enter("export", model, x)
    Pipeline([InsertTransforms(graphs.config())]).run(captured.gm)
    graphs.randomize(captured.gm)
    # θ is held in fp32: the cosine and sine of one rotation come from the same numbers, forth and back.
    assert graphs.relative(captured(x), graphs.eager(model, x)) < 1e-6


def test_the_report_says_who_shares() -> None:
    gm = graphs.enter("export", attention(), graphs.rows(3, 64)).gm
    report = InsertTransforms(graphs.config()).run(gm)
    shared = "shares one transform with its siblings: q, k, v; group_size 64"
    expected = [("q", shared), ("k", shared), ("v", shared), ("o", "own transform; group_size 64")]
    assert report.matched == expected


@pytest.mark.parametrize("door", DOORS)
def test_a_second_run_changes_nothing(door: str) -> None:
    gm = graphs.enter(door, attention(), graphs.rows(3, 64)).gm
    InsertTransforms(graphs.config()).run(gm)
    before = census(gm)
    assert InsertTransforms(graphs.config()).run(gm).changed == 0
    assert Normalize().run(gm).changed == 0
    assert census(gm) == before


@pytest.mark.parametrize("door", DOORS)
def test_meta_is_kept_and_given(door: str) -> None:
    gm = graphs.enter(door, attention(), graphs.rows(3, 64)).gm
    linears = nodes_calling(gm.graph, LINEAR)
    before = [dict(node.meta) for node in linears]
    InsertTransforms(graphs.config()).run(gm)
    assert [node.meta for node in nodes_calling(gm.graph, LINEAR)] == before
    for node in linears:
        for inserted in node.args[:2]:
            assert inserted.meta["stack_trace"] == linears[0].meta["stack_trace"] or inserted.meta["stack_trace"]
            assert module_stack(inserted)
        assert node.args[0].meta["val"].shape == (3, 64)
        assert node.args[1].meta["val"].shape == (64, 64)
        assert node.args[1].args[0].meta["val"].shape == (64, 64)


@pytest.mark.parametrize("door", DOORS)
def test_a_weight_of_several_calls_is_rotated_once(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return m.b(y) + m.a(x) + m.b(x) + m.a(y)

    model, x = Model(forward, a=graphs.linear(seed=1), b=graphs.linear(seed=2)).eval(), graphs.rows(3, 64)
    captured = graphs.enter(door, model, x)
    report = InsertTransforms(graphs.config()).run(captured.gm)
    captured.gm.recompile()
    assert report.changed == 4
    (transform,) = find_transforms(captured.gm)
    assert [(one.name, len(one.calls)) for one in transform.linears] == [("b", 2), ("a", 2)]
    assert len(transform.inputs) == 2
    graphs.randomize(captured.gm)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_tensors_of_the_model_with_names_of_ours_are_left_alone(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.weight, m.bias) * m.scales + m.pairs * m.bias + F.linear(x, m.theta)

    names = {"scales": graphs.vector(64), "pairs": graphs.vector(64), "bias": graphs.vector(64)}
    inner = Model(forward, weight=graphs.matrix(64, 64), theta=graphs.matrix(64, 64, seed=1), **names)
    model, x = Model(lambda m, x: m.inner(x), inner=inner).eval(), graphs.rows(3, 64)
    captured = graphs.enter(door, model, x)
    Pipeline([InsertTransforms(graphs.config())]).run(captured.gm)
    graphs.randomize(captured.gm)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


def test_tied_embedding_and_head_stay_and_the_body_is_prepared() -> None:
    embedding, body, head = nn.Embedding(64, 64), graphs.linear(), graphs.linear(64, 64, bias=False)
    head.weight = embedding.weight
    model = Model(lambda m, x: m.head(m.body(m.embedding(x))), embedding=embedding, body=body, head=head).eval()
    tokens = torch.arange(6).view(2, 3)
    captured = graphs.enter("export", model, tokens)
    report = InsertTransforms(ParoConfig()).run(captured.gm)
    captured.gm.recompile()
    # The body's weight has the embedding's shape, too, but the head is behind it.
    assert [name for name, _ in report.matched] == ["body"]
    assert [reason for _, reason in report.skipped] == ["output head"]
    assert graphs.relative(captured(tokens), graphs.eager(model, tokens)) < EXACT_IN_FP32
