from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, EXACT_IN_FP32, Captured, Model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parofx.errors import PassError
from parofx.passes import Convert, InsertTransforms, Lower, MergeSiblings, Stage, census, stage_of
from parofx.passes.graph import (
    FAKE_QUANTIZE,
    INT4_LINEAR,
    LINEAR,
    binding,
    bits_of,
    get_attribute,
    module_stack,
    nodes_calling,
)
from parofx.passes.transforms import find_transforms
from parofx.pipeline import Pipeline


def calibrated(model: Any, *inputs: Tensor, door: str = "export", bits: Mapping[str, int] | None = None) -> Captured:
    captured = graphs.enter(door, model.eval(), *inputs)
    InsertTransforms(graphs.config()).run(captured.gm)
    graphs.set_bits(captured.gm, bits or {})
    graphs.randomize(captured.gm)
    graphs.round_to_nearest(captured.gm)
    captured.gm.recompile()
    return captured


def check(captured: Captured, *inputs: Tensor, calls: int) -> None:
    before, output = census(captured.gm), captured(*inputs)
    report = Convert().run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert report.changed == calls
    assert stage_of(captured.gm) is Stage.CONVERTED
    after = census(captured.gm)
    assert after[str(INT4_LINEAR)] == calls
    assert after[str(LINEAR)] == before[str(LINEAR)] - calls
    assert after[str(FAKE_QUANTIZE)] == after["aten.reciprocal.default"] == 0
    assert graphs.relative(captured(*inputs), output) < EXACT_IN_FP32
    assert Convert().run(captured.gm).changed == 0


@pytest.mark.parametrize("door", DOORS)
def test_the_output_is_the_fake_quantized_one(door: str) -> None:
    x = graphs.rows(3, 64)
    captured = calibrated(graphs.Stack(2), x, door=door)
    shapes = [str(node.meta["val"].shape) for node in nodes_calling(captured.gm.graph, LINEAR)]
    check(captured, x, calls=6)
    nodes = nodes_calling(captured.gm.graph, INT4_LINEAR)
    assert [str(node.meta["val"].shape) for node in nodes] == shapes
    assert all("stack_trace" in node.meta and module_stack(node) for node in nodes)


def test_each_linear_has_the_width_its_fake_quantize_says() -> None:
    x = graphs.rows(3, 64)
    captured = calibrated(graphs.Stack(1), x, bits={"gate": 3, "down": 8})
    check(captured, x, calls=3)
    nodes = nodes_calling(captured.gm.graph, INT4_LINEAR)
    assert [bits_of(node) for node in nodes] == [3, 4, 8]
    assert [len(node.args) for node in nodes] == [7, 6, 7], "a graph does not state what is the default"
    assert [get_attribute(captured.gm, node.args[1].target).shape[1] for node in nodes] == [12, 16, 16]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bits", [{}, {"gate": 3, "up": 3}])
def test_corrections_become_arguments_of_one_operator(door: str, bits: Mapping[str, int]) -> None:
    x = graphs.rows(3, 64)
    captured = calibrated(graphs.Stack(1), x, door=door, bits=bits)
    plain = captured(x)
    graphs.compensate(captured.gm, {"gate": 2, "up": 5})
    captured.gm.recompile()
    corrected = captured(x)
    assert graphs.relative(corrected, plain) > 1e-2
    check(captured, x, calls=3)
    gate, up, down = nodes_calling(captured.gm.graph, INT4_LINEAR)
    assert [len(node.args) for node in (gate, up, down)] == [9, 9, 6]
    names = [str(node.target).rpartition(".")[2] for node in gate.args[-2:]]
    assert names == ["compensation_down", "compensation_up"]
    shapes = [tuple(node.meta["val"].shape) for node in (*gate.args[-2:], *up.args[-2:])]
    assert shapes == [(2, 64), (2, 128), (5, 64), (5, 128)]
    for provider, ours in ((None, "parofx_cpu"), ("reference", "parofx.reference")):
        gm = graphs.copy_of(captured.gm)
        Pipeline([MergeSiblings(), Lower(provider=provider)]).run(gm)
        names = [name for name in census(gm) if "getitem" not in name]
        products = [name for name in names if "mm" in name or "linear" in name or "siblings" in name]
        assert products, names
        assert all(name.startswith(ours) for name in products), names
        assert sum(census(gm)[name] for name in products) == 2, "one call for the siblings, one behind them"
        with torch.no_grad():
            output = gm(*captured.arguments(x))
        assert graphs.relative(output[0] if isinstance(output, tuple) else output, corrected) < EXACT_IN_FP32


def test_a_correction_that_fp16_cannot_hold_is_refused() -> None:
    captured = calibrated(graphs.Stack(1), graphs.rows(3, 64))
    graphs.compensate(captured.gm, {"down": 1}, scale=1e6)
    with pytest.raises(PassError, match=r"0\.down cannot be converted: its low-rank correction must be finite"):
        Convert().run(captured.gm)


