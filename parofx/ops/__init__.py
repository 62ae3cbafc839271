"""The semantic operators `torch.ops.parofx.*`: checkpoint layout, any device, opaque to the compiler.

Each block of the files here holds one operator: schema and reference, fake kernel, autograd. Passes match these
operators; providers replace them by operators on kernel layouts. The references compute in fp32 (fp64 for fp64 inputs)
and round once. Under autocast the linears cast `x`, as `F.linear` does.

| operator | returns |
|-|-|
| `rotate(v, pairs, theta, scales, group_size)` | `ROT(v ⊙ scales)` |
| `fake_quantize(w, scales, zeros, bits, group_size)` | `w` rounded to its grid; a copy while `scales` is empty |
| `int4_linear(x, qweight, qzeros, scales, bias, group_size, bits=4)` | `x @ Wq + bias` |
| `rotate_int4_linear(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size, bits=4)` | both |
| `rotate_int4_siblings(x, pairs[], theta[], …)` | one output per linear that reads the same `x` |
| `rmsnorm_rotate(x, residual, weight, …)` | the rotations of a normed sum, and the sum |
| `silu_mul_rotate(gate, up, …)` | the rotations of a gated activation |
| `int4_siblings(x[], qweight[], …)` | one output per linear that reads a rotated `x` |

"int4" is in their names from when there was no other width: `bits` 3, 4 or 8 says what the codes have. A graph states
it only where it is not 4. Behind it may stand `down (r, K)` and `up (r, N)`, a low-rank correction of the weight.
"""

from __future__ import annotations

from parofx.ops.autocast import cast_activation
from parofx.ops.linear import DEFAULT_BITS, int4_linear, int4_linear_backward, rotate_int4_linear, stated, stated_bits
from parofx.ops.producers import int4_siblings, rmsnorm_rotate, silu_mul_rotate
from parofx.ops.rounding import fake_quantize, fake_quantize_backward
from parofx.ops.siblings import (
    SIBLINGS_SCHEMA,
    differentiate_siblings,
    rotate_int4_siblings,
    save_siblings,
    spread_bias,
)
from parofx.ops.transform import rotate, rotate_backward

__all__ = [
    "DEFAULT_BITS",
    "SIBLINGS_SCHEMA",
    "cast_activation",
    "differentiate_siblings",
    "fake_quantize",
    "fake_quantize_backward",
    "int4_linear",
    "int4_linear_backward",
    "int4_siblings",
    "rmsnorm_rotate",
    "rotate",
    "rotate_backward",
    "rotate_int4_linear",
    "rotate_int4_siblings",
    "save_siblings",
    "silu_mul_rotate",
    "spread_bias",
    "stated",
    "stated_bits",
]
