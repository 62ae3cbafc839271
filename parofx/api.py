"""The stages as functions, for callers who run them one by one: each takes and returns a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from parofx.calibration.processes import together
from parofx.config import ParoConfig
from parofx.errors import DataError
from parofx.explanation import ExplainedLinear, Explanation, explain
from parofx.passes.allocate_bits import AllocateBits
from parofx.passes.base import Pass
from parofx.passes.calibrate import Calibrate
from parofx.passes.capture import capture, complete_inputs, complete_named
from parofx.passes.convert import Convert
from parofx.passes.fuse_producers import FuseProducers
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower, place_siblings
from parofx.passes.merge_siblings import MergeSiblings
from parofx.pipeline import Pipeline


def prepare(gm: GraphModule, config: ParoConfig | None = None) -> GraphModule:
    """FLOAT → PREPARED, in place: insert transforms that change nothing yet. See `passes.insert_transforms`."""
    return Pipeline([InsertTransforms(config or ParoConfig())]).run(gm)


def calibrate(
    gm: GraphModule,
    batches: Iterable[Any] | None = None,
    config: ParoConfig | None = None,
    *,
    progress: bool = False,
) -> GraphModule:
    """PREPARED → CALIBRATED, in place: fit the transforms. See `passes.calibrate`.

    With a `bits_budget` formats are chosen first; see `passes.allocate_bits`.

    Args:
        gm: a PREPARED graph.
        batches: inputs of the captured model: mappings of keyword inputs, tuples of positional ones or single
            tensors, as it was captured with; None fits on weights alone.
        config: that of `prepare`.
        progress: show a progress bar.
    """
    config, named = config or ParoConfig(), None
    with contextlib.nullcontext() if batches is None else together():
        if batches is not None:
            _, names = gm.meta["parofx_inputs"]
            named = [complete_named(names, _named(batch)) for batch in batches]
        return Pipeline([AllocateBits(config, named), Calibrate(config, named, progress)]).run(gm)


def convert(gm: GraphModule) -> GraphModule:
    """CALIBRATED → CONVERTED, in place: pack the weights. See `passes.convert`."""
    return Pipeline([Convert()]).run(gm)


def lower(gm: GraphModule, device: torch.device | str | None = None, *, provider: str | None = None) -> GraphModule:
    """CONVERTED → LOWERED, in place: merge siblings, fuse producers, then choose kernels. See `passes.lower`.

    Args:
        gm: a CONVERTED graph.
        device: the target; by default the device of the graph's inputs.
        provider: force one provider by name; by default the first that serves a call.
    """
    passes: list[Pass] = [MergeSiblings(), FuseProducers(device, provider), Lower(device, provider)]
    lowered = Pipeline(passes).run(gm)
    place_siblings(lowered)
    return lowered


def _named(batch: object) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    values = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(values, tuple | list):
        raise DataError(
            f"a calibration batch must be a mapping, a tuple or a tensor, got {type(batch).__name__}; "
            "pass the inputs of the captured model"
        )
    return {f"arg{index}": value for index, value in enumerate(values)}


__all__ = [
    "ExplainedLinear",
    "Explanation",
    "calibrate",
    "capture",
    "complete_inputs",
    "convert",
    "explain",
    "lower",
    "prepare",
]
