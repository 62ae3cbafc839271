import copy

import pytest
import torch
from rounded import round_model
from torch import nn

import parofx
from parofx import CalibrationConfig, FloatReason, ParoConfig, kept_float


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.body = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)

    def forward(self, x):
        return self.last(self.body(self.norm(x)))


def quantized():
    torch.manual_seed(0)
    model = Model().eval()
    config = ParoConfig(modules_to_not_convert=("last",), calibration=CalibrationConfig(steps=0))
    parofx.quantize(model, config, example_inputs=torch.randn(3, 64), progress=False)
    return model


def marked(model):
    return [name for name, module in model.named_modules() if hasattr(module, kept_float.MARK)]


def test_quantize_marks_what_it_left_float_and_dequantize_unmarks_it(tmp_path):
    model = quantized()
    assert marked(model) == ["last"]
    assert marked(copy.deepcopy(model)) == ["last"]
    assert not any(kept_float.MARK in key for key in model.state_dict())
    parofx.save_pretrained(model, tmp_path / "checkpoint")
    assert marked(parofx.load_pretrained(tmp_path / "checkpoint", model=Model().eval())) == ["last"]
    assert marked(parofx.dequantize(model)) == []


def test_a_quantized_model_keeps_float_what_is_marked_or_inside_it():
    model, alone = quantized(), nn.Linear(64, 64)
    weights = {0: model.last.weight, 1: model.last.weight, 2: alone.weight, 3: alone.weight}
    modules = {0: [model.last], 1: [model.last, model], 2: [alone], 3: [alone, model]}
    left = FloatReason.LEFT_FLOAT
    assert kept_float.float_reasons(weights, modules) == {0: left, 1: left, 3: left}
    kept_float.unmark(model)
    assert kept_float.float_reasons(weights, modules) == {1: left, 3: left}


def test_the_output_head_is_what_a_module_on_the_way_names():
    class Named(Model):
        def get_output_embeddings(self):
            return self.last

    model = Named()
    weights = {0: model.last.weight, 1: model.body.weight}
    modules = {0: [model.last, model], 1: [model.body, model]}
    assert kept_float.float_reasons(weights, modules) == {0: FloatReason.OUTPUT_HEAD}


def _raises(error):
    def get_output_embeddings(self):
        raise error

    return get_output_embeddings


@pytest.mark.parametrize("get", [lambda self: None, _raises(NotImplementedError()), _raises(AttributeError("lm_head"))])
def test_a_module_may_have_no_output_head(get):
    model = type("Headless", (Model,), {"get_output_embeddings": get})()
    assert kept_float.output_head(model) is None
    assert kept_float.output_head(Model()) is None
    assert kept_float.float_reasons({0: model.last.weight}, {0: [model.last, model]}) == {}


def test_embedding_tables_stand_in_for_those_of_the_tree():
    model = nn.ModuleDict({"a": nn.Embedding(40, 8), "b": nn.Embedding(40, 8), "c": nn.Sequential(nn.Embedding(9, 8))})
    tables = kept_float.embedding_tables([model, model["c"]])
    assert [tuple(table.shape) for table in tables] == [(40, 8), (9, 8)]
    assert all(table.is_meta for table in tables)
    model.get_output_embeddings = lambda: None
    assert kept_float.embedding_tables([model]) == ()


def test_models_made_without_quantize_are_told_by_their_linears():
    model = Model()
    last = model.last
    round_model(model)
    model.last = last
    assert kept_float.float_reasons({0: last.weight}, {0: [last, model]}) == {0: FloatReason.LEFT_FLOAT}
