"""What a quantized model does where no compiler takes options for it."""

from __future__ import annotations

from torch import nn

from parofx import kernel_layouts
from parofx.config import ACTIVATIONS, Activations
from parofx.errors import ConfigError, LoweringError, one_per_line
from parofx.nn import ParoLinear


def set_eager_activations(model: nn.Module, activations: Activations) -> None:
    """Set what the `ParoLinear`s of a model multiply when they run outside of compiled graphs.

    It is an attribute of the modules, which goes along where they are copied, pickled or moved; neither `state_dict`
    nor a checkpoint holds it. Compiled and exported graphs do not follow it: they have the backend's option
    `activations`.

    Args:
        model: a quantized model, or a `ParoLinear`.
        activations: `"float"` multiplies rotated activations as they are; `"int8"` quantizes each (row, group) of them
            first, which only the CPU kernels do, and which has no gradient.

    Raises:
        ConfigError: if the value is none of these, or the model holds no `ParoLinear`.
        LoweringError: if there are no such kernels for some of the linears, listing them. None is changed then.
    """
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations must be one of {ACTIVATIONS}, got {activations!r}")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, ParoLinear)}
    if not linears:
        raise ConfigError(f"{type(model).__name__} holds no ParoLinear; call parofx.quantize first")
    if activations != "float":
        _refuse_without_kernels(linears, activations)
    for linear in linears.values():
        linear.eager_activations = activations


def _refuse_without_kernels(linears: dict[str, ParoLinear], activations: Activations) -> None:
    places = {name: (next(linear.buffers()).device, linear.group_size) for name, linear in linears.items()}
    refused = [
        f"{name or 'ParoLinear'}: group_size {group_size} on {device}"
        for name, (device, group_size) in places.items()
        if kernel_layouts.choose(device, group_size) is None
    ]
    if refused:
        raise LoweringError(
            f"{activations} activations need the CPU kernels, which these linears do not get; `parofx doctor` tells "
            f"whether there are any:\n{one_per_line(refused)}"
        )
