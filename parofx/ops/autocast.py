"""Autocast: linears of 4-bit weights take part in it as `F.linear` does, with the activation cast and nothing else.

`torch.library.register_autocast` would cast scales and angles too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import Library

_DISPATCH_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_library = Library("parofx", "FRAGMENT")  # type: ignore[no-untyped-call]


def cast_activation(op: CustomOpDef) -> None:
    """Let an operator cast its first argument to autocast's dtype, on CPU and CUDA; float64 stays as it is."""
    for device, key in _DISPATCH_KEYS.items():
        _library.impl(op._name, partial(_call, op._opoverload, device), key)  # type: ignore[no-untyped-call]


def as_autocast(x: Tensor, device: str) -> Tensor:
    """Return an activation as autocast on a type of device hands it on."""
    if x.is_floating_point() and x.device.type == device and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def _call(overload: Any, device: str, x: Tensor, *args: Any) -> Any:
    # What the reference computes in fp32 stays in fp32.
    with torch._C._DisableAutocast():
        return overload(as_autocast(x, device), *args)
