"""A block whose linears are quantized while it is trained: the student of block-wise training.

A rotation of activations and the inverse one of the rounded weight are the same to the block's output. So the student
keeps activations as they are and computes, once per step, the weight that each linear multiplies by,

    Ŵ = Q(W ⊙ α · M) Mᵀ ⊘ α,

with M the rotation's dense form: `4·N·K·g` operations instead of rotating every activation. Gradients pass rounding and
clamping straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx import rotation
from parofx.affine import LARGEST_SCALE, SMALLEST_SCALE, quant_max
from parofx.calibration.segment import SegmentInterpreter
from parofx.passes.graph import FAKE_QUANTIZE, ROTATE

_ASSERT_METADATA = torch.ops.aten._assert_tensor_metadata.default


@dataclass
class TrainedLinear:
    """A linear's trainable tensors: the rotated weight `(N, K)`, scales and float zeros `(N, K/g)`, all fp32.

    Where codes are decided, `fixed` is true: `weight` holds codes minus zeros, and `scales` their logarithms, because
    they differ by orders of magnitude.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    fixed: bool = False


class TrainedTransform:
    """One transform while its block is trained.

    Args:
        pairs: int16 `(krot, K)`.
        theta: `(krot, K/2)`.
        channel_scales: 1/α, `(1, K)`.
        weights: the linears' float weights by name, `(N_i, K)`.
        bits: width of each linear's codes, by name.
        group_size: channels per group.
    """

    def __init__(
        self,
        pairs: Tensor,
        theta: Tensor,
        channel_scales: Tensor,
        weights: Mapping[str, Tensor],
        *,
        bits: Mapping[str, int],
        group_size: int,
    ) -> None:
        self.pairs = pairs
        self.theta = theta.float().clone()
        # α's logarithm is trained, so that it stays positive.
        self.log_alpha = channel_scales.float().flatten().log().neg()
        self.weights = weights
        self.bits = bits
        self.group_size = group_size
        self.linears: dict[str, TrainedLinear] = {}

    def freeze_rotation(self) -> None:
        """Round θ and 1/α to fp16, as they are stored, and move the weights, with plain grids, to that rotation."""
        with torch.no_grad():
            self.theta = self.theta.detach().half().float()
            self.log_alpha = self.log_alpha.detach().neg().exp().half().float().log().neg()
            self.linears = {}
            for name, weight in self.weights.items():
                rotated = self._rotate(weight)
                self.linears[name] = TrainedLinear(
                    rotated, *differentiable_qparams(rotated, self.bits[name], self.group_size)
                )

    def fix_codes(self, name: str, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Let a linear's codes `(N, K)` and zeros stay as they are from here on; its scales may still be trained."""
        # As integers: a whole model of them lies in memory while it is distilled.
        steps = (codes.float() - zeros.repeat_interleave(self.group_size, 1)).to(torch.int16)
        if self.bits[name] < 8:
            steps = steps.to(torch.int8)
        self.linears[name] = TrainedLinear(steps, scales.log(), zeros, fixed=True)

    @property
    def channel_scales(self) -> Tensor:
        """1/α, fp16 `(1, K)`."""
        return self.log_alpha.detach().neg().exp().half()[None]

    def effective_weights(self) -> dict[str, Tensor]:
        """Return what each linear multiplies by, fp32 `(N, K)`, differentiable in whatever is trained."""
        matrix = rotation.dense_form(self.pairs, self.theta, self.group_size)
        alpha = self.log_alpha.exp()
        result = {}
        for name, weight in self.weights.items():
            linear = self.linears.get(name)
            if linear is None:
                rotated = self._blocks(weight.float() * alpha, matrix)
                grid = differentiable_qparams(rotated, self.bits[name], self.group_size)
            else:
                rotated, grid = linear.weight, (linear.scales, linear.zeros)
            if linear is not None and linear.fixed:
                rounded = linear.weight * linear.scales.exp().repeat_interleave(self.group_size, 1)
            else:
                rounded = FAKE_QUANTIZE(rotated, *grid, self.bits[name], self.group_size)
            result[name] = self._blocks(rounded, matrix.transpose(1, 2)) / alpha
        return result

    def _rotate(self, weight: Tensor) -> Tensor:
        matrix = rotation.dense_form(self.pairs, self.theta, self.group_size)
        return self._blocks(weight.float() * self.log_alpha.exp(), matrix)

    def _blocks(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """Multiply each group's columns of `weight (N, K)` by its matrix, `(K/g, g, g)`."""
        groups = weight.view(len(weight), -1, self.group_size).transpose(0, 1)
        return torch.bmm(groups, matrix).transpose(0, 1).reshape(weight.shape)


def differentiable_qparams(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return scales and float zeros `(N, K/g)` of each group's range, differentiable in `weight (N, K)`."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / quant_max(bits)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return scales, -low / scales


class Student(SegmentInterpreter):
    """Runs a segment with given weights in the place of the quantized linears' own.

    Args:
        module: the segment.
        weights: by linear's name, `(N, K)`; a linear that is not named keeps its float weight.
        record: called with the rotation of an activation and its input.
    """

    def __init__(
        self, module: GraphModule, weights: Mapping[str, Tensor], record: Callable[[Node, Tensor], None] | None = None
    ) -> None:
        super().__init__(module)
        self._weights = weights
        self._record = record

    def run_node(self, n: Node) -> Any:
        """Run one node; rotations hand their input on."""
        if n.target is _ASSERT_METADATA:
            return None  # the export noted the dtypes of a forward without autocast
        if n.target is not ROTATE and n.target is not FAKE_QUANTIZE:
            return super().run_node(n)
        value = self.env[n.args[0]]  # type: ignore[index]
        if "parofx_transform" in n.meta and self._record is not None:
            self._record(n, value)
        trained = self._weights.get(n.meta.get("parofx_linear", ""))
        return value if trained is None else trained.to(value.dtype)
