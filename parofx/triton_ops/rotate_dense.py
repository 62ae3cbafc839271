"""The rotation as a block-diagonal product: `out[s] = (x ⊙ channel_scales_s) @ blockdiag(matrices_s)`.

| tensor | dtype | shape |
|-|-|-|
| `x` | fp16, bf16 | `(M, K)`, rows of any stride, channels contiguous |
| `matrices` | x's | `(S, K/g, g, g)`, row-vector convention |
| `channel_scales` | fp32 | `(S, K)` |
| `out` | x's | `(S, M, K)` |

For many tokens: where the gather form spends 16 shuffles a round and row, tensor cores do all rounds at once. The
price is one rounding of the matrices and one of the scaled activations to x's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops.layout import DenseRotation
from parofx.triton_ops.tiles import DenseTiles


@triton.jit
def rotate_dense_kernel(
    x_ptr,
    matrices_ptr,
    scales_ptr,
    out_ptr,
    M,
    K,
    stride_xm,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    group = tl.program_id(1)
    rotation = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [BLOCK_M, 1]
    offs_k = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    mask = offs_m < M
    x = tl.load(x_ptr + offs_m * stride_xm + group * GROUP + offs_k, mask=mask, other=0.0)  # [BLOCK_M, GROUP]
    scales = tl.load(scales_ptr + rotation * K + group * GROUP + offs_k)
    scaled = (x.to(tl.float32) * scales).to(x_ptr.dtype.element_ty)
    block = (rotation * (K // GROUP) + group) * (GROUP * GROUP)
    matrix = tl.load(matrices_ptr + block + tl.arange(0, GROUP)[:, None] * GROUP + offs_k)  # [GROUP, GROUP]
    rotated = tl.dot(scaled, matrix)
    out_ptrs = out_ptr + (rotation * M + offs_m) * K + group * GROUP + offs_k
    tl.store(out_ptrs, rotated.to(out_ptr.dtype.element_ty), mask=mask)


def rotate_dense(x: Tensor, rotation: DenseRotation, tiles: DenseTiles) -> Tensor:
    """Return `(S, M, K)`: `x (M, K)` under each of the stacked rotations.

    Raises:
        ShapeError: if `x` is no matrix with contiguous rows of K channels, or of another dtype than the matrices.
    """
    rotations, groups, group_size, _ = rotation.matrices.shape
    channels = groups * group_size
    if x.dim() != 2 or x.shape[1] != channels or x.stride(1) != 1 or x.dtype != rotation.matrices.dtype:
        raise ShapeError(
            f"x must be {rotation.matrices.dtype} (M, {channels}) with contiguous rows, "
            f"got {x.dtype} {tuple(x.shape)} of strides {x.stride()}"
        )
    tokens = x.shape[0]
    out = torch.empty((rotations, tokens, channels), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    rotate_dense_kernel[(triton.cdiv(tokens, tiles.block_m), groups, rotations)](
        x,
        rotation.matrices,
        rotation.channel_scales,
        out,
        tokens,
        channels,
        x.stride(0),
        GROUP=group_size,
        BLOCK_M=tiles.block_m,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
