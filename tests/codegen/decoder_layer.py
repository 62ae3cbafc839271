"""Which kernels a decoder layer launches at decode, read off the code Inductor generates for an H100.

Run as a script it prints them as JSON. Each model is built with two layers and with three; what one more adds is what
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
_LAUNCH = re.compile(r"^\s*(?:\w+ = )?(triton_\w+)\.run\(|torch\.ops\.(\w+\.\w+)\.default\(|extern_kernels\.(\w+)\(", re.M)


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
    """The decoder layers of a model, for one new token of each sequence."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.rotary = model.layers, model.rotary_emb
        self.kinds = getattr(model.config, "layer_types", None)

    def forward(self, hidden: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        cache = Cache(keys, values, position)
        kinds = set(self.kinds or ()) if self.rotary.__class__.__name__.startswith("Gemma3") else {None}
        embeddings = {
            kind: self.rotary(hidden, position[None], *(() if kind is None else (kind,))) for kind in sorted(kinds, key=str)
        }
        for index, layer in enumerate(self.layers):
            kind = None if None in embeddings else self.kinds[index]
            hidden = layer(hidden, position_embeddings=embeddings[kind], past_key_values=cache, attention_mask=None)
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
        torch.zeros(shape, dtype=torch.bfloat16),
        torch.zeros(shape, dtype=torch.bfloat16),
    ]
    gm = torch.export.export(decode, tuple(inputs), strict=False).module(check_guards=False)
    Normalize().run(gm)
    passes = [MergeSiblings(), *([FuseProducers()] if fuse else []), Lower()]
    gm = copy_graph(Pipeline(passes).run(gm))
    inputs += lift_constants(gm).values()
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            node.target, node.args, node.kwargs = torch.ops.parofx_test.attention.default, node.args[:3], {}
        node.kwargs = {key: _on_cuda(value) for key, value in node.kwargs.items()}
        node.args = tuple(_on_cuda(value) for value in node.args)
    gm.recompile()
    return gm, inputs


def kernels(gm: GraphModule, inputs: list[Tensor], batch: int) -> Counter[str]:
    """Return the names of the kernels that the generated code launches, and how often it does."""
    with FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in inputs]
    source = generate(gm, fakes)
    launched: Counter[str] = Counter()
    for inductors, operator, extern in _LAUNCH.findall(source):
        launched[re.sub(r"_\d+$", "", inductors) or operator or extern] += 1
    return launched


def _on_cuda(value: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value


def main() -> None:
    register_guard()
    providers.register(TritonProvider(ARCH))
    found: dict[str, Any] = {}
    for name in MODELS:
        for batch in (1, 16):
            for fuse in (False, True):
                counts = [kernels(*lowered(name, layers, batch, fuse=fuse), batch) for layers in (2, 3)]
                found[f"{name} {batch} {'fused' if fuse else 'plain'}"] = dict(counts[1] - counts[0])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
