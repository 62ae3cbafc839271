"""What an unused node leaves behind: nothing, unless it writes to a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from parofx.passes.graph import erase_unused

WRITES: dict[str, Callable[[Graph, Any], Any]] = {
    "method": lambda graph, x: graph.call_method("fill_", (x, 7.0)),
    "function": lambda graph, x: graph.call_function(torch.relu_, (x,)),
    "inplace": lambda graph, x: graph.call_function(torch.nn.functional.relu, (x,), {"inplace": True}),
    "out": lambda graph, x: graph.call_function(torch.neg, (x,), {"out": x}),
    "operator": lambda graph, x: graph.call_function(operator.iadd, (x, 1.0)),
    "setitem": lambda graph, x: graph.call_function(operator.setitem, (x, 0, 7.0)),
    "aten": lambda graph, x: graph.call_function(torch.ops.aten.add_.Tensor, (x, 1.0)),
    "dunder": lambda graph, x: graph.call_method("__imul__", (x, 3.0)),
}
PURE: dict[str, Callable[[Graph, Any], Any]] = {
    "method": lambda graph, x: graph.call_method("t", (x,)),
    "function": lambda graph, x: graph.call_function(torch.nn.functional.relu, (x,), {"inplace": False}),
    "operator": lambda graph, x: graph.call_function(operator.add, (x, 1.0)),
    "dunder": lambda graph, x: graph.call_method("__add__", (x, 1.0)),
}


def build(node: Callable[[Graph, Any], Any]) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    node(graph, x)
    graph.output(x)
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("kind", WRITES)
def test_a_write_stays_though_nothing_uses_its_result(kind: str) -> None:
    gm = build(WRITES[kind])
    before: Tensor = gm(torch.tensor([[-1.0, 2.0]]))
    erase_unused(gm.graph)
    gm.recompile()
    assert len(gm.graph.nodes) == 3
    assert torch.equal(gm(torch.tensor([[-1.0, 2.0]])), before)
    assert not torch.equal(before, torch.tensor([[-1.0, 2.0]]))


@pytest.mark.parametrize("kind", PURE)
def test_what_writes_nothing_goes(kind: str) -> None:
    gm = build(PURE[kind])
    erase_unused(gm.graph)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "output"]
