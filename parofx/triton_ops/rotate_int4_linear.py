"""The whole layer in one launch, for at most four tokens: `out = ROT(x ⊙ channel_scales) @ Wq + bias`.

| tensor | dtype | shape |
|-|-|-|
| `x` | fp16, bf16 | `(M, K)`, contiguous channels, M ≤ 4 |
| `coefficients`, `order` | fp32, uint8 | `(S, K/g, 1 + krot, g)`, see `layout` |
| `words`, `qparams` | int16, int32 | `(T, N, 32)`, `(128·T/g, N)`; siblings side by side along N |
| `bias` | fp16, bf16, fp32 | `(N,)` or None |
| `out` | x's | `(M, N)` |

A program owns `SLICE` K tiles of 128 channels and `BLOCK_N` columns. It rotates its slice of x (real rows only, once)
and then multiplies the transposed way, weights first, so that tokens are the narrow side of the tensor cores' tile.
That has `SLOTS` slots (8 on NVIDIA, 16 on AMD) and there are at most four tokens, so the other slots hold the *other K
tiles of the slice*: slot `t·ROWS + m` is token m in tile t. Then the operand x is made once and stays, every product is
taken with all tiles' slots, and of tile t's product only the slots of tile t are kept. At the end the slots of a token
are added up.

Rounding: rotated activations are rounded to x's dtype, products and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import (
    dequantize,
    last_to_arrive,
    load_in_first_order,
    load_qparams,
    locate_tile,
    rotate_rows,
    scale_of,
)
from parofx.triton_ops.layout import TILE_K, PackedRotation, PackedWeight
from parofx.triton_ops.siblings import check_bias, check_siblings, column_tiles, inner_ends, split_buffer
from parofx.triton_ops.tiles import FusedTiles, operand_slots, padded_rows


@triton.jit
def _rotated_operand(
    x_ptr,
    coefficients_ptr,
    order_ptr,
    M,
    K,
    stride_xm,
    first,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Return the rotated slice as four operands `[32, SLOTS]`, one per nibble, in x's dtype."""
    GROUPS_PER_TILE: tl.constexpr = 128 // GROUP
    # A row is one token in one channel group: (tile, token, group of the tile).
    LINES: tl.constexpr = SLICE * ROWS * GROUPS_PER_TILE
    line = tl.arange(0, LINES)[:, None]  # [LINES, 1]
    group = (first + line // (ROWS * GROUPS_PER_TILE)) * GROUPS_PER_TILE + line % GROUPS_PER_TILE
    token = line // GROUPS_PER_TILE % ROWS
    inside = group * GROUP < K
    offs_k = tl.arange(0, GROUP)[None, :]
    table = tl.where(inside, group, 0) * ((1 + KROT) * GROUP) + offs_k  # [LINES, GROUP]
    x_ptrs = x_ptr + token * stride_xm + group * GROUP
    v = load_in_first_order(x_ptrs, coefficients_ptr + table, order_ptr + table, inside & (token < M))
    v = rotate_rows(v, coefficients_ptr + table, order_ptr + table, LINES, GROUP, KROT, False)
    v = tl.reshape(v.to(x_ptr.dtype.element_ty), [1, SLICE * ROWS, 128])
    # The slots that are left hold copies, which no one looks at.
    v = tl.reshape(tl.broadcast_to(v, [SLOTS // (SLICE * ROWS), SLICE * ROWS, 128]), [SLOTS, 2, 2, 32])
    low, high = tl.split(tl.permute(v, [0, 2, 3, 1]))  # [SLOTS, 2, 32], nibbles 0 1 and 2 3
    x_0, x_1 = tl.split(tl.permute(low, [0, 2, 1]))
    x_2, x_3 = tl.split(tl.permute(high, [0, 2, 1]))
    return tl.trans(x_0), tl.trans(x_1), tl.trans(x_2), tl.trans(x_3)


@triton.jit(do_not_specialize=["M"])
def rotate_int4_linear_kernel(
    x_ptr,
    coefficients_ptr,
    order_ptr,
    words_ptr,
    qparams_ptr,
    bias_ptr,
    out_ptr,
    partials_ptr,
    locks_ptr,
    M,
    N,
    K,
    stride_xm,
    n_end_0,
    n_end_1,
    n_end_2,
    GROUP: tl.constexpr,
    KROT: tl.constexpr,
    ROTATIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Rotate `SLICE` tiles of x and multiply them with `BLOCK_N` columns; grid (column tiles, splits)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS_PER_TILE: tl.constexpr = 128 // GROUP
    NIBBLES_PER_GROUP: tl.constexpr = GROUP // 32

    split, splits = tl.program_id(1), tl.num_programs(1)
    rotation, n_start, n_end = locate_tile(tl.program_id(0), N, n_end_0, n_end_1, n_end_2, BLOCK_N, ROTATIONS)
    offs_n = n_start + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    # Columns beyond the end repeat the last one: no mask in the loop, and nothing of them is stored.
    columns = tl.minimum(offs_n, n_end - 1)
    tiles_k = tl.cdiv(K, 128)
    first = split * SLICE
    tiles = tl.minimum(SLICE, tiles_k - first)
    word_ptrs = words_ptr + first.to(tl.int64) * N * 32 + (columns * 32 + tl.arange(0, 32)[None, :])
    qparam_ptrs = qparams_ptr + first.to(tl.int64) * GROUPS_PER_TILE * N + columns

    table = rotation * (K // GROUP) * (1 + KROT) * GROUP
    x = _rotated_operand(
        x_ptr, coefficients_ptr + table, order_ptr + table, M, K, stride_xm, first, GROUP, KROT, SLICE, ROWS, SLOTS
    )
    tile_of_slot = tl.arange(0, SLOTS)[None, :] // ROWS
    acc = tl.zeros([BLOCK_N, SLOTS], dtype=tl.float32)
    for tile in range(tiles):
        qparams = load_qparams(qparam_ptrs, N, GROUP)
        weights = dequantize(tl.load(word_ptrs), qparams, DTYPE, PTX)
        for nibble in tl.static_range(4):
            if nibble % NIBBLES_PER_GROUP == 0:
                part = tl.zeros_like(acc)
            part = tl.dot(weights[nibble], x[nibble], part)
            if (nibble + 1) % NIBBLES_PER_GROUP == 0:
                scaled = part * scale_of(qparams[nibble])
                if nibble >= NIBBLES_PER_GROUP:
                    scaled += acc
                acc = tl.where(tile_of_slot == tile, scaled, acc)
        word_ptrs += N * 32
        qparam_ptrs += GROUPS_PER_TILE * N

    # [BLOCK_N, ROWS]: token m is the sum of slots m, m + ROWS, …; those beyond the slice are zero.
    total = tl.sum(tl.reshape(acc, [BLOCK_N, SLOTS // ROWS, ROWS]), axis=1)
    offs_m = tl.arange(0, ROWS)[None, :]
    mask = (offs_m < M) & (offs_n < n_end)
    offs_out = offs_m.to(tl.int64) * N + offs_n
    if SPLIT:
        shares = partials_ptr + offs_out
        share = split.to(tl.int64) * M * N
        if not last_to_arrive(shares + share, total, mask, locks_ptr + tl.program_id(0), splits):
            return
        total = tl.zeros_like(total)
        for _ in range(splits):
            total += tl.load(shares, mask=mask, other=0.0, cache_modifier=".cg")
            shares += tl.cast(M, tl.int64) * N
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns).to(tl.float32)
    tl.store(out_ptr + offs_out, total.to(DTYPE), mask=mask)


def rotate_int4_linear(
    x: Tensor,
    rotation: PackedRotation,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    locks: Tensor,
    tiles: FusedTiles,
    *,
    ptx: bool,
) -> Tensor:
    """Return `(M, N)`.

    Args:
        x: `(M, K)`, M at most 4.
        rotation: S stacked rotations, one for all columns or one per sibling.
        weight: of N columns, of all siblings.
        bias: `(N,)`, or None.
        ends: S numbers, the columns' end of each rotation's sibling; the last is N.
        locks: int32 zeros, one per column tile; zeros again afterwards.
        tiles: launch parameters.
        ptx: inline assembly, for NVIDIA only.

    Raises:
        ShapeError: if tensors do not fit.
        ConfigError: if the tiles do not serve this number of tokens.
    """
    rotations, groups, rows, group_size = rotation.order.shape
    tokens, channels = x.shape
    out_features = weight.words.shape[1]
    check_siblings(rotations, ends, out_features)
    check_bias(bias, out_features)
    tiles_k = triton.cdiv(channels, TILE_K)
    if channels != groups * group_size or weight.words.shape[0] != tiles_k or (x.numel() and x.stride(1) != 1):
        raise ShapeError(
            f"x must be (M, {groups * group_size}) with contiguous rows and {weight.words.shape[0]} tiles of {TILE_K} "
            f"channels, got {tuple(x.shape)} of strides {x.stride()}"
        )
    out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    tiles.check(tokens)
    split_k = triton.cdiv(tiles_k, tiles.slice_tiles)
    tiles_n = column_tiles(ends, tiles.block_n)
    partials = split_buffer(split_k, tokens, out_features, tiles_n, locks)
    rotate_int4_linear_kernel[(tiles_n, split_k)](
        x,
        rotation.coefficients,
        rotation.order,
        weight.words,
        weight.qparams,
        out if bias is None else bias,
        out,
        partials,
        locks,
        tokens,
        out_features,
        channels,
        x.stride(0),
        *inner_ends(ends),
        GROUP=group_size,
        KROT=rows - 1,
        ROTATIONS=rotations,
        HAS_BIAS=bias is not None,
        ROWS=padded_rows(tokens),
        BLOCK_N=tiles.block_n,
        SLICE=tiles.slice_tiles,
        SLOTS=operand_slots(ptx=ptx),
        SPLIT=split_k > 1,
        PTX=ptx,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
