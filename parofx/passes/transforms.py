"""The transforms of a PREPARED or CALIBRATED graph, read off the graph itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.calibration.fitting import FittedTransform
from parofx.checks import FLOAT_DTYPES
from parofx.errors import DataError
from parofx.passes.blocks import block_of
from parofx.passes.compensation import compensate, correction, quantized_weight
from parofx.passes.graph import ROTATE, TRANSPOSE, binding, get_attribute, nodes_calling, set_buffer
from parofx.report import TransformReport


@dataclass
class TransformedLinear:
    """One weight behind a transform: its `fake_quantize` node and the linears that read it, in the graph's order."""

    name: str
    fake_quantize: Node
    calls: list[Node]

    @property
    def weight(self) -> Tensor:
        """The float weight `(N, K)`, a view of the model's own."""
        tensor = self.parameter.detach()
        return tensor.t() if self._source.target is TRANSPOSE else tensor

    @property
    def bits(self) -> int:
        """Width of its codes; siblings may have others."""
        bits = self.fake_quantize.args[3]
        assert isinstance(bits, int)
        return bits

    @property
    def bits_given(self) -> bool:
        """Whether `lm_head` gave that width: it is not to be chosen."""
        return bool(self.fake_quantize.meta.get("parofx_bits_given"))

    def correction(self, gm: GraphModule) -> tuple[Tensor, Tensor] | None:
        """Return `(down (r, K), up (r, N))`, fp16, that is added to its fake-quantized weight, or None."""
        return correction(gm, self.calls[0].args[1])

    @property
    def parameter(self) -> Tensor:
        """The model's own tensor behind the weight."""
        bound = binding(self.parameter_node)
        assert bound is not None
        return bound.tensor

    @property
    def parameter_node(self) -> Node:
        """The node of the model's own tensor."""
        source = self._source
        if source.target is TRANSPOSE:
            assert isinstance(source.args[0], Node)
            return source.args[0]
        return source

    @property
    def _source(self) -> Node:
        rotated = self.fake_quantize.args[0]
        assert isinstance(rotated, Node)
        assert isinstance(rotated.args[0], Node)
        return rotated.args[0]

    @property
    def has_bias(self) -> bool:
        """Whether a call of it adds one."""
        return any(len(call.args) > 2 and call.args[2] is not None for call in self.calls)

    def set_bits(self, bits: int) -> None:
        """Choose the width of its codes."""
        args = self.fake_quantize.args
        self.fake_quantize.args = (*args[:3], bits, *args[4:])

    def set_grid(self, gm: GraphModule, scales: Tensor, zeros: Tensor) -> None:
        """Switch fake quantization on with `scales` and `zeros (N, K/g)`."""
        _set_buffers(gm, self.fake_quantize.args[1:3], (scales, zeros))

    def set_weight(self, gm: GraphModule, weight: Tensor) -> None:
        """Let the graph read another weight `(N, K)`, in the dtype of the model's own, which stays as it is."""
        node = self.parameter_node
        assert node.op == "get_attr"
        weight = weight.to(self.weight.dtype)
        _set_buffers(gm, (node,), (weight.t() if self._source.target is TRANSPOSE else weight,))

    def grid(self, gm: GraphModule) -> tuple[Tensor, Tensor]:
        """Return `(scales, zeros)`; empty while fake quantization is off."""
        scales, zeros = (get_attribute(gm, str(node.target)) for node in self.fake_quantize.args[1:3])  # type: ignore[union-attr]
        return scales, zeros


