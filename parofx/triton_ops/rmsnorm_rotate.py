"""RMSNorm that rotates: `out[s] = ROT_s(n ⊙ channel_scales_s)` with

    h = x + residual        n = h / √(mean(h²) + eps) · (weight + weight_offset)

| tensor | dtype | shape |
|-|-|-|
| `x`, `residual` | fp16, bf16, fp32 | `(M, K)`, rows of any stride, channels contiguous; `residual` may be missing |
| `weight` | floating | `(K,)`, may be missing |
| `coefficients`, `order` | fp32, uint8 | `(S, K/g, 1 + krot, g)`, see `layout` |
| `out` | x's | `(S, M, K)` |
| `total` | x's | `(M, K)`: h, rounded as it was before the norm |

A program rotates `BLOCK_GROUPS` channel groups of one row. Its norm is that of the whole row, which it sums for itself:
a row is a few kilobytes in L2, and no program waits for another, so that a single token still fills many processors
and K/g need not be a power of two. With one warp to a group, rounds exchange values inside a warp only.

Everything is fp32 from the first load to the last store, but for h, which is rounded since others read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import rotate_rows
from parofx.triton_ops.layout import PackedRotation
from parofx.triton_ops.producer_tiles import NormTiles


@triton.jit
def _load_sum(x_ptrs, residual_ptrs, mask, HAS_RESIDUAL: tl.constexpr):
    """Load `x + residual`, rounded to their dtype, as fp32; zero outside."""
    h = tl.load(x_ptrs, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        # In fp32 and back, as the addition of two narrow numbers is done everywhere.
        h = (h.to(tl.float32) + tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def rmsnorm_rotate_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    coefficients_ptr,
    order_ptr,
    out_ptr,
    total_ptr,
    M,
    K,
    stride_xm,
    stride_rm,
    weight_offset,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rotation = tl.program_id(2).to(tl.int64)
    x_ptr += row * stride_xm
    residual_ptr += row * stride_rm
    own = tl.program_id(1) * (BLOCK_GROUPS * GROUP)
    squares = tl.zeros([BLOCK_SUM], dtype=tl.float32)
    for start in range(0, K, BLOCK_SUM):
        k = start + tl.arange(0, BLOCK_SUM)
        h = _load_sum(x_ptr + k, residual_ptr + k, k < K, HAS_RESIDUAL)
        if HAS_RESIDUAL and rotation == 0:
            tl.store(total_ptr + row * K + k, h, mask=(k >= own) & (k < own + BLOCK_GROUPS * GROUP) & (k < K))
        wide = h.to(tl.float32)
        squares += wide * wide
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)

    groups = K // GROUP
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]  # [BLOCK_GROUPS, 1]
    inside = group < groups
    offs_g = tl.arange(0, GROUP)[None, :]  # [1, GROUP]
    # Groups beyond the end repeat the last one, and nothing of them is stored.
    group = tl.minimum(group, groups - 1)
    table = (rotation * groups + group) * ((1 + KROT) * GROUP) + offs_g  # [BLOCK_GROUPS, GROUP]
    k = group * GROUP + tl.load(order_ptr + table).to(tl.int32)
    h = _load_sum(x_ptr + k, residual_ptr + k, inside, HAS_RESIDUAL)
    v = h.to(tl.float32) * (scale * tl.load(coefficients_ptr + table))
    if HAS_WEIGHT:
        v *= tl.load(weight_ptr + k).to(tl.float32) + weight_offset
    v = rotate_rows(v, coefficients_ptr + table, order_ptr + table, BLOCK_GROUPS, GROUP, KROT, False)
    out_ptrs = out_ptr + (rotation * M + row) * K + group * GROUP + offs_g
    tl.store(out_ptrs, v.to(out_ptr.dtype.element_ty), mask=inside)


def rmsnorm_rotate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    weight_offset: float,
    eps: float,
    rotation: PackedRotation,
    tiles: NormTiles,
) -> tuple[Tensor, Tensor | None]:
    """Return `out (S, M, K)` and, with a residual, the sum `(M, K)`.

    Args:
        x: `(M, K)`.
        residual: alike, or None.
        weight: `(K,)`, or None.
        weight_offset: added to every weight.
        eps: added to the mean square.
        rotation: S stacked rotations.
        tiles: launch parameters.

    Raises:
        ShapeError: if tensors do not fit.
    """
    rotations, groups, rounds, group_size = rotation.order.shape
    channels = groups * group_size
    for name, rows in (("x", x), ("residual", residual)):
        if rows is not None and (rows.shape != (x.shape[0], channels) or rows.stride(1) != 1 or rows.dtype != x.dtype):
            raise ShapeError(
                f"{name} must be {x.dtype} ({x.shape[0]}, {channels}) with contiguous rows, "
                f"got {rows.dtype} {tuple(rows.shape)} of strides {rows.stride()}"
            )
    if weight is not None and (weight.shape != (channels,) or weight.stride(0) != 1):
        raise ShapeError(f"weight must be ({channels},) and contiguous, got {tuple(weight.shape)}")
    tokens = x.shape[0]
    out = torch.empty((rotations, tokens, channels), dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out, total
    rmsnorm_rotate_kernel[(tokens, triton.cdiv(groups, tiles.block_groups), rotations)](
        x,
        x if residual is None else residual,
        x if weight is None else weight,
        rotation.coefficients,
        rotation.order,
        out,
        out if total is None else total,
        tokens,
        channels,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        weight_offset,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None,
        GROUP=group_size,
        KROT=rounds - 1,
        BLOCK_GROUPS=tiles.block_groups,
        BLOCK_SUM=tiles.block_sum,
        num_warps=tiles.num_warps,
    )
    return out, total
