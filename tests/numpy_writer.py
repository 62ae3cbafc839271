"""An independent writer of PARO checkpoints: NumPy and the format's definition, nothing of parofx."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]


def random_linear(rng: np.random.Generator, k: int, n: int, g: int, krot: int, bias: bool, bits: int = 4) -> Arrays:
    """Return the checkpoint tensors of a random linear, as a foreign writer would make them."""
    codes, zeros = rng.integers(0, 2**bits, (k, n)), rng.integers(0, 2**bits, (k // g, n))
    pairs = [np.concatenate([rng.permutation(g) for _ in range(k // g)]) for _ in range(krot)]
    linear = {
        "qweight": pack(codes, bits),
        "qzeros": pack(zeros, bits),
        "scales": rng.uniform(0.005, 0.02, (k // g, n)).astype(np.float16),
        "theta": rng.normal(0, 2, (krot, k // 2)).astype(np.float16),
        "pairs": np.array(pairs).astype(np.int16),
        "channel_scales": rng.uniform(0.5, 2, (1, k)).astype(np.float16),
    }
    return linear | ({"bias": rng.normal(0, 0.1, n).astype(np.float16)} if bias else {})


def fields(bits: int) -> Iterator[tuple[slice, slice, int, int, int]]:
    """Yield `(columns, words, shift in the word, shift in the code, mask)` of each piece of code in the words."""
    if bits == 3:
        for column, plane in itertools.product(range(32), range(3)):
            yield slice(column, None, 32), slice(plane, None, 3), column, plane, 1
    else:
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else range(4)):
            yield slice(column, None, 32 // bits), slice(None), bits * i, 0, 2**bits - 1


def pack(codes: NDArray, bits: int = 4) -> NDArray:
    words = np.zeros((codes.shape[0], codes.shape[1] * bits // 32), np.uint32)
    for columns, where, shift, shift_in_code, mask in fields(bits):
        piece = codes[:, columns].astype(np.uint32) >> np.uint32(shift_in_code) & np.uint32(mask)
        words[:, where] |= piece << np.uint32(shift)
    return words.view(np.int32)


def unpack(words: NDArray, n: int) -> NDArray:
    codes = np.zeros((words.shape[0], n))
    for columns, where, shift, shift_in_code, mask in fields(words.shape[1] * 32 // n):
        codes[:, columns] += ((words[:, where] >> shift) & mask) << shift_in_code
    return codes


def forward(x: NDArray, linear: Arrays) -> NDArray:
    """Return `ROT(x ⊙ channel_scales) @ Wq + bias` in float64."""
    k, groups = linear["qweight"].shape[0], linear["scales"].shape[0]
    v = x.astype(np.float64) * linear["channel_scales"].astype(np.float64)
    base = np.arange(k) // (k // groups) * (k // groups)
    for pairs, theta in zip(linear["pairs"], linear["theta"].astype(np.float64), strict=True):
        i, j = (pairs + base)[0::2], (pairs + base)[1::2]
        v_i, v_j = v[..., i].copy(), v[..., j].copy()
        v[..., i] = np.cos(theta) * v_i + np.sin(theta) * v_j
        v[..., j] = -np.sin(theta) * v_i + np.cos(theta) * v_j
    n = linear["scales"].shape[1]
    spread = [np.repeat(part, k // groups, axis=0) for part in (unpack(linear["qzeros"], n), linear["scales"])]
    y = v @ ((unpack(linear["qweight"], n) - spread[0]) * spread[1].astype(np.float64))
    return y + linear["bias"].astype(np.float64) if "bias" in linear else y


def dense_weight(linear: Arrays) -> NDArray:
    """Return the `(N, K)` float64 weight that the linear multiplies by."""
    without_bias = {name: array for name, array in linear.items() if name != "bias"}
    return forward(np.eye(linear["qweight"].shape[0]), without_bias).T
