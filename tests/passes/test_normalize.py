from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, EXACT_IN_FP32, Model
from rounded import random_rotation, round_linear
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from transformers.pytorch_utils import Conv1D

from parofx.passes import Normalize, Stage, census, stage_of
from parofx.passes.graph import INT4_LINEAR, LINEAR, ROTATE, TRANSPOSE, module_stack, nodes_calling, weight_binding

K, N = 64, 32
Forward = Callable[[Any, Tensor], Tensor]

#: A product with `w (N, K)`.
FORMS_NK: dict[str, Forward] = {
    "linear": lambda m, x: F.linear(x, m.w),
    "linear with bias": lambda m, x: F.linear(x, m.w, m.b),
    "linear by keyword": lambda m, x: F.linear(bias=m.b, input=x, weight=m.w),
    "aten.linear": lambda m, x: torch.ops.aten.linear.default(x, m.w, m.b),
    "matmul with .t()": lambda m, x: torch.matmul(x, m.w.t()),
    "@ with .T": lambda m, x: x @ m.w.T,
    "@ with .mT": lambda m, x: x @ m.w.mT,
    "@ with transpose": lambda m, x: x @ m.w.transpose(-1, 0),
    "@ with transpose by keyword": lambda m, x: x @ torch.transpose(m.w, dim0=0, dim1=1),
    "@ with t by keyword": lambda m, x: x @ torch.t(input=m.w),
    "@ with swapaxes": lambda m, x: x @ m.w.swapaxes(0, 1),
    "@ with permute": lambda m, x: x @ m.w.permute(1, 0),
    "@ with permute of a tuple": lambda m, x: x @ torch.permute(m.w, (-1, -2)),
    "@ with permute by keyword": lambda m, x: x @ m.w.permute(dims=(1, 0)),
    "mm with .t()": lambda m, x: torch.mm(x, m.w.t()),
    "addmm with .t()": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    "three transpositions": lambda m, x: x @ m.w.t().T.permute(1, 0),
}
#: A product with `v (K, N)`.
FORMS_KN: dict[str, Forward] = {
    "@": lambda m, x: x @ m.v,
    "matmul": lambda m, x: torch.matmul(x, m.v),
    "matmul by keyword": lambda m, x: torch.matmul(other=m.v, input=x),
    "matmul method": lambda m, x: x.matmul(m.v),
    "matmul method by keyword": lambda m, x: x.matmul(other=m.v),
    "mm": lambda m, x: torch.mm(x, m.v),
    "mm by keyword": lambda m, x: torch.mm(x, mat2=m.v),
    "mm method": lambda m, x: x.mm(m.v),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.v),
    "addmm by keyword": lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.v),
    "addmm method": lambda m, x: m.b.addmm(x, m.v),
    "linear with .t()": lambda m, x: F.linear(x, m.v.t(), m.b),
    "aten.mm": lambda m, x: torch.ops.aten.mm.default(x, m.v),
}


def products() -> dict[str, nn.Parameter]:
    return {"w": graphs.matrix(N, K), "v": graphs.matrix(K, N), "b": graphs.vector(N)}


def check_is_normal(door: str, forward: Forward, x: Tensor, *, stored: str) -> GraphModule:
    model = Model(forward, **products()).eval()
    captured = graphs.enter(door, model, x)
    (node,) = nodes_calling(captured.gm.graph, LINEAR)
    bound, transposed = weight_binding(node.args[1])
    assert (bound.fqn, transposed) == (stored, stored == "v")
    assert bound.tensor is getattr(model, stored)
    assert not node.kwargs
    assert node.meta["val"].shape == (*x.shape[:-1], N)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32
    assert Normalize().run(captured.gm).changed == 0
    return captured.gm


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS_NK)
def test_a_product_with_a_parameter_stored_by_rows_of_outputs(door: str, form: str) -> None:
    check_is_normal(door, FORMS_NK[form], graphs.rows(3, K), stored="w")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS_KN)
def test_a_product_with_a_parameter_stored_by_rows_of_inputs(door: str, form: str) -> None:
    gm = check_is_normal(door, FORMS_KN[form], graphs.rows(3, K), stored="v")
    assert len(nodes_calling(gm.graph, TRANSPOSE)) == 1


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", ["linear", "@", "matmul", "@ with .T"])
@pytest.mark.parametrize("shape", [(K,), (2, 3, K)], ids=["vector", "batched"])
def test_any_number_of_dimensions(door: str, form: str, shape: tuple[int, ...]) -> None:
    stored = "w" if form in FORMS_NK else "v"
    check_is_normal(door, (FORMS_NK | FORMS_KN)[form], graphs.rows(*shape), stored=stored)