@dataclass
class Transform:
    """One rotation and everything it serves."""

    name: str
    block: str
    group_size: int
    inputs: list[Node] = field(default_factory=list)
    linears: list[TransformedLinear] = field(default_factory=list)

    def parameters(self, gm: GraphModule) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(pairs, theta, channel_scales)`."""
        nodes = self.inputs[0].args[1:4]
        pairs, theta, channel_scales = (get_attribute(gm, str(node.target)) for node in nodes)  # type: ignore[union-attr]
        return pairs, theta, channel_scales

    def krot(self, gm: GraphModule) -> int:
        """Return the number of rotation rounds."""
        return self.parameters(gm)[0].shape[0]

    def apply(self, gm: GraphModule, fitted: FittedTransform) -> TransformReport:
        """Put what calibration found into the graph, and note it there."""
        device = self.parameters(gm)[0].device
        parts = (fitted.pairs, fitted.theta, fitted.channel_scales)
        self.set_parameters(gm, *(part.to(device) for part in parts))
        errors = gm.meta.setdefault("parofx_relative_errors", {})
        for index, (linear, grid, error) in enumerate(zip(self.linears, fitted.grids, fitted.errors, strict=True)):
            linear.set_grid(gm, *(part.to(device) for part in grid))
            weight = fitted.weight(index)
            if weight is not None:
                linear.set_weight(gm, weight.to(device))
            errors[linear.name] = error
        members = tuple(linear.name for linear in self.linears)
        nearest = gm.meta.setdefault("parofx_nearest_errors", {})
        nearest |= zip(members, fitted.nearest_errors or (), strict=False)
        for linear, (up, down) in zip(self.linears, fitted.corrections or (), strict=False):
            compensate(gm, linear.fake_quantize, up.to(device), down.to(device))
        uncorrected = gm.meta.setdefault("parofx_uncorrected_errors", {})
        uncorrected |= zip(members, fitted.uncorrected_errors or (), strict=False)
        report = TransformReport(
            self.name,
            members,
            self.block,
            fitted.loss_before,
            fitted.loss_after,
            fitted.angle_rms,
            fitted.damping,
            fitted.joins_rows,
        )
        gm.meta.setdefault("parofx_transform_reports", {})[self.name] = report
        return report

    def set_parameters(self, gm: GraphModule, pairs: Tensor, theta: Tensor, channel_scales: Tensor) -> None:
        """Replace the rotation; θ and the channel scales are held in fp32, whatever precision they were rounded to."""
        _set_buffers(gm, self.inputs[0].args[1:4], (pairs, theta.float(), channel_scales.float().reshape(1, -1)))

    def set_group_size(self, group_size: int) -> None:
        """Choose the channels per group; pairs and angles that fit it must follow."""
        rotated = [linear.fake_quantize.args[0] for linear in self.linears]
        for node in (*self.inputs, *rotated, *(linear.fake_quantize for linear in self.linears)):
            assert isinstance(node, Node)
            node.args = (*node.args[:4], group_size)
        self.group_size = group_size

    def halve_parameters(self, gm: GraphModule) -> None:
        """Hold θ and the channel scales as the checkpoint does, in fp16."""
        pairs, theta, channel_scales = self.parameters(gm)
        _set_buffers(gm, self.inputs[0].args[1:4], (pairs, theta.half(), channel_scales.half()))


def _set_buffers(gm: GraphModule, nodes: Sequence[object], tensors: Sequence[Tensor]) -> None:
    """Replace the tensors that `get_attr` nodes read."""
    for node, tensor in zip(nodes, tensors, strict=True):
        assert isinstance(node, Node)
        set_buffer(gm, str(node.target), tensor)
        node.meta["val"] = tensor


def find_transforms(gm: GraphModule) -> list[Transform]:
    """Return the transforms in the order their blocks run."""
    blocks = gm.meta.get("parofx_blocks", ())
    transforms: dict[str, Transform] = {}
    for node in nodes_calling(gm.graph, ROTATE):
        name = node.meta.get("parofx_transform")
        if name is not None:
            found = transforms.setdefault(name, Transform(name, block_of(node, blocks), int(node.args[4])))  # type: ignore[arg-type]
            found.inputs.append(node)
    for transform in transforms.values():
        weights: dict[Node, list[Node]] = {}
        for rotated in transform.inputs:
            for call in rotated.users:
                source = quantized_weight(call.args[1])
                if source is not None:
                    weights.setdefault(source, []).append(call)
        for fake_quantize, calls in weights.items():
            linear = TransformedLinear(fake_quantize.meta["parofx_linear"], fake_quantize, sorted(calls))
            transform.linears.append(linear)
    return list(transforms.values())


def check_weights(transforms: Sequence[Transform]) -> None:
    """Check that the weights behind transforms are finite and of a dtype that can be computed with.

    Raises:
        DataError: naming those that are not.
    """
    weights = [linear for transform in transforms for linear in transform.linears]
    for linear in weights:
        if linear.weight.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"the weight of {linear.name} must be one of {', '.join(map(str, FLOAT_DTYPES))}, got "
                f"{linear.weight.dtype}; load the model in one of them, with the scales that belong to it applied, or "
                "add the module to modules_to_not_convert"
            )
    wrong = [linear.name for linear in weights if not torch.isfinite(linear.weight).all()]
    if wrong:
        names = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DataError(
            f"the weight of {names} must be finite, got NaN or infinity; repair the model or add it to "
            "modules_to_not_convert"
        )
