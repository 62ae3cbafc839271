"""The kernels' memory layouts, from and to the checkpoint's.

K is `in_features`, N `out_features`, g the group size, T = ⌈K / 128⌉ the number of K tiles.

| tensor | dtype | shape | holds |
|-|-|-|-|
| `words` | int16 | `(T, N, 32)` | bits `4j … 4j+3` of `words[t, n, r]`: the code of channel `128·t + 32·j + r` |
| `qparams` | int32 | `(128·T / g, N)` | low half the fp16 scale's bits, high half the zero point |
| `coefficients` | fp32 | `(K/g, 1 + krot, g)` | row 0 channel scales, row 1 + r `cos, sin` of round r's pairs |
| `order` | uint8 | `(K/g, 1 + krot, g)` | row r: which element comes where before round r; the last row undoes it all |

*Words.* 16 bit wide like the activations they meet, so that a tile goes through shared memory and `ldmatrix` as if it
were fp16; four shifts then give four operands of 32 channels, with no interleaving. A tile of columns is contiguous.
K is padded to whole tiles with scales of zero.

*Qparams.* One 32-bit word per scale, the least that `cp.async` copies.

*Rotation.* Row `r` of `order` brings the channels into the order of `pairs[r]`: the two channels of a pair are then
neighbours in one thread, one sine serves both, and the only exchange between threads is the gather to the next order.
Row 0 is applied while loading (`coefficients` row 0 is in that order).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parofx import packing, rotation
from parofx.errors import ShapeError

#: Channels of one K tile.
TILE_K = 128
#: Words of one column in a K tile, and codes in one word.
WORDS_PER_TILE = 32
CODES_PER_WORD = TILE_K // WORDS_PER_TILE
GROUP_SIZES = (32, 64, 128)


class PackedWeight(NamedTuple):
    """`words (T, N, 32)` int16 and `qparams (128·T/g, N)` int32."""

    words: Tensor
    qparams: Tensor


class PackedRotation(NamedTuple):
    """`coefficients (…, K/g, 1 + krot, g)` fp32 and `order`, uint8, of the same shape; stacked along dimension 0."""

    coefficients: Tensor
    order: Tensor


def pack_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> PackedWeight:
    """Reorder a checkpoint's quantized weight for the kernels.

    Args:
        qweight: int32 `(K, N/8)`.
        qzeros: int32 `(K/g, N/8)`.
        scales: fp16 `(K/g, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features = qweight.shape[0]
    _check_group_size(group_size, in_features)
    packing.check_packed_shapes(qweight, qzeros, scales)
    if scales.shape[0] * group_size != in_features or scales.dtype != torch.float16:
        raise ShapeError(
            f"scales must be float16 ({in_features // group_size}, N) at group_size {group_size}, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )
    tiles = _tiles(in_features)
    codes = _pad_rows(packing.unpack_words(qweight), tiles * TILE_K)
    by_nibble = codes.view(tiles, CODES_PER_WORD, WORDS_PER_TILE, codes.shape[1])
    words = torch.zeros(by_nibble[:, 0].shape, dtype=torch.int32, device=codes.device)
    for nibble in range(CODES_PER_WORD):
        words |= by_nibble[:, nibble].to(torch.int32) << (4 * nibble)
    zeros = packing.unpack_words(qzeros).to(torch.int32)
    bits = scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    qparams = _pad_rows(zeros << 16 | bits, tiles * TILE_K // group_size)
    return PackedWeight(words.to(torch.int16).transpose(1, 2).contiguous(), qparams)


def unpack_weight(weight: PackedWeight, group_size: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the checkpoint's `(qweight, qzeros, scales)`; the exact inverse of `pack_weight`.

    Raises:
        ShapeError: if the sizes do not fit.
    """
    _check_group_size(group_size, in_features)
    tiles, out_features = _tiles(in_features), weight.words.shape[1]
    expected = (tiles, out_features, WORDS_PER_TILE), (tiles * TILE_K // group_size, out_features)
    if (tuple(weight.words.shape), tuple(weight.qparams.shape)) != expected:
        raise ShapeError(
            f"words and qparams must be {expected[0]} and {expected[1]} for {in_features} channels in groups of "
            f"{group_size}, got {tuple(weight.words.shape)} and {tuple(weight.qparams.shape)}"
        )
    shifts = torch.arange(0, 4 * CODES_PER_WORD, 4, dtype=torch.int16, device=weight.words.device)
    nibbles = (weight.words.transpose(1, 2)[:, None] >> shifts[:, None, None]) & 15
    qweight = packing.pack_words(nibbles.reshape(-1, out_features)[:in_features])
    qparams = weight.qparams[: in_features // group_size]
    return qweight, packing.pack_words(qparams >> 16), qparams.to(torch.int16).view(torch.float16)


def merge_weights(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Return siblings as one weight; the siblings are slices of its dimension 1."""
    return PackedWeight(*(torch.cat(parts, dim=1) for parts in zip(*weights, strict=True)))


def pack_rotation(pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> PackedRotation:
    """Bring a rotation into the form the kernels read.

    Args:
        pairs: integer `(krot, K)`, each (round, group) a permutation of `0 … g−1`.
        theta: floating `(krot, K/2)`, radians; cosines and sines are computed in fp64 and kept in fp32.
        channel_scales: floating `(K,)` or `(1, K)`, multiply the activation before the first round.
        group_size: channels per group; 32, 64 or 128.

    Raises:
        ShapeError: if a shape does not fit, or if `pairs` holds anything but permutations.
    """
    in_features = channel_scales.numel()
    _check_group_size(group_size, in_features)
    rotation.check_shapes(in_features, pairs, theta, channel_scales, group_size)
    rotation.check_pairs(pairs, group_size)
    krot, groups = pairs.shape[0], in_features // group_size
    identity = torch.arange(group_size, device=pairs.device).expand(1, groups, group_size)
    chosen = pairs.long().reshape(krot, groups, group_size)
    # Where each channel is while a round runs, and before the first one.
    place = torch.cat((identity, torch.empty_like(chosen).scatter_(-1, chosen, identity.expand_as(chosen))))
    order = place.gather(-1, torch.cat((chosen, identity)))
    angle = theta.double().reshape(krot, groups, group_size // 2)
    rounds = torch.stack((angle.cos(), angle.sin()), dim=-1).reshape(krot, groups, group_size)
    scales = channel_scales.double().reshape(1, groups, group_size).gather(-1, order[:1])
    coefficients = torch.cat((scales, rounds)).transpose(0, 1).float()
    return PackedRotation(coefficients.contiguous(), order.transpose(0, 1).to(torch.uint8).contiguous())


def stack_rotations(rotations: Sequence[PackedRotation]) -> PackedRotation:
    """Return the rotations of siblings, each its own, as `(siblings, …)`; all have the same number of rounds.

    Raises:
        ShapeError: if they have not.
    """
    shapes = sorted({tuple(one.order.shape) for one in rotations})
    if len(shapes) != 1:
        raise ShapeError(f"rotations of siblings must have one K, group_size and krot, got shapes {shapes}")
    return PackedRotation(*(torch.stack(parts) for parts in zip(*rotations, strict=True)))


def _tiles(in_features: int) -> int:
    return -(-in_features // TILE_K)


def _pad_rows(matrix: Tensor, rows: int) -> Tensor:
    if matrix.shape[0] == rows:
        return matrix.contiguous()
    return torch.cat((matrix, matrix.new_zeros(rows - matrix.shape[0], matrix.shape[1])))


def _check_group_size(group_size: int, in_features: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ShapeError(f"group_size must be one of {GROUP_SIZES} for the Triton kernels, got {group_size}")
    if in_features <= 0 or in_features % group_size:
        raise ShapeError(f"group_size must divide in_features: got {group_size} and {in_features}")
