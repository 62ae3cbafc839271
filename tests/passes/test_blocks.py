from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, Model
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO

from parofx.passes import capture
from parofx.passes.blocks import WHOLE_GRAPH, block_of, find_blocks, split_at_blocks
from parofx.passes.capture import complete_named
from parofx.passes.graph import LINEAR, nodes_calling


def blocks(model: Any, door: str = "export") -> tuple[str, ...]:
    return find_blocks(graphs.enter(door, model.eval(), graphs.rows(3, 64)).gm)


@pytest.mark.parametrize("door", DOORS)
def test_repeated_modules_of_one_class_are_blocks(door: str) -> None:
    model = Model(
        lambda m, x: m.head(m.stack(m.stem(x))), stem=graphs.linear(), stack=graphs.Stack(3), head=graphs.linear()
    )
    assert blocks(model, door) == tuple(f"stack.whatever.{index}" for index in range(3))


@pytest.mark.parametrize("door", DOORS)
def test_a_list_of_linears_is_no_list_of_blocks(door: str) -> None:
    assert blocks(nn.Sequential(graphs.linear(), graphs.linear(seed=1)), door) == ()


def test_of_nested_repetitions_the_outermost_counts() -> None:
    class Outer(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner, self.own = graphs.Stack(2, seed), graphs.linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.inner(x))

    assert blocks(nn.Sequential(Outer(0), Outer(5))) == ("0", "1")


def test_a_repetition_of_nothing_but_repetitions_is_taken_apart() -> None:
    model = Model(lambda m, x: m.decoder(m.encoder(x)), encoder=graphs.Stack(2), decoder=graphs.Stack(2, seed=5))
    assert blocks(model) == ("encoder.whatever.0", "encoder.whatever.1", "decoder.whatever.0", "decoder.whatever.1")


def test_blocks_are_in_the_order_they_first_run() -> None:
    layers = nn.ModuleList(graphs.Layer(seed) for seed in range(3))
    model = Model(lambda m, x: m.layers[1](m.layers[2](m.layers[0](m.layers[2](x)))), layers=layers)
    assert blocks(model) == ("layers.2", "layers.0", "layers.1")


@pytest.mark.parametrize("name", ["llama", "t5", "albert"])
def test_splitting_keeps_the_output(name: str) -> None:
    spec = ZOO[name]
    inputs = spec.inputs()
    gm = capture(spec.build(), inputs)
    found = find_blocks(gm)
    split = split_at_blocks(gm, found)
    parts = [node for node in split.graph.nodes if node.op == "call_module"]
    # What comes before the first block is a part of its own, and what comes behind the last one.
    assert len(parts) == (len(found) + 2 if found else 1)
    arguments = complete_named(gm.meta["parofx_inputs"][1], inputs)
    outputs = [pytree.tree_leaves(one)[0] for one in (gm(**arguments), split(*arguments.values()))]
    assert torch.equal(*outputs)


def test_nodes_outside_of_all_blocks_belong_to_the_whole_graph() -> None:
    model = Model(lambda m, x: m.head(m.stack(x)), stack=graphs.Stack(2), head=graphs.linear()).eval()
    gm = capture(model, graphs.rows(3, 64))
    *inside, head = nodes_calling(gm.graph, LINEAR)
    found = find_blocks(gm)
    assert block_of(head, found) == WHOLE_GRAPH
    assert [block_of(node, found) for node in inside] == [found[0]] * 3 + [found[1]] * 3
