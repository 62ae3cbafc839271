"""What a captured graph assumes of its inputs, asked of other inputs before the graph runs on them.

A capture follows one way through a model's code. Which way was decided by sizes (`x.shape[1] > 6`) and by inputs that
are no tensors (`flag=True`); inputs that would decide otherwise need another graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

_GUARDS = "parofx_guards"


def keep_guards(gm: GraphModule, guards: nn.Module | None) -> None:
    """Note the exporter's guards: a module that takes the graph's inputs and raises where one of them fails."""
    gm.meta[_GUARDS] = guards


def why_not_served(gm: GraphModule, inputs: Mapping[str, Any]) -> str | None:
    """Return why a captured graph does not compute what the model would for `inputs`, by placeholder, or None."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        reason = _why_not_like(inputs[node.name], node.meta.get("val"))
        if reason is not None:
            return f"{node.name} {reason}"
    guards = gm.meta.get(_GUARDS)
    if guards is not None:
        try:
            guards(*(inputs[node.name] for node in placeholders))
        except AssertionError as error:
            return str(error).partition("\n")[0]
    return None


def _why_not_like(value: object, captured: object) -> str | None:
    """Return how an input differs from what the graph was captured with, or None."""
    if not isinstance(captured, Tensor):
        same = type(value) is type(captured) and (value == captured or value != value)
        dynamic = isinstance(captured, torch.SymInt | torch.SymFloat | torch.SymBool)
        return None if same or dynamic else f"must be {captured!r}, as at the capture, got {_shown(value)}"
    if not isinstance(value, Tensor):
        return f"must be a tensor, as at the capture, got {_shown(value)}"
    # A size that the model has fixed may still be a symbol, which prints as its value.
    fixed = [int(str(size)) if str(size).isdigit() else None for size in captured.shape]
    if len(fixed) != value.dim() or any(
        size not in (None, given) for size, given in zip(fixed, value.shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in fixed)
        return f"must have the shape ({expected}), as at the capture, got {tuple(value.shape)}"
    return None


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
