from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, EXACT_IN_FP32, Captured, Model
from rounded import random_rotation, round_linear
from torch import Tensor

from parofx import ParoLinear
from parofx.passes import Convert, InsertTransforms, Lower, MergeSiblings, PassReport, Stage, stage_of
from parofx.passes.graph import INT4_LINEAR, ROTATE, ROTATE_INT4_SIBLINGS, bits_of, module_stack, nodes_calling
from parofx.passes.lower import sibling_call


def converted(model: Any, *inputs: Tensor, door: str = "export", **options: Any) -> Captured:
    captured = graphs.enter(door, model.eval(), *inputs)
    InsertTransforms(graphs.config(**options)).run(captured.gm)
    graphs.randomize(captured.gm)
    graphs.round_to_nearest(captured.gm)
    Convert().run(captured.gm)
    captured.gm.recompile()
    return captured


def merge(captured: Captured, *inputs: Tensor) -> tuple[PassReport, list[tuple[int, int]]]:
    """Merge, check the output, and return `(rotations, linears)` of each call."""
    before = captured(*inputs)
    linears = len(nodes_calling(captured.gm.graph, INT4_LINEAR))
    report = MergeSiblings().run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert graphs.relative(captured(*inputs), before) < EXACT_IN_FP32
    assert report.changed == linears - len(nodes_calling(captured.gm.graph, INT4_LINEAR))
    assert stage_of(captured.gm) is Stage.CONVERTED
    assert MergeSiblings().run(captured.gm).changed == 0
    calls = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
    return report, [(len(node.args[1]), len(node.args[4])) for node in calls]


def attention() -> Model:
    parts = {
        name: graphs.linear(64, 64 if name in "qo" else 32, seed=i, bias=name != "k") for i, name in enumerate("qkvo")
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.o(m.q(x) + torch.cat((m.k(x), m.v(x)), dim=-1))

    return Model(forward, **parts)


@pytest.mark.parametrize("door", DOORS)
def test_a_shared_rotation_is_one_in_the_call(door: str) -> None:
    x = graphs.rows(3, 64)
    captured = converted(attention(), x, door=door)
    report, calls = merge(captured, x)
    assert calls == [(1, 3), (1, 1)]
    assert not nodes_calling(captured.gm.graph, INT4_LINEAR, ROTATE)
    first = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)[0]
    assert first.args[8] == [True, False, True]
    assert [value.shape[-1] for value in first.meta["val"]] == [64, 32, 32]
    assert len(report.matched) == 2
    assert report.matched[0][1].endswith("with 1 rotation(s)")


@pytest.mark.parametrize("door", DOORS)
def test_separate_rotations_are_one_call_with_several(door: str) -> None:
    x = graphs.rows(3, 64)
    report, calls = merge(converted(attention(), x, door=door, share_siblings=False), x)
    assert calls == [(3, 3), (1, 1)]
    assert report.matched[0][1].endswith("with 3 rotation(s)")


@pytest.mark.parametrize("door", DOORS)
def test_modules_with_and_without_a_common_rotation(door: str) -> None:
    rotations = [random_rotation(64, 32, 2, seed=seed) for seed in (0, 0, 1)]
    rotations[1] = rotations[0]
    parts = {
        name: round_linear(graphs.matrix(64, 64, seed=index), None, rotation, 32)
        for index, (name, rotation) in enumerate(zip("qkv", rotations, strict=True))
    }
    x = graphs.rows(3, 64)
    captured = graphs.enter(door, Model(lambda m, x: m.q(x) + m.k(x) * m.v(x), **parts).eval(), x)
    _, calls = merge(captured, x)
    assert calls == [(1, 2), (1, 1)], "no rotation is computed twice"


@pytest.mark.parametrize("door", DOORS)
def test_different_group_sizes_are_different_calls(door: str) -> None:
    def paro(group_size: int, seed: int) -> ParoLinear:
        rotation = random_rotation(64, group_size, 2, seed=seed)
        return round_linear(graphs.matrix(64, 64, seed=group_size), graphs.vector(64), rotation, group_size)

    model, x = (
        Model(lambda m, x: m.a(x) + m.b(x) + m.c(x), a=paro(32, 0), b=paro(64, 1), c=paro(32, 2)).eval(),
        graphs.rows(3, 64),
    )
    captured = graphs.enter(door, model, x)
    _, calls = merge(captured, x)
    assert calls == [(2, 2), (1, 1)]
    sizes = [node.args[9] for node in nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)]
    assert sizes == [32, 64]


