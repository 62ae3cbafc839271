from __future__ import annotations

from collections import Counter
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, EXACT_IN_FP32, Model
from torch import Tensor, nn
from torch.fx import GraphModule
from zoo import ZOO

import parofx
from parofx.api import convert, lower, prepare
from parofx.passes import InsertTransforms
from parofx.passes.blocks import find_blocks
from parofx.passes.capture import capture
from parofx.passes.graph import STAYS_FLOAT, binding
from parofx.passes.linears import choose_group_sizes, find_units, group_siblings, matches
from parofx.passes.transforms import find_transforms
from parofx.report import FloatLinear, FloatReason


def kept(gm: GraphModule, **options: Any) -> list[FloatLinear]:
    settings = {name: options.pop(name) for name in ("output_heads", "replace_modules") if name in options}
    InsertTransforms(graphs.config(**options), **settings).run(gm)
    found: tuple[FloatLinear, ...] = gm.meta["parofx_kept_float"]
    return list(found)


def quantized(gm: GraphModule) -> list[str]:
    return [linear.name for transform in find_transforms(gm) for linear in transform.linears]


class TestFloatReasons:
    """One case per member of the closed enumeration, through both doors where both know it."""

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("pattern", ["a", "inner.a", "inner.*a", "*.a"])
    def test_excluded(self, door: str, pattern: str) -> None:
        inner = nn.ModuleDict({"a": graphs.linear(), "ab": graphs.linear(seed=1)})
        model = Model(lambda m, x: m.inner["ab"](m.inner["a"](x)), inner=inner).eval()
        captured = graphs.enter(door, model, graphs.rows(3, 64))
        expected = FloatLinear("inner.a", FloatReason.EXCLUDED, f"matches {pattern!r}")
        assert kept(captured.gm, modules_to_not_convert=(pattern,)) == [expected]
        assert quantized(captured.gm) == ["inner.ab"]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("tied", [True, False])
    def test_output_head(self, door: str, tied: bool) -> None:
        embedding, body, head = nn.Embedding(40, 64), graphs.linear(), graphs.linear(64, 40, bias=False, seed=1)
        if tied:
            head.weight = embedding.weight
        model = Model(lambda m, x: m.head(m.body(m.embedding(x))), embedding=embedding, body=body, head=head).eval()
        captured = graphs.enter(door, model, torch.arange(6).view(2, 3))
        (found,) = kept(captured.gm)
        assert found.reason is FloatReason.OUTPUT_HEAD
        assert quantized(captured.gm) == ["body"]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("tied", [True, False])
    def test_an_output_head_that_shall_be_quantized(self, door: str, tied: bool) -> None:
        embedding, body, head = nn.Embedding(40, 64), graphs.linear(), graphs.linear(64, 40, bias=False, seed=1)
        if tied:
            head.weight = embedding.weight
        model = Model(lambda m, x: m.head(m.body(m.embedding(x))), embedding=embedding, body=body, head=head).eval()
        captured = graphs.enter(door, model, torch.arange(6).view(2, 3))
        assert kept(captured.gm, lm_head=4, replace_modules=door == "export") == []
        assert quantized(captured.gm) == ["body", "head"]

    def test_a_tied_head_that_is_computed_with_stays_float(self) -> None:
        embedding, body = nn.Embedding(40, 64), graphs.linear()
        model = Model(lambda m, x: F.linear(m.body(m.embedding(x)), m.embedding.weight), embedding=embedding, body=body)
        gm = capture(model.eval(), torch.arange(6).view(2, 3))
        (found,) = kept(gm, lm_head=4, replace_modules=True)
        assert found.reason is FloatReason.FUNCTIONAL

    @pytest.mark.parametrize("kind", ["linear", "functional"])
    def test_whole_model(self, kind: str) -> None:
        class Root(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = graphs.matrix(64, 64)

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight)

        model = graphs.linear() if kind == "linear" else Root()
        gm = capture(model, graphs.rows(3, 64))
        assert kept(gm, replace_modules=True) == [FloatLinear("weight", FloatReason.WHOLE_MODEL)]

    def test_output_head_named_by_the_model(self) -> None:
        model = nn.Sequential(graphs.linear(), graphs.linear(64, 40))
        gm = capture(model, graphs.rows(3, 64))
        assert kept(gm, output_heads=("1",)) == [FloatLinear("1", FloatReason.OUTPUT_HEAD)]

    def test_the_last_linear_of_a_sequential_is_no_output_head(self) -> None:
        gm = capture(nn.Sequential(graphs.linear(), graphs.linear(64, 40)), graphs.rows(3, 64))
        assert kept(gm) == []
        assert quantized(gm) == ["0", "1"]

    def test_a_linear_inside_a_block_with_the_shape_of_an_embedding_is_no_output_head(self) -> None:
        blocks = nn.ModuleList(nn.Sequential(graphs.linear(seed=seed), nn.ReLU()) for seed in range(2))
        embedding = nn.Embedding(64, 64)
        model = Model(lambda m, x: m.blocks[1](m.blocks[0](m.embedding(x))), blocks=blocks, embedding=embedding).eval()
        gm = capture(model, torch.arange(6).view(2, 3))
        assert kept(gm) == []

    @pytest.mark.parametrize("door", DOORS)
    def test_hidden_linears_with_the_shape_of_an_embedding_are_no_output_head(self, door: str) -> None:
        def forward(m: Any, x: Tensor) -> Tensor:
            return torch.tanh(m.last(torch.relu(m.first(m.embedding(x)))) / 30)[:, -1] * 30

        parts = {"first": graphs.linear(), "last": graphs.linear(seed=1)}
        model = Model(forward, embedding=nn.Embedding(64, 64), **parts).eval()
        captured = graphs.enter(door, model, torch.arange(6).view(2, 3))
        assert kept(captured.gm) == [FloatLinear("last", FloatReason.OUTPUT_HEAD)]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("in_features", [16, 48, 100])
    def test_in_features(self, door: str, in_features: int) -> None:
        model = nn.Sequential(graphs.linear(64, in_features if in_features % 8 == 0 else 104), nn.ReLU())
        model.append(graphs.linear(in_features, 64)) if in_features % 8 == 0 else None
        odd = nn.Sequential(graphs.linear(in_features, 64)).eval()
        captured = graphs.enter(door, odd, graphs.rows(3, in_features))
        assert kept(captured.gm) == [FloatLinear("0", FloatReason.IN_FEATURES, f"{in_features} in_features")]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize(("out_features", "bits", "columns"), [(1, 4, 8), (100, 4, 8), (40, 3, 32), (10, 8, 4)])
    def test_out_features(self, door: str, out_features: int, bits: int, columns: int) -> None:
        model = nn.Sequential(graphs.linear(64, out_features)).eval()
        captured = graphs.enter(door, model, graphs.rows(3, 64))
        detail = f"{out_features} out_features; {bits} bits need a multiple of {columns}"
        assert kept(captured.gm, bits=bits) == [FloatLinear("0", FloatReason.OUT_FEATURES, detail)]

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize("choice", ["topk", "softmax", "sigmoid with bias", "argmax"])
    def test_router(self, door: str, choice: str) -> None:
        def forward(m: Any, x: Tensor) -> Tensor:
            logits = m.gate(x)
            if choice == "softmax":
                logits = logits.float().softmax(-1).to(x.dtype)
            if choice == "sigmoid with bias":
                logits = logits.sigmoid() + m.correction
            if choice == "argmax":
                chosen = F.one_hot(logits.argmax(-1), 8).to(x.dtype)
            else:
                chosen = torch.topk(logits, 2, dim=-1)[0]
            return m.expert(x) * chosen.sum(-1, keepdim=True)

        parts = {"gate": graphs.linear(64, 8), "expert": graphs.linear(seed=1), "correction": graphs.vector(8)}
        captured = graphs.enter(door, Model(forward, **parts).eval(), graphs.rows(3, 64))
        assert kept(captured.gm) == [FloatLinear("gate", FloatReason.ROUTER)]
        assert quantized(captured.gm) == ["expert"]

    def test_a_predicted_class_is_no_router(self) -> None:
        model = Model(lambda m, x: m.head(x).argmax(-1), head=graphs.linear(64, 8)).eval()
        assert kept(capture(model, graphs.rows(3, 64))) == []

    @pytest.mark.parametrize("door", DOORS)
    def test_weight_not_matrix(self, door: str) -> None:
        experts = nn.Parameter(graphs.rows(4, 64, 64))
        model = Model(lambda m, x: torch.bmm(m.body(x), m.experts), experts=experts, body=graphs.linear()).eval()
        captured = graphs.enter(door, model, graphs.rows(4, 3, 64))
        assert kept(captured.gm) == [FloatLinear("experts", FloatReason.WEIGHT_NOT_MATRIX)]

    @pytest.mark.parametrize("door", DOORS)
    def test_a_slice_of_a_stack_is_no_matrix(self, door: str) -> None:
        model = Model(lambda m, x: F.linear(x, m.experts[2]), experts=nn.Parameter(graphs.rows(4, 64, 64))).eval()
        captured = graphs.enter(door, model, graphs.rows(3, 64))
        assert kept(captured.gm) == [FloatLinear("experts", FloatReason.WEIGHT_NOT_MATRIX)]

    def test_functional(self) -> None:
        model = Model(lambda m, x: F.linear(x, m.w), w=graphs.matrix(64, 64)).eval()
        detail = "w is read outside of one linear module"
        assert kept(capture(model, graphs.rows(3, 64)), replace_modules=True) == [
            FloatLinear("w", FloatReason.FUNCTIONAL, detail)
        ]
        assert kept(capture(model, graphs.rows(3, 64))) == []

    def test_not_reached(self) -> None:
        model = nn.ModuleDict({"used": graphs.linear(), "unused": graphs.linear(seed=1)})
        forward = Model(lambda m, x: m.inner["used"](x), inner=model)
        report = parofx.quantize(forward, graphs.config(), example_inputs=graphs.rows(3, 64), progress=False)
        assert report.kept_float == (FloatLinear("inner.unused", FloatReason.NOT_REACHED),)

    def test_left_float(self) -> None:
        """The backend says so of a parameter; see `tests/test_kept_float.py`."""
        model = Model(lambda m, x: m.b(m.a(x)), a=graphs.linear(), b=graphs.linear(seed=1)).eval()
        captured = graphs.enter("dynamo", model, graphs.rows(3, 64))
        weight = next(node for node in captured.gm.graph.nodes if (bound := binding(node)) and bound.fqn == "b.weight")
        weight.meta[STAYS_FLOAT] = FloatReason.LEFT_FLOAT
        assert kept(captured.gm) == [FloatLinear("b", FloatReason.LEFT_FLOAT)]
        assert quantized(captured.gm) == ["a"]

    def test_every_reason_has_a_case(self) -> None:
        cases = {name for name in dir(self) if name.startswith("test_")}
        assert {f"test_{reason.name.lower()}" for reason in FloatReason} <= cases


