"""What tests of passes share: models written as one function, both doors into a graph, random transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy_writer
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from parofx import affine, pairing
from parofx.calibration.fitting import rotate_weight
from parofx.config import CalibrationConfig, ParoConfig
from parofx.dynamo import bind_parameters
from parofx.passes import Normalize, Stage, compensation
from parofx.passes.base import set_stage
from parofx.passes.capture import capture
from parofx.passes.graph import INT4_LINEAR, get_attribute, nodes_calling
from parofx.passes.linears import find_units
from parofx.passes.transforms import find_transforms

DOORS = ("export", "dynamo")
#: Fits next to nothing: what is tested is the graph.
QUICK = CalibrationConfig(steps=2, clip_ratios=(1.0,))
#: Rewrites that only reorder fp32 sums.
EXACT_IN_FP32 = 1e-5


class Model(nn.Module):
    """A forward written as a function of the module, its parts given by name."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


class Layer(nn.Module):
    """A block: norm, two siblings, one more linear, a residual."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.norm.weight.data = 1 + 0.3 * vector(64, seed=seed).data
        self.gate, self.up = linear(64, 128, seed=seed), linear(64, 128, bias=False, seed=seed + 50)
        self.down = linear(128, 64, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        normalized = self.norm(x)
        return x + self.down(torch.relu(self.gate(normalized)) * self.up(normalized))


class Stack(nn.Module):
    """Repeated blocks."""

    def __init__(self, count: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.whatever = nn.ModuleList(Layer(seed + index) for index in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.whatever:
            x = layer(x)
        return x


def linear(in_features: int = 64, out_features: int = 64, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """Return a linear whose bias is made of fp16 values, as checkpoints hold it."""
    module = nn.Linear(in_features, out_features, bias=bias)
    module.weight.data = matrix(out_features, in_features, seed=seed)
    if bias:
        module.bias.data = vector(out_features, seed=seed)
    return module


def matrix(rows: int, columns: int, *, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed + 1)
    return nn.Parameter(torch.randn(rows, columns, generator=generator) / max(rows, columns) ** 0.5)


def vector(size: int, *, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed + 2)).half().float())


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Captured:
    """A normalized graph and how to call it with the model's inputs."""

    gm: GraphModule
    arguments: Callable[..., tuple[Any, ...]]

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            output = self.gm(*self.arguments(*(value.clone() for value in inputs)))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def enter(door: str, model: Any, *inputs: Tensor) -> Captured:
    """Return the FLOAT graph of a model through `torch.export` or Dynamo."""
    if door == "export":
        return Captured(capture(model, *(value.clone() for value in inputs)), lambda *values: values)
    gm, given, positions = dynamo_graph(model, *(value.clone() for value in inputs))
    Normalize().run(gm)
    gm.graph.lint()
    gm.recompile()

    def arguments(*values: Tensor) -> tuple[Any, ...]:
        filled = list(given)
        for position, value in zip(positions, values, strict=True):
            filled[position] = value
        return tuple(filled)

    return Captured(gm, arguments)


def copy_of(gm: GraphModule) -> GraphModule:
    """Copy a graph for a test to change; parameters are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def dynamo_graph(model: Any, *inputs: Tensor) -> tuple[GraphModule, list[Any], list[int]]:
    """Return Dynamo's graph with bound parameters, its inputs, and where the model's own inputs are among them."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        bind_parameters(gm, example_inputs)
        found.append((gm, list(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    ((gm, given),) = found
    positions = [next(index for index, one in enumerate(given) if one is value) for value in inputs]
    return gm, given, positions


def randomize(gm: GraphModule, seed: int = 0) -> None:
    """Give every transform random pairs, angles and channel scales, as fp16 holds them."""
    generator = torch.Generator().manual_seed(seed)
    for index, transform in enumerate(find_transforms(gm)):
        _, theta, channel_scales = transform.parameters(gm)
        krot, in_features = theta.shape[0], channel_scales.shape[1]
        pairs = pairing.make_pairs(in_features, transform.group_size, krot, method="greedy", seed=seed + index)
        angles = torch.randn(theta.shape, generator=generator).half()
        scales = (0.5 + 1.5 * torch.rand(channel_scales.shape, generator=generator)).half()
        transform.set_parameters(gm, pairs.to(theta.device), angles, scales)


def round_to_nearest(gm: GraphModule) -> None:
    """Choose every weight's grid by min and max under the transforms as they are: CALIBRATED without fitting."""
    for transform in find_transforms(gm):
        for one in transform.linears:
            rotated = rotate_weight(one.weight, *transform.parameters(gm), transform.group_size)
            one.set_grid(gm, *affine.choose_qparams(rotated, one.bits, transform.group_size))
    set_stage(gm, Stage.CALIBRATED)


def set_bits(gm: GraphModule, bits: Mapping[str, int]) -> None:
    """Give linears of a PREPARED graph, known by the ends of their names, another width."""
    for transform in find_transforms(gm):
        for one in transform.linears:
            width = next((width for name, width in bits.items() if one.name.endswith(name)), one.bits)
            w, scales, zeros, _, group_size = one.fake_quantize.args
            one.fake_quantize.args = (w, scales, zeros, width, group_size)


def compensate(gm: GraphModule, ranks: Mapping[str, int], scale: float = 0.1) -> None:
    """Add random corrections to linears of a CALIBRATED graph, known by the ends of their names."""
    random = torch.Generator().manual_seed(0)
    for transform in find_transforms(gm):
        for one in transform.linears:
            rank = next((rank for name, rank in ranks.items() if one.name.endswith(name)), 0)
            if rank:
                up, down = (scale * torch.randn(size, rank, generator=random) for size in one.weight.shape)
                compensation.compensate(gm, one.fake_quantize, up, down.t())


def config(**options: Any) -> ParoConfig:
    return ParoConfig(calibration=QUICK, **options)


def relative(value: Tensor, expected: Tensor) -> float:
    """Return `max|value − expected| / max|expected|`, computed in fp64; NaN is infinite."""
    assert value.shape == expected.shape
    error = (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def eager(model: Any, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(*(value.clone() for value in inputs))
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def unit_parameters(gm: GraphModule) -> dict[str, tuple[str, bool]]:
    """Return unit name → (parameter name, read transposed) of a FLOAT graph."""
    return {unit.name: (unit.weight.fqn, unit.transposed) for unit in find_units(gm)}


def dequantized_weights(gm: GraphModule) -> dict[str, Tensor]:
    """Return the fp64 weight `(N, K)` each linear of a CONVERTED graph multiplies by, computed by NumPy."""
    weights = {}
    for node in nodes_calling(gm.graph, INT4_LINEAR):
        rotated, *packed = node.args[:4]
        nodes = dict(zip(("pairs", "theta", "channel_scales"), rotated.args[1:4], strict=True))
        nodes |= dict(zip(("qweight", "qzeros", "scales"), packed, strict=True))
        arrays = {name: get_attribute(gm, source.target).numpy() for name, source in nodes.items()}
        weights[node.meta["parofx_linear"]] = torch.from_numpy(numpy_writer.dense_weight(arrays))
    return weights
