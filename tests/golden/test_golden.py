"""The graph of one decoder layer at every stage, as text: a change of a rewrite shows as a diff.

`pytest tests/golden --update-golden` writes the files anew; read the diff before committing it.
"""

from __future__ import annotations

import difflib
import re
from operator import getitem as _getitem
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from parofx.api import capture, convert, lower, prepare

FOLDER = Path(__file__).parent
_DTYPES = {"float32": "f32", "float16": "f16", "int16": "i16", "int32": "i32"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (graphs.linear(64, size, bias=size == 64) for size in (64, 32, 32))
        self.o = graphs.linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), graphs.Layer()
        self.norm = nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x)))


def text_of(gm: GraphModule) -> str:
    """Return a graph as text without what changes between runs: names of nodes and of sizes are numbered."""
    names: dict[Node, str] = {}
    sizes: dict[str, str] = {}
    lines = []

    def value(node: Node) -> str:
        found = node.meta.get("val")
        if isinstance(found, list | tuple):
            return "[" + ", ".join(tensor(one) for one in found) + "]"
        return tensor(found)

    def tensor(found: object) -> str:
        if not isinstance(found, Tensor):
            return "?" if found is None else type(found).__name__
        dtype = str(found.dtype).removeprefix("torch.")
        shape = ", ".join(
            re.sub(r"[a-z]\d+", lambda one: sizes.setdefault(one[0], f"s{len(sizes)}"), str(size))
            for size in found.shape
        )
        return f"{_DTYPES.get(dtype, dtype)}[{shape}]"

    def argument(one: Any) -> str:
        if isinstance(one, Node):
            return names[one]
        if isinstance(one, list | tuple):
            return "[" + ", ".join(map(argument, one)) + "]"
        return repr(one)

    for node in gm.graph.nodes:
        operator = str(node.target) if node.op == "call_function" else "input"
        if node.target is _getitem:
            operator = "getitem"
        arguments = [*map(argument, node.args), *(f"{key}={argument(one)}" for key, one in node.kwargs.items())]
        if node.op == "get_attr":
            names[node] = node.target
        elif operator == "aten.sym_size.int":
            names[node] = sizes.setdefault(str(node.meta["val"]), f"s{len(sizes)}")
        elif node.op == "output":
            lines.append(f"return {', '.join(arguments)}")
        else:
            names[node] = f"%{len(lines)}"
            lines.append(f"{names[node]}: {value(node)} = {operator}({', '.join(arguments)})")
    return "\n".join(lines) + "\n"


def stages() -> dict[str, str]:
    gm = capture(Layer().eval(), graphs.rows(2, 5, 64))
    found = {"float": text_of(gm)}
    prepare(gm, graphs.config(krot=2))
    found["prepared"] = text_of(gm)
    graphs.round_to_nearest(gm)
    convert(gm)
    found["converted"] = text_of(gm)
    lower(gm, provider="reference")
    found["lowered"] = text_of(gm)
    return found


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return stages()


@pytest.mark.parametrize("stage", ["float", "prepared", "converted", "lowered"])
def test_golden(stage: str, texts: dict[str, str], request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"decoder_layer_{stage}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(texts[stage])
    assert path.exists(), f"{path.name} is missing: run pytest tests/golden --update-golden"
    golden = path.read_text()
    diff = difflib.unified_diff(golden.splitlines(), texts[stage].splitlines(), path.name, "now", lineterm="")
    assert texts[stage] == golden, "\n".join(diff)


def test_the_text_is_the_same_in_every_run(texts: dict[str, str]) -> None:
    assert stages() == texts
