"""The operators in NumPy fp64, as the definitions read: scalar pair by scalar pair, nibble by nibble.

They share no code with `parofx.rotation` and `parofx.packing`, which are checked against them. Slow on purpose:
a loop over rounds, groups and slots is the definition. Tensors of any dtype and device come in, fp64 arrays go out.

    v_i ← cosθ·v_i + sinθ·v_j        v_j ← −sinθ·v_i + cosθ·v_j        (simultaneously)
    y = ROT(x ⊙ channel_scales) @ Wq + bias,  Wq[k, n] = (q[k, n] − z[k // g, n])·scales[k // g, n]

Source: ParoQuant (arXiv 2511.10645) eq. 3 and 4, in the sign and the nibble order of the published checkpoints.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

#: Column, inside its word of eight, that bits 4i..4i+3 hold.
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
#: Columns whose codes of 3 bits are in three words, a word for each bit.
PLANE_COLUMNS = 32


def float64(tensor: Tensor) -> Array:
    """Return the tensor's values as an fp64 array."""
    array: Array = tensor.detach().double().cpu().numpy()
    return array


def rotate(v: Tensor, pairs: Tensor, theta: Tensor, scales: Tensor, group_size: int) -> Array:
    """Return `ROT(v ⊙ scales)` for `v (…, K)`."""
    rotated = float64(v) * float64(scales).reshape(-1)
    indices, angles = pairs.cpu().tolist(), float64(theta).tolist()
    for r in range(pairs.shape[0]):
        for start in range(0, pairs.shape[1], group_size):
            for slot in range(group_size // 2):
                i = start + indices[r][start + 2 * slot]
                j = start + indices[r][start + 2 * slot + 1]
                angle = angles[r][start // 2 + slot]
                cos, sin = math.cos(angle), math.sin(angle)
                v_i, v_j = rotated[..., i].copy(), rotated[..., j].copy()
                rotated[..., i] = cos * v_i + sin * v_j
                rotated[..., j] = -sin * v_i + cos * v_j
    return rotated


def unpack(words: Tensor, bits: int = 4) -> Array:
    """Return the codes `(rows, 32·words/bits)` of int32 words `(rows, words)`."""
    packed = words.cpu().numpy()
    codes = np.zeros((packed.shape[0], 32 * packed.shape[1] // bits))
    # The words are signed: a shift copies the sign, so mask after it.
    if bits == 3:
        for column in range(PLANE_COLUMNS):
            for plane in range(3):
                codes[:, column::PLANE_COLUMNS] += ((packed[:, plane::3] >> column) & 1) << plane
    elif bits == 8:
        for column in range(4):
            codes[:, column::4] = (packed >> (8 * column)) & 255
    else:
        for nibble, column in enumerate(COLUMN_OF_NIBBLE):
            codes[:, column::8] = (packed >> (4 * nibble)) & 15
    return codes


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Array:
    """Return `Wq (K, N)`, in the rotated space."""
    bits = 32 * qweight.shape[1] // scales.shape[1]
    codes, zeros, steps = unpack(qweight, bits), unpack(qzeros, bits), float64(scales)
    group_size = codes.shape[0] // steps.shape[0]
    weight = np.empty_like(codes)
    for k in range(codes.shape[0]):
        weight[k] = (codes[k] - zeros[k // group_size]) * steps[k // group_size]
    return weight


def int4_linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None) -> Array:
    """Return `x @ Wq + bias`, `(…, N)`."""
    return _linear(float64(x), dequantize(qweight, qzeros, scales), bias)


def rotate_int4_linear(
    x: Tensor,
    pairs: Tensor,
    theta: Tensor,
    channel_scales: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Array:
    """Return `ROT(x ⊙ channel_scales) @ Wq + bias`, `(…, N)`."""
    rotated = rotate(x, pairs, theta, channel_scales, group_size)
    return _linear(rotated, dequantize(qweight, qzeros, scales), bias)


def _linear(x: Array, weight: Array, bias: Tensor | None) -> Array:
    product: Array = x @ weight
    return product if bias is None else product + float64(bias)
