"""Graphs lowered for CUDA, run on the CPU, where the operators compute with PyTorch."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, Captured
from rounded import random_rotation, round_linear
from test_fuse_producers import block, llama
from test_merge_siblings import attention, converted
from test_providers import a_call
from torch import Tensor
from torch.library import opcheck

from parofx import providers
from parofx.passes import FuseProducers, Lower, MergeSiblings, census
from parofx.pipeline import Pipeline
from parofx.providers.triton import TritonProvider
from parofx.testing import RotateLinearCase
from parofx.triton_ops import emission as _emission  # noqa: F401  (registers the operators)
from parofx.triton_ops import layout

#: bf16 has 8 bits.
BF16 = 1e-2
paro = torch.ops.parofx


@pytest.fixture(autouse=True)
def for_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_PROVIDERS", [TritonProvider("sm_90"), *providers.providers()])


def lower(captured: Captured, *inputs: Tensor, **options: Any) -> dict[str, int]:
    """Lower, check the output, and return the operators of the result."""
    before = captured(*inputs)
    Pipeline([MergeSiblings(), FuseProducers(**options), Lower()]).run(captured.gm)
    after = captured(*inputs)
    assert after.dtype == before.dtype
    assert float((after - before).float().norm() / before.float().norm()) < BF16
    return {name: count for name, count in census(captured.gm).items() if "parofx" in name}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("share", [True, False])
def test_siblings_are_one_operator(door: str, share: bool) -> None:
    x = graphs.rows(3, 64).bfloat16()
    found = lower(converted(attention().bfloat16(), x, door=door, share_siblings=share), x)
    assert found == {"parofx.triton_rotate_int4_linear.default": 2}


def test_a_computed_bias_is_added_behind() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.a(x) + torch.nn.functional.linear(x, m.w, x.mean(0)[:32].repeat(2))

    model = graphs.Model(forward, a=graphs.linear(), w=graphs.matrix(64, 64, seed=2)).bfloat16()
    x = graphs.rows(3, 64).bfloat16()
    # The bias is computed behind the first product, so that the two are not one call.
    assert lower(converted(model, x), x) == {"parofx.triton_rotate_int4_linear.default": 2}


class TwoOrders(torch.nn.Module):
    """Siblings of which one has a bias, in the orders that a graph may have them in."""

    def __init__(self) -> None:
        super().__init__()
        plain, biased = (
            round_linear(torch.randn(width, 64), bias, random_rotation(64, 64, 2, seed=0), 64)
            for width, bias in ((32, None), (48, torch.full((48,), 100.0)))
        )
        self.plain, self.biased = plain.eval(), biased.eval()

    def plain_first(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.plain(x), self.biased(x)

    def biased_first(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.biased(x), self.plain(x)

    def alone(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.biased(x),)


def test_a_bias_stays_with_its_linear_in_every_graph() -> None:
    """Regression: the packed bias was shared between graphs whose siblings stand in another order."""
    torch.manual_seed(0)
    model, x = TwoOrders().eval(), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        for forward in (model.plain_first, model.biased_first, model.alone):
            fast = torch.compile(forward, backend="paro")
            for got, expected in zip(fast(x), forward(x), strict=True):
                assert float((got - expected).float().norm() / expected.float().norm()) < BF16


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("share", [True, False])
def test_fused_producers(door: str, share: bool) -> None:
    inputs = graphs.rows(2, 3, 64).bfloat16(), graphs.rows(2, 3, 64, seed=1).bfloat16()
    found = lower(converted(block(llama).bfloat16(), *inputs, door=door, share_siblings=share), *inputs, always=True)
    assert found == {
        "parofx.triton_rmsnorm_rotate.default": 1,
        "parofx.triton_silu_mul_rotate.default": 1,
        "parofx.triton_int4_linear.default": 2,
    }


@pytest.mark.parametrize(("launches", "fused"), [(0, 1), (9, 0)])
def test_the_cost_model_decides(launches: int, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parofx.passes.fuse_producers.is_fusible", lambda node: launches)
    inputs = graphs.rows(16, 64).bfloat16(), graphs.rows(16, 64, seed=1).bfloat16()
    found = lower(converted(block(llama).bfloat16(), *inputs, door="dynamo"), *inputs)
    assert found.get("parofx.triton_rmsnorm_rotate.default", 0) == fused


def test_dynamic_rows_are_left_to_the_operator() -> None:
    call = a_call(rows=None)
    assert "the number of rows is dynamic" in str(TritonProvider("sm_90").why_not_fuse(call, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "torch.float32 is not one of (torch.float16, torch.bfloat16)"),
        ({"group_size": 16}, "group_size 16 is not one of (32, 64, 128)"),
        ({"activations": "int8"}, "activations are int8; the kernels multiply them as they are"),
        ({"bits": 3}, "weights have 3 bits; the kernels know 4"),
        ({"corrections": ((), ())}, "weights have low-rank corrections, which the kernels do not add"),
        ({}, None),
    ],
)
def test_why_not(changes: dict[str, Any], reason: str | None) -> None:
    assert TritonProvider("sm_90").why_not(a_call(**changes)) == reason


def test_why_not_by_rotations_and_device() -> None:
    call = a_call()
    five = call.rotations * 5
    assert TritonProvider("sm_90").why_not(a_call(rotations=five)) == "5 rotations are more than 4"
    assert TritonProvider().why_not(call) == "device cpu is not cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_why_not_without_a_device() -> None:
    assert TritonProvider().why_not(a_call(device=torch.device("cuda"))) == "there is no CUDA device here"


@pytest.mark.parametrize("batch", [(3,), (2, 2), (0,), ()])
def test_operators_pass_opcheck(batch: tuple[int, ...]) -> None:
    case = RotateLinearCase(batch=batch, groups=2, group_size=32, krot=2, words=2, bias=True, dtype=torch.bfloat16)
    x, (qweight, qzeros, scales, bias) = case.x(), case.weight()
    rotation = layout.stack_rotations([layout.pack_rotation(*case.rotation(), 32)])
    weight = layout.pack_weight(qweight, qzeros, scales, 32)
    locks = torch.zeros(8, dtype=torch.int32)
    opcheck(paro.triton_rotate_int4_linear, (x, *rotation, *weight, bias, [16], locks))
    opcheck(paro.triton_int4_linear, (x[None], *weight, bias, [16], 32, locks))
    opcheck(paro.triton_silu_mul_rotate, (x, x, *rotation))
    opcheck(paro.triton_rmsnorm_rotate, (x, x.clone(), torch.ones(64, dtype=x.dtype), 1.0, 1e-5, *rotation))
    opcheck(paro.triton_rmsnorm_rotate, (x, None, None, 0.0, 1e-5, *rotation))