def test_no_float_weight_is_left_in_the_graph() -> None:
    captured = calibrated(graphs.Stack(1), graphs.rows(3, 64))
    check(captured, graphs.rows(3, 64), calls=3)
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in captured.gm.state_dict().items()}
    assert dtypes.pop("weight") == torch.float32  # the norm's
    assert dtypes == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "pairs": torch.int16,
        "theta": torch.float16,
        "channel_scales": torch.float16,
        "bias": torch.float16,
    }
    names = {name for name in captured.gm.state_dict() if ".gate." in name}
    assert names == {f"whatever.0.gate.{name}" for name in dtypes}


@pytest.mark.parametrize("door", DOORS)
def test_calls_of_one_weight_in_any_order(door: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return m.a(x) + m.b(y) + m.b(x) + m.a(2 * x)

    model, x = Model(forward, a=graphs.linear(), b=graphs.linear(seed=1)), graphs.rows(3, 64)
    captured = calibrated(model, x, door=door)
    check(captured, x, calls=4)
    assert len({node.args[1] for node in nodes_calling(captured.gm.graph, INT4_LINEAR)}) == 2


@pytest.mark.parametrize("door", DOORS)
def test_biases(door: str) -> None:
    """None, a parameter, two for one weight, one that another node reads, a computed one."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.linear(x, m.w, m.b) + F.linear(x, m.w, m.c) + F.linear(x, m.w)
        return y + F.linear(y, m.v, m.b * 2) + m.c

    parts = {"w": graphs.matrix(64, 64), "v": graphs.matrix(64, 64, seed=3)}
    model = Model(forward, **parts, b=graphs.vector(64), c=graphs.vector(64, seed=5))
    x = graphs.rows(3, 64)
    captured = calibrated(model, x, door=door)
    check(captured, x, calls=4)


def test_a_bias_that_others_read_keeps_its_precision() -> None:
    exact = torch.full((64,), 1 / 3)

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.w, m.b), m.b + 0

    captured = calibrated(Model(forward, w=graphs.matrix(64, 64), b=nn.Parameter(exact)), graphs.rows(3, 64))
    Convert().run(captured.gm)
    captured.gm.recompile()
    _, other = captured.gm(graphs.rows(3, 64))
    assert torch.equal(other, exact)
    (node,) = nodes_calling(captured.gm.graph, INT4_LINEAR)
    assert get_attribute(captured.gm, node.args[4].target).dtype == torch.float16


@pytest.mark.parametrize("door", DOORS)
def test_a_weight_stored_by_rows_of_inputs(door: str) -> None:
    x = graphs.rows(2, 3, 64)
    check(calibrated(Model(lambda m, x: m.inner(x), inner=Conv1D(32, 64)), x, door=door), x, calls=1)


def test_the_models_own_tensors_stay() -> None:
    model = graphs.Stack(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Convert().run(calibrated(model, graphs.rows(3, 64)).gm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_kept_is_packed_once() -> None:
    model = graphs.linear()
    first, second = (calibrated(model, graphs.rows(3, 64)) for _ in range(2))
    grid = find_transforms(first.gm)[0].linears[0].grid(first.gm)
    find_transforms(second.gm)[0].linears[0].set_grid(second.gm, *grid)
    packed = []
    for captured in (first, second):
        Convert(reuse=True).run(captured.gm)
        (node,) = nodes_calling(captured.gm.graph, INT4_LINEAR)
        packed.append(binding(node.args[1]).tensor)
    assert packed[0] is packed[1]


def test_a_linear_without_grid_is_refused() -> None:
    gm = graphs.enter("export", graphs.linear(), graphs.rows(3, 64)).gm
    InsertTransforms(graphs.config()).run(gm)
    with pytest.raises(PassError, match="weight cannot be converted: its grid is empty; run calibrate first"):
        Convert().run(gm)


@pytest.mark.parametrize("wrong", ["scales", "zeros"])
def test_a_grid_that_cannot_be_stored_is_refused(wrong: str) -> None:
    gm = calibrated(graphs.linear(), graphs.rows(3, 64)).gm
    linear = find_transforms(gm)[0].linears[0]
    scales, zeros = linear.grid(gm)
    linear.set_grid(gm, *((scales * 1.0001, zeros) if wrong == "scales" else (scales, zeros + 0.5)))
    with pytest.raises(PassError, match="its scales must be fp16 values and its zeros integers"):
        Convert().run(gm)


def test_a_bias_beyond_fp16_is_refused() -> None:
    module = graphs.linear()
    module.bias.data[3] = 1e5
    gm = calibrated(module, graphs.rows(3, 64)).gm
    with pytest.raises(
        PassError, match=r"the bias of weight must fit fp16 .* 1e\+05; add it to modules_to_not_convert"
    ):
        Convert().run(gm)
