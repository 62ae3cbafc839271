"""What the lowering for CUDA inserts: operators on tensors packed for the Triton kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parofx.passes.graph import RMSNORM_ROTATE, binding, inherit_meta
from parofx.providers.base import SiblingCall
from parofx.providers.fusing import FusedCall
from parofx.triton_ops import operators as _operators  # noqa: F401  (registers torch.ops.parofx.triton_*)
from parofx.triton_ops.layout import PackedRotation, merge_weights, pack_rotation, pack_weight, stack_rotations

_OPS = torch.ops.parofx


def emit(call: SiblingCall) -> list[Node]:
    """Insert one operator that rotates and multiplies, and slices of its output."""
    bias, added = _bias(call)
    words, qparams, locks = _weight(call)
    args = (call.x, *_rotation(call), words, qparams, bias, _ends(call), locks)
    return _outputs(call, call.gm.graph.call_function(_OPS.triton_rotate_int4_linear.default, args), added)


def emit_fused(fused: FusedCall) -> tuple[list[Node], Node | None]:
    """Insert the producer's operator, and that of the linears behind it; return their outputs and the sum."""
    call, producer, graph = fused.call, fused.producer, fused.call.gm.graph
    total: Node | None = None
    with graph.inserting_before(producer):
        rotation = _rotation(call)
        if producer.target is RMSNORM_ROTATE:
            both = graph.call_function(_OPS.triton_rmsnorm_rotate.default, (*producer.args[:5], *rotation))
            inherit_meta(both, producer)
            rotated = graph.call_function(operator.getitem, (both, 0))
            if fused.has_total:
                total = graph.call_function(operator.getitem, (both, 1))
        else:
            rotated = graph.call_function(_OPS.triton_silu_mul_rotate.default, (*producer.args[:2], *rotation))
    inherit_meta(rotated, producer)
    with graph.inserting_before(call.node):
        words, qparams, locks = _weight(call)
        bias, added = _bias(call)
        args = (rotated, words, qparams, bias, _ends(call), call.group_size, locks)
        return _outputs(call, graph.call_function(_OPS.triton_int4_linear.default, args), added), total


def _ends(call: SiblingCall) -> list[int]:
    """Return where the columns of each rotation's linears end."""
    ends = [sum(call.out_features[: index + 1]) for index in range(len(call.out_features))]
    return ends[-len(call.rotations) :]


def _rotation(call: SiblingCall) -> tuple[Node, ...]:
    """Return `coefficients, order` of all rotations, packed once."""
    sources = [node for pairs, theta, channel_scales in call.rotations for node in (theta, pairs, channel_scales)]
    return call.constants("triton_rotation", sources, partial(_pack_rotations, call))


def _pack_rotations(call: SiblingCall) -> PackedRotation:
    tensors = [tuple(map(call.tensor, nodes)) for nodes in call.rotations]
    packed = [pack_rotation(pairs, theta, scales, call.group_size) for pairs, theta, scales in tensors]
    return stack_rotations(packed)


def _weight(call: SiblingCall) -> tuple[Node, ...]:
    """Return `words, qparams, locks` of all linears side by side, packed once."""
    return call.constants("triton_weight", [node for nodes in call.weights for node in nodes], partial(_pack, call))


def _pack(call: SiblingCall) -> tuple[Tensor, ...]:
    from parofx.triton_ops.launch import make_locks

    tensors = [tuple(map(call.tensor, nodes)) for nodes in call.weights]
    merged = merge_weights(
        [pack_weight(qweight, qzeros, scales, call.group_size) for qweight, qzeros, scales in tensors]
    )
    return *merged, make_locks(merged.words.shape[1], merged.words.device)


def _bias(call: SiblingCall) -> tuple[Node | None, Sequence[Node | None]]:
    """Return the bias that the kernel adds, and per linear the one that must be added behind it.

    Biases that are parameters are laid side by side once, zeros where there is none; computed ones are added behind.
    """
    if not any(call.biases):
        return None, call.biases
    bound = [bias for bias in call.biases if bias is not None]
    if any(binding(bias) is None for bias in bound):
        return None, call.biases
    # Which linears have one, and how wide all are, is part of what is made: siblings of another order differ.
    layout = "triton_bias_" + "_".join(
        f"{'b' if bias is not None else 'n'}{size}" for bias, size in zip(call.biases, call.out_features, strict=True)
    )
    return call.constants(layout, bound, partial(_pack_bias, call))[0], [None] * len(call.biases)


def _pack_bias(call: SiblingCall) -> tuple[Tensor]:
    device = call.tensor(call.weights[0][0]).device
    parts = [
        torch.zeros(size, device=device) if bias is None else call.tensor(bias).float()
        for bias, size in zip(call.biases, call.out_features, strict=True)
    ]
    return (torch.cat(parts),)


def _outputs(call: SiblingCall, merged: Node, added: Sequence[Node | None]) -> list[Node]:
    graph = call.gm.graph
    inherit_meta(merged, call.node)
    outputs = [merged]
    if len(call.weights) > 1:
        parts: Any = graph.call_function(torch.ops.aten.split_with_sizes.default, (merged, [*call.out_features], -1))
        outputs = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(call.weights))]
    return [
        output if bias is None else graph.call_function(torch.ops.aten.add.Tensor, (output, bias))
        for output, bias in zip(outputs, added, strict=True)
    ]
