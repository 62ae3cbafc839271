"""int8 activations of a model that runs outside of compiled graphs."""

import copy
import pickle

import pytest
import torch
from fp64 import relative_error
from libraries import needs_library
from test_nn_layout import GROUP, N, reference, same, some_input, some_linear
from torch import nn

import parofx
from parofx.cpu_ops.packed_linear import CpuLayout
from parofx.errors import ConfigError, LoweringError

pytestmark = needs_library
#: Half a step of a 127th of a group's largest value, over many channels.
INT8 = 2e-2


def model_of(activations: str) -> nn.Module:
    model = nn.Sequential(some_linear(), nn.GELU(), nn.Linear(N, 8)).requires_grad_(False)
    parofx.set_eager_activations(model, activations)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,)])
def test_activations_are_quantized(dtype, shape):
    linear, x = some_linear(), some_input(*shape).to(dtype)
    parofx.set_eager_activations(linear, "int8")
    result = linear(x)
    rotation, weight, scales, zeros = (linear.get_buffer(f"cpu_{n}") for n in ("rotation", "weight", "scales", "zeros"))
    expected = torch.ops.parofx_cpu.rotate_linear(x, rotation, weight, scales, zeros, linear.bias, 4, GROUP, 1)
    assert torch.equal(result, expected)
    if result.numel():
        assert 1e-4 < relative_error(result, reference(linear.state_dict(), x.float())) < INT8


def test_float_undoes_it():
    model, plain, x = model_of("int8"), model_of("float"), some_input()
    assert not torch.equal(model(x), plain(x))
    parofx.set_eager_activations(model, "float")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.requires_grad_(False).to(torch.float64).float(),
        lambda model: (model.load_state_dict(model.state_dict()), model)[1],
        lambda model: (model[0].unpack_(), model)[1],
    ],
    ids=["deepcopy", "pickle", "to", "load_state_dict", "unpack_"],
)
def test_it_goes_along(change):
    model, x = model_of("int8"), some_input()
    expected = model(x)
    changed = change(model)
    assert changed[0].eager_activations == "int8"
    assert torch.equal(changed(x), expected)


def test_the_state_dict_does_not_hold_it():
    assert same(model_of("int8")[0].state_dict(), model_of("float")[0].state_dict())


def test_autocast_casts_first():
    model, x = model_of("int8"), some_input()
    with torch.autocast("cpu", torch.bfloat16):
        result = model[0](x)
    assert torch.equal(result, model[0](x.bfloat16()))


def test_graphs_do_not_follow_it():
    model, plain, x = model_of("int8"), model_of("float"), some_input()
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), plain(x))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), plain(x))


def test_an_input_that_requires_a_gradient_is_refused():
    model, x = model_of("int8"), some_input().requires_grad_()
    with pytest.raises(LoweringError, match=r"no gradient.*under torch.no_grad\(\)"):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x), model(x.detach()))


def test_an_input_that_the_kernels_do_not_take_is_refused():
    linear = model_of("int8")[0]
    with pytest.raises(LoweringError, match=r"from one of .*: got torch.float64 on cpu; convert the input"):
        linear(some_input().double())


def test_a_value_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"activations must be one of \('float', 'int8'\), got 'int4'"):
        parofx.set_eager_activations(some_linear(), "int4")


def test_a_float_model_is_refused():
    with pytest.raises(ConfigError, match=r"Linear holds no ParoLinear; call parofx\.quantize first"):
        parofx.set_eager_activations(nn.Linear(2, 2), "int8")


def test_without_kernels_it_is_refused_and_nothing_changes(monkeypatch):
    set_before = model_of("int8")
    monkeypatch.setattr(CpuLayout, "why_not", lambda *_: "no kernels")
    model = nn.ModuleDict({"one": some_linear()})
    with pytest.raises(LoweringError, match=r"int8 activations need the CPU kernels(.|\n)*- one: group_size 32 on cpu"):
        parofx.set_eager_activations(model, "int8")
    assert model["one"].eager_activations == "float"
    with pytest.raises(LoweringError, match="activations need kernels, and there are none for group_size 32 on cpu"):
        set_before(some_input())
    parofx.set_eager_activations(set_before, "float")
    set_before(some_input())
