"""The checkpoint's words of 3, 4 or 8 bits a code, and the way back.

Codes run over output channels. The shortest run of them that fills whole int32 words is, by width:

| bits | columns | words | order |
|-|-|-|-|
| 4 | 8 | 1 | bits `4i … 4i+3` hold column `NIBBLE_ORDER[i]` |
| 8 | 4 | 1 | byte i, from the lowest, holds column i |
| 3 | 32 | 3 | word p holds bit p of every code: column c in its bit c |

Run w starts at column `columns · w`, and N is a multiple of `columns`. With `B = bits/32`:

| tensor | dtype | shape | from |
|-|-|-|-|
| `qweight` | int32 | `(K, B·N)` | codes `(N, K)` |
| `qzeros` | int32 | `(K/g, B·N)` | zero points `(N, K/g)` |
| `scales` | fp16 | `(K/g, N)` | scales `(N, K/g)` |

So the shapes tell the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parofx.config import PACKED_BITS
from parofx.errors import ConfigError, ShapeError

#: Column inside a word that each nibble, from the lowest, holds.
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Columns that fill whole words, by width; N must be a multiple of it.
COLUMNS_PER_RUN = {3: 32, 4: 8, 8: 4}
_WORD_BITS = 32


def check_packable(bits: int) -> None:
    """Refuse widths that the checkpoint's words do not hold.

    Raises:
        ConfigError: naming the width and the ones that can be packed.
    """
    if bits not in PACKED_BITS:
        raise ConfigError(f"bits must be one of {PACKED_BITS} to be packed, got {bits!r}")


def words_per_row(out_features: int, bits: int) -> int:
    """Return how many int32 words hold the codes of `out_features` columns."""
    return out_features * bits // _WORD_BITS


def packed_bits(qweight: Tensor, scales: Tensor) -> int:
    """Return the width of a weight's codes, which its shapes tell; `check_packed_shapes` says whether it is one."""
    return qweight.shape[1] * _WORD_BITS // scales.shape[1]


def pack_words(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack codes `(rows, N)` in `0 … 2^bits − 1` to int32 words `(rows, bits·N/32)`.

    Raises:
        ConfigError: if words do not hold the width.
        ShapeError: if the codes are no matrix, N fills no whole words, or a code is out of range.
    """
    check_packable(bits)
    columns, top = COLUMNS_PER_RUN[bits], 2**bits - 1
    if codes.dim() != 2 or codes.shape[1] % columns:
        raise ShapeError(f"codes must be (rows, N) with N a multiple of {columns}, got {tuple(codes.shape)}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= top:
        raise ShapeError(f"codes must lie in 0..{top}, got {int(codes.min())}..{int(codes.max())}")
    runs = codes.to(torch.uint8).reshape(codes.shape[0], codes.shape[1] // columns, columns)
    # Bytes, four to a little-endian word: no 32-bit temporaries, no sign trouble.
    if bits == 4:
        nibbles = runs[..., list(NIBBLE_ORDER)]
        packed = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    else:
        packed = runs if bits == 8 else _to_planes(runs)
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32).flatten(1)


def unpack_words(words: Tensor, bits: int = 4) -> Tensor:
    """Unpack int32 words `(rows, W)` to uint8 codes `(rows, 32·W/bits)`; the inverse of `pack_words`.

    Raises:
        ConfigError: if words do not hold the width.
        ShapeError: if the words are no int32 matrix, or no whole runs.
    """
    check_packable(bits)
    per_run = words_per_row(COLUMNS_PER_RUN[bits], bits)
    if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] % per_run:
        what = f" with a multiple of {per_run} columns" if per_run > 1 else ""
        raise ShapeError(f"words must be an int32 matrix{what}, got {words.dtype} {tuple(words.shape)}")
    # A clone, not contiguous(): that keeps the odd stride a dimension of one may have, and the view then fails.
    packed = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return packed
    runs = packed.reshape(words.shape[0], words.shape[1] // per_run, 4 * per_run)
    if bits == 3:
        return _from_planes(runs).flatten(1)
    nibbles = torch.stack((runs & 15, runs >> 4), dim=-1).flatten(2)
    return nibbles[..., [NIBBLE_ORDER.index(column) for column in range(len(NIBBLE_ORDER))]].flatten(1)


def _to_planes(runs: Tensor) -> Tensor:
    """Return the bytes `(rows, runs, 12)` of three words for each run of 32 codes below 8, `(rows, runs, 32)`."""
    eights = runs.view(*runs.shape[:2], 4, 8)  # a byte of a word holds one bit of eight columns
    planes = torch.zeros(*runs.shape[:2], 3, 4, dtype=torch.uint8, device=runs.device)
    for plane in range(3):
        for column in range(8):
            planes[:, :, plane] |= ((eights[..., column] >> plane) & 1) << column
    return planes.flatten(2)


def _from_planes(packed: Tensor) -> Tensor:
    """Invert `_to_planes`."""
    planes = packed.view(*packed.shape[:2], 3, 4)
    eights = torch.zeros(*packed.shape[:2], 4, 8, dtype=torch.uint8, device=packed.device)
    for plane in range(3):
        for column in range(8):
            eights[..., column] |= ((planes[:, :, plane] >> column) & 1) << plane
    return eights.flatten(2)


def pack_linear(codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checkpoint's `(qweight, qzeros, scales)` of codes `(N, K)`, scales and zeros `(N, K/g)`."""
    qzeros = pack_words(zeros.t().round().to(torch.uint8), bits)
    return pack_words(codes.t(), bits), qzeros, scales.t().contiguous().half()


def unpack_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(codes (N, K) uint8, scales (N, K/g), zeros (N, K/g) uint8)` of the checkpoint's tensors."""
    check_packed_shapes(qweight, qzeros, scales)
    bits = packed_bits(qweight, scales)
    return unpack_words(qweight, bits).t(), scales.t(), unpack_words(qzeros, bits).t()


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
    words = qweight.shape[1]
    fitting = [
        bits for bits, columns in COLUMNS_PER_RUN.items()
        if out_features % columns == 0 and words_per_row(out_features, bits) == words
    ]  # fmt: skip
    if not (fitting and out_features) or tuple(qzeros.shape) != (groups, words):
        raise ShapeError(
            f"qweight (K, bits·N/32), qzeros (K/g, bits·N/32) and scales (K/g, N) must agree on one of {PACKED_BITS} "
            f"bits, got {tuple(qweight.shape)}, {tuple(qzeros.shape)} and {tuple(scales.shape)}"
        )
    if groups == 0 or qweight.shape[0] % groups:
        raise ShapeError(f"the {groups} rows of scales must divide the {qweight.shape[0]} rows of qweight")
