"""The rotation as a block-diagonal product: `out[s] = (x ⊙ channel_scales_s) @ blockdiag(matrices_s)`.

| tensor | dtype | shape |
|-|-|-|
| `x` | fp16, bf16 | `(M, K)`, rows of any stride, channels contiguous |
| `coefficients`, `order` | fp32, uint8 | `(S, K/g, 1 + krot, g)`, see `layout` |
| `matrices` | x's | `(S, K/g, g, g)`: the rounds applied to the unit vectors, rows in the first round's order |
| `out` | x's | `(S, M, K)` |

For many tokens: where the gather form spends 16 shuffles a round and row, tensor cores do all rounds at once. The
matrices are made by a launch of their own, at the price of rotating g more rows, instead of being kept: they would
take an eighth of the 4-bit weight's memory. They are rounded to x's dtype, and so are the scaled activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import load_in_first_order, rotate_rows
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.tiles import DenseTiles

#: Unit vectors per program of one warp.
_UNIT_ROWS = 4


@triton.jit
def rotation_matrices_kernel(
    coefficients_ptr,
    order_ptr,
    matrices_ptr,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotate `BLOCK_M` unit vectors of one group; grid (row blocks, rotations · groups)."""
    group = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_k = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    table = group * ((1 + KROT) * GROUP) + offs_k
    v = tl.where(offs_m == offs_k, 1.0, 0.0)  # [BLOCK_M, GROUP]
    v = rotate_rows(v, coefficients_ptr + table, order_ptr + table, BLOCK_M, GROUP, KROT, True)
    matrix_ptrs = matrices_ptr + group * (GROUP * GROUP) + offs_m * GROUP + offs_k
    tl.store(matrix_ptrs, v.to(matrices_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def rotate_dense_kernel(
    x_ptr,
    coefficients_ptr,
    order_ptr,
    matrices_ptr,
    out_ptr,
    M,
    K,
    stride_xm,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Multiply `BLOCK_M` rows of one group with its matrix; grid (row blocks, groups, rotations)."""
    group = tl.program_id(1)
    rotation = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_k = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    mask = offs_m < M
    block = rotation * (K // GROUP) + group
    table = block * ((1 + KROT) * GROUP) + offs_k
    x_ptrs = x_ptr + offs_m * stride_xm + group * GROUP
    v = load_in_first_order(x_ptrs, coefficients_ptr + table, order_ptr + table, mask)  # [BLOCK_M, GROUP]
    matrix_ptrs = matrices_ptr + block * (GROUP * GROUP) + tl.arange(0, GROUP)[:, None] * GROUP + offs_k
    rotated = tl.dot(v.to(x_ptr.dtype.element_ty), tl.load(matrix_ptrs))  # [BLOCK_M, GROUP]
    out_ptrs = out_ptr + (rotation * M + offs_m) * K + group * GROUP + offs_k
    tl.store(out_ptrs, rotated.to(out_ptr.dtype.element_ty), mask=mask)


def rotate_dense(x: Tensor, rotation: PackedRotation, tiles: DenseTiles) -> Tensor:
    """Return `(S, M, K)`: `x (M, K)` under each of the stacked rotations `(S, K/g, 1 + krot, g)`.

    Raises:
        ShapeError: if `x` is no matrix with contiguous rows of K channels, or not of a 16-bit dtype.
    """
    rotations, groups, rows, group_size = rotation.order.shape
    channels = groups * group_size
    if x.dim() != 2 or x.shape[1] != channels or (x.numel() and x.stride(1) != 1) or x.dtype.itemsize != 2:
        raise ShapeError(
            f"x must be float16 or bfloat16 (M, {channels}) with contiguous rows, "
            f"got {x.dtype} {tuple(x.shape)} of strides {x.stride()}"
        )
    tokens = x.shape[0]
    out = torch.empty((rotations, tokens, channels), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    matrices = torch.empty((rotations, groups, group_size, group_size), dtype=x.dtype, device=x.device)
    rotation_matrices_kernel[(group_size // _UNIT_ROWS, rotations * groups)](
        rotation.coefficients,
        rotation.order,
        matrices,
        GROUP=group_size,
        KROT=rows - 1,
        BLOCK_M=_UNIT_ROWS,
        num_warps=1,
    )
    rotate_dense_kernel[(triton.cdiv(tokens, tiles.block_m), groups, rotations)](
        x,
        rotation.coefficients,
        rotation.order,
        matrices,
        out,
        tokens,
        channels,
        x.stride(0),
        GROUP=group_size,
        KROT=rows - 1,
        BLOCK_M=tiles.block_m,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
