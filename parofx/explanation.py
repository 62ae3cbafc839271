"""`parofx.explain`: what the passes make of a model's linears, and why; its rows are the passes' reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule, Node

from parofx import integrations, packing
from parofx.config import ParoConfig
from parofx.nn import ParoLinear
from parofx.passes.base import Pass, PassReport, Stage, set_stage
from parofx.passes.blocks import find_blocks
from parofx.passes.capture import capture
from parofx.passes.convert import rewrite
from parofx.passes.fuse_producers import FuseProducers
from parofx.passes.graph import (
    INT4_LINEAR,
    INT4_SIBLINGS,
    ROTATE_INT4_SIBLINGS,
    binding,
    nodes_calling,
    remove_dead_code,
)
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower
from parofx.passes.merge_siblings import MergeSiblings
from parofx.passes.transforms import find_transforms
from parofx.pipeline import Pipeline
from parofx.quantization import check_patterns, not_converted, output_heads
from parofx.unwrapping import plain_module


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

    Of a model that is quantized already it tells what its linears hold, how they are merged and fused with what is
    before them, and which provider computes them.

    Args:
        model: any module.
        *example_inputs: as for `capture`; a Transformers model needs none.
        config: as for `quantize`; of no meaning for a quantized model.

    Returns:
        One row per linear; `print` it.

    Raises:
        ConfigError: if `modules_to_not_convert` names what the model does not have.
    """
    model = plain_module(model)
    if not example_inputs and integrations.is_transformers_model(model):
        from parofx.models import example_inputs as described_by_its_configuration

        example_inputs = (described_by_its_configuration(model),)
    if any(isinstance(module, ParoLinear) for module in model.modules()):
        return _explain_quantized(model, capture(model, *example_inputs))
    config = config or ParoConfig()
    check_patterns(model, config)
    gm = capture(model, *example_inputs)
    pipeline = Pipeline([InsertTransforms(config, output_heads(model), replace_modules=True)])
    pipeline.run(gm)
    (report,) = pipeline.reports
    _convert_structure(gm)
    merged = _merge(gm)
    kept = [*report.skipped]
    kept += [(one.name, one.explanation) for one in not_converted(model, gm, [name for name, _ in report.matched])]
    rows = [ExplainedLinear(name, "quantize", _joined(what, merged.get(name))) for name, what in report.matched]
    rows += [ExplainedLinear(name, "keep float", reason) for name, reason in kept]
    return Explanation(tuple(rows), gm.meta["parofx_blocks"])


def _explain_quantized(model: nn.Module, gm: GraphModule) -> Explanation:
    blocks = find_blocks(gm)
    merged = _merge(gm)
    fused = _run_on_calls(gm, FuseProducers())
    lowered = _run_on_calls(gm, Lower())
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, ParoLinear):
            what = f"{module.bits} bit; group_size {module.group_size}; krot {module.krot}"
            where = f"lowered to {lowered[name]}" if name in lowered else "the example inputs never reach it"
            rows.append(ExplainedLinear(name, "quantized", _joined(what, merged.get(name), fused.get(name), where)))
        elif isinstance(module, nn.Linear):
            rows.append(ExplainedLinear(name, "keep float", "the model holds it float"))
    return Explanation(tuple(rows), blocks)


def _convert_structure(gm: GraphModule) -> None:
    """PREPARED → CONVERTED with packed tensors of the right shapes that hold nothing: no weight is computed."""
    for transform in find_transforms(gm):
        for linear in transform.linears:
            out_features, in_features = linear.weight.shape
            groups = in_features // transform.group_size
            words = packing.words_per_row(out_features, linear.bits)
            packed = (
                torch.empty(in_features, words, dtype=torch.int32, device="meta"),
                torch.empty(groups, words, dtype=torch.int32, device="meta"),
                torch.empty(groups, out_features, dtype=torch.float16, device="meta"),
            )
            rewrite(gm, transform, linear, packed)
    remove_dead_code(gm)
    set_stage(gm, Stage.CONVERTED)


def _merge(gm: GraphModule) -> dict[str, str]:
    """Run `merge_siblings`; return what it says of each linear that shares a call with others."""
    linears = {node.name: _owner(node.args[1]) for node in nodes_calling(gm.graph, INT4_LINEAR)}
    pipeline = Pipeline([MergeSiblings()])
    pipeline.run(gm)
    (report,) = pipeline.reports
    return _by_linear(report, linears)


def _by_linear(report: PassReport, linears: Mapping[str, str]) -> dict[str, str]:
    """Return what a report says by linear, where it names several nodes; these become the linears' names."""
    found: dict[str, str] = {}
    for _, what in report.matched:
        named = [word for word in re.findall(r"\w+", what) if word in linears]
        if len(named) > 1:
            text = re.sub(r"\w+", lambda word: linears.get(word[0], word[0]), what)
            found |= {linears[node]: text for node in named}
    return found


def _run_on_calls(gm: GraphModule, one: Pass) -> dict[str, str]:
    """Run a pass on merged calls; return what it says of each call, by linear."""
    linears = {node.name: _linears(node) for node in nodes_calling(gm.graph, ROTATE_INT4_SIBLINGS, INT4_SIBLINGS)}
    pipeline = Pipeline([one])
    pipeline.run(gm)
    return {name: what for call, what in pipeline.reports[0].matched for name in linears[call]}


def _linears(call: Node) -> list[str]:
    """Return the names of the linears in a merged call."""
    assert isinstance(call.target, torch._ops.OpOverload)
    names = [argument.name for argument in call.target._schema.arguments]
    weights = call.args[names.index("qweight")]
    assert isinstance(weights, list | tuple)
    return [_owner(weight) for weight in weights]


def _owner(weight: object) -> str:
    """Return the name of the module whose tensors a node stands for or was computed from."""
    assert isinstance(weight, Node)
    bound = binding(weight)
    return bound.module if bound is not None else _owner(weight.all_input_nodes[0])


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)
