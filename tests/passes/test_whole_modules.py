"""Where a `ParoLinear` may take a module's place: the model computes the same through its module tree."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import Model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parofx.passes import InsertTransforms
from parofx.passes.capture import capture
from parofx.report import FloatReason


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Heads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(*x.shape[:-1], 4, -1)


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(0, 1)


class TwoResults(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y.view(*x.shape[:-1], -1)


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Gated(nn.Module):
    """Holds a matrix named `weight`, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scales = graphs.matrix(64, 64), graphs.vector(64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.scales


def reasons(model: nn.Module, *inputs: Tensor) -> dict[str, FloatReason]:
    gm = capture(model.eval(), *inputs)
    InsertTransforms(graphs.config(), replace_modules=True).run(gm)
    return {one.name: one.reason for one in gm.meta["parofx_kept_float"]}


@pytest.mark.parametrize("module", [graphs.linear(64, 64), graphs.linear(64, 64, bias=False), Flat(64, 64)])
def test_a_linear_is_a_whole_module(module: nn.Module) -> None:
    assert reasons(nn.Sequential(module), graphs.rows(2, 3, 64)) == {}


def test_conv1d_is_a_whole_module() -> None:
    assert reasons(nn.Sequential(Conv1D(32, 64)), graphs.rows(2, 3, 64)) == {}


@pytest.mark.parametrize("kind", [Scaled, Heads, Residual, Transposed])
def test_a_linear_that_does_more_is_none(kind: type[nn.Linear]) -> None:
    assert reasons(nn.Sequential(kind(64, 64)), graphs.rows(2, 3, 64)) == {"0": FloatReason.FUNCTIONAL}


def test_a_linear_of_two_results_is_none() -> None:
    model = Model(lambda m, x: sum(m.inner(x)), inner=TwoResults(64, 64))
    assert reasons(model, graphs.rows(2, 3, 64)) == {"inner": FloatReason.FUNCTIONAL}


def test_a_module_with_another_use_of_its_tensors_is_none() -> None:
    assert reasons(nn.Sequential(Gated()), graphs.rows(2, 3, 64)) == {"0": FloatReason.FUNCTIONAL}


READERS: dict[str, Any] = {
    "norm": lambda m, x: m.a(x) * m.a.weight.norm(),
    "transposed linear": lambda m, x: F.linear(m.a(x), m.a.weight.t()),
    "functional linear": lambda m, x: F.linear(m.a(x), m.a.weight),
    "embedding": lambda m, x: m.a(x) + F.embedding(torch.zeros(3, dtype=torch.long), m.a.weight),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_weight_that_is_read_elsewhere_stays(reader: str) -> None:
    found = reasons(Model(READERS[reader], a=graphs.linear()), graphs.rows(3, 64))
    assert found
    assert set(found.values()) <= {FloatReason.FUNCTIONAL, FloatReason.OUTPUT_HEAD}
    assert "a" in found


def test_a_module_that_is_called_twice_is_one() -> None:
    assert reasons(Model(lambda m, x: m.a(m.a(x)), a=graphs.linear()), graphs.rows(3, 64)) == {}
