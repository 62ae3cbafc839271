"""Cases: one call of an operator as plain values that print as a constructor call, and build their tensors.

Tensors are generated from `seed`, on the CPU, so that a printed case means the same numbers on every machine.
Sizes are chosen by the strategies; the modes below are the contents worth telling apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from parofx.packing import COLUMNS_PER_RUN

Layout = Literal["contiguous", "sliced", "strided", "transposed", "expanded"]
Values = Literal["normal", "zeros", "outliers"]
Angles = Literal["zero", "any", "large"]
Codes = Literal["any", "lowest", "highest"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
VALUES: tuple[Values, ...] = get_args(Values)
ANGLES: tuple[Angles, ...] = get_args(Angles)
CODES: tuple[Codes, ...] = get_args(Codes)

#: Angles of "large" cases in radians: the format leaves them unbounded, and a fast sine is wrong out here.
LARGE_ANGLE = 1000.0
#: An outlier channel is this many times the others, as in a trained model's activations.
OUTLIER = 100.0


class Rotation(NamedTuple):
    """`pairs (krot, K)` int16, `theta (krot, K/2)` and `scales (K,)` or `(1, K)` floating."""

    pairs: Tensor
    theta: Tensor
    scales: Tensor


class PackedWeight(NamedTuple):
    """`qweight (K, W)` int32, `qzeros (K/g, W)` int32, `scales (K/g, N)` fp16, `bias (N,)` fp16 or None."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None


class _Stream(IntEnum):
    """One random stream per tensor: a case that drops its bias keeps its other numbers."""

    X = 0
    PAIRS = 1
    THETA = 2
    CHANNEL_SCALES = 3
    QWEIGHT = 4
    QZEROS = 5
    SCALES = 6
    BIAS = 7


@dataclass(frozen=True, kw_only=True)
class InputCase:
    """An activation `x (*batch, K)` with `K = groups · group_size`.

    Args:
        batch: leading dimensions; `()` is one vector, a 0 an empty batch.
        groups: channel groups.
        group_size: channels per group, even.
        dtype: of `x`.
        layout: how `x` lies in memory: `"sliced"` has a row stride above K, `"strided"` a channel stride of 2,
            `"transposed"` channels outermost, `"expanded"` batch strides of 0.
        values: what `x` holds.
        device: where all tensors are.
        seed: of all tensors.
    """

    batch: tuple[int, ...]
    groups: int
    group_size: int
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    values: Values = "normal"
    device: str = "cpu"
    seed: int = 0

    @property
    def in_features(self) -> int:
        """K."""
        return self.groups * self.group_size

    def x(self) -> Tensor:
        """Return `x (*batch, K)` in its layout."""
        channels = self.in_features
        if self.layout == "sliced":
            return self._values((*self.batch, 2 * channels))[..., channels // 2 : channels // 2 + channels]
        if self.layout == "strided":
            return self._values((*self.batch, 2 * channels))[..., ::2]
        if self.layout == "transposed":
            return self._values((channels, *self.batch)).movedim(0, -1)
        if self.layout == "expanded":
            return self._values((channels,)).expand(*self.batch, channels)
        return self._values((*self.batch, channels))

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        if self.values == "zeros":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.randn(shape, generator=self._generator(_Stream.X), dtype=torch.float64)
        if self.values == "outliers":
            rare = torch.rand(shape, generator=self._generator(_Stream.X), dtype=torch.float64) < 0.05
            values = torch.where(rare, OUTLIER * values, values)
        return values.to(self.device, self.dtype)

    def _generator(self, stream: _Stream) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * len(_Stream) + stream)


@dataclass(frozen=True, kw_only=True)
class RotationCase(InputCase):
    """An input and a rotation of it.

    Args:
        krot: rounds, 0 included.
        angles: `"zero"`, `"any"` (a few radians) or `"large"`.
        theta_dtype: of `theta`.
        scales_dtype: of the channel scales.
        flat_scales: channel scales are `(K,)` instead of the checkpoint's `(1, K)`.
    """

    krot: int
    angles: Angles = "any"
    theta_dtype: torch.dtype = torch.float16
    scales_dtype: torch.dtype = torch.float16
    flat_scales: bool = False

    def rotation(self) -> Rotation:
        """Return the rotation; its pairs are any permutations, which is all the format asks for."""
        channels = self.in_features
        order = torch.rand(self.krot, self.groups, self.group_size, generator=self._generator(_Stream.PAIRS))
        pairs = order.argsort(-1).reshape(self.krot, channels).to(torch.int16)
        noise = torch.randn(self.krot, channels // 2, generator=self._generator(_Stream.THETA), dtype=torch.float64)
        theta = noise * {"zero": 0.0, "any": 1.0, "large": LARGE_ANGLE}[self.angles]
        spread = torch.rand(channels, generator=self._generator(_Stream.CHANNEL_SCALES), dtype=torch.float64)
        scales = (4 * spread - 2).exp2()
        return Rotation(
            pairs.to(self.device),
            theta.to(self.device, self.theta_dtype),
            scales.reshape(-1 if self.flat_scales else (1, channels)).to(self.device, self.scales_dtype),
        )


@dataclass(frozen=True, kw_only=True)
class LinearCase(InputCase):
    """An input and a packed weight of N output channels.

    Args:
        words: runs of int32 words per row of `qweight`: with 4 bits a word and 8 channels each, with 8 bits a word
            and 4, with 3 bits three words and 32.
        bits: width of a code.
        bias: whether there is one.
        codes: what the words hold: `"lowest"` is 0 everywhere, `"highest"` all ones (negative words), zeros stay any.
    """

    words: int
    bits: int = 4
    bias: bool = False
    codes: Codes = "any"

    @property
    def out_features(self) -> int:
        """N."""
        return COLUMNS_PER_RUN[self.bits] * self.words

    def weight(self) -> PackedWeight:
        """Return the packed weight."""
        qweight = self._words(self.in_features, _Stream.QWEIGHT)
        if self.codes != "any":
            qweight = torch.full_like(qweight, 0 if self.codes == "lowest" else -1)
        noise = torch.rand(self.groups, self.out_features, generator=self._generator(_Stream.SCALES))
        bias = torch.randn(self.out_features, generator=self._generator(_Stream.BIAS)) if self.bias else None
        return PackedWeight(
            qweight.to(self.device),
            self._words(self.groups, _Stream.QZEROS).to(self.device),
            (0.005 + 0.02 * noise).to(self.device, torch.float16),
            None if bias is None else bias.to(self.device, torch.float16),
        )

    def _words(self, rows: int, stream: _Stream) -> Tensor:
        limits = torch.iinfo(torch.int32)
        shape = (rows, self.out_features * self.bits // 32)
        words = torch.randint(limits.min, limits.max + 1, shape, generator=self._generator(stream))
        return words.to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class RotateLinearCase(RotationCase, LinearCase):
    """An input, a rotation of it and a packed weight."""
