"""`insert_transforms`: FLOAT → PREPARED. Each linear gets a rotation on both sides, which cancel.

    linear(x, W, b)   →   linear(rotate(x, P, θ, c), fake_quantize(rotate(W, P, θ, 1/c), off), b)

`x ⊙ c` against `W ⊘ c` and an orthogonal rotation of both leave every product as it was, whatever θ and c are; the
pass starts them at 0 and 1. Siblings read one `rotate` node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from parofx.config import ParoConfig
from parofx.ops import DEFAULT_BITS
from parofx.pairing import make_pairs
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.blocks import find_blocks
from parofx.passes.graph import FAKE_QUANTIZE, ROTATE, buffer_node, inherit_meta
from parofx.passes.linears import (
    LinearUnit,
    Selection,
    choose_group_sizes,
    find_attention_weights,
    find_embeddings,
    find_units,
    find_weight_stacks,
    group_siblings,
    name_tied_heads,
)
from parofx.report import FloatLinear, FloatReason


@register
@dataclass(frozen=True)
class InsertTransforms:
    """Insert a rotation and its inverse around every linear that can be quantized.

    `output_heads` names modules to treat as output head besides those found from embedding tables, and `embeddings`
    are tables besides those the graph looks up; with `replace_modules` a linear stays float unless a module can be put
    in its place.
    """

    config: ParoConfig = field(default_factory=ParoConfig)
    output_heads: tuple[str, ...] = ()
    replace_modules: bool = False
    embeddings: tuple[torch.Tensor, ...] = ()

    name: ClassVar[str] = "insert_transforms"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.FLOAT,)
    produces: ClassVar[Stage] = Stage.PREPARED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        blocks = find_blocks(gm)
        chosen, kept, group_sizes = self.select(gm, blocks)
        for group in group_siblings(chosen, blocks, share=self.config.shares_transforms):
            group_size = group_sizes[group[0].name]
            _insert(gm, group, group_size, self.config)
            names = ", ".join(unit.name for unit in group)
            what = "own transform" if len(group) == 1 else f"shares one transform with its siblings: {names}"
            width = "" if group[0].bits == DEFAULT_BITS else f"; {group[0].bits} bits"
            report.matched += [(unit.name, f"{what}; group_size {group_size}{width}") for unit in group]
            report.changed += sum(len(unit.calls) for unit in group)
        report.skipped = [(one.name, one.explanation) for one in kept]
        gm.meta["parofx_blocks"] = blocks
        gm.meta["parofx_kept_float"] = tuple(kept)
        set_stage(gm, Stage.PREPARED)
        return report

    def select(
        self, gm: GraphModule, blocks: tuple[str, ...]
    ) -> tuple[list[LinearUnit], list[FloatLinear], dict[str, int]]:
        """Return the units to transform, the linears that stay float with their reasons, and the group sizes."""
        looked_up, units = find_embeddings(gm), find_units(gm)
        embeddings = (*looked_up, *self.embeddings)
        selection = Selection(self.config, blocks, embeddings, self.output_heads, self.replace_modules)
        kept = [FloatLinear(name, FloatReason.WEIGHT_NOT_MATRIX) for name in find_weight_stacks(gm)]
        inside = "it is inside one call of multi_head_attention_forward"
        kept += [FloatLinear(name, FloatReason.FUNCTIONAL, inside) for name in find_attention_weights(gm)]
        if self.config.lm_head != "float":
            name_tied_heads(units, looked_up)
        chosen = []
        for unit in units:
            reason = selection.why_not(unit)
            if reason is None:
                unit.bits, unit.bits_given = selection.bits(unit), selection.bits_given(unit)
                chosen.append(unit)
            else:
                kept.append(FloatLinear(unit.name, *reason))
        group_sizes = choose_group_sizes(chosen, self.config)
        for unit in chosen:
            if unit.name not in group_sizes:
                kept.append(FloatLinear(unit.name, FloatReason.IN_FEATURES, f"{unit.in_features} in_features"))
        return [unit for unit in chosen if unit.name in group_sizes], kept, group_sizes


def _insert(gm: GraphModule, group: list[LinearUnit], group_size: int, config: ParoConfig) -> None:
    """Rewrite every call of a sibling set around one shared transform, named after its first linear."""
    graph, leader = gm.graph, group[0]
    in_features, device = leader.in_features, leader.weight.tensor.device
    members = {call for unit in group for call in unit.calls}
    calls = [node for node in graph.nodes if node in members]
    seed, method = config.calibration.seed, config.calibration.pairs
    pairs = make_pairs(in_features, group_size, config.krot, method=method, seed=seed)
    with graph.inserting_before(calls[0]):
        rotation = (
            buffer_node(gm, f"{leader.name}.pairs", pairs.to(device)),
            buffer_node(gm, f"{leader.name}.theta", torch.zeros(config.krot, in_features // 2, device=device)),
        )
        scales = buffer_node(gm, f"{leader.name}.channel_scales", torch.ones(1, in_features, device=device))
        reciprocal = graph.call_function(torch.ops.aten.reciprocal.default, (scales,))
        reciprocal.meta["val"] = scales.meta["val"]
    quantized: dict[Node, Node] = {}
    for unit in group:
        with graph.inserting_before(unit.calls[0]):
            weight = unit.calls[0].args[1]
            rotated = graph.call_function(ROTATE, (weight, *rotation, reciprocal, group_size))
            grid = [
                buffer_node(gm, f"{unit.name}.fake_quantize.{name}", torch.empty(0, device=device))
                for name in ("scales", "zeros")
            ]
            rounded = graph.call_function(FAKE_QUANTIZE, (rotated, *grid, unit.bits, group_size))
        rounded.meta["parofx_linear"], rounded.meta["parofx_bits_given"] = unit.name, unit.bits_given
        for node in (rotated, rounded):
            inherit_meta(node, unit.calls[0]).meta["val"] = _value(weight)
        quantized |= dict.fromkeys(unit.calls, rounded)
    rotated_inputs: dict[Node, Node] = {}
    for call in calls:
        source = call.args[0]
        assert isinstance(source, Node)
        if source not in rotated_inputs:
            with graph.inserting_before(call):
                node = graph.call_function(ROTATE, (source, *rotation, scales, group_size))
            inherit_meta(node, call).meta["val"] = _value(source)
            node.meta["parofx_transform"] = leader.name
            rotated_inputs[source] = node
        call.args = (rotated_inputs[source], quantized[call], *call.args[2:])


def _value(node: object) -> object:
    return node.meta.get("val") if isinstance(node, Node) else None
