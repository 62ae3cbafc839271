from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, Captured
from test_merge_siblings import attention, converted
from torch import Tensor

from parofx import providers
from parofx.errors import LoweringError
from parofx.passes import Lower, MergeSiblings, Stage, census, stage_of
from parofx.passes.graph import SEMANTIC, module_stack, nodes_calling
from parofx.pipeline import Pipeline

#: The native kernels and the reference compute in fp32.
FP32 = 1e-4
#: bf16 has 8 bits, and ATen's product holds its scales in it.
BF16 = 1e-2


def merged(model: Any, *inputs: Tensor, door: str = "export", **options: Any) -> Captured:
    captured = converted(model, *inputs, door=door, **options)
    MergeSiblings().run(captured.gm)
    captured.gm.recompile()
    return captured


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("provider", [None, "reference"])
@pytest.mark.parametrize("share", [True, False])
def test_the_output_is_that_of_the_converted_graph(door: str, provider: str | None, share: bool) -> None:
    x = graphs.rows(3, 64)
    captured = merged(attention(), x, door=door, share_siblings=share)
    before = captured(x)
    report = Lower(provider=provider).run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert stage_of(captured.gm) is Stage.LOWERED
    assert report.changed == len(report.matched) == 2
    assert not nodes_calling(captured.gm.graph, *SEMANTIC)
    assert graphs.relative(captured(x), before) < FP32
    assert Lower(provider=provider).run(captured.gm).changed == 0


@pytest.mark.parametrize("provider", ["aten", "reference", None])
def test_bfloat16(provider: str | None) -> None:
    x = graphs.rows(3, 64).bfloat16()
    captured = merged(attention().bfloat16(), x)
    before = captured(x)
    Lower(provider=provider).run(captured.gm)
    captured.gm.recompile()
    result = captured(x)
    assert result.dtype == torch.bfloat16
    assert float((result - before).float().norm() / before.float().norm()) < BF16


def test_the_report_names_providers_and_why_others_were_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(providers.ReferenceProvider):
        name = "picky"

        def why_not(self, call: providers.SiblingCall) -> str | None:
            return "only single linears" if len(call.weights) > 1 else None

    monkeypatch.setattr(providers, "_PROVIDERS", [Picky(), *providers.providers()[1:]])
    gm = merged(attention(), graphs.rows(3, 64)).gm
    report = Lower().run(gm)
    assert [what for _, what in report.matched] == ["reference (3 linears)", "picky (1 linears)"]
    reasons = dict(reason.split(": ", 1) for _, reason in report.skipped)
    assert reasons["picky"] == "only single linears"
    assert reasons["aten"] == "torch.float32 is scalar code there; only bfloat16 is fast"
    assert gm.meta["parofx_providers"] == {"reference": 1, "picky": 1}


def test_an_unknown_provider_is_refused() -> None:
    gm = merged(attention(), graphs.rows(3, 64)).gm
    with pytest.raises(LoweringError, match=r"provider must be one of \[.*'aten'.*'reference'.*\], got 'cuda13'"):
        Lower(provider="cuda13").run(gm)


def test_a_forced_provider_that_does_not_serve_is_refused() -> None:
    gm = merged(attention(), graphs.rows(3, 64)).gm
    with pytest.raises(
        LoweringError, match=r"provider 'aten' does not serve rotate_int4_siblings\w*: torch.float32 is"
    ):
        Lower(provider="aten").run(gm)


def test_leftovers_are_an_error_that_names_them() -> None:
    gm = converted(attention(), graphs.rows(3, 64)).gm
    with pytest.raises(
        LoweringError, match=r"(?s)no lowering; run merge_siblings first:.*- rotate\w*: parofx.rotate.*int4_linear"
    ):
        Lower().run(gm)


def test_the_target_device_decides() -> None:
    gm = merged(attention(), graphs.rows(3, 64)).gm
    report = Lower(device="cuda").run(gm)
    assert {what for _, what in report.matched} == {"reference (3 linears)", "reference (1 linears)"}
    assert {reason for _, reason in report.skipped} == {
        "cpu: device cuda is not cpu",
        "aten: device cuda is not cpu",
        "triton: torch.float32 is not one of (torch.float16, torch.bfloat16)",
    }


def test_only_what_the_kernels_read_is_left() -> None:
    gm = merged(graphs.Stack(1), graphs.rows(3, 64)).gm
    Lower(provider="reference").run(gm)
    assert {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"} == set(gm.state_dict())


def test_meta_is_kept() -> None:
    gm = merged(graphs.Stack(1), graphs.rows(3, 64)).gm
    Lower().run(gm)
    lowered = [node for node in gm.graph.nodes if node.op == "call_function" and "siblings" in node.name]
    getters = [user for node in lowered for user in node.users] or nodes_calling(
        gm.graph, __import__("operator").getitem
    )
    assert getters
    for node in getters:
        assert isinstance(node.meta["val"], torch.Tensor)
        assert module_stack(node)


def test_gradients_go_through_the_reference() -> None:
    """dL/dx of the lowered graph against the same linear with its dequantized weight, in fp64."""
    model, x = attention().double(), graphs.rows(3, 64).double().requires_grad_()
    captured = converted(model, x.detach())
    weights = graphs.dequantized_weights(captured.gm)
    Pipeline([MergeSiblings(), Lower(provider="reference")]).run(captured.gm)
    captured.gm(x).square().sum().backward()
    found, x.grad = x.grad, None
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    model(x).square().sum().backward()
    assert graphs.relative(found, x.grad) < 1e-6


def test_a_layer_of_one_value_per_call_is_lowered_once_and_shared() -> None:
    captured = merged(graphs.Model(lambda m, x: m.a(m.a(x)), a=graphs.linear()), graphs.rows(3, 64))
    before = captured(graphs.rows(3, 64))
    Lower().run(captured.gm)
    captured.gm.recompile()
    assert graphs.relative(captured(graphs.rows(3, 64)), before) < FP32
    packed = [str(node.target) for node in captured.gm.graph.nodes if node.op == "get_attr"]
    assert not [name for name in packed if name.endswith("_")]
    assert census(captured.gm)
