"""Fused calls in a graph: reading them, choosing who lowers them, and replacing the sum they return."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import providers
from parofx.config import Activations
from parofx.errors import LoweringError
from parofx.passes.graph import RMSNORM_ROTATE, SILU_MUL_ROTATE


def fused_call(
    gm: GraphModule, node: Node, device: torch.device | str | None, activations: Activations = "float"
) -> providers.FusedCall:
    """Read an `int4_siblings` node and the producer of its inputs off the graph.

    Raises:
        LoweringError: if its inputs are not those that one fused producer rotated.
    """
    inputs, qweight, qzeros, scales, bias, has_bias, group_size = node.args
    sources = {source.args[0] for source in _nodes(inputs) if source.target is operator.getitem}
    producer = next(iter(sources), None)
    if len(sources) != 1 or not isinstance(producer, Node) or producer.target not in (RMSNORM_ROTATE, SILU_MUL_ROTATE):
        raise LoweringError(f"{node.name} reads no fused producer, and nothing else lowers it; run fuse_producers")
    pairs, theta, channel_scales = (_nodes(argument) for argument in producer.args[-4:-1])
    x = producer.args[0]
    assert isinstance(x, Node)
    value = x.meta.get("val")
    assert isinstance(value, Tensor), f"{x.name} has no example value"
    assert isinstance(has_bias, Sequence)
    assert isinstance(group_size, int)
    present = iter(_nodes(bias))
    call = providers.SiblingCall(
        gm=gm,
        node=node,
        x=x,
        device=torch.device(device) if device is not None else value.device,
        dtype=value.dtype,
        rows=value.shape[:-1].numel() if all(isinstance(size, int) for size in value.shape[:-1]) else None,
        rotations=tuple(zip(pairs, theta, channel_scales, strict=True)),
        weights=tuple(zip(_nodes(qweight), _nodes(qzeros), _nodes(scales), strict=True)),
        biases=tuple(next(present) if has else None for has in has_bias),
        group_size=group_size,
        activations=activations,
    )
    return providers.FusedCall(call, producer)


def choose_fusing(fused: providers.FusedCall, forced: str | None) -> tuple[providers.FusingProvider, list[tuple[str, str]]]:
    """Return the provider for a fused call, and why those before it were passed over.

    Raises:
        LoweringError: if a provider is forced that does not serve it.
    """
    reasons: list[tuple[str, str]] = []
    for provider in providers.providers():
        if forced is not None and provider.name != forced:
            continue
        if not isinstance(provider, providers.FusingProvider):
            reasons.append((provider.name, "it has no producers that rotate"))
            continue
        reason = provider.why_not(fused.call)
        if reason is None:
            return provider, reasons
        reasons.append((provider.name, reason))
    known = [provider.name for provider in providers.providers()]
    reason = reasons[0][1] if reasons else f"there is none of that name, only {known}"
    raise LoweringError(f"provider {forced!r} does not serve {fused.call.node.name}: {reason}")


def replace_total(fused: providers.FusedCall, total: Node) -> None:
    """Let readers of the sum that the producer returns read another node."""
    for user in list(fused.producer.users):
        if user.target is operator.getitem and user.args[1] == len(fused.call.rotations):
            total.meta = dict(user.meta)
            user.replace_all_uses_with(total)


def _nodes(argument: object) -> list[Node]:
    assert isinstance(argument, Sequence)
    return [node for node in argument if isinstance(node, Node)]
