"""Random problems for the CPU kernels and their answer in fp64, written from the method alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parofx import cpu_ops

# Unit roundoff of each input dtype; the kernels round an activation once and an output once.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PACK_CODES = {3: cpu_ops.pack_plane_codes, 4: cpu_ops.pack_codes, 8: cpu_ops.pack_byte_codes}


@dataclass
class Rotation:
    """Parameters as a checkpoint holds them."""

    pairs: Tensor
    theta: Tensor
    channel_scales: Tensor


@dataclass
class Linear:
    """Plain codes `(K, N)`, zeros and scales `(G, N)`, perhaps a bias `(N,)` and a correction `(r, K)`, `(r, N)`."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None
    correction: tuple[Tensor, Tensor] | None = None


@dataclass
class Problem:
    """One call: siblings, and one rotation for all of them, one for each, or none."""

    linears: list[Linear]
    rotations: list[Rotation] | None
    in_features: int
    group_size: int
    bits: int = 4

    def packed(self) -> tuple[list[Any], ...]:
        pack = PACK_CODES[self.bits]
        weights, scales, zeros = zip(
            *(pack(each.codes, each.zeros, each.scales, self.group_size) for each in self.linears),
            strict=True,
        )
        blobs = [torch.empty(0, dtype=torch.uint8)]
        if self.rotations is not None:
            blobs = [
                cpu_ops.pack_rotation(each.pairs, each.theta, each.channel_scales, self.group_size)
                for each in self.rotations
            ]
        return blobs, list(weights), list(scales), list(zeros), [each.bias for each in self.linears]

    def call(self, x: Tensor, mode: int = 0) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
        """The operator for so many linears, and its arguments."""
        cpu_ops.load()
        packed = self.packed()
        halves = [each.correction for each in self.linears if each.correction is not None]
        if len(self.linears) > 1:
            corrections = [list(half) for half in zip(*halves, strict=True)]
            arguments = (x, *packed, self.group_size, mode, self.bits, *corrections)
            return torch.ops.parofx_cpu.rotate_int4_linear.default, arguments
        alone = [each[0] for each in packed]
        rest = (self.bits, self.group_size, mode, *(halves[0] if halves else ()))
        return torch.ops.parofx_cpu.rotate_linear.default, (x, *alone, *rest)

    def run(self, x: Tensor, mode: int = 0) -> list[Tensor]:
        op, arguments = self.call(x, mode)
        # Freed at once, so that the allocator hands this memory to the outputs: what is not written stays NaN.
        for each in self.linears:
            torch.full((*x.shape[:-1], each.codes.shape[1]), torch.nan, dtype=x.dtype)
        result = op(*arguments)
        return result if isinstance(result, list) else [result]

    def rotate(self, x: Tensor, index: int) -> Tensor:
        """x after channel scales and rounds, fp64, in gather form."""
        v = x.double()
        if self.rotations is None:
            return v
        rotation = self.rotations[index if len(self.rotations) > 1 else 0]
        v = v * rotation.channel_scales.double().reshape(-1)
        base = torch.arange(self.in_features) // self.group_size * self.group_size
        for pairs, theta in zip(rotation.pairs.long(), rotation.theta.double(), strict=True):
            first, second = (base + pairs)[0::2], (base + pairs)[1::2]
            partner = torch.empty_like(base)
            partner[first], partner[second] = second, first
            cos, sin = torch.empty(self.in_features).double(), torch.empty(self.in_features).double()
            cos[first], cos[second] = theta.cos(), theta.cos()
            sin[first], sin[second] = theta.sin(), -theta.sin()
            v = cos * v + sin * v[..., partner]
        return v

    def check(self, x: Tensor, outputs: list[Tensor], mode: int = 0) -> None:
        """Assert every output within the error that its arithmetic allows, element by element."""
        assert len(outputs) == len(self.linears)
        for index, (linear, output) in enumerate(zip(self.linears, outputs, strict=True)):
            assert output.dtype == x.dtype
            assert output.shape == (*x.shape[:-1], linear.codes.shape[1])
            assert output.is_contiguous()
            assert output.isfinite().all()
            expected, allowed = self._answer(x, index, linear, mode)
            worst = ((output.double() - expected).abs() / allowed).max().item() if output.numel() else 0.0
            assert worst <= 1.0, f"linear {index}: {worst:.3g} times the allowed error"

    def _answer(self, x: Tensor, index: int, linear: Linear, mode: int) -> tuple[Tensor, Tensor]:
        groups = self.in_features // self.group_size
        scales = linear.scales.double().repeat_interleave(self.group_size, 0)
        zeros = linear.zeros.double().repeat_interleave(self.group_size, 0)
        weight = (linear.codes.double() - zeros) * scales
        v = self.rotate(x, index)
        bias = torch.zeros(weight.shape[1]).double() if linear.bias is None else linear.bias.double()
        expected = v @ weight + bias
        # fp32 sums of code·v and zero·v, which may cancel, after fp32 rounds that keep each group's norm.
        by_group = v.unflatten(-1, (groups, self.group_size))
        norms = by_group.norm(dim=-1, keepdim=True).expand_as(by_group).flatten(-2) / self.group_size**0.5
        codes = (linear.codes.double() + zeros) * scales
        sums = (v.abs() + norms) @ codes + bias.abs()
        if linear.correction is not None:
            down, up = (half.double() for half in linear.correction)
            expected = expected + v @ down.t() @ up
            sums = sums + (v.abs() + norms) @ down.t().abs() @ up.abs()
        allowed = 24 * UNIT[torch.float32] * sums
        if mode == 1:
            peak = by_group.abs().amax(-1, keepdim=True).expand_as(by_group).flatten(-2)
            allowed = allowed + 1.001 * (peak / 254) @ weight.abs()
        elif x.dtype == torch.bfloat16:
            # Some kernels multiply in bf16; the others are better.
            allowed = allowed + UNIT[torch.bfloat16] * v.abs() @ weight.abs()
        return expected, allowed + UNIT[x.dtype] * 1.01 * expected.abs() + 1e-7


