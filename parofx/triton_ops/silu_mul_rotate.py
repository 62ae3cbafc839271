"""SiLU·mul that rotates: `out[s] = ROT_s(silu(gate) ⊙ up ⊙ channel_scales_s)`, `silu(v) = v / (1 + exp(−v))`.

| tensor | dtype | shape |
|-|-|-|
| `gate`, `up` | fp16, bf16, fp32 | `(M, K)`, rows of any stride (halves of one tensor, say), channels contiguous |
| `coefficients`, `order` | fp32, uint8 | `(S, K/g, 1 + krot, g)`, see `layout` |
| `out` | theirs | `(S, M, K)` |

A program holds `BLOCK_M` rows of one channel group in registers, fp32 from the first load to the last store; a group's
rounds are read once per program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import load_in_first_order, rotate_rows
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.producer_tiles import GateTiles


@triton.jit
def silu_mul_rotate_kernel(
    gate_ptr,
    up_ptr,
    coefficients_ptr,
    order_ptr,
    out_ptr,
    M,
    K,
    stride_gm,
    stride_um,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    group = tl.program_id(1)
    rotation = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_k = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    mask = offs_m < M
    table = (rotation * (K // GROUP) + group) * (1 + KROT) * GROUP + offs_k
    up_ptrs = up_ptr + offs_m * stride_um + group * GROUP
    v = load_in_first_order(up_ptrs, coefficients_ptr + table, order_ptr + table, mask)  # [BLOCK_M, GROUP]
    gate_ptrs = gate_ptr + offs_m * stride_gm + group * GROUP + tl.load(order_ptr + table).to(tl.int32)
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    v *= gate / (1.0 + tl.exp(-gate))
    v = rotate_rows(v, coefficients_ptr + table, order_ptr + table, BLOCK_M, GROUP, KROT, True)
    out_ptrs = out_ptr + (rotation * M + offs_m) * K + group * GROUP + offs_k
    tl.store(out_ptrs, v.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul_rotate(gate: Tensor, up: Tensor, rotation: PackedRotation, tiles: GateTiles) -> Tensor:
    """Return `(S, M, K)` for `gate` and `up` `(M, K)` and S stacked rotations.

    Raises:
        ShapeError: if `gate` and `up` are no matrices of one dtype with contiguous rows of K channels.
    """
    rotations, groups, rounds, group_size = rotation.order.shape
    tokens, channels = gate.shape[0], groups * group_size
    for name, rows in (("gate", gate), ("up", up)):
        if rows.shape != (tokens, channels) or rows.stride(1) != 1 or rows.dtype != gate.dtype:
            raise ShapeError(
                f"{name} must be {gate.dtype} ({tokens}, {channels}) with contiguous rows, "
                f"got {rows.dtype} {tuple(rows.shape)} of strides {rows.stride()}"
            )
    out = torch.empty((rotations, tokens, channels), dtype=gate.dtype, device=gate.device)
    if tokens == 0:
        return out
    silu_mul_rotate_kernel[(triton.cdiv(tokens, tiles.block_m), groups, rotations)](
        gate,
        up,
        rotation.coefficients,
        rotation.order,
        out,
        tokens,
        channels,
        gate.stride(0),
        up.stride(0),
        GROUP=group_size,
        KROT=rounds - 1,
        BLOCK_M=tiles.block_m,
        num_warps=tiles.num_warps,
    )
    return out
