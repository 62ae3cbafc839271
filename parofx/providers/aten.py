"""A CPU provider made of ATen: rotation in gather form, then PyTorch's int4 product, in bfloat16.

`aten::_weight_int4pack_mm_for_cpu` is fast in bfloat16 only (its fp16 and fp32 paths are scalar) and holds scales in
bfloat16, so that its relative error is about 2.4e-3. It computes `(q − 8)·scale + zero`; the checkpoint's `(q − z)·s`
is `scale = s`, `zero = (8 − z)·s`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parofx import ops, packing, rotation
from parofx.providers.base import SiblingCall

#: The product wants whole tiles of output channels.
_OUT_FEATURES_MULTIPLE = 16
_GROUP_SIZES = (32, 64, 128)


def pack_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(packed, scales_and_zeros (K/g, N, 2) bf16)` of the checkpoint's tensors."""
    codes, scale, zeros = packing.unpack_linear(qweight, qzeros, scales)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 2)
    scale = scale.float()
    both = torch.stack((scale, (8 - zeros.float()) * scale), dim=-1)
    return packed, both.transpose(0, 1).to(torch.bfloat16).contiguous()


def pack_rotation(
    pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(partner int64, cos, sin, channel scales)` in fp32, the rotation in gather form."""
    form = rotation.gather_form(pairs, theta.float(), group_size)
    return form.partner, form.cos, form.sin, channel_scales.reshape(-1).float()


@torch.library.custom_op("parofx::aten_int4_siblings", mutates_args=())
def aten_int4_siblings(
    x: Tensor,
    partner: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    packed: Sequence[Tensor],
    scales_and_zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
) -> list[Tensor]:
    """Return one `(…, N_i)` per linear for `x (…, K)` in bfloat16."""
    rows = x.reshape(-1, x.shape[-1]).float()
    rotated = []
    for which, form in enumerate(zip(partner, cos, sin, strict=True)):
        value = rows * channel_scales[which]
        for partners, c, s in zip(*form, strict=True):
            value = torch.addcmul(value * c, value.index_select(1, partners), s)
        rotated.append(value.to(x.dtype))
    outputs = []
    for which, added in enumerate(ops.spread_bias(bias, has_bias)):
        source = rotated[which if len(rotated) > 1 else 0]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(source, packed[which], group_size, scales_and_zeros[which])
        y = y if added is None else (y + added.to(y.dtype))
        outputs.append(y.reshape(*x.shape[:-1], y.shape[-1]))
    return outputs


@aten_int4_siblings.register_fake
def _(
    x: Tensor,
    partner: Sequence[Tensor],
    cos: Sequence[Tensor],
    sin: Sequence[Tensor],
    channel_scales: Sequence[Tensor],
    packed: Sequence[Tensor],
    scales_and_zeros: Sequence[Tensor],
    bias: Sequence[Tensor],
    has_bias: Sequence[bool],
    group_size: int,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], both.shape[1])) for both in scales_and_zeros]


class AtenProvider:
    """Serves bfloat16 on CPU."""

    name = "aten"

    def why_not(self, call: SiblingCall) -> str | None:
        """Return why ATen's int4 product does not serve a call, or None."""
        if call.device.type != "cpu":
            return f"device {call.device.type} is not cpu"
        if call.bits != 4:
            return f"weights have {call.bits} bits; the product knows 4"
        if call.corrections:
            return "weights have low-rank corrections, which the product does not add"
        if call.activations != "float":
            return f"it does not quantize activations to {call.activations}"
        if call.dtype != torch.bfloat16:
            return f"{call.dtype} is scalar code there; only bfloat16 is fast"
        if not call.is_bound():
            return "the packed tensors are not known when the graph is lowered"
        if call.group_size not in _GROUP_SIZES:
            return f"group_size {call.group_size} is not one of {_GROUP_SIZES}"
        if any(n % _OUT_FEATURES_MULTIPLE for n in call.out_features):
            return f"out_features {call.out_features} are not multiples of {_OUT_FEATURES_MULTIPLE}"
        return None

    def emit(self, call: SiblingCall) -> list[Node]:
        """Insert the operator on weights packed for it."""
        graph = call.gm.graph
        rotations = []
        for nodes in call.rotations:
            pairs, theta, channel_scales = (call.tensor(node) for node in nodes)
            make_rotation = partial(pack_rotation, pairs, theta, channel_scales, call.group_size)
            rotations.append(call.constants("aten_rotation", (nodes[1], nodes[0], nodes[2]), make_rotation))
        weights = []
        for nodes in call.weights:
            make_weight = partial(pack_weight, *(call.tensor(node) for node in nodes))
            weights.append(call.constants("aten_weight", nodes, make_weight))
        args: tuple[Any, ...] = (
            call.x,
            *([rotation[index] for rotation in rotations] for index in range(4)),
            *([weight[index] for weight in weights] for index in range(2)),
            [bias for bias in call.biases if bias is not None],
            [bias is not None for bias in call.biases],
            call.group_size,
        )
        merged = graph.call_function(torch.ops.parofx.aten_int4_siblings.default, args)
        merged.meta = dict(call.node.meta)
        return [graph.call_function(operator.getitem, (merged, index)) for index in range(len(weights))]