def make_problem(
    in_features: int,
    out_features: tuple[int, ...],
    group_size: int,
    krot: int | None = 8,
    *,
    separate: bool = False,
    bias: torch.dtype | None = None,
    seed: int = 0,
    bits: int = 4,
    ranks: tuple[int, ...] = (),
) -> Problem:
    """A random problem; `krot` None leaves the rotation out, `bias` goes to every second linear.

    Corrections have the `ranks` in turn, unless there are none.
    """
    random = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    linears = []
    for i, columns in enumerate(out_features):
        codes = torch.randint(0, 2**bits, (in_features, columns), generator=random, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (groups, columns), generator=random, dtype=torch.uint8)
        scales = (0.002 + 0.01 * torch.rand(groups, columns, generator=random)).half()
        chosen = torch.randn(columns, generator=random).to(bias) if bias is not None and i % 2 == 0 else None
        rank = ranks[i % len(ranks)] if ranks else 0
        halves = [(0.2 * torch.randn(rank, size, generator=random)).half() for size in (in_features, columns)]
        linears.append(Linear(codes, zeros, scales, chosen, (halves[0], halves[1]) if ranks else None))
    if krot is None:
        return Problem(linears, None, in_features, group_size, bits)
    count = len(out_features) if separate else 1
    rotations = [make_rotation(in_features, group_size, krot, random) for _ in range(count)]
    return Problem(linears, rotations, in_features, group_size, bits)


def make_rotation(in_features: int, group_size: int, krot: int, random: torch.Generator) -> Rotation:
    groups = in_features // group_size
    order = torch.rand(krot, groups, group_size, generator=random).argsort(-1)
    return Rotation(
        pairs=order.reshape(krot, in_features).to(torch.int16),
        theta=(4 * torch.randn(krot, in_features // 2, generator=random)).half(),
        channel_scales=(0.25 + torch.rand(1, in_features, generator=random)).half(),
    )
