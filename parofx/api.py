"""The stages as functions, for callers who run them one by one: each takes and returns a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from parofx.config import ParoConfig
from parofx.errors import DataError
from parofx.passes.calibrate import Calibrate
from parofx.passes.capture import capture, complete_inputs, complete_named
from parofx.passes.convert import Convert
from parofx.passes.fuse_producers import FuseProducers
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower, place_siblings
from parofx.passes.merge_siblings import MergeSiblings
from parofx.passes.transforms import find_transforms
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

    Args:
        gm: a PREPARED graph.
        batches: inputs of the captured model: mappings of keyword inputs, tuples of positional ones or single
            tensors, as it was captured with; None fits on weights alone.
        config: `calibration` applies; the rest was decided by `prepare`.
        progress: show a progress bar.
    """
    named = None
    if batches is not None:
        _, names = gm.meta["parofx_inputs"]
        named = [complete_named(names, _named(batch)) for batch in batches]
    return Pipeline([Calibrate(config or ParoConfig(), named, progress)]).run(gm)


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
    passes = [MergeSiblings(), FuseProducers(device, provider), Lower(device, provider)]
    lowered = Pipeline(passes).run(gm)
    place_siblings(lowered)
    return lowered


class ExplainedLinear(NamedTuple):
    """One row of `explain`: what happens to a linear, and why."""

    name: str
    action: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What the passes would do with a model."""

    rows: tuple[ExplainedLinear, ...]
    blocks: tuple[str, ...]

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{row.name:{width}}  {row.action:10}  {row.reason}" for row in self.rows]
        return "\n".join([f"{len(self.blocks)} blocks: {', '.join(self.blocks) or 'the whole graph'}", *lines])


def explain(model: nn.Module, *example_inputs: Any, config: ParoConfig | None = None) -> Explanation:
    """Tell what would be quantized, shared, merged and left float, and why. Nothing is changed.

    Args:
        model: any module.
        *example_inputs: as for `capture`.
        config: as for `quantize`.

    Returns:
        One row per linear; `print` it.
    """
    from parofx.quantization import _output_heads

    gm = capture(model, *example_inputs)
    pipeline = Pipeline([InsertTransforms(config or ParoConfig(), _output_heads(model), replace_modules=True)])
    pipeline.run(gm)
    report = pipeline.reports[0]
    calls = {linear.name: len(transform.linears) for transform in find_transforms(gm) for linear in transform.linears}
    rows = [
        ExplainedLinear(name, "quantize", what + (f"; {calls[name]} linears in one call" if calls[name] > 1 else ""))
        for name, what in report.matched
    ]
    rows += [ExplainedLinear(name, "keep float", reason) for name, reason in report.skipped]
    return Explanation(tuple(rows), gm.meta["parofx_blocks"])


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


__all__ = ["Explanation", "calibrate", "capture", "complete_inputs", "convert", "explain", "lower", "prepare"]