@pytest.mark.parametrize("door", DOORS)
def test_different_widths_are_different_calls(door: str) -> None:
    rotation = random_rotation(64, 32, 2, seed=0)
    parts = {
        name: round_linear(graphs.matrix(64, 64, seed=index), None, rotation, 32, bits)
        for index, (name, bits) in enumerate(zip("abc", (3, 8, 3), strict=True))
    }
    model, x = Model(lambda m, x: m.a(x) + m.b(x) + m.c(x), **parts).eval(), graphs.rows(3, 64)
    captured = graphs.enter(door, model, x)
    _, calls = merge(captured, x)
    assert calls == [(1, 2), (1, 1)]
    nodes = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
    assert [bits_of(node) for node in nodes] == [3, 8]
    Lower().run(captured.gm)
    captured.gm.recompile()
    with torch.no_grad():
        assert graphs.relative(captured(x), model(x)) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_a_bias_that_is_computed_behind_the_first_call_stays_apart(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = m.a(x)
        shift = first.mean(0)
        late = torch.nn.functional.linear(x, m.w, shift)
        return first + late + m.b(x)

    parts = {"a": graphs.linear(), "b": graphs.linear(seed=1), "w": graphs.matrix(64, 64, seed=2)}
    x = graphs.rows(3, 64)
    _, calls = merge(converted(Model(forward, **parts), x, door=door), x)
    assert sorted(calls) == [(1, 1), (1, 2)]


@pytest.mark.parametrize("door", DOORS)
def test_a_bias_that_is_computed_before_is_part_of_the_call(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        shift = x.mean(0)
        return m.a(x) + torch.nn.functional.linear(x, m.w, shift)

    x = graphs.rows(3, 64)
    _, calls = merge(converted(Model(forward, a=graphs.linear(), w=graphs.matrix(64, 64, seed=2)), x, door=door), x)
    assert calls == [(1, 2)]


@pytest.mark.parametrize("door", DOORS)
def test_siblings_far_apart_are_one_call_at_the_first(door: str) -> None:
    """The second sibling's tensors are defined after the first use, and its result is needed much later."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.b(torch.relu(m.a(x)))
        return m.c(y) + m.d(x) + m.b(x)

    parts = {name: graphs.linear(seed=index) for index, name in enumerate("abcd")}
    x = graphs.rows(3, 64)
    _, calls = merge(converted(Model(forward, **parts), x, door=door), x)
    assert sorted(calls) == [(1, 1), (1, 1), (1, 3)]


@pytest.mark.parametrize("door", DOORS)
def test_one_weight_called_twice_on_one_tensor(door: str) -> None:
    x = graphs.rows(3, 64)
    _, calls = merge(converted(Model(lambda m, x: m.a(x) * m.a(x), a=graphs.linear()), x, door=door), x)
    assert calls == [(1, 2)]


def test_meta_is_kept() -> None:
    captured = converted(graphs.Stack(1), graphs.rows(3, 64))
    MergeSiblings().run(captured.gm)
    for node in nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS):
        assert "stack_trace" in node.meta
        assert module_stack(node)[-1][0].startswith("whatever.0.")
        for index, user in enumerate(node.users):
            assert user.meta["val"] is node.meta["val"][index]
            assert module_stack(user)


def test_a_linear_on_an_unrotated_input_is_skipped() -> None:
    module = round_linear(graphs.matrix(64, 64), None, random_rotation(64, 32, 2, seed=0), 32)

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.ops.parofx.int4_linear(x, m.inner.qweight, m.inner.qzeros, m.inner.scales, None, 32)

    gm = graphs.enter("export", Model(forward, inner=module).eval(), graphs.rows(3, 64)).gm
    report = MergeSiblings().run(gm)
    assert report.changed == 0
    assert [reason for _, reason in report.skipped] == ["its input is not rotated"]


def test_a_call_is_read_off_the_graph() -> None:
    captured = converted(attention(), graphs.rows(3, 64))
    MergeSiblings().run(captured.gm)
    first, last = (
        sibling_call(captured.gm, node, None) for node in nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
    )
    assert (first.in_features, first.out_features, first.group_size) == (64, (64, 32, 32), 64)
    assert (len(first.rotations), [bias is None for bias in first.biases]) == (1, [False, True, False])
    assert (last.dtype, last.device.type, last.is_bound()) == (torch.float32, "cpu", True)
    assert first.rows is None  # dynamic
    captured = converted(graphs.linear(), graphs.rows(2, 3, 64), door="dynamo")
    MergeSiblings().run(captured.gm)
    (node,) = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
    assert sibling_call(captured.gm, node, None).rows == 6