@pytest.mark.parametrize(
    ("name", "pattern", "matched"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.1.mlp.up", "layers.1", True),
        ("model.layers.11.mlp.up", "layers.1", False),
        ("model.layers.11.mlp.up", "model.layers.1*", True),
        ("model.layers.1.mlp.up", "*.up", True),
        ("model.layers.1.mlp.up_proj", "up", False),
        ("a.b", "A.b", False),
    ],
)
def test_patterns(name: str, pattern: str, matched: bool) -> None:
    assert matches(name, pattern) is matched


class TestGroupSizes:
    @staticmethod
    def sizes(*in_features: int, **options: Any) -> list[int | None]:
        model = Model(
            lambda m, *xs: [layer(x) for layer, x in zip(m.layers, xs, strict=True)],
            layers=nn.ModuleList(graphs.linear(k, 8) for k in in_features),
        )
        gm = capture(model.eval(), *(graphs.rows(2, k) for k in in_features))
        units = find_units(gm)
        found = choose_group_sizes(units, graphs.config(**options))
        return [found.get(unit.name) for unit in units]

    def test_the_largest_that_divides_every_layer(self) -> None:
        assert self.sizes(128, 256) == [128, 128]
        assert self.sizes(128, 192) == [64, 64]
        assert self.sizes(128, 192, 96) == [32, 32, 32]
        assert self.sizes(96) == [32]

    def test_what_32_does_not_divide_has_no_say(self) -> None:
        assert self.sizes(128, 80, 100) == [128, None, None]
        assert self.sizes(80) == [None]

    def test_the_asked_size_is_the_largest(self) -> None:
        assert self.sizes(128, 256, group_size=64) == [64, 64]
        assert self.sizes(128, 256, group_size=32) == [32, 32]
        assert self.sizes(128, 96, group_size=64) == [32, 32]

    def test_one_per_layer(self) -> None:
        assert self.sizes(128, 192, 96, 80, mixed_group_size=True) == [128, 64, 32, None]
        assert self.sizes(128, 192, 96, group_size=64, mixed_group_size=True) == [64, 64, 32]


