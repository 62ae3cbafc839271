from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, EXACT_IN_FP32, Model
from torch import Tensor, nn
from torch.fx import Graph, Node

from parofx.api import convert, lower, prepare
from parofx.passes import Normalize
from parofx.passes.graph import LINEAR, nodes_calling
from parofx.passes.mutation import written_inputs


def through_a_view(x: Tensor) -> None:
    x.view(-1)[1:].mul_(2)


def by_slice(x: Tensor) -> None:
    x[0] = 0.0


def with_out(x: Tensor) -> None:
    torch.neg(x, out=x)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add_(1.0),
    "function": torch.relu_,
    "in place by keyword": lambda x: F.relu(x, inplace=True),
    "in place by position": lambda x: F.elu(x, 1.0, True),
    "copy": lambda x: x.copy_(x.flip(0)),
    "slice": by_slice,
    "view": through_a_view,
    "out": with_out,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("write", WRITES)
def test_linears_before_and_behind_a_write_are_no_siblings(door: str, write: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.clone()
        first = m.a(x)
        WRITES[write](x)
        return first + m.b(x) + m.a(x)

    model, x = Model(forward, a=graphs.linear(seed=1), b=graphs.linear(seed=2)).eval(), graphs.rows(4, 64)
    captured = graphs.enter(door, model, x)
    expected = graphs.eager(model, x)
    assert graphs.relative(captured(x), expected) < EXACT_IN_FP32
    first, *behind = (node.args[0] for node in nodes_calling(captured.gm.graph, LINEAR))
    assert first not in behind
    assert behind[0] is behind[1]
    assert Normalize().run(captured.gm).changed == 0
    prepare(captured.gm, graphs.config())
    graphs.randomize(captured.gm)
    assert graphs.relative(captured(x), expected) < EXACT_IN_FP32
    graphs.round_to_nearest(captured.gm)
    convert(captured.gm)
    converted = captured(x)
    lower(captured.gm)
    assert graphs.relative(captured(x), converted) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_a_write_to_something_else_separates_nothing(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = m.a(x)
        other = torch.zeros_like(first)
        other.add_(first)
        return other + m.b(x)

    model, x = Model(forward, a=graphs.linear(seed=1), b=graphs.linear(seed=2)).eval(), graphs.rows(4, 64)
    captured = graphs.enter(door, model, x)
    first, second = nodes_calling(captured.gm.graph, LINEAR)
    assert first.args[0] is second.args[0]


@pytest.mark.parametrize("door", DOORS)
def test_in_place_activations_of_a_sequential(door: str) -> None:
    model = nn.Sequential(graphs.linear(), nn.ReLU(inplace=True), graphs.linear(seed=3), nn.ELU(inplace=True)).eval()
    captured, x = graphs.enter(door, model, graphs.rows(4, 64)), graphs.rows(4, 64)
    assert graphs.relative(captured(x), graphs.eager(model, x)) < EXACT_IN_FP32


def call(kind: str, target: Any, *args: Any, **kwargs: Any) -> tuple[Node, Node]:
    graph = Graph()
    x = graph.placeholder("x")
    filled = tuple(x if arg == "x" else arg for arg in args)
    named = {key: x if value == "x" else value for key, value in kwargs.items()}
    return x, graph.create_node(kind, target, filled, named)


@pytest.mark.parametrize(
    ("kind", "target", "args", "kwargs"),
    [
        ("call_method", "add_", ("x", 1.0), {}),
        ("call_method", "__iadd__", ("x", 1.0), {}),
        ("call_function", operator.iadd, ("x", 1.0), {}),
        ("call_function", operator.setitem, ("x", 0, 1.0), {}),
        ("call_function", torch.ops.aten.add_.Tensor, ("x", 1.0), {}),
        ("call_function", torch.ops.aten.add_.Tensor, (), {"self": "x", "other": 1.0}),
        ("call_function", torch._foreach_add_, (["x"], 1.0), {}),
        ("call_function", torch.neg, (1.0,), {"out": "x"}),
        ("call_function", F.hardtanh, ("x", -1.0, 1.0, True), {}),
        ("call_function", F.silu, (), {"input": "x", "inplace": True}),
    ],
)
def test_written_inputs(kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    args = tuple([x if x != ["x"] else "list" for x in args])
    x, node = call(kind, target, *args, **kwargs)
    if "list" in args:
        node.update_arg(0, [x])
    assert written_inputs(node) == [x]


@pytest.mark.parametrize(
    ("kind", "target", "args"),
    [
        ("call_method", "add", ("x", 1.0)),
        ("call_method", "__add__", ("x", 1.0)),
        ("call_function", operator.and_, ("x", 1)),
        ("call_function", operator.add, ("x", 1.0)),
        ("call_function", torch.ops.aten.add.Tensor, ("x", 1.0)),
        ("call_function", F.relu, ("x",)),
        ("call_function", F.hardtanh, ("x", -1.0, 1.0)),
    ],
)
def test_nothing_is_written(kind: str, target: Any, args: tuple[Any, ...]) -> None:
    _, node = call(kind, target, *args)
    assert written_inputs(node) == []
