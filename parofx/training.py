"""What tells that a graph was traced for training: modules in that mode, and calls that behave so."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parofx.dynamo import Owner
from parofx.passes.graph import operator_name


def training_modules(ways: Iterable[tuple[Owner, ...]]) -> list[str]:
    """Return the names of modules in training mode: first those that hold a parameter, then those that lead there."""
    ways = list(ways)
    links = [way[0] for way in ways if way] + [link for way in ways for link in way[1:]]
    names: dict[int, str] = {}
    for link in links:
        if link.module.training:
            names.setdefault(id(link.module), link.name or type(link.module).__name__)
    return list(names.values())


def training_calls(gm: GraphModule) -> list[str]:
    """Return the calls that drop at random or update running statistics."""
    return [f"{operator_name(node)} ({node.name})" for node in gm.graph.nodes if _trains(node)]


def _trains(node: Node) -> bool:
    given = _arguments(node) if node.op == "call_function" else {}
    if not given.get("training", given.get("train", "dropout_p" in given)):
        return False
    if "running_mean" in given:
        # Without running statistics a batch norm uses the batch's in evaluation too.
        return given["running_mean"] is not None
    return bool(given.get("p", given.get("dropout_p", 1.0)))


def _arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included; none where nothing tells the names."""
    if inspect.isfunction(node.target):
        parameters = inspect.signature(node.target).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
        names = [one.name for one in parameters]
    else:
        overload: Any = node.target
        if not isinstance(overload, torch._ops.OpOverload):
            # A builtin has no signature to look at; the operator behind it has the same arguments.
            overload = getattr(getattr(torch.ops.aten, operator_name(node), None), "default", None)
        arguments = [] if overload is None else overload._schema.arguments
        defaults = {one.name: one.default_value for one in arguments if one.has_default_value()}
        names = [one.name for one in arguments]
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
