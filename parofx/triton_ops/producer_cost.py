"""Whether the producer of a layer's input should rotate it: a pure function of sizes and architecture.

The producer runs anyway, so a rotation there costs neither a launch nor another pass over the activations; a rotation
inside the product costs every column of programs its own. But what computes the producer's input may have been one
kernel with it, as where a norm follows a norm: a launch for each. By estimate, for K = N = 4096 and g = 128 on sm_90:

| tokens | placement without it | rotation in the producer |
|-|-|-|
| 1 | inside the product | yes: there every column of programs rotates |
| 4 | inside the product or a kernel of its own | yes |
| 16 | a kernel of its own | yes: one launch less |
| 2048 | tensor cores, in a kernel of its own | no: gathers cost more than the launch |
"""

from __future__ import annotations

from parofx.triton_ops import cost_model
from parofx.triton_ops.architectures import architecture
from parofx.triton_ops.tiles import FusedTiles


def why_not_in_producer(
    tokens: int,
    in_features: int,
    out_features: int,
    group_size: int,
    krot: int,
    arch: str,
    *,
    rotations: int = 1,
    launches: int = 0,
) -> str | None:
    """Return why the producer should not rotate a layer's input, or None.

    Arguments as `cost_model.plan_layer`'s; `launches` is how many kernels it takes to compute the producer's inputs
    apart from it.
    """
    card = architecture(arch)
    sizes = (tokens, in_features, group_size, krot, card, rotations)
    plan = cost_model.plan_layer(tokens, in_features, out_features, group_size, krot, arch, rotations=rotations)
    linear = cost_model.choose_product(tokens, in_features, out_features, arch, group_size)
    product = cost_model.product_us(tokens, in_features, out_features, linear, card)
    if isinstance(plan.linear, FusedTiles):
        separate = cost_model.fused_us(tokens, in_features, out_features, group_size, krot, plan.linear, card)
    elif plan.placement == "gather":
        separate = product + cost_model.rotate_us(*sizes)
    else:
        separate = product + cost_model.dense_us(*sizes)
    rotating = cost_model.rotate_us(*sizes) - cost_model.LAUNCH_US + cost_model.PRODUCER_US
    in_producer = product + rotating + launches * cost_model.LAUNCH_US
    if in_producer < separate:
        return None
    return (
        f"rotating for {tokens} tokens takes {in_producer:.1f} µs in the producer, {separate:.1f} µs {plan.placement}"
    )
