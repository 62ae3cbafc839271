"""The int4 product for many tokens: dequantize a slab of columns, and let the device's own matrix product do the rest.

| tensor | dtype | shape |
|-|-|-|
| `words`, `qparams` | int16, int32 | `(T, N, 32)`, `(128·T/g, N)`, see `layout` |
| `out` | fp16, bf16 | `(N', K)`: `(q − z)·scale` of N' columns, rounded once |

A product that dequantizes in registers does so once per tile of tokens and keeps the tensor cores waiting. From some
hundred tokens on it is faster to write the weights out once, a slab at a time that stays in L2, and to multiply with
cuBLAS (hipBLAS on AMD). Weights are rounded to x's dtype, as they were before they were quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from parofx.triton_ops._device import dequantize, load_qparams, scale_of
from parofx.triton_ops.layout import TILE_K, PackedWeight
from parofx.triton_ops.siblings import check_bias, check_siblings
from parofx.triton_ops.tiles import DequantizeTiles

#: A slab of dequantized columns: fits the L2 of large cards, and is all the memory that this takes.
SLAB_BYTES = 32 * 2**20
#: Columns of a slab are a multiple of this, for the matrix product's tiles.
_SLAB_COLUMNS = 256


@triton.jit
def dequantize_kernel(
    words_ptr,
    qparams_ptr,
    out_ptr,
    start,
    end,
    N,
    K,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    """Dequantize one K tile of `BLOCK_N` of the columns `start … end − 1`; grid (K tiles, column tiles)."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tile = tl.program_id(0)
    offs_n = start + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # [BLOCK_N, 1]
    columns = tl.minimum(offs_n, end - 1)
    offs_r = tl.arange(0, 32)[None, :]  # [1, 32]
    qparams = load_qparams(qparams_ptr + tile.to(tl.int64) * (128 // GROUP) * N + columns, N, GROUP)
    weights = dequantize(tl.load(words_ptr + tile.to(tl.int64) * N * 32 + columns * 32 + offs_r), qparams, DTYPE, PTX)
    out_ptrs = out_ptr + (offs_n - start).to(tl.int64) * K + tile * 128 + offs_r
    for nibble in tl.static_range(4):
        mask = offs_n < end
        if not EVEN_K:
            mask = mask & (tile * 128 + nibble * 32 + offs_r < K)
        value = weights[nibble].to(tl.float32) * scale_of(qparams[nibble])
        tl.store(out_ptrs + nibble * 32, value.to(DTYPE), mask=mask)


def dequantize_columns(
    weight: PackedWeight,
    start: int,
    end: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    tiles: DequantizeTiles,
    *,
    ptx: bool,
) -> Tensor:
    """Return columns `start … end − 1` of the weight as `(end − start, K)`, fp16 or bf16."""
    words, qparams = weight
    out = torch.empty((end - start, in_features), dtype=dtype, device=words.device)
    dequantize_kernel[(words.shape[0], triton.cdiv(end - start, tiles.block_n))](
        words,
        qparams,
        out,
        start,
        end,
        words.shape[1],
        in_features,
        GROUP=group_size,
        EVEN_K=in_features % TILE_K == 0,
        BLOCK_N=tiles.block_n,
        PTX=ptx,
        num_warps=tiles.num_warps,
    )
    return out


def dequantize_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    ends: Sequence[int],
    group_size: int,
    tiles: DequantizeTiles,
    *,
    ptx: bool,
) -> Tensor:
    """Return `(M, N)`: `x_s @ Wq + bias` for x `(S, M, K)`; arguments as `int4_linear`'s.

    Raises:
        ShapeError: if tensors do not fit.
    """
    rotations, tokens, channels = x.shape
    check_siblings(rotations, ends, weight.words.shape[1])
    check_bias(bias, weight.words.shape[1])
    out = torch.empty((tokens, weight.words.shape[1]), dtype=x.dtype, device=x.device)
    for sibling, start, end in _slabs(ends, channels * x.itemsize):
        slab = dequantize_columns(weight, start, end, group_size, channels, x.dtype, tiles, ptx=ptx)
        if bias is None:
            torch.mm(x[sibling], slab.t(), out=out[:, start:end])
        else:
            torch.addmm(bias[start:end].to(x.dtype), x[sibling], slab.t(), out=out[:, start:end])
    return out


def _slabs(ends: Sequence[int], column_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(sibling, first column, end)` of slabs of equal width in which no sibling meets another."""
    widest = max(_SLAB_COLUMNS, SLAB_BYTES // column_bytes // _SLAB_COLUMNS * _SLAB_COLUMNS)
    for sibling, (first, last) in enumerate(zip((0, *ends), ends, strict=False)):
        for start in range(first, last, widest):
            yield sibling, start, min(start + widest, last)