#: Products that are no linear layers, and what they multiply.
LEFT_ALONE: dict[str, Forward] = {
    "addmm with alpha": lambda m, x: torch.addmm(m.b, x, m.v, alpha=2.0),
    "addmm with beta": lambda m, x: torch.addmm(m.b, x, m.v, beta=0.5),
    "addmm with a bias per row": lambda m, x: torch.addmm(m.rows, x, m.v),
    "computed weight": lambda m, x: F.linear(x, m.w * 2),
    "activation as weight": lambda m, x: x @ x.t(),
    "parameter from the left": lambda m, x: m.w @ x.t(),
    "vector": lambda m, x: x @ m.v[:, 0],
    "stack of matrices": lambda m, x: torch.matmul(x, m.stack),
    "no transposition": lambda m, x: x @ m.v.permute(0, 1),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", LEFT_ALONE)
def test_what_is_no_linear_layer_is_left_alone(door: str, form: str) -> None:
    stack = nn.Parameter(graphs.rows(2, K, N))
    model = Model(LEFT_ALONE[form], **products(), rows=graphs.matrix(3, N), stack=stack).eval()
    x = graphs.rows(3, K)
    captured = graphs.enter(door, model, x)
    found = [weight_binding(node.args[1]) for node in nodes_calling(captured.gm.graph, LINEAR)]
    assert [one for one in found if one is not None] == ([] if form != "no transposition" else found)
    assert graphs.relative(captured(x), graphs.eager(model, x)) == 0


def test_a_product_that_writes_its_result_elsewhere_is_left_alone() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = graphs.matrix(K, N)

        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            return torch.mm(x, self.v, out=out)

    gm = symbolic_trace(Root())
    assert Normalize().run(gm).changed == 0
    assert not nodes_calling(gm.graph, LINEAR)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("call", "size"), [("linear", ()), ("linear", (1,)), ("addmm", (1,)), ("linear", (1, N)), ("linear", (3, N))]
)
def test_a_bias_of_another_shape_becomes_an_addition(door: str, call: str, size: tuple[int, ...]) -> None:
    forward = {"linear": lambda m, x: F.linear(x, m.w, m.b), "addmm": lambda m, x: torch.addmm(m.b, x, m.w.t())}
    bias = nn.Parameter(torch.full(size, 0.5))
    model, x = Model(forward[call], w=graphs.matrix(N, K), b=bias).eval(), graphs.rows(3, K)
    captured = graphs.enter(door, model, x)
    (node,) = nodes_calling(captured.gm.graph, LINEAR)
    assert len(node.args) == 2
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32
    assert Normalize().run(captured.gm).changed == 0


@pytest.mark.parametrize("door", DOORS)
def test_conv1d_siblings_read_one_view(door: str) -> None:
    parts = {name: Conv1D(N, K) for name in ("q", "k")}
    model, x = Model(lambda m, x: m.q(x) + m.k(x), **parts).eval(), graphs.rows(2, 3, K)
    captured = graphs.enter(door, model, x)
    first, second = nodes_calling(captured.gm.graph, LINEAR)
    assert first.args[0] is second.args[0]
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_copies_of_which_one_is_written_stay_two(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = x.t().reshape(K, -1), x.t().reshape(K, -1)
        third, fourth = x.t().reshape(-1), x.t().reshape(-1)
        third.add_(1.0)
        return first.t() @ m.v + second.t() @ m.v + (third - fourth).mean()

    model, x = Model(forward, **products()).eval(), graphs.rows(3, K)
    captured = graphs.enter(door, model, x)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_views_of_other_types_stay_two(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x.view(torch.int32).view(3, K).float() @ m.v + x.view(3, K) @ m.v

    model, x = Model(forward, **products()).eval(), graphs.rows(3, K)
    captured = graphs.enter(door, model, x)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_provenance_is_kept(door: str) -> None:
    inner = Model(lambda m, x: x @ m.v, v=graphs.matrix(K, N))
    captured = graphs.enter(door, Model(lambda m, x: m.inner(x), inner=inner).eval(), graphs.rows(3, K))
    (node,) = nodes_calling(captured.gm.graph, LINEAR)
    assert "stack_trace" in node.meta
    assert module_stack(node)[-1][0] == "inner"


def test_the_report_counts_and_names_rewrites() -> None:
    gm, *_ = graphs.dynamo_graph(Model(lambda m, x: F.linear(x @ m.v, m.w.t()), **products()).eval(), graphs.rows(3, K))
    before = census(gm)
    report = Normalize().run(gm)
    assert LINEAR not in before
    assert report.changed == 2
    assert [what for _, what in report.matched] == ["matmul with a parameter weight", "linear with a parameter weight"]
    assert census(gm)[str(LINEAR)] == 2


class TestParoLinear:
    """Graphs that hold `ParoLinear`'s operator."""

    @staticmethod
    def layers(count: int, *, shared: bool) -> list[nn.Module]:
        rotations = [random_rotation(K, 32, 2, seed=0 if shared else index) for index in range(count)]
        if shared:
            rotations = [rotations[0]] * count
        return [
            round_linear(graphs.matrix(N, K, seed=index), graphs.vector(N), rotations[index], 32)
            for index in range(count)
        ]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("shared", [True, False])
    def test_the_operator_is_split_and_equal_rotations_are_one(self, door: str, shared: bool) -> None:
        q, k, v = self.layers(3, shared=shared)
        model, x = Model(lambda m, x: m.q(x) + m.k(x) + m.v(x), q=q, k=k, v=v).eval(), graphs.rows(3, K)
        captured = graphs.enter(door, model, x)
        assert stage_of(captured.gm) is Stage.CONVERTED
        assert len(nodes_calling(captured.gm.graph, INT4_LINEAR)) == 3
        assert len(nodes_calling(captured.gm.graph, ROTATE)) == (1 if shared else 3)
        assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32
        assert Normalize().run(captured.gm).changed == 0

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("bits", [{}, {"bits": 4}])
    def test_arguments_by_keyword(self, door: str, bits: dict[str, int]) -> None:
        (q,) = self.layers(1, shared=True)
        names = ("pairs", "theta", "channel_scales", "qweight", "qzeros", "scales", "bias")

        def forward(m: Any, x: Tensor) -> Tensor:
            tensors = {name: getattr(m.q, name) for name in names}
            return torch.ops.parofx.rotate_int4_linear(x, **tensors, **bits, group_size=32)

        model, x = Model(forward, q=q).eval(), graphs.rows(3, K)
        captured = graphs.enter(door, model, x)
        assert len(nodes_calling(captured.gm.graph, ROTATE)) == 1
        assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32
