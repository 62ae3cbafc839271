"""A compiled module stands for the module behind it, wherever a model is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import parofx
from parofx.errors import ConfigError
from parofx.unwrapping import plain_module

CONFIG = parofx.ParoConfig(group_size=32, calibration=parofx.CalibrationConfig(steps=1))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def test_a_module_is_itself_and_a_wrapper_the_module_behind_it() -> None:
    model = nn.Linear(2, 2)
    assert plain_module(model) is model
    assert plain_module(compiled(model)) is model


@pytest.mark.parametrize(
    "function",
    [
        parofx.quantize,
        parofx.plan_quantization,
        parofx.explain,
        parofx.dequantize,
        lambda model: parofx.save_pretrained(model, "nowhere"),
    ],
)
def test_what_is_no_module_is_refused(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got str; load it first"):
        function("path/to/model")


def test_a_compiled_model_goes_all_the_way(tmp_path: Path) -> None:
    model, inputs = tiny.model(), {"input_ids": torch.arange(8).view(2, 4)}
    fast = compiled(model)
    before = fast(**inputs).logits
    report = parofx.quantize(fast, CONFIG, progress=False)
    assert report.linears[0].name == "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.equal(expected, before)
        assert torch.equal(fast(**inputs).logits, expected)  # the wrapper saw the change
        parofx.save_pretrained(fast, tmp_path / "paro")
        assert torch.equal(parofx.load_pretrained(tmp_path / "paro")(**inputs).logits, expected)
    assert parofx.dequantize(fast) is model
    assert not any(isinstance(module, parofx.ParoLinear) for module in fast.modules())
