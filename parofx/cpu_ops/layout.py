"""The kernels' memory layouts, from and to the checkpoint's.

`csrc/layout.h` states both layouts for the reader of the C++ code. In short, K being `in_features`, N `out_features`
and G = K / g:

| tensor | checkpoint | kernel | order of the kernel's elements |
|-|-|-|-|
| codes | `qweight` int32 (K, N/8) | `weight` uint8 (N, K/2) | words of 8 channels, (K/8, N), in blocks of 32 columns |
| zero points | `qzeros` int32 (G, N/8) | `zeros` uint8 (N, G) | (G, N) in blocks of 32 columns |
| scales | `scales` fp16 (G, N) | `scales` fp16 (N, G) | (G, N) in blocks of 32 columns |
| rotation | `pairs`, `theta`, `channel_scales` | `rotation` uint8 (bytes,) | one run of bytes per group |

These are 4-bit codes; `layout_planes.py` has the layout of 3-bit ones and `layout_bytes.py` that of 8-bit ones.

The kernel tensors' shapes give their sizes only; their elements are blocked. The angles cannot be read back from
`rotation`, so who wants the checkpoint's form again keeps `theta`. Nothing is padded, and as long as every
N is a multiple of 32, concatenating layers along dimension 0 gives the packed tensors of the merged layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parofx.errors import ShapeError

BLOCK_COLUMNS = 32
CHUNK = 8
GROUP_SIZES = (32, 64, 128)

# Whole blocks of columns are packed at once, but not all: the temporary copies stay small.
_WORDS_AT_ONCE = 16 * BLOCK_COLUMNS // CHUNK

# Column 8w + NIBBLE_COLUMNS[i] of the checkpoint's word w is in bits 4i..4i+3.
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder a checkpoint's quantized weight for the kernels.

    Args:
        qweight: int32 `(K, N/8)`, codes.
        qzeros: int32 `(G, N/8)`, zero points, in the same nibble order.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)`: uint8 `(N, K/2)`, fp16 `(N, G)`, uint8 `(N, G)` on the inputs' device.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features, words = qweight.shape
    out_features = CHUNK * words
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("qweight", qweight, torch.int32, (in_features, words))
    _check_tensor("qzeros", qzeros, torch.int32, (groups, words))
    _check_tensor("scales", scales, torch.float16, (groups, out_features))

    weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=qweight.device)
    for first in range(0, words, _WORDS_AT_ONCE):
        part = qweight[:, first : first + _WORDS_AT_ONCE]
        into = weight[CHUNK * first : CHUNK * (first + _WORDS_AT_ONCE)]
        by_chunk = part.reshape(in_features // CHUNK, CHUNK, -1).clone()
        _transpose_nibbles(by_chunk)
        # Row i of a chunk now holds eight channels of column 8w + NIBBLE_COLUMNS[i].
        columns = by_chunk[:, _inverse(NIBBLE_COLUMNS)].transpose(1, 2).reshape(-1, len(into))
        into.copy_(_to_blocks(columns).view(torch.uint8).view_as(into))
    zeros = _to_blocks(_unpack_nibbles(qzeros)).view(out_features, groups)
    return weight, _to_blocks(scales).view(out_features, groups), zeros


def unpack_weight(
    weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert `pack_weight` exactly.

    Returns:
        `(qweight, qzeros, scales)` in the checkpoint's layout.

    Raises:
        ShapeError: if a shape, a dtype or a size does not fit.
    """
    _check_sizes(in_features, out_features, group_size)
    if out_features % CHUNK:
        raise ShapeError(f"out_features must be a multiple of {CHUNK} in a checkpoint: got {out_features}")
    groups = in_features // group_size
    _check_tensor("weight", weight, torch.uint8, (out_features, in_features // 2))
    _check_tensor("scales", scales, torch.float16, (out_features, groups))
    _check_tensor("zeros", zeros, torch.uint8, (out_features, groups))

    words = out_features // CHUNK
    flat = weight.reshape(-1)
    # `view(int32)` needs an aligned start, which a slice of a larger buffer may lack.
    flat = flat if flat.data_ptr() % 4 == 0 else flat.clone()
    columns = _from_blocks(flat.view(torch.int32), in_features // CHUNK, out_features)
    by_chunk = columns.view(-1, words, CHUNK).transpose(1, 2)[:, list(NIBBLE_COLUMNS)].contiguous()
    _transpose_nibbles(by_chunk)
    qzeros = _pack_nibbles(_from_blocks(zeros.reshape(-1), groups, out_features))
    return by_chunk.view(in_features, words), qzeros, _from_blocks(scales.reshape(-1), groups, out_features)


def pack_codes(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack plain codes for the kernels; unlike a checkpoint, any N will do.

    Args:
        codes: integer `(K, N)`, values 0..15.
        zeros: integer `(G, N)`, values 0..15.
        scales: fp16 `(G, N)`.
        group_size: input channels per scale; 32, 64 or 128.

    Returns:
        `(weight, scales, zeros)` as `pack_weight` returns them.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    in_features, out_features = codes.shape
    _check_sizes(in_features, out_features, group_size)
    groups = in_features // group_size
    _check_tensor("zeros", zeros, zeros.dtype, (groups, out_features))
    _check_tensor("scales", scales, torch.float16, (groups, out_features))
    words = torch.zeros(in_features // CHUNK, out_features, dtype=torch.int32, device=codes.device)
    for channel in range(CHUNK):
        words |= codes[channel::CHUNK].to(torch.int32) << (4 * channel)
    weight = _to_blocks(words).view(torch.uint8).view(out_features, in_features // 2)
    return (
        weight,
        _to_blocks(scales).view(out_features, groups),
        _to_blocks(zeros.to(torch.uint8)).view(out_features, groups),
    )


def pack_rotation(pairs: Tensor, theta: Tensor, channel_scales: Tensor, group_size: int) -> Tensor:
    """Pack channel scales and rotation rounds into the kernels' run of bytes.

    Cosines and sines are computed in fp64 and kept in fp32: nothing else is lost, but the angles cannot be read back.
    `unpack_rotation` gives the rest.

    Args:
        pairs: integer `(krot, K)`; each (round, group) is a permutation of 0..g-1, whose neighbours are paired.
        theta: float `(krot, K/2)`, radians.
        channel_scales: float `(K,)` or `(1, K)`, multiplies the activation before the first round.
        group_size: channels per group; 32, 64 or 128.

    Returns:
        uint8 `(K · (5 + 5·krot),)`, or `(4·K,)` when krot is 0.

    Raises:
        ShapeError: if a shape does not fit, or if `pairs` holds anything but permutations.
    """
    in_features = channel_scales.numel()
    krot = pairs.shape[0]
    half = group_size // 2
    _check_sizes(in_features, 1, group_size)
    _check_tensor("pairs", pairs, pairs.dtype, (krot, in_features))
    _check_tensor("theta", theta, theta.dtype, (krot, in_features // 2))
    groups = in_features // group_size
    parts = [_bytes_of(channel_scales.reshape(groups, group_size).to(torch.float32))]
    if krot == 0:
        return parts[0].reshape(-1)

    chosen = pairs.reshape(krot, groups, group_size).to(torch.int64)
    # The order a round leaves: the first channels of all pairs, then the second ones.
    order = torch.cat((chosen[..., 0::2], chosen[..., 1::2]), dim=-1)
    channels = torch.arange(group_size, device=pairs.device)
    if not bool((order.sort(dim=-1).values == channels).all()):
        raise ShapeError(
            f"pairs must hold a permutation of 0..{group_size - 1} in each round and group; check group_size"
        )
    place = torch.empty_like(order).scatter_(-1, order, channels.expand_as(order))  # of a channel in an order
    start = channels.expand(1, groups, group_size)
    source = torch.cat((start, place)).gather(-1, torch.cat((order, start))).to(torch.uint8)
    angle = theta.reshape(krot, groups, half).to(torch.float64)
    rounds = torch.cat(
        (source[:-1], _bytes_of(angle.cos().to(torch.float32)), _bytes_of(angle.sin().to(torch.float32))), dim=-1
    )
    parts += [rounds.transpose(0, 1).reshape(groups, -1), source[-1]]
    return torch.cat(parts, dim=-1).reshape(-1)


def unpack_rotation(rotation: Tensor, theta: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return what `pack_rotation` was given besides the angles.

    Args:
        rotation: what it returned.
        theta: the angles it was given, `(krot, K/2)`; read for their shape only.
        group_size: channels per group; 32, 64 or 128.

    Returns:
        `(pairs, channel_scales)`: int16 `(krot, K)` and fp16 `(1, K)`, equal to the checkpoint's to the last bit.

    Raises:
        ShapeError: if a shape, a dtype or `group_size` does not fit.
    """
    krot, in_features = theta.shape[0], 2 * theta.shape[1]
    _check_sizes(in_features, 1, group_size)
    _check_tensor("rotation", rotation, torch.uint8, (in_features * (5 + 5 * krot if krot else 4),))
    groups = in_features // group_size
    runs = rotation.view(groups, -1)
    scales_bytes = 4 * group_size
    channel_scales = runs[:, :scales_bytes].contiguous().view(torch.float32).to(torch.float16).view(1, in_features)
    if krot == 0:
        return torch.empty(0, in_features, dtype=torch.int16, device=rotation.device), channel_scales
    rounds = runs[:, scales_bytes:-group_size].view(groups, krot, 5 * group_size)
    orders = []
    order = torch.arange(group_size, device=rotation.device).expand(groups, group_size)
    for source in rounds[..., :group_size].to(torch.int64).unbind(1):
        order = order.gather(1, source)
        orders.append(order)
    # An order is the first channels of all pairs, then the second ones; a checkpoint has neighbours paired.
    pairs = torch.stack(orders).view(krot, groups, 2, group_size // 2).transpose(2, 3)
    return pairs.reshape(krot, in_features).to(torch.int16), channel_scales


def place_together(linears: Sequence[tuple[Tensor, ...]]) -> bool:
    """Let the packed tensors of linears that are computed in one call be slices of one buffer each, in their order.

    The tensor objects stay, and so do their values; only their memory is another.

    Args:
        linears: `(weight, scales, zeros)` of each, as `pack_weight` returns them.

    Returns:
        Whether they are slices of one buffer; a narrow last block of 32 columns keeps linears apart.
    """
    if any(len(weight) % BLOCK_COLUMNS for weight, *_ in linears):
        return False
    for parts in zip(*linears, strict=True):
        if not _follow_one_another(parts):
            buffer = torch.cat([part.detach() for part in parts])
            start = 0
            for part in parts:
                part.data = buffer[start : start + len(part)]
                start += len(part)
    return True


def _follow_one_another(parts: Sequence[Tensor]) -> bool:
    storages = {part.untyped_storage()._cdata for part in parts}
    ends = [part.storage_offset() + part.numel() for part in parts]
    return len(storages) == 1 and ends[:-1] == [part.storage_offset() for part in parts[1:]]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _check_sizes(in_features: int, out_features: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ShapeError(f"group_size must be one of {GROUP_SIZES} for the CPU kernels: got {group_size}")
    if in_features <= 0 or in_features % group_size:
        raise ShapeError(f"group_size must divide in_features: got {group_size} and {in_features}")
    if out_features <= 0:
        raise ShapeError(f"out_features must be positive: got {out_features}")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} must be {dtype} of shape {shape}: got {tensor.dtype} of shape {tuple(tensor.shape)}")


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _transpose_nibbles(words: Tensor) -> None:
    """Transpose, in place, each 8 × 8 square of nibbles that 8 consecutive int32 of dimension 1 form.

    `words` is contiguous int32 `(chunks, 8, columns)`. Three rounds swap the off-diagonal quarters of ever smaller
    squares.
    """
    swap = torch.empty(words.numel() // 2, dtype=torch.int32, device=words.device)
    for size, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        squares = words.view(words.shape[0], CHUNK // (2 * size), 2, size, words.shape[2])
        upper, lower = squares[:, :, 0], squares[:, :, 1]
        swap = swap.view(upper.shape)
        torch.bitwise_right_shift(upper, 4 * size, out=swap)
        swap.bitwise_xor_(lower).bitwise_and_(mask)
        lower.bitwise_xor_(swap)
        upper.bitwise_xor_(swap.bitwise_left_shift_(4 * size))


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes uint8 `(rows, N)` of checkpoint words int32 `(rows, N/8)`."""
    shifts = torch.tensor([4 * i for i in _inverse(NIBBLE_COLUMNS)], dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Checkpoint words int32 `(rows, N/8)` of codes uint8 `(rows, N)`."""
    by_word = codes.to(torch.int32).view(codes.shape[0], -1, CHUNK)
    packed = torch.zeros_like(by_word[..., 0])
    for i, column in enumerate(NIBBLE_COLUMNS):
        packed |= by_word[..., column] << (4 * i)
    return packed


def _to_blocks(matrix: Tensor) -> Tensor:
    """The elements of `(rows, N)`, one block of 32 columns after the other, each row by row."""
    rows, columns = matrix.shape
    whole = columns - columns % BLOCK_COLUMNS
    blocks = matrix[:, :whole].reshape(rows, -1, BLOCK_COLUMNS).transpose(0, 1).reshape(-1)
    if whole == columns:
        return blocks
    return torch.cat((blocks, matrix[:, whole:].reshape(-1)))


def _from_blocks(elements: Tensor, rows: int, columns: int) -> Tensor:
    """Invert `_to_blocks`."""
    whole = columns - columns % BLOCK_COLUMNS
    blocks = elements[: rows * whole].view(-1, rows, BLOCK_COLUMNS).transpose(0, 1).reshape(rows, whole)
    if whole == columns:
        return blocks
    return torch.cat((blocks, elements[rows * whole :].view(rows, -1)), dim=1)


def _cloned(tensor: Tensor) -> Tensor:
    """Copy, not `contiguous()`: that keeps the odd stride a dimension of one may have, and views then fail."""
    return tensor.clone(memory_format=torch.contiguous_format)
