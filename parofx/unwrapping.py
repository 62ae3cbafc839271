"""The module behind what a caller gives as a model."""

from __future__ import annotations

import sys

from torch import nn

from parofx.errors import ConfigError


def plain_module(model: object) -> nn.Module:
    """Return a model as it is, or the module that `torch.compile` made it from.

    A compiled module is a wrapper: its names begin with `_orig_mod.`, and it has neither the class nor the signature of
    the model. What is done in place to the module reaches the wrapper, which compiles anew.

    Raises:
        ConfigError: if it is no module, such as the path of one.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; load it first, for example with "
            "AutoModelForCausalLM.from_pretrained"
        )
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # whoever holds a compiled module has imported it
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        module: nn.Module = model._orig_mod
        return module
    return model
