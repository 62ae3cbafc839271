"""The checkpoint's 4-bit words, and the way back.

Bits `4i … 4i+3` of the int32 word `w` hold column `8w + ORDER[i]`. Codes run over output channels:

| tensor | dtype | shape | from |
|-|-|-|-|
| `qweight` | int32 | `(K, N/8)` | codes `(N, K)` |
| `qzeros` | int32 | `(K/g, N/8)` | zero points `(N, K/g)` |
| `scales` | fp16 | `(K/g, N)` | scales `(N, K/g)` |
"""

from __future__ import annotations

import torch
from torch import Tensor

from parofx.config import PACKED_BITS
from parofx.errors import ConfigError, ShapeError

#: Column inside a word that each nibble, from the lowest, holds.
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Codes in one int32 word; N must be a multiple of it.
CODES_PER_WORD = 8


def check_packable(bits: int) -> None:
    """Refuse widths that the checkpoint's words do not hold.

    Raises:
        ConfigError: naming the width and the ones that can be packed.
    """
    if bits not in PACKED_BITS:
        raise ConfigError(f"bits must be one of {PACKED_BITS} to be packed, got {bits!r}")


def pack_words(codes: Tensor) -> Tensor:
    """Pack codes `(rows, N)` in 0..15 to int32 words `(rows, N/8)`.

    Raises:
        ShapeError: if the codes are no matrix, N is no multiple of 8, or a code is out of range.
    """
    if codes.dim() != 2 or codes.shape[1] % CODES_PER_WORD:
        raise ShapeError(f"codes must be (rows, N) with N a multiple of {CODES_PER_WORD}, got {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise ShapeError(f"codes must lie in 0..15, got {int(codes.min())}..{int(codes.max())}")
    shape = (codes.shape[0], codes.shape[1] // CODES_PER_WORD, CODES_PER_WORD)
    columns = codes.to(torch.uint8).reshape(shape)[..., list(NIBBLE_ORDER)]
    # Two nibbles a byte, four bytes a little-endian word: no 32-bit temporaries, no sign trouble.
    halves = columns[..., 0::2] | (columns[..., 1::2] << 4)
    return halves.clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1)


def unpack_words(words: Tensor) -> Tensor:
    """Unpack int32 words `(rows, N/8)` to uint8 codes `(rows, N)`; the inverse of `pack_words`.

    Raises:
        ShapeError: if the words are no int32 matrix.
    """
    if words.dim() != 2 or words.dtype != torch.int32:
        raise ShapeError(f"words must be an int32 matrix, got {words.dtype} {tuple(words.shape)}")
    # A clone, not contiguous(): that keeps the odd stride a dimension of one may have, and the view then fails.
    halves = words.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(*words.shape, 4)
    nibbles = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(2)
    inverse = [NIBBLE_ORDER.index(column) for column in range(CODES_PER_WORD)]
    return nibbles[..., inverse].flatten(1)


def pack_linear(codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checkpoint's `(qweight, qzeros, scales)` of codes `(N, K)`, scales and zeros `(N, K/g)`."""
    check_packable(bits)
    return pack_words(codes.t()), pack_words(zeros.t().round().to(torch.uint8)), scales.t().contiguous().half()


def unpack_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(codes (N, K) uint8, scales (N, K/g), zeros (N, K/g) uint8)` of the checkpoint's tensors."""
    check_packed_shapes(qweight, qzeros, scales)
    return unpack_words(qweight).t(), scales.t(), unpack_words(qzeros).t()


def dequantize_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight `(N, K)` in the rotated space, `(q − z)·s`, rounded once to `dtype`."""
    codes, scale, zeros = unpack_linear(qweight, qzeros, scales)
    group_size = codes.shape[1] // scale.shape[1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    steps = codes.reshape(codes.shape[0], -1, group_size).to(work) - zeros.to(work)[..., None]
    return (steps * scale.to(work)[..., None]).reshape(codes.shape).to(dtype)


def check_packed_shapes(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> None:
    """Check that the three tensors belong to one linear.

    Raises:
        ShapeError: saying which tensor contradicts which.
    """
    if qweight.dim() != 2 or qzeros.dim() != 2 or scales.dim() != 2:
        shapes = [tuple(tensor.shape) for tensor in (qweight, qzeros, scales)]
        raise ShapeError(f"qweight, qzeros and scales must be matrices, got {shapes}")
    groups, out_features = scales.shape
    if qweight.shape[1] * CODES_PER_WORD != out_features or tuple(qzeros.shape) != (groups, qweight.shape[1]):
        raise ShapeError(
            f"qweight (K, N/8), qzeros (K/g, N/8) and scales (K/g, N) must agree, got {tuple(qweight.shape)}, "
            f"{tuple(qzeros.shape)} and {tuple(scales.shape)}"
        )
    if groups == 0 or qweight.shape[0] % groups:
        raise ShapeError(f"the {groups} rows of scales must divide the {qweight.shape[0]} rows of qweight")
