"""The Triton kernels as a provider: int4 linears on CUDA, and producers that rotate their input."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parofx.errors import ConfigError
from parofx.passes.graph import RMSNORM_ROTATE, binding, inherit_meta
from parofx.providers.base import SiblingCall
from parofx.providers.fusing import FusedCall
from parofx.triton_ops import operators as _operators  # noqa: F401  (registers torch.ops.parofx.triton_*)
from parofx.triton_ops.architectures import architecture_of
from parofx.triton_ops.layout import (
    GROUP_SIZES,
    PackedRotation,
    merge_weights,
    pack_rotation,
    pack_weight,
    stack_rotations,
)
from parofx.triton_ops.siblings import MAX_ROTATIONS

_DTYPES = (torch.float16, torch.bfloat16)
_OPS = torch.ops.parofx


class TritonProvider:
    """Serves fp16 and bf16 on CUDA.

    Args:
        arch: lower for this architecture, on whatever device; by default for the device of the call, if it is there.
    """

    name = "triton"

    def __init__(self, arch: str | None = None) -> None:
        self.arch = arch

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why the Triton kernels do not serve a call, or None."""
        if self.arch is None and call.device.type != "cuda":
            return f"device {call.device.type} is not cuda"
        if call.dtype not in _DTYPES:
            return f"{call.dtype} is not one of {_DTYPES}"
        if call.activations != "float":
            return f"activations are {call.activations}; the kernels multiply them as they are"
        if call.group_size not in GROUP_SIZES:
            return f"group_size {call.group_size} is not one of {GROUP_SIZES}"
        if len(call.rotations) > MAX_ROTATIONS:
            return f"{len(call.rotations)} rotations are more than {MAX_ROTATIONS}"
        if not call.is_bound():
            return "the packed tensors are not known when the graph is lowered"
        if len({_krot(call, index) for index in range(len(call.rotations))}) > 1:
            return "the siblings' rotations have different numbers of rounds"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if self.arch is None:
            return _why_not_device(call.device)
        return None

    def why_not_fuse(self, call: SiblingCall) -> str | None:
        """Return why a call's producer should not rotate, or None: what the cost model says.

        Where the number of rows is dynamic, the operator decides when it knows them.
        """
        from parofx.triton_ops.producer_cost import why_not_in_producer

        if call.rows is None:
            return "the number of rows is dynamic; the operator places the rotation when it knows them"
        return why_not_in_producer(
            max(call.rows, 1),
            call.in_features,
            sum(call.out_features),
            call.group_size,
            _krot(call, 0),
            self.arch or architecture_of(call.device),
            rotations=len(call.rotations),
        )

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert one operator on packed tensors, and slices of its output."""
        bias, added = _bias(call)
        args = (call.x, *_rotation(call), *_weight(call)[:2], bias, _ends(call), _weight(call)[2])
        merged = call.gm.graph.call_function(_OPS.triton_rotate_int4_linear.default, args)
        return _outputs(call, merged, added)

    def emit_fused(self, fused: FusedCall) -> tuple[list[Node], Node | None]:
        """Insert the producer's operator, and that of the linears behind it."""
        call, producer, graph = fused.call, fused.producer, fused.call.gm.graph
        total: Node | None = None
        with graph.inserting_before(producer):
            rotation = _rotation(call)
            if producer.target is RMSNORM_ROTATE:
                args = (*producer.args[:5], *rotation)
                both = graph.call_function(_OPS.triton_rmsnorm_rotate.default, args)
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
            linear_args = (rotated, words, qparams, bias, _ends(call), call.group_size, locks)
            merged = graph.call_function(_OPS.triton_int4_linear.default, linear_args)
            return _outputs(call, merged, added), total


def _why_not_device(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    try:
        architecture_of(device)
    except ConfigError as error:
        return str(error)
    return None


def _krot(call: SiblingCall, index: int) -> int:
    _, theta, _ = call.rotations[index]
    return call.tensor(theta).shape[0]


def _ends(call: SiblingCall) -> list[int]:
    """Return where the columns of each rotation's linears end."""
    ends = [sum(call.out_features[: index + 1]) for index in range(len(call.out_features))]
    return ends[-len(call.rotations) :]


def _rotation(call: SiblingCall) -> tuple[Node, ...]:
    """Return `coefficients, order` of all rotations, packed once."""
    sources = [node for pairs, theta, channel_scales in call.rotations for node in (theta, pairs, channel_scales)]
    return call.constants("triton_rotation", sources, partial(_pack_rotations, call))


def _pack_rotations(call: SiblingCall) -> PackedRotation:
    packed = [pack_rotation(*map(call.tensor, nodes), call.group_size) for nodes in call.rotations]
    return stack_rotations(packed)


def _weight(call: SiblingCall) -> tuple[Node, ...]:
    """Return `words, qparams, locks` of all linears side by side, packed once."""
    return call.constants("triton_weight", [node for nodes in call.weights for node in nodes], partial(_pack, call))


def _pack(call: SiblingCall) -> tuple[Tensor, ...]:
    from parofx.triton_ops.launch import make_locks

    weights = [pack_weight(*map(call.tensor, nodes), call.group_size) for nodes in call.weights]
    merged = merge_weights(weights)
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
    return call.constants("triton_bias", bound, partial(_pack_bias, call))[0], [None] * len(call.biases)


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
