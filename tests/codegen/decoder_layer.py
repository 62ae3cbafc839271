"""Which kernels a decoder layer launches at decode, read off the code Inductor generates for an H100.

Run as a script it prints them as JSON. Each model is built with one layer and with two; what one more adds is what
a layer costs. Attention is one opaque operator, as on a GPU.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from fake_cuda import generate, register_guard
from rounded import round_model

from parofx import providers
from parofx.compiled_graph import _lift_constants as lift_constants
from parofx.compiled_graph import copy_graph
from parofx.passes import FuseProducers, Lower, MergeSiblings, Normalize
from parofx.pipeline import Pipeline
from parofx.providers.triton import TritonProvider
from parofx.triton_ops.cost_model import plan_layer

ARCH = "sm_90"
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
CACHE_LENGTH = 256
MODELS = ("llama", "qwen3", "gemma3_text")
#: What `triton_rotate_int4_linear` launches, by where the rotation is placed.
_KERNELS = {
    "fused": ("rotate_int4_linear",),
    "gather": ("rotate", "int4_linear"),
    "dense": ("rotation_matrices", "rotate_dense", "int4_linear"),
}
_LAUNCH = re.compile(
    r"^\s*(?:\w+ = )?(triton_\w+)\.run\(|torch\.ops\.(\w+\.\w+)\.default\(|extern_kernels\.(\w+)\(", re.M
)


@torch.library.custom_op("parofx_test::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stand for the attention kernel."""
    raise NotImplementedError


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


class Cache:
    """What attention asks of a cache of fixed size."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = self.keys[layer].index_copy(2, self.position, key)
        values = self.values[layer].index_copy(2, self.position, value)
        return keys, values


class Decode(nn.Module):
    """The decoder layers of a model, for one new token of each sequence; `rotary` is what attention turns by."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, hidden: Tensor, position: Tensor, rotary: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache, rotary = Cache(keys, values, position), (rotary[0], rotary[1])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, past_key_values=cache, attention_mask=None)
        return hidden


def lowered(name: str, layers: int, batch: int, *, fuse: bool) -> tuple[GraphModule, list[Tensor]]:
    """Return the graph of a quantized model lowered for ARCH, constants as inputs, and examples of its inputs."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SIZES, num_hidden_layers=layers)
    model = transformers.AutoModel.from_config(config).eval()
    decode = round_model(Decode(model), group_size=128, krot=8).to(torch.bfloat16)
    shape = (layers, batch, SIZES["num_key_value_heads"], CACHE_LENGTH, SIZES["head_dim"])
    inputs = [
        torch.randn(batch, 1, SIZES["hidden_size"], dtype=torch.bfloat16),
        torch.tensor([17]),
        torch.randn(2, 1, 1, SIZES["head_dim"], dtype=torch.bfloat16),
        torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape, dtype=torch.bfloat16),
    ]
    gm = torch.export.export(decode, tuple(inputs), strict=False).module(check_guards=False)
    Normalize().run(gm)
    passes = [MergeSiblings(), *([FuseProducers()] if fuse else []), Lower()]
    gm = copy_graph(Pipeline(passes).run(gm))
    inputs += lift_constants(gm).values()
    _forget_assertions(gm)
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            node.target, node.args, node.kwargs = torch.ops.parofx_test.attention.default, node.args[:3], {}
        node.kwargs = {key: _on_cuda(value) for key, value in node.kwargs.items()}
        node.args = tuple(_on_cuda(value) for value in node.args)
    gm.recompile()
    return gm, inputs


def _forget_assertions(gm: GraphModule) -> None:
    """Erase what the exporter asserted of devices: the tensors are on another one now."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            target = torch.ops.aten._assert_tensor_metadata.default
            for node in module.graph.find_nodes(op="call_function", target=target):
                module.graph.erase_node(node)
            module.recompile()


def kernels(gm: GraphModule, inputs: list[Tensor], batch: int, *, apart: bool) -> Counter[str]:
    """Return the kernels that the generated code launches: Inductor's as one name, ours by theirs.

    `apart` gives every rotation that no producer does a kernel of its own, whatever the cost model says.
    """
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
    launched: Counter[str] = Counter()
    for inductors, operator, extern in _LAUNCH.findall(generate(gm, fakes)):
        launched["inductor" if inductors else operator.removeprefix("parofx.triton_") or extern] += 1
    placed: Counter[str] = Counter()
    by_name = dict(zip([node.name for node in gm.graph.nodes if node.op == "placeholder"], inputs, strict=True))
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.parofx.triton_rotate_int4_linear.default):
        order, words = by_name[node.args[2].name], by_name[node.args[3].name]
        rotations, groups, rounds, group_size = order.shape
        sizes = (batch, groups * group_size, words.shape[1], group_size, rounds - 1)
        plan = plan_layer(*sizes, ARCH, rotations=rotations)
        placed += Counter(_KERNELS["gather" if apart else plan.placement])
    # One operator may launch several kernels: the cost model says which.
    del launched["rotate_int4_linear"]
    return launched + placed


def _on_cuda(value: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value


def per_layer(name: str, batch: int, *, fuse: bool) -> dict[str, int]:
    """Return the kernels that one more layer adds."""
    counts = [kernels(*lowered(name, layers, batch, fuse=fuse), batch, apart=not fuse) for layers in (1, 2)]
    return dict(sorted((counts[1] - counts[0]).items()))


def main() -> None:
    register_guard()
    providers.register(TritonProvider(ARCH))
    found = {
        f"{name} {batch} {'after' if fuse else 'before'}": per_layer(name, batch, fuse=fuse)
        for name in MODELS
        for batch in (1, 16)
        for fuse in (False, True)
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
