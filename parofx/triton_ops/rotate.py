"""The rotation in gather form: `out[s] = ROT_s(x ⊙ channel_scales_s)` for `s` rotations of one activation.

| tensor | dtype | shape |
|-|-|-|
| `x` | fp16, bf16, fp32 | `(M, K)`, rows of any stride, channels contiguous |
| `coefficients`, `order` | fp32, uint8 | `(S, K/g, 1 + krot, g)`, see `layout` |
| `out` | x's | `(S, M, K)` |

A program holds `BLOCK_M` rows of one channel group in registers, fp32 from the first round to the last, and rounds
once. Channel groups are grid points, so that K/g need not be a power of two; a group's rounds are read once per
program. `tl.gather` along the channels becomes warp shuffles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import load_in_first_order, rotate_rows
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.tiles import RotateTiles


@triton.jit(do_not_specialize=["M"])
def rotate_kernel(
    x_ptr,
    coefficients_ptr,
    order_ptr,
    out_ptr,
    M,
    K,
    stride_xm,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotate `BLOCK_M` rows of one group; grid (row blocks, groups, rotations)."""
    group = tl.program_id(1)
    rotation = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_k = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    mask = offs_m < M
    table = (rotation * (K // GROUP) + group) * (1 + KROT) * GROUP + offs_k
    x_ptrs = x_ptr + offs_m * stride_xm + group * GROUP
    v = load_in_first_order(x_ptrs, coefficients_ptr + table, order_ptr + table, mask)  # [BLOCK_M, GROUP]
    v = rotate_rows(v, coefficients_ptr + table, order_ptr + table, BLOCK_M, GROUP, KROT, True)
    out_ptrs = out_ptr + (rotation * M + offs_m) * K + group * GROUP + offs_k
    tl.store(out_ptrs, v.to(out_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, rotation: PackedRotation, tiles: RotateTiles) -> Tensor:
    """Return `(S, M, K)`: `x (M, K)` under each of the stacked rotations `(S, K/g, 1 + krot, g)`.

    Raises:
        ShapeError: if `x` is no matrix with contiguous rows of K channels.
    """
    rotations, groups, rows, group_size = rotation.order.shape
    if x.dim() != 2 or x.shape[1] != groups * group_size or (x.numel() and x.stride(1) != 1):
        raise ShapeError(
            f"x must be (M, {groups * group_size}) with contiguous rows, got {tuple(x.shape)} of strides {x.stride()}"
        )
    tokens, channels = x.shape
    out = torch.empty((rotations, tokens, channels), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    grid = (triton.cdiv(tokens, tiles.block_m), groups, rotations)
    rotate_kernel[grid](
        x,
        rotation.coefficients,
        rotation.order,
        out,
        tokens,
        channels,
        x.stride(0),
        GROUP=group_size,
        KROT=rows - 1,
        BLOCK_M=tiles.block_m,
        num_warps=tiles.num_warps,
    )
    return out
