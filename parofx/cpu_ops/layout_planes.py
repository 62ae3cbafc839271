"""The kernels' memory layout of 3-bit weights, from and to the checkpoint's; `layout.py` has that of 4-bit ones.

| tensor | checkpoint | kernel | order of the kernel's elements |
|-|-|-|-|
| codes | `qweight` int32 (K, 3N/32) | `weight` uint8 (N, 3K/8) | words, (3K/32, N), in blocks of 32 columns |
| zero points | `qzeros` int32 (G, 3N/32) | `zeros` uint8 (N, G) | (G, N) in blocks of 32 columns |
| scales | `scales` fp16 (G, N) | `scales` fp16 (N, G) | (G, N) in blocks of 32 columns |

Three words hold 32 channels of a column, which are four chunks of 8. The first two words hold the low two bits of the
codes: nibble j of word w those of channel j of chunk 2w, and above them those of channel j of chunk 2w + 1. The third
holds the high bits: nibble j has one for channel j of each chunk. So two shifts and two masks make the 4-bit layout's
word of any chunk.
"""

import torch
from torch import Tensor

from parofx import packing
from parofx.cpu_ops.layout import BLOCK_COLUMNS, CHUNK, _check_sizes, _check_tensor, _cloned, _from_blocks, _to_blocks

BITS = 3
#: Input channels whose codes are stored together.
RUN = 4 * CHUNK
# Whole blocks of columns are packed at once, but not all: the temporary copies stay small.
_COLUMNS_AT_ONCE = 16 * BLOCK_COLUMNS


def pack_plane_weight(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder a checkpoint's 3-bit weight for the kernels.

    Args:
        qweight: int32 `(K, 3N/32)`, codes.
        qzeros: int32 `(G, 3N/32)`, zero points.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)`: uint8 `(N, 3K/8)`, fp16 `(N, G)`, uint8 `(N, G)` on the inputs' device.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    (in_features, words), out_features = qweight.shape, scales.shape[1]
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("qweight", qweight, torch.int32, (in_features, packing.words_per_row(out_features, BITS)))
    _check_tensor("qzeros", qzeros, torch.int32, (groups, words))
    _check_tensor("scales", scales, torch.float16, (groups, out_features))
    weight = torch.empty(out_features, in_features * BITS // 8, dtype=torch.uint8, device=qweight.device)
    for first in range(0, out_features, _COLUMNS_AT_ONCE):
        last = min(first + _COLUMNS_AT_ONCE, out_features)
        some = slice(packing.words_per_row(first, BITS), packing.words_per_row(last, BITS))
        words_of = _to_words(packing.unpack_words(qweight[:, some], BITS))
        weight[first:last] = _to_blocks(words_of).view(torch.uint8).view(last - first, -1)
    zeros = _to_blocks(packing.unpack_words(qzeros, BITS)).view(out_features, groups)
    return weight, _to_blocks(scales).view(out_features, groups), zeros


def unpack_plane_weight(
    weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack_plane_weight` exactly.

    Returns:
        `(qweight, qzeros, scales)` in the checkpoint's layout.

    Raises:
        ShapeError: if a shape, a dtype or a size does not fit.
    """
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("weight", weight, torch.uint8, (out_features, in_features * BITS // 8))
    _check_tensor("scales", scales, torch.float16, (out_features, groups))
    _check_tensor("zeros", zeros, torch.uint8, (out_features, groups))
    parts = []
    for first in range(0, out_features, _COLUMNS_AT_ONCE):
        some = weight[first : first + _COLUMNS_AT_ONCE]
        # `view(int32)` needs an aligned start, which a slice of a larger buffer may lack.
        words = _from_blocks(some.reshape(-1).clone().view(torch.int32), in_features // RUN * BITS, len(some))
        parts.append(packing.pack_words(_from_words(words), BITS))
    qzeros = packing.pack_words(_from_blocks(zeros.reshape(-1), groups, out_features), BITS)
    return torch.cat(parts, dim=1), qzeros, _from_blocks(scales.reshape(-1), groups, out_features)


def pack_plane_codes(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack plain 3-bit codes for the kernels; unlike a checkpoint, any N will do.

    Args:
        codes: uint8 `(K, N)`, values 0..7.
        zeros: uint8 `(G, N)`, values 0..7.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)` as `pack_plane_weight` returns them.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features, out_features = codes.shape
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("codes", codes, torch.uint8, (in_features, out_features))
    _check_tensor("zeros", zeros, torch.uint8, (groups, out_features))
    _check_tensor("scales", scales, torch.float16, (groups, out_features))
    weight = _to_blocks(_to_words(codes)).view(torch.uint8).view(out_features, in_features * BITS // 8)
    return weight, _to_blocks(scales).view(out_features, groups), _to_blocks(zeros).view(out_features, groups)


def _to_words(codes: Tensor) -> Tensor:
    """Return words int32 `(3K/32, N)` of codes uint8 `(K, N)`."""
    chunks = codes.view(-1, 4, CHUNK, codes.shape[1])
    low, high = chunks & 3, chunks >> 2
    nibbles = torch.stack(
        (
            low[:, 0] | low[:, 1] << 2,
            low[:, 2] | low[:, 3] << 2,
            high[:, 0] | high[:, 1] << 1 | high[:, 2] << 2 | high[:, 3] << 3,
        ),
        dim=1,
    )  # [K/32, 3, 8, N]
    words = nibbles[:, :, 0::2] | nibbles[:, :, 1::2] << 4
    return _cloned(words.transpose(2, 3)).view(torch.int32).flatten(0, 1).squeeze(-1)


def _from_words(words: Tensor) -> Tensor:
    """Invert `_to_words`."""
    columns = words.shape[1]
    by_run = _cloned(words).view(torch.uint8).view(-1, 3, columns, 4).transpose(2, 3)
    nibbles = torch.stack((by_run & 15, by_run >> 4), dim=3).flatten(2, 3)  # [K/32, 3, 8, N]
    low = (nibbles[:, 0] & 3, nibbles[:, 0] >> 2, nibbles[:, 1] & 3, nibbles[:, 1] >> 2)
    chunks = [low[chunk] | (nibbles[:, 2] >> chunk & 1) << 2 for chunk in range(4)]
    return torch.stack(chunks, dim=1).reshape(-1, columns)
