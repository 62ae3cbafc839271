"""An independent forward of quantized models: the float architecture in fp64 with weights dequantized by NumPy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy_writer
import torch
from torch import Tensor, nn

from parofx import ParoLinear


def reference_model(model: nn.Module, quantized: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return `model` in fp64 with the weights that `quantized` multiplies by; what is float is rounded to `dtype`."""
    reference = in_double(copy.deepcopy(model).to(dtype))
    for name, module in quantized.named_modules(remove_duplicate=False):
        if not isinstance(module, ParoLinear):
            continue
        arrays = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
        weight = torch.from_numpy(numpy_writer.dense_weight(arrays))
        linear = reference.get_submodule(name)
        # The other kind of linear, `Conv1D`, holds its weight (K, N).
        linear.weight.data = weight if isinstance(linear, nn.Linear) else weight.t().contiguous()
        if "bias" in arrays:
            linear.bias.data = torch.from_numpy(arrays["bias"]).double()
    return reference


def in_double(model: nn.Module) -> nn.Module:
    """Cast to fp64; the grouped product of expert models knows no fp64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs with floating tensors in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the main output of a model or of its graph."""
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    found = output.get("logits")
    result: Tensor = output["last_hidden_state"] if found is None else found
    return result


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return `‖value − expected‖ / ‖expected‖`, computed in fp64."""
    assert value.shape == expected.shape
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())