class TestSiblings:
    @staticmethod
    def groups(gm: GraphModule, *, share: bool = True) -> list[list[str]]:
        units = group_siblings(find_units(gm), find_blocks(gm), share=share)
        return [[unit.name for unit in group] for group in units]

    @pytest.mark.parametrize("door", DOORS)
    def test_linears_that_read_one_tensor(self, door: str) -> None:
        parts = {name: graphs.linear(seed=index) for index, name in enumerate("qkvo")}
        model = Model(lambda m, x: m.o(m.q(x) + m.k(x) + m.v(x)), **parts).eval()
        captured = graphs.enter(door, model, graphs.rows(3, 64))
        assert self.groups(captured.gm) == [["q", "k", "v"], ["o"]]
        assert self.groups(captured.gm, share=False) == [["q"], ["k"], ["v"], ["o"]]

    @pytest.mark.parametrize("door", DOORS)
    def test_being_siblings_is_transitive(self, door: str) -> None:
        parts = {name: graphs.linear(seed=index) for index, name in enumerate("abc")}

        def forward(m: Any, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            return m.a(x) + m.b(x) + m.b(y) + m.c(y)

        captured = graphs.enter(door, Model(forward, **parts).eval(), graphs.rows(3, 64))
        assert self.groups(captured.gm) == [["a", "b", "c"]]

    def test_a_weight_of_several_call_sites_is_one_unit(self) -> None:
        gm = capture(ZOO["albert"].build(), ZOO["albert"].inputs())
        units = {unit.name: len(unit.calls) for unit in find_units(gm)}
        shared = [name for name in units if "albert_layer_groups" in name]
        assert len(shared) == 6
        assert {units[name] for name in shared} == {3}

    def test_a_matrix_that_is_also_read_transposed_is_two_units(self) -> None:
        model = Model(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=graphs.linear(64, 128)).eval()
        x = graphs.rows(3, 64)
        captured = graphs.enter("export", model, x)
        assert self.groups(captured.gm) == [["a"], ["a.transposed"]]
        InsertTransforms(graphs.config()).run(captured.gm)
        captured.gm.recompile()
        graphs.randomize(captured.gm)
        assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32

    def test_cross_attention_is_grouped_per_block(self) -> None:
        gm = capture(ZOO["t5"].build(), ZOO["t5"].inputs())
        cross = [group for group in self.groups(gm) if any("EncDecAttention.k" in name for name in group)]
        assert cross == [
            [f"decoder.block.{block}.layer.1.EncDecAttention.{name}" for name in "kv"] for block in range(2)
        ]
        assert Counter(map(len, self.groups(gm))) == {3: 4, 2: 2, 1: 17}


def test_two_models_with_parameters_of_one_name_stay_apart() -> None:
    """Dynamo names parameters from their module on: compiling two modules in one function gives equal names."""
    first, second = nn.Sequential(graphs.linear(64, 128)).eval(), nn.Sequential(graphs.linear(128, 64, seed=1)).eval()

    def both(x: Tensor) -> Tensor:
        return second(torch.tanh(first(x)))

    x = graphs.rows(3, 64)
    captured = graphs.enter("dynamo", both, x)
    assert [unit.name for unit in find_units(captured.gm)] == ["0", "0_"]
    prepare(captured.gm, graphs.config(mixed_group_size=True))
    assert [transform.group_size for transform in find_transforms(captured.gm)] == [64, 128]
    graphs.randomize(captured.gm)
    assert graphs.relative(captured(x), both(x).detach()) < EXACT_IN_FP32
    graphs.round_to_nearest(captured.gm)
    rounded = captured(x)
    convert(captured.gm)
    assert graphs.relative(captured(x), rounded) < EXACT_IN_FP32
    lower(captured.gm)
    assert graphs.relative(captured(x), rounded) < EXACT_IN_FP32
