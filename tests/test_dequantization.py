import pytest
import torch
from rounded import random_rotation, round_linear, round_model
from torch import nn

from parofx.dequantization import dequantize
from parofx.errors import ConfigError
from parofx.nn import ParoLinear

#: The weight is rounded once to its dtype; K = 64 products are summed in it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_weights_are_those_the_layer_multiplies_by(dtype):
    torch.manual_seed(0)
    model = round_model(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False)), 16)
    x = torch.randn(7, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model.double()(x)
        result = dequantize(model, dtype=dtype)
        got = result.to(dtype)(x.to(dtype))
    assert result is model
    assert [type(module) for module in model] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    assert not model[0].training
    assert model[2].bias is None
    assert (got.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_dtype_follows_the_model():
    model = round_model(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32)), 16).to(torch.bfloat16)
    assert dequantize(model)[0].weight.dtype == torch.bfloat16
    only = round_model(nn.Sequential(nn.Linear(64, 32)), 16)
    assert dequantize(only)[0].weight.dtype == torch.float32


def test_shared_linears_stay_shared():
    linear = round_linear(torch.randn(32, 32), None, random_rotation(32, 16, 2, seed=0), 16)
    model = dequantize(nn.ModuleList([linear, nn.Sequential(linear)]))
    assert isinstance(model[0], nn.Linear)
    assert model[0] is model[1][0]


def test_a_single_linear_and_a_float_model():
    linear = round_linear(torch.randn(32, 32), torch.randn(32), random_rotation(32, 16, 2, seed=0), 16)
    assert isinstance(dequantize(linear), nn.Linear)
    model = nn.Sequential(nn.Linear(4, 4))
    assert dequantize(model) is model


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "int8"], ids=str)
def test_a_dtype_that_holds_no_weights_is_refused_before_anything_changes(dtype):
    model = round_model(nn.Sequential(nn.Linear(64, 32)), 16)
    with pytest.raises(ConfigError, match=r"dtype must be one of torch\.float16, .*, got .*8"):
        dequantize(model, dtype=dtype)
    assert isinstance(model[0], ParoLinear)
