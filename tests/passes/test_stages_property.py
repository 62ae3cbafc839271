"""Every stage equals the one before, on random graphs through both doors and on models of the zoo."""

from __future__ import annotations

import copy

import graphs
import pytest
import torch
from graphs import DOORS, EXACT_IN_FP32, Captured, relative
from hypothesis import given, settings
from random_graphs import Program, RandomModel, programs
from torch import Tensor
from zoo import ZOO

from parofx.api import convert, lower, prepare
from parofx.passes import Stage, stage_of
from parofx.passes.graph import INT4_LINEAR, LINEAR, nodes_calling

#: Packing keeps codes and fp16 scales; biases are fp16 values already. What is left is the order of fp32 sums.
CONVERTED = 1e-5
LOWERED = 1e-4
#: The forward in fp64 against stages that compute in fp32.
INDEPENDENT = 1e-4


def check_stages(captured: Captured, *inputs: Tensor, expected: Tensor, **options: object) -> None:
    gm = captured.gm
    assert relative(captured(*inputs), expected) < EXACT_IN_FP32
    prepare(gm, graphs.config(**options))
    assert relative(captured(*inputs), expected) < EXACT_IN_FP32
    graphs.randomize(gm)
    assert relative(captured(*inputs), expected) < EXACT_IN_FP32
    graphs.round_to_nearest(gm)
    rounded = captured(*inputs)
    convert(gm)
    converted = captured(*inputs)
    assert relative(converted, rounded) < CONVERTED
    lower(gm)
    assert relative(captured(*inputs), converted) < LOWERED
    assert stage_of(gm) is Stage.LOWERED


@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=settings().max_examples // 5)
@given(program=programs())
def test_random_graphs(door: str, program: Program) -> None:
    model, x = RandomModel(program).eval(), graphs.rows(2, 3, program.width)
    check_stages(graphs.enter(door, model, x), x, expected=graphs.eager(model, x))


@settings(max_examples=settings().max_examples // 8)
@given(program=programs())
def test_random_graphs_equal_an_independent_forward_of_the_dequantized_weights(program: Program) -> None:
    model, x = RandomModel(program).eval(), graphs.rows(2, 3, program.width)
    captured = graphs.enter("export", model, x)
    names = graphs.unit_parameters(captured.gm)
    prepare(captured.gm, graphs.config(share_siblings=False, mixed_group_size=True))
    graphs.randomize(captured.gm)
    graphs.round_to_nearest(captured.gm)
    convert(captured.gm)
    reference = copy.deepcopy(model).double()
    weights = graphs.dequantized_weights(captured.gm)
    assert set(weights) <= set(names)  # conversion drops linears whose result nothing reads
    for name, weight in weights.items():
        parameter, transposed = names[name]
        reference.get_parameter(parameter).data = weight.t().contiguous() if transposed else weight
    with torch.no_grad():
        expected = reference(x.double())
    assert relative(captured(x), expected) < INDEPENDENT
    lower(captured.gm)
    assert relative(captured(x), expected) < INDEPENDENT


@pytest.mark.parametrize("name", ["llama", "albert"])
def test_zoo(name: str) -> None:
    spec = ZOO[name]
    model = spec.build()
    inputs = spec.inputs()
    captured = graphs.enter("export", _Main(model), *inputs.values())
    check_stages(captured, *inputs.values(), expected=graphs.eager(_Main(model), *inputs.values()))
    assert not nodes_calling(captured.gm.graph, INT4_LINEAR)
    kept = sum(spec.kept.values())
    assert len(nodes_calling(captured.gm.graph, LINEAR)) == kept


class _Main(torch.nn.Module):
    """A model by positional token ids, returning its main output only."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).to_tuple()[0]
