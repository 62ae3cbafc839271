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

With `SPLIT_K > 1` programs share an output tile: each stores an fp32 share, and the last one adds them up in order.
One launch, and deterministic; `locks` must be zero before and are zero after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from parofx.triton_ops._device import dequantize, last_to_arrive, locate_tile, scale_of, zero_points


@triton.jit
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
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    PTX: tl.constexpr,
):
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
    split = tl.program_id(1)
    rotation, n_start, n_end = locate_tile(tile_n, N, n_end_0, n_end_1, n_end_2, BLOCK_N, ROTATIONS)

    offs_m = tl.expand_dims(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), AXIS_N)  # [BLOCK_M, 1]
    offs_n = tl.expand_dims(n_start + tl.arange(0, BLOCK_N), AXIS_M)  # [1, BLOCK_N]
    # Rows and columns beyond the end repeat the last one: no mask in the loop, and nothing of them is stored.
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = tl.minimum(offs_n, n_end - 1)
    offs_xk = tl.expand_dims(tl.arange(0, 32), AXIS_M)  # [1, 32]
    offs_r = tl.expand_dims(tl.arange(0, 32), AXIS_N)  # [32, 1]

    tiles_k = tl.cdiv(K, 128)
    tiles_per_split = tl.cdiv(tiles_k, SPLIT_K)
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tiles_k)
    x_ptrs = x_ptr + rotation * stride_xs + rows * stride_xm + (first * 128 + offs_xk)
    word_ptrs = words_ptr + first.to(tl.int64) * N * 32 + (columns * 32 + offs_r)
    qparam_ptrs = qparams_ptr + first.to(tl.int64) * GROUPS_PER_TILE * N + columns

    if SWAP_AB:
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for tile in range(first, end):
        words = tl.load(word_ptrs)
        for nibble in tl.static_range(4):
            if nibble % NIBBLES_PER_GROUP == 0:
                qparams = tl.load(qparam_ptrs + (nibble // NIBBLES_PER_GROUP) * N)
                even_zero, odd_zero = zero_points(qparams, DTYPE)
                weights = dequantize(words, even_zero + tl.zeros_like(words).to(DTYPE), odd_zero, DTYPE, PTX)
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
                acc += part * scale_of(qparams)
        x_ptrs += 128
        word_ptrs += N * 32
        qparam_ptrs += GROUPS_PER_TILE * N

    mask = (offs_m < M) & (offs_n < n_end)
    offs_out = offs_m.to(tl.int64) * N + offs_n
    if SPLIT_K > 1:
        shares = partials_ptr + offs_out
        share = split.to(tl.int64) * M * N
        if not last_to_arrive(shares + share, acc, mask, locks_ptr + tl.program_id(0), SPLIT_K):
            return
        acc = tl.zeros_like(acc)
        for _ in tl.static_range(SPLIT_K):
            # Not from L1, which may hold what was there before another program wrote.
            acc += tl.load(shares, mask=mask, other=0.0, cache_modifier=".cg")
            shares += M.to(tl.int64) * N
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns).to(tl.float32)
    tl.store(out_ptr + offs_out, acc.to(DTYPE), mask=mask)
