from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, Model
from torch import Tensor
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D

from parofx.calibration.fitting import FittedTransform
from parofx.passes import Convert, InsertTransforms
from parofx.passes.calibrate import reports_of
from parofx.passes.transforms import Transform, find_transforms


def prepared(model: Any, *inputs: Tensor, door: str = "export", **options: Any) -> GraphModule:
    gm = graphs.enter(door, model.eval(), *inputs).gm
    InsertTransforms(graphs.config(**options)).run(gm)
    gm.recompile()
    return gm


def only(gm: GraphModule) -> Transform:
    (transform,) = find_transforms(gm)
    return transform


def test_transforms_are_read_off_the_graph_in_the_order_of_their_blocks() -> None:
    transforms = find_transforms(prepared(graphs.Stack(2), graphs.rows(3, 64), krot=3))
    layers = [f"whatever.{index}" for index in range(2)]
    assert [(one.name, one.block) for one in transforms] == [
        (f"{layer}.{name}", layer) for layer in layers for name in ("gate", "down")
    ]
    first = transforms[0]
    assert [one.name for one in first.linears] == ["whatever.0.gate", "whatever.0.up"]
    assert (first.group_size, first.linears[0].bits, len(first.inputs)) == (64, 4, 1)


def test_the_start_is_the_identity() -> None:
    gm = prepared(graphs.Stack(1), graphs.rows(3, 64), krot=3)
    transform = find_transforms(gm)[0]
    pairs, theta, channel_scales = transform.parameters(gm)
    assert (pairs.dtype, pairs.shape, transform.krot(gm)) == (torch.int16, (3, 64), 3)
    assert torch.equal(theta, torch.zeros(3, 32))
    assert torch.equal(channel_scales, torch.ones(1, 64))
    scales, zeros = transform.linears[0].grid(gm)
    assert scales.numel() == zeros.numel() == 0


@pytest.mark.parametrize("door", DOORS)
def test_the_weight_is_a_view_of_the_models_own(door: str) -> None:
    conv = Conv1D(32, 64)
    gm = prepared(Model(lambda m, x: m.inner(x), inner=conv), graphs.rows(3, 64), door=door)
    (linear,) = only(gm).linears
    assert linear.parameter.data_ptr() == linear.weight.data_ptr() == conv.weight.data_ptr()
    assert linear.weight.shape == (32, 64)
    assert not linear.weight.requires_grad


def test_calls_are_in_the_graphs_order() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return m.a(x) + m.b(y) + m.b(x)

    gm = prepared(Model(forward, a=graphs.linear(), b=graphs.linear(seed=1)), graphs.rows(3, 64))
    order = list(gm.graph.nodes)
    calls = only(gm).linears[1].calls
    assert len(calls) == 2
    assert order.index(calls[0]) < order.index(calls[1])


def test_what_calibration_found_is_put_into_the_graph_and_noted() -> None:
    gm = prepared(graphs.linear(), graphs.rows(3, 64), krot=2)
    transform = only(gm)
    pairs, theta, _ = transform.parameters(gm)
    grid = (torch.full((64, 1), 0.5), torch.full((64, 1), 3.0))
    scales = torch.full((1, 64), 2.0).half()
    fitted = FittedTransform(pairs.flip(1), (theta + 1).half(), scales, (grid,), (0.25,), 2.0, 1.0)
    report = transform.apply(gm, fitted)
    assert reports_of(gm) == (report,)
    assert (report.name, report.members, report.block) == ("weight", ("weight",), "")
    assert (report.loss_before, report.loss_after, report.angle_rms) == (2.0, 1.0, 1.0)
    assert gm.meta["parofx_relative_errors"] == {"weight": 0.25}
    found = only(gm)
    assert torch.equal(found.parameters(gm)[0], pairs.flip(1))
    assert [one.dtype for one in found.parameters(gm)[1:]] == [torch.float32, torch.float32]
    assert all(map(torch.equal, found.linears[0].grid(gm), grid))
    node = found.linears[0].fake_quantize.args[1]
    assert node.meta["val"] is grid[0]


def test_a_converted_graph_has_transforms_without_float_weights() -> None:
    gm = prepared(graphs.Stack(1), graphs.rows(3, 64))
    graphs.round_to_nearest(gm)
    Convert().run(gm)
    assert [one.linears for one in find_transforms(gm)] == [[], []]
