"""`lower`: CONVERTED → LOWERED. Semantic operators become those of a provider for the target.

Each merged call is offered to the providers in order (`parofx.providers`): by device, dtype and number of rows. What is
left over in the end is an error that names the nodes, never a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import providers
from parofx.config import Activations
from parofx.errors import LoweringError, one_per_line
from parofx.passes.base import PassReport, Stage, register, set_stage
from parofx.passes.fused_calls import choose_fusing, fused_call, replace_total
from parofx.passes.graph import (
    INT4_SIBLINGS,
    ROTATE_INT4_SIBLINGS,
    SEMANTIC,
    bits_of,
    correction_of,
    nodes_calling,
    remove_dead_code,
)


@register
@dataclass(frozen=True)
class Lower:
    """Replace semantic operators by a provider's; `provider` forces one by name.

    With `activations` `"int8"`, rotated activations are quantized per (row, group) before they are multiplied.
    """

    device: torch.device | str | None = None
    provider: str | None = None
    activations: Activations = "float"

    name: ClassVar[str] = "lower"
    consumes: ClassVar[tuple[Stage, ...]] = (Stage.CONVERTED,)
    produces: ClassVar[Stage] = Stage.LOWERED

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        report = PassReport(self.name)
        used: Counter[str] = Counter()
        for node in nodes_calling(gm.graph, ROTATE_INT4_SIBLINGS):
            call = sibling_call(gm, node, self.device, self.activations)
            provider, passed_over = choose_provider(call, self.provider)
            with gm.graph.inserting_before(node):
                outputs = provider.emit(call)
            _replace_outputs(gm, node, outputs)
            used[provider.name] += 1
            report.matched.append((node.name, f"{provider.name} ({len(outputs)} linears)"))
            report.skipped += [(node.name, f"{name}: {reason}") for name, reason in passed_over]
            report.changed += 1
        for node in nodes_calling(gm.graph, INT4_SIBLINGS):
            fused = fused_call(gm, node, self.device, self.activations)
            fusing, passed_over = choose_fusing(fused, self.provider)
            outputs, total = fusing.emit_fused(fused)
            if total is not None:
                replace_total(fused, total)
            _replace_outputs(gm, node, outputs)
            used[fusing.name] += 1
            report.matched.append((node.name, f"{fusing.name} ({len(outputs)} linears behind {fused.producer.name})"))
            report.skipped += [(node.name, f"{name}: {reason}") for name, reason in passed_over]
            report.changed += 1
        remove_dead_code(gm)
        left = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in SEMANTIC]
        if left:
            names = one_per_line(f"{node.name}: {node.target}" for node in left)
            raise LoweringError(f"these operators have no lowering; run merge_siblings first:\n{names}")
        gm.meta["parofx_providers"] = dict(used)
        set_stage(gm, Stage.LOWERED)
        return report


def choose_provider(
    call: providers.SiblingCall, forced: str | None
) -> tuple[providers.Provider, list[tuple[str, str]]]:
    """Return the provider for a call, and why those before it were passed over.

    Raises:
        LoweringError: if a provider is forced that there is not, or that does not serve the call.
    """
    if forced is None:
        return providers.choose(call)
    known = {provider.name: provider for provider in providers.providers()}
    if forced not in known:
        raise LoweringError(f"provider must be one of {sorted(known)}, got {forced!r}")
    reason = known[forced].why_not(call)
    if reason is not None:
        raise LoweringError(f"provider {forced!r} does not serve {call.node.name}: {reason}")
    return known[forced], []


def place_siblings(gm: GraphModule) -> None:
    """Give merged siblings the memory that their providers asked for: slices of one buffer.

    Not done while a compiler holds on to the old memory's offsets.
    """
    with torch._C._DisableAutocast():
        for place in gm.meta.pop("parofx_placements", ()):
            place()


def sibling_call(
    gm: GraphModule, node: Node, device: torch.device | str | None, activations: Activations = "float"
) -> providers.SiblingCall:
    """Read a merged call off the graph."""
    x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, has_bias, group_size, *_ = node.args
    assert isinstance(x, Node)
    value = x.meta.get("val")
    assert isinstance(value, Tensor), f"{x.name} has no example value"
    present = iter(_nodes(bias))
    correction = correction_of(node)
    rows = value.shape[:-1].numel() if all(isinstance(size, int) for size in value.shape[:-1]) else None
    assert isinstance(group_size, int)
    assert isinstance(has_bias, Sequence)
    return providers.SiblingCall(
        gm=gm,
        node=node,
        x=x,
        device=torch.device(device) if device is not None else value.device,
        dtype=value.dtype,
        rows=rows,
        rotations=tuple(zip(_nodes(pairs), _nodes(theta), _nodes(channel_scales), strict=True)),
        weights=tuple(zip(_nodes(qweight), _nodes(qzeros), _nodes(scales), strict=True)),
        biases=tuple(next(present) if has else None for has in has_bias),
        group_size=group_size,
        bits=bits_of(node),
        corrections=None if correction is None else (tuple(_nodes(correction[0])), tuple(_nodes(correction[1]))),
        activations=activations,
    )


def _nodes(argument: object) -> list[Node]:
    assert isinstance(argument, Sequence)
    return [node for node in argument if isinstance(node, Node)]


def _replace_outputs(gm: GraphModule, node: Node, outputs: list[Node]) -> None:
    for user in list(node.users):
        output = outputs[int(user.args[1])]  # type: ignore[arg-type]
        output.meta = dict(user.meta)
        user.replace_all_uses_with(output)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
