"""An independent writer of PARO checkpoints: NumPy and the format's definition, nothing of parofx."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]


def random_linear(rng: np.random.Generator, k: int, n: int, g: int, krot: int, bias: bool) -> Arrays:
    """Return the checkpoint tensors of a random linear, as a foreign writer would make them."""
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // g, n))
    pairs = [np.concatenate([rng.permutation(g) for _ in range(k // g)]) for _ in range(krot)]
    linear = {
        "qweight": pack(codes),
        "qzeros": pack(zeros),
        "scales": rng.uniform(0.005, 0.02, (k // g, n)).astype(np.float16),
        "theta": rng.normal(0, 2, (krot, k // 2)).astype(np.float16),
        "pairs": np.array(pairs).astype(np.int16),
        "channel_scales": rng.uniform(0.5, 2, (1, k)).astype(np.float16),
    }
    return linear | ({"bias": rng.normal(0, 0.1, n).astype(np.float16)} if bias else {})


def pack(codes: NDArray) -> NDArray:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def unpack(words: NDArray) -> NDArray:
    codes = np.empty((words.shape[0], words.shape[1] * 8))
    for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes[:, column::8] = (words >> (4 * i)) & 15
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
    spread = [np.repeat(part, k // groups, axis=0) for part in (unpack(linear["qzeros"]), linear["scales"])]
    y = v @ ((unpack(linear["qweight"]) - spread[0]) * spread[1].astype(np.float64))
    return y + linear["bias"].astype(np.float64) if "bias" in linear else y


def dense_weight(linear: Arrays) -> NDArray:
    """Return the `(N, K)` float64 weight that the linear multiplies by."""
    without_bias = {name: array for name, array in linear.items() if name != "bias"}
    return forward(np.eye(linear["qweight"].shape[0]), without_bias).T
