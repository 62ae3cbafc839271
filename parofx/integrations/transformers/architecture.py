"""Back to the float linears that a transformers architecture has."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from parofx.dequantization import float_linear, replace_by_float
from parofx.nn import ParoLinear


def replace_by_architecture(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Replace every `ParoLinear` by the linear class that the model's own architecture has in its place."""
    with torch.device("meta"):
        architecture = type(model)(copy.deepcopy(model.config))

    def make(name: str, linear: ParoLinear, dtype: torch.dtype) -> nn.Module:
        result = float_linear(linear, dtype)
        return _as_conv1d(result) if isinstance(architecture.get_submodule(name), Conv1D) else result

    return replace_by_float(model, dtype, make)


def _as_conv1d(linear: nn.Linear) -> nn.Module:
    with torch.device("meta"):
        result = Conv1D(linear.out_features, linear.in_features)
    result.weight = nn.Parameter(linear.weight.data.t().contiguous(), requires_grad=False)
    result.bias = linear.bias
    module: nn.Module = result
    return module
