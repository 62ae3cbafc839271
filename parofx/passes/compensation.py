"""Low-rank corrections in a CALIBRATED graph: what rounding took from a weight, as a product of two thin matrices.

    linear(rotate(x, …), fake_quantize(W_rot, …), b)
        →   linear(rotate(x, …), fake_quantize(W_rot, …) + up @ down, b)

`up (N, r)` and `down (r, K)` are fp16 buffers in the rotated space. `convert` makes them arguments of the packed
linear, `up` transposed, so that both hold a row for each rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.passes.graph import CAST, FAKE_QUANTIZE, buffer_node, get_attribute, inherit_meta

ADD = torch.ops.aten.add.Tensor
PRODUCT = torch.ops.aten.mm.default


def compensate(gm: GraphModule, fake_quantize: Node, up: Tensor, down: Tensor) -> None:
    """Add `up @ down` to a fake-quantized weight, whoever reads it."""
    value = fake_quantize.meta["val"]
    name = fake_quantize.meta["parofx_linear"]
    readers = list(fake_quantize.users)
    with gm.graph.inserting_before(fake_quantize.next):
        halves = [
            gm.graph.call_function(CAST, (buffer_node(gm, f"{name}.fake_quantize.{half}", tensor), value.dtype))
            for half, tensor in (("up", up.half()), ("down", down.half()))
        ]
        product = gm.graph.call_function(PRODUCT, tuple(halves))
        total = gm.graph.call_function(ADD, (fake_quantize, product))
    for node, example in zip((*halves, product, total), (up, down, value, value), strict=True):
        inherit_meta(node, fake_quantize).meta["val"] = example
    for reader in readers:
        reader.replace_input_with(fake_quantize, total)


def quantized_weight(weight: object) -> Node | None:
    """Return the `fake_quantize` node behind what a linear multiplies by, corrected or not, or None."""
    if isinstance(weight, Node) and weight.target is ADD:
        weight = weight.args[0] if _product(weight) is not None else None
    return weight if isinstance(weight, Node) and weight.target is FAKE_QUANTIZE else None


def correction(gm: GraphModule, weight: object) -> tuple[Tensor, Tensor] | None:
    """Return `(down (r, K), up (r, N))`, fp16, of what a linear multiplies by, or None where nothing is added."""
    product = _product(weight)
    if product is None:
        return None
    up, down = (get_attribute(gm, str(_buffer(half).target)).detach().half() for half in product.args)
    return down.contiguous(), up.t().contiguous()


def _product(weight: object) -> Node | None:
    """Return the product of two buffers that is added to a fake-quantized weight, or None."""
    if not isinstance(weight, Node) or weight.target is not ADD or weight.kwargs or len(weight.args) != 2:
        return None
    base, product = weight.args
    if not isinstance(base, Node) or base.target is not FAKE_QUANTIZE:
        return None
    if not isinstance(product, Node) or product.target is not PRODUCT:
        return None
    return product if all(_buffer(half).op == "get_attr" for half in product.args) else None


def _buffer(half: object) -> Node:
    assert isinstance(half, Node)
    source = half.args[0] if half.target is CAST else half
    assert isinstance(source, Node)
    return source
