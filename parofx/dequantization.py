"""Back to float: `ParoLinear`s become ordinary linears with the weights they multiply by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from parofx import integrations, kept_float
from parofx.checks import check_float_dtype
from parofx.nn import ParoLinear
from parofx.unwrapping import plain_module


def dequantize(model: nn.Module, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `ParoLinear` by a float linear, in place, and forget the quantization configuration.

    The weights are in the unrotated space: only the rounding remains of the quantization.

    Args:
        model: any module; a transformers model gets the linear class its architecture has (`Conv1D` in GPT-2).
        dtype: of the new weights; by default that of the model's first floating parameter, else fp32.

    Returns:
        The model; for a `ParoLinear` itself, the new linear.

    Raises:
        ConfigError: if `dtype` holds no float weights.
    """
    dtype = check_float_dtype(dtype)
    model = plain_module(model)
    if integrations.is_transformers_model(model):
        from parofx.integrations import transformers

        return transformers.dequantize(model, dtype)
    return replace_by_float(model, dtype, lambda name, linear, dtype: float_linear(linear, dtype))


def replace_by_float(
    model: nn.Module, dtype: torch.dtype | None, make: Callable[[str, ParoLinear, torch.dtype], nn.Module]
) -> nn.Module:
    """Replace every `ParoLinear` by `make(name, linear, dtype)`; one that is shared stays shared."""
    if dtype is None:
        dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        dtype = next(dtypes, torch.float32)
    if isinstance(model, ParoLinear):
        return make("", model, dtype)
    made: dict[ParoLinear, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ParoLinear):
            if module not in made:
                made[module] = make(name, module, dtype).train(module.training)
            model.set_submodule(name, made[module])
    kept_float.unmark(model)
    return model


def float_linear(linear: ParoLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the `nn.Linear` that computes what `linear` does."""
    result = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    result.weight = nn.Parameter(linear.dequantized_weight(dtype), requires_grad=False)
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
    return result
