"""The kernels' memory layout of 8-bit weights, from and to the checkpoint's; `layout.py` has that of 4-bit ones.

| tensor | checkpoint | kernel | order of the kernel's elements |
|-|-|-|-|
| codes | `qweight` int32 (K, N/4) | `weight` uint8 (N, K) | words of 4 channels, (K/4, N), in blocks of 32 columns |
| zero points | `qzeros` int32 (G, N/4) | `zeros` uint8 (N, G) | (G, N) in blocks of 32 columns |
| scales | `scales` fp16 (G, N) | `scales` fp16 (N, G) | (G, N) in blocks of 32 columns |

Of 8 consecutive channels the first word holds 0, 2, 4, 6 and the second 1, 3, 5, 7, the first in the lowest byte: the
order in which the kernels keep int8 activations. The checkpoint's word w holds columns 4w..4w+3, lowest byte first.
"""

import torch
from torch import Tensor

from parofx.cpu_ops.layout import CHUNK, _check_sizes, _check_tensor, _cloned, _from_blocks, _to_blocks

#: Codes in one int32 word of the checkpoint.
CODES_PER_WORD = 4
_CHANNEL_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_byte_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder a checkpoint's 8-bit weight for the kernels.

    Args:
        qweight: int32 `(K, N/4)`, codes.
        qzeros: int32 `(G, N/4)`, zero points.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)`: uint8 `(N, K)`, fp16 `(N, G)`, uint8 `(N, G)` on the inputs' device.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features, words = qweight.shape
    _check_sizes(in_features, CODES_PER_WORD * words, group_size)
    _check_tensor("qweight", qweight, torch.int32, (in_features, words))
    _check_tensor("qzeros", qzeros, torch.int32, (in_features // group_size, words))
    codes, zeros = (_cloned(tensor).view(torch.uint8) for tensor in (qweight, qzeros))
    return pack_byte_codes(codes, zeros, scales, group_size)


def unpack_byte_weight(
    weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack_byte_weight` exactly.

    Returns:
        `(qweight, qzeros, scales)` in the checkpoint's layout.

    Raises:
        ShapeError: if a shape, a dtype or a size does not fit.
    """
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("weight", weight, torch.uint8, (out_features, in_features))
    _check_tensor("scales", scales, torch.float16, (out_features, groups))
    _check_tensor("zeros", zeros, torch.uint8, (out_features, groups))
    # `view(int32)` needs an aligned start, which a slice of a larger buffer may lack.
    words = _from_blocks(weight.reshape(-1).clone().view(torch.int32), in_features // CODES_PER_WORD, out_features)
    by_chunk = _cloned(words).view(torch.uint8).view(-1, 2, out_features, CODES_PER_WORD)
    channels = by_chunk.transpose(2, 3).reshape(-1, CHUNK, out_features)
    inverse = [_CHANNEL_ORDER.index(channel) for channel in range(CHUNK)]
    codes = channels[:, inverse].reshape(in_features, out_features)
    qzeros = _from_blocks(zeros.reshape(-1), groups, out_features)
    checkpoint = (_cloned(each).view(torch.int32) for each in (codes, qzeros))
    return *checkpoint, _from_blocks(scales.reshape(-1), groups, out_features)  # type: ignore[return-value]


def pack_byte_codes(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack plain 8-bit codes for the kernels; unlike a checkpoint, any N will do.

    Args:
        codes: uint8 `(K, N)`.
        zeros: uint8 `(G, N)`.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)` as `pack_byte_weight` returns them.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features, out_features = codes.shape
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("codes", codes, torch.uint8, (in_features, out_features))
    _check_tensor("zeros", zeros, torch.uint8, (groups, out_features))
    _check_tensor("scales", scales, torch.float16, (groups, out_features))
    by_chunk = codes.view(-1, CHUNK, out_features)[:, list(_CHANNEL_ORDER)].view(-1, CODES_PER_WORD, out_features)
    words = _cloned(by_chunk.transpose(1, 2)).view(torch.int32).squeeze(-1)
    weight = _to_blocks(words).view(torch.uint8).view(out_features, in_features)
    return weight, _to_blocks(scales).view(out_features, groups), _to_blocks(zeros).view(out_features, groups)
