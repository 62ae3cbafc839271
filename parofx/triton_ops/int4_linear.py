"""The int4 product `out = x @ Wq + bias`, `Wq[k, n] = (q[k, n] − z[k//g, n])·scales[k//g, n]`, of rotated activations.

| tensor | dtype | shape |
|-|-|-|
| `x` | fp16, bf16 | `(S, M, K)`, contiguous channels; S rotations of one activation, or 1 |
| `words`, `qparams` | int16, int32 | `(T, N, 32)`, `(128·T/g, N)`, see `layout`; siblings side by side along N |
| `bias` | fp16, bf16, fp32 | `(N,)` or None |
| `out` | x's | `(M, N)` |

Weights become `q − z`, exact in fp16 and bf16, in registers; a group's product accumulates in fp32 and is scaled
there, so a weight costs no multiplication of its own. `SWAP_AB` computes the transposed product: the weights are then
the operand that tensor cores of sm_90 and later can read from registers.

With `SPLIT` the programs of grid axis 1 share an output tile: each stores an fp32 share, and the last one adds them
up in order. One launch, and deterministic; `locks` must be zero before and are zero after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.errors import ShapeError
from parofx.triton_ops._device import dequantize, last_to_arrive, load_qparams, locate_tile, scale_of
from parofx.triton_ops.layout import TILE_K, PackedWeight
from parofx.triton_ops.siblings import check_bias, check_siblings, column_tiles, inner_ends, split_buffer
from parofx.triton_ops.tiles import LinearTiles


@triton.jit(do_not_specialize=["M"])
def int4_linear_kernel(
    x_ptr,
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
    stride_xs,
    n_end_0,
    n_end_1,
    n_end_2,
    GROUP: tl.constexpr,
    ROTATIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP_AB: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute `BLOCK_M` tokens and `BLOCK_N` columns over one share of K; grid (output tiles, splits)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # Axis of the tokens and of the output columns in the accumulator.
    AXIS_M: tl.constexpr = 1 if SWAP_AB else 0
    AXIS_N: tl.constexpr = 0 if SWAP_AB else 1
    GROUPS_PER_TILE: tl.constexpr = 128 // GROUP
    NIBBLES_PER_GROUP: tl.constexpr = GROUP // 32

    # Programs of one column tile run side by side and share its weights in L2.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    split, splits = tl.program_id(1), tl.num_programs(1)
    rotation, n_start, n_end = locate_tile(tile_n, N, n_end_0, n_end_1, n_end_2, BLOCK_N, ROTATIONS)

    offs_m = tl.expand_dims(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), AXIS_N)  # [BLOCK_M, 1]
    offs_n = tl.expand_dims(n_start + tl.arange(0, BLOCK_N), AXIS_M)  # [1, BLOCK_N]
    # Rows and columns beyond the end repeat the last one: no mask in the loop, and nothing of them is stored.
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = tl.minimum(offs_n, n_end - 1)
    offs_xk = tl.expand_dims(tl.arange(0, 32), AXIS_M)  # [1, 32]
    offs_r = tl.expand_dims(tl.arange(0, 32), AXIS_N)  # [32, 1]

    tiles_k = tl.cdiv(K, 128)
    tiles_per_split = tl.cdiv(tiles_k, splits)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tiles_k)
    x_ptrs = x_ptr + tl.cast(rotation, tl.int64) * stride_xs + rows * stride_xm + (first * 128 + offs_xk)
    word_ptrs = words_ptr + first.to(tl.int64) * N * 32 + (columns * 32 + offs_r)
    qparam_ptrs = qparams_ptr + first.to(tl.int64) * GROUPS_PER_TILE * N + columns

    if SWAP_AB:
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(first, end):
        qparams = load_qparams(qparam_ptrs, N, GROUP)
        weights = dequantize(tl.load(word_ptrs), qparams, DTYPE, PTX)
        for nibble in tl.static_range(4):
            if nibble % NIBBLES_PER_GROUP == 0:
                part = tl.zeros_like(acc)
            if EVEN_K:
                x = tl.load(x_ptrs + nibble * 32)
            else:
                x = tl.load(x_ptrs + nibble * 32, mask=tile * 128 + nibble * 32 + offs_xk < K, other=0.0)
            if SWAP_AB:
                part = tl.dot(weights[nibble], x, part)
            else:
                part = tl.dot(x, weights[nibble], part)
            if (nibble + 1) % NIBBLES_PER_GROUP == 0:
                acc += part * scale_of(qparams[nibble])
        x_ptrs += 128
        word_ptrs += N * 32
        qparam_ptrs += GROUPS_PER_TILE * N

    mask = (offs_m < M) & (offs_n < n_end)
    offs_out = offs_m.to(tl.int64) * N + offs_n
    if SPLIT:
        shares = partials_ptr + offs_out
        share = split.to(tl.int64) * M * N
        if not last_to_arrive(shares + share, acc, mask, locks_ptr + tl.program_id(0), splits):
            return
        acc = tl.zeros_like(acc)
        for _ in range(splits):
            # Not from L1, which may hold what was there before another program wrote.
            acc += tl.load(shares, mask=mask, other=0.0, cache_modifier=".cg")
            shares += tl.cast(M, tl.int64) * N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns).to(tl.float32)
    tl.store(out_ptr + offs_out, acc.to(DTYPE), mask=mask)


def int4_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    locks: Tensor,
    tiles: LinearTiles,
    *,
    ptx: bool,
) -> Tensor:
    """Return `(M, N)`.

    Args:
        x: `(S, M, K)`.
        weight: of N columns, of all siblings.
        bias: `(N,)`, or None.
        ends: S numbers, the columns' end of each rotation's sibling; the last is N.
        group_size: channels per group.
        locks: int32 zeros, one per output tile if `tiles.split_k > 1`; zeros again afterwards.
        tiles: launch parameters.
        ptx: inline assembly, for NVIDIA only.

    Raises:
        ShapeError: if tensors do not fit.
    """
    rotations, tokens, channels = x.shape
    out_features = weight.words.shape[1]
    check_siblings(rotations, ends, out_features)
    check_bias(bias, out_features)
    if weight.words.shape[0] != triton.cdiv(channels, TILE_K) or (x.numel() and x.stride(2) != 1):
        raise ShapeError(
            f"x must be (S, M, K) with contiguous rows and K in {weight.words.shape[0]} tiles of {TILE_K}, "
            f"got {tuple(x.shape)} of strides {x.stride()}"
        )
    out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    tiles_n = column_tiles(ends, tiles.block_n)
    output_tiles = triton.cdiv(tokens, tiles.block_m) * tiles_n
    partials = split_buffer(tiles.split_k, tokens, out_features, output_tiles, locks)
    int4_linear_kernel[(output_tiles, tiles.split_k)](
        x,
        weight.words,
        weight.qparams,
        out if bias is None else bias,
        out,
        partials,
        locks,
        tokens,
        out_features,
        channels,
        x.stride(1),
        x.stride(0),
        *inner_ends(ends),
        GROUP=group_size,
        ROTATIONS=rotations,
        HAS_BIAS=bias is not None,
        EVEN_K=channels % TILE_K == 0,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        SPLIT=tiles.split_k > 1,
        SWAP_AB=tiles.swap_ab,
        PTX=ptx,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
