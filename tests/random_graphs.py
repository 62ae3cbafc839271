"""Random models: linears in every spelling, shared inputs and weights, views, residuals, in-place writes, blocks."""

from __future__ import annotations

from dataclasses import dataclass

import graphs
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTHS = (32, 64, 96, 128, 192)
#: How a product is written; the second set reads a weight stored (K, N).
FORMS_NK = ("module", "functional", "keywords", "matmul_t", "mm_T", "operator_permute")
FORMS_KN = ("matmul", "addmm", "functional_t", "method")
ELEMENTWISE = ("tanh", "gelu", "scale", "norm", "relu")
SHAPES = ("heads", "swap", "flatten")


@dataclass(frozen=True)
class Step:
    """One operation of a program: which of the values so far it reads, and how."""

    kind: str
    source: int
    weight: int = 0
    other: int = 0
    form: str = ""


@dataclass(frozen=True)
class Weight:
    in_features: int
    out_features: int
    form: str
    bias: bool


@dataclass(frozen=True)
class Program:
    """The steps of one block `(2, 3, width) → (2, 3, width)`, its weights, and how often the block is repeated."""

    width: int
    weights: tuple[Weight, ...]
    steps: tuple[Step, ...]
    blocks: int


class Block(nn.Module):
    def __init__(self, program: Program, seed: int) -> None:
        super().__init__()
        self.program = program
        for index, weight in enumerate(program.weights):
            shape = (weight.out_features, weight.in_features)
            here = 100 * seed + index
            if weight.form == "module":
                linear = graphs.linear(weight.in_features, weight.out_features, bias=weight.bias, seed=here)
                self.add_module(f"linear{index}", linear)
                continue
            shape = shape if weight.form in FORMS_NK else shape[::-1]
            self.register_parameter(f"matrix{index}", graphs.matrix(*shape, seed=here))
            bias = graphs.vector(weight.out_features, seed=here) if weight.bias or weight.form == "addmm" else None
            self.register_parameter(f"shift{index}", bias)

    def forward(self, x: Tensor) -> Tensor:
        values = [x.clone()]
        for step in self.program.steps:
            source = values[step.source]
            if step.kind == "linear":
                values.append(self.product(source, step.weight))
            elif step.kind == "add":
                values.append(source + values[step.other])
            elif step.kind == "write":
                source.mul_(0.5).add_(0.1)
            elif step.kind == "write_slice":
                source[0] = 0.25
            elif step.kind == "elementwise":
                values.append(elementwise(step.form, source))
            else:
                values.append(reshape(step.form, source))
        return values[-1]

    def product(self, x: Tensor, index: int) -> Tensor:
        form = self.program.weights[index].form
        if form == "module":
            return self.get_submodule(f"linear{index}")(x)
        w, b = getattr(self, f"matrix{index}"), getattr(self, f"shift{index}")
        if form == "functional":
            return F.linear(x, w, b)
        if form == "keywords":
            return F.linear(bias=b, weight=w, input=x)
        if form == "functional_t":
            return F.linear(x, w.t(), b)
        if form == "addmm":
            return torch.addmm(b, x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)
        if form == "mm_T":
            y = torch.mm(x.reshape(-1, x.shape[-1]), w.T).reshape(*x.shape[:-1], -1)
        elif form == "matmul_t":
            y = torch.matmul(x, w.transpose(0, 1))
        elif form == "operator_permute":
            y = x @ w.permute(1, 0)
        else:
            y = x @ w if form == "matmul" else x.matmul(w)
        return y if b is None else y + b


class RandomModel(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(program, seed) for seed in range(program.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def elementwise(form: str, x: Tensor) -> Tensor:
    if form == "norm":
        return F.layer_norm(x, (x.shape[-1],))
    if form == "scale":
        return 0.5 * x
    return {"tanh": torch.tanh, "gelu": F.gelu, "relu": torch.relu}[form](x)


def reshape(form: str, x: Tensor) -> Tensor:
    """Mix up an activation `(2, 3, K)` in ways that keep its shape."""
    if form == "heads":
        return x.view(2, 3, 4, -1).transpose(1, 2).contiguous().view(2, 3, -1)
    if form == "swap":
        return x.transpose(0, 1).reshape(2, 3, -1)
    return x.reshape(6, -1).flip(0).view(2, 3, -1)


@st.composite
def programs(draw: st.DrawFn, widths: tuple[int, ...] = WIDTHS) -> Program:
    width = draw(st.sampled_from(widths))
    weights: list[Weight] = []
    steps: list[Step] = []
    value_widths = [width]

    def add_linear(source: int, out_features: int | None) -> None:
        known = [
            index
            for index, weight in enumerate(weights)
            if weight.in_features == value_widths[source] and out_features in (None, weight.out_features)
        ]
        if known and draw(st.booleans()):
            index = draw(st.sampled_from(known))
        else:
            wide = out_features or draw(st.sampled_from(widths))
            form = draw(st.sampled_from(FORMS_NK + FORMS_KN))
            weights.append(Weight(value_widths[source], wide, form, draw(st.booleans())))
            index = len(weights) - 1
        steps.append(Step("linear", source, weight=index))
        value_widths.append(weights[index].out_features)

    for _ in range(draw(st.integers(2, 8))):
        source = draw(st.integers(0, len(value_widths) - 1))
        kind = draw(st.sampled_from(("linear", "linear", "linear", "add", "elementwise", "shape", "write")))
        if kind == "linear":
            add_linear(source, None)
            continue
        if kind == "write":
            steps.append(Step(draw(st.sampled_from(("write", "write_slice"))), source))
            continue
        if kind == "add":
            equal = [index for index, one in enumerate(value_widths) if one == value_widths[source]]
            steps.append(Step("add", source, other=draw(st.sampled_from(equal))))
        else:
            form = draw(st.sampled_from(ELEMENTWISE if kind == "elementwise" else SHAPES))
            steps.append(Step(kind, source, form=form))
        value_widths.append(value_widths[source])
    add_linear(draw(st.integers(0, len(value_widths) - 1)), width)
    return Program(width, tuple(weights), tuple(steps), draw(st.integers(1, 2)))
