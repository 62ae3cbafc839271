"""The transforms of a PREPARED or CALIBRATED graph, read off the graph itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from parofx.calibration.fitting import FittedTransform
from parofx.passes.blocks import block_of
from parofx.passes.graph import FAKE_QUANTIZE, ROTATE, TRANSPOSE, binding, get_attribute, nodes_calling, set_buffer
from parofx.report import TransformReport

_GRID = ".fake_quantize.scales"


@dataclass
class TransformedLinear:
    """One weight behind a transform: its `fake_quantize` node and the linears that read it."""

    name: str
    fake_quantize: Node
    calls: list[Node]

    @property
    def weight(self) -> Tensor:
        """The float weight `(N, K)`, a view of the model's own."""
        tensor = self.parameter.detach()
        return tensor.t() if self._source.target is TRANSPOSE else tensor

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

    def set_grid(self, gm: GraphModule, scales: Tensor, zeros: Tensor) -> None:
        """Switch fake quantization on with `scales` and `zeros (N, K/g)`."""
        set_buffer(gm, f"{self.name}.fake_quantize.scales", scales)
        set_buffer(gm, f"{self.name}.fake_quantize.zeros", zeros)
        for node, value in zip(self.fake_quantize.args[1:3], (scales, zeros), strict=True):
            assert isinstance(node, Node)
            node.meta["val"] = value

    def grid(self, gm: GraphModule) -> tuple[Tensor, Tensor]:
        """Return `(scales, zeros)`; empty while fake quantization is off."""
        name = f"{self.name}.fake_quantize"
        return get_attribute(gm, f"{name}.scales"), get_attribute(gm, f"{name}.zeros")


@dataclass
class Transform:
    """One rotation and everything it serves."""

    name: str
    block: str
    group_size: int
    bits: int
    inputs: list[Node] = field(default_factory=list)
    linears: list[TransformedLinear] = field(default_factory=list)

    def parameters(self, gm: GraphModule) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(pairs, theta, channel_scales)`."""
        names = (f"{self.name}.{part}" for part in ("pairs", "theta", "channel_scales"))
        pairs, theta, channel_scales = (get_attribute(gm, name) for name in names)
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
        for linear, grid, error in zip(self.linears, fitted.grids, fitted.errors, strict=True):
            linear.set_grid(gm, *(part.to(device) for part in grid))
            errors[linear.name] = error
        members = tuple(linear.name for linear in self.linears)
        report = TransformReport(
            self.name, members, self.block, fitted.loss_before, fitted.loss_after, fitted.angle_rms
        )
        gm.meta.setdefault("parofx_transform_reports", {})[self.name] = report
        return report

    def set_parameters(self, gm: GraphModule, pairs: Tensor, theta: Tensor, channel_scales: Tensor) -> None:
        """Replace the rotation; θ and the channel scales are held in fp32, whatever precision they were rounded to."""
        set_buffer(gm, f"{self.name}.pairs", pairs)
        set_buffer(gm, f"{self.name}.theta", theta.float())
        set_buffer(gm, f"{self.name}.channel_scales", channel_scales.float().reshape(1, -1))


def find_transforms(gm: GraphModule) -> list[Transform]:
    """Return the transforms in the order their blocks run."""
    blocks = gm.meta.get("parofx_blocks", ())
    transforms: dict[str, Transform] = {}
    for node in nodes_calling(gm.graph, ROTATE):
        name = node.meta.get("parofx_transform")
        if name is not None:
            found = transforms.setdefault(name, Transform(name, block_of(node, blocks), int(node.args[4]), bits=4))  # type: ignore[arg-type]
            found.inputs.append(node)
    for transform in transforms.values():
        weights: dict[Node, list[Node]] = {}
        for rotated in transform.inputs:
            for call in rotated.users:
                source = call.args[1]
                assert isinstance(source, Node)
                assert source.target is FAKE_QUANTIZE
                weights.setdefault(source, []).append(call)
        for fake_quantize, calls in weights.items():
            scales, bits = fake_quantize.args[1], fake_quantize.args[3]
            assert isinstance(scales, Node)
            assert isinstance(bits, int)
            transform.bits = bits
            linear = TransformedLinear(str(scales.target).removesuffix(_GRID), fake_quantize, calls)
            transform.linears.append(linear)
    return list(transforms.values())


def norm_power(rotated_input: Node) -> Tensor | None:
    """Return `E[x²] (K,)` of a transform's input as far as the graph tells without data, or None.

    Where the input is a normalized tensor times a gain made of parameters alone (RMSNorm, LayerNorm), its channels
    have unit mean square before the gain, so `E[x²] = gain² (+ shift²)`.
    """
    node = rotated_input.args[0]
    assert isinstance(node, Node)
    channels = node.meta["val"].shape[-1] if isinstance(node.meta.get("val"), Tensor) else None
    while _name(node) in _KEEPS_CHANNELS and isinstance(node.args[0], Node):
        node = node.args[0]
    if _name(node) == "layer_norm":
        gain, shift = (_constant(_argument(node, index, key)) for index, key in ((2, "weight"), (3, "bias")))
        if gain is None or gain.numel() != channels:
            return None
        return gain.square() + (0 if shift is None else shift.square())
    if _name(node) == "rms_norm":
        gain = _constant(_argument(node, 2, "weight"))
        return gain.square() if gain is not None and gain.numel() == channels else None
    if _name(node) in ("mul", "multiply"):
        for operand in node.args[:2]:
            gain = _constant(operand)
            if gain is not None and gain.numel() == channels:
                return gain.square()
    return None


#: What may stand between a norm and the linears that read it.
_KEEPS_CHANNELS = frozenset({"to", "_to_copy", "type_as", "float", "dropout", "view", "reshape", "contiguous", "clone"})


def _constant(value: object) -> Tensor | None:
    """Evaluate a node that depends on parameters alone, `(K,)` in fp32, or return None."""
    if not isinstance(value, Node):
        return None
    bound = binding(value)
    if bound is not None:
        return bound.tensor.detach().float().flatten()
    if value.op == "placeholder" or not value.all_input_nodes:
        return None
    arguments = []
    for argument in value.args:
        constant = _constant(argument) if isinstance(argument, Node) else argument
        if constant is None and isinstance(argument, Node):
            return None
        arguments.append(constant)
    if value.op == "call_function" and callable(value.target) and _name(value) in ("add", "mul", "to", "_to_copy"):
        if _name(value) in ("to", "_to_copy"):
            return arguments[0]  # type: ignore[return-value]
        result = value.target(*arguments)
        return result if isinstance(result, Tensor) else None
    if value.op == "call_method" and value.target in ("float", "to"):
        return arguments[0]  # type: ignore[return-value]
    return None


def _argument(node: Node, index: int, key: str) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(key)


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).rpartition("::")[2]
    return target if isinstance(target, str) else getattr(target, "__name__", "")
