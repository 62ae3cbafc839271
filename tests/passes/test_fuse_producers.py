from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
from graphs import DOORS, EXACT_IN_FP32, Captured, Model
from test_merge_siblings import converted
from torch import Tensor

from parofx import providers
from parofx.errors import LoweringError
from parofx.passes import FuseProducers, Lower, MergeSiblings, PassReport, Stage, stage_of
from parofx.passes.graph import (
    INT4_SIBLINGS,
    RMSNORM_ROTATE,
    ROTATE_INT4_SIBLINGS,
    SILU_MUL_ROTATE,
    buffer_node,
    module_stack,
    nodes_calling,
    operator_name,
)

FUSED = (RMSNORM_ROTATE, SILU_MUL_ROTATE, INT4_SIBLINGS)
Norm = Callable[[Tensor, Tensor], Tensor]


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * wide.to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + weight.float())).type_as(x)


def newer_gemma(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * weight.float()).type_as(x)


def t5(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def divided(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(1e-5 + torch.mean(torch.square(x), dim=-1, keepdim=True)) * weight


def reciprocal(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.reciprocal(torch.sqrt((x * x).mean(dim=(-1,), keepdim=True) + 1e-5))) * weight


def by_operator(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def by_operator_without_eps(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight)


def without_weight(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


NORMS: list[Norm] = [
    llama, gemma, newer_gemma, t5, divided, reciprocal, by_operator, by_operator_without_eps, without_weight,
]  # fmt: skip


def block(norm: Norm, **options: Any) -> Model:
    """Residual sum, norm, two siblings, SiLU·mul and one more linear, as decoders write them."""

    def forward(m: Any, x: Tensor, residual: Tensor) -> Tensor:
        total = residual + x
        normed = norm(total, m.weight)
        return total + m.down(torch.nn.functional.silu(m.gate(normed)) * m.up(normed))

    parts = {"gate": graphs.linear(64, 128), "up": graphs.linear(64, 128, bias=False, seed=1)}
    return Model(forward, **parts, down=graphs.linear(128, 64, seed=2), weight=graphs.vector(64, seed=3), **options)


def merged(model: Any, *inputs: Tensor, door: str = "export", **options: Any) -> Captured:
    captured = converted(model, *inputs, door=door, **options)
    MergeSiblings().run(captured.gm)
    captured.gm.recompile()
    return captured


def fuse(captured: Captured, *inputs: Tensor) -> PassReport:
    """Fuse, and check the output, the count, and that a second run changes nothing."""
    before = captured(*inputs)
    report = FuseProducers(always=True).run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert graphs.relative(captured(*inputs), before) < EXACT_IN_FP32
    assert report.changed == len(report.matched) == len(nodes_calling(captured.gm.graph, INT4_SIBLINGS))
    assert stage_of(captured.gm) is Stage.CONVERTED
    assert FuseProducers(always=True).run(captured.gm).changed == 0
    return report


def producers(captured: Captured) -> dict[Any, int]:
    return {target: len(nodes_calling(captured.gm.graph, target)) for target in FUSED}


def reasons(report: PassReport) -> list[str]:
    return [reason for _, reason in report.skipped]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("share", [True, False])
def test_norms_as_models_write_them(door: str, norm: Norm, share: bool) -> None:
    inputs = graphs.rows(2, 3, 64), graphs.rows(2, 3, 64, seed=1)
    captured = merged(block(norm), *inputs, door=door, share_siblings=share)
    fuse(captured, *inputs)
    assert producers(captured) == {RMSNORM_ROTATE: 1, SILU_MUL_ROTATE: 1, INT4_SIBLINGS: 2}
    (fused,) = nodes_calling(captured.gm.graph, RMSNORM_ROTATE)
    assert fused.args[1] is not None
    assert fused.args[3] == (1.0 if norm is gemma else 0.0)
    assert (fused.args[2] is None) == (norm is without_weight)
    assert len(fused.args[5]) == (1 if share else 2)
    # Nothing is left of the sum and the norm, nor of the product.
    left = {operator_name(node) for node in captured.gm.graph.nodes if node.op != "placeholder"}
    assert not left & {"rsqrt", "pow", "square", "sqrt", "rms_norm", "silu", "mean"}


@pytest.mark.parametrize("door", DOORS)
def test_bfloat16_and_lowering_by_the_reference(door: str) -> None:
    inputs = graphs.rows(3, 64).bfloat16(), graphs.rows(3, 64, seed=1).bfloat16()
    captured = merged(block(llama).bfloat16(), *inputs, door=door)
    before = captured(*inputs)
    assert FuseProducers(always=True).run(captured.gm).changed == 2
    captured.gm.recompile()
    fused = captured(*inputs)
    Lower(provider="reference").run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    for after in (fused, captured(*inputs)):
        assert after.dtype == torch.bfloat16
        assert float((after - before).float().norm() / before.float().norm()) < 1e-2


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("norm", [llama, gemma, without_weight], ids=lambda norm: norm.__name__)
def test_the_reference_lowers_what_was_fused(door: str, norm: Norm) -> None:
    inputs = graphs.rows(3, 64), graphs.rows(3, 64, seed=1)
    captured = merged(block(norm), *inputs, door=door, share_siblings=False)
    before = captured(*inputs)
    FuseProducers(always=True).run(captured.gm)
    report = Lower(provider="reference").run(captured.gm)
    captured.gm.graph.lint()
    captured.gm.recompile()
    assert stage_of(captured.gm) is Stage.LOWERED
    assert report.changed == 2
    assert "linears behind rmsnorm_rotate" in report.matched[0][1]
    assert graphs.relative(captured(*inputs), before) < EXACT_IN_FP32


@pytest.mark.parametrize("door", DOORS)
def test_a_norm_without_a_residual(door: str) -> None:
    model = Model(lambda m, x: m.a(llama(x, m.weight)), a=graphs.linear(), weight=graphs.vector(64))
    captured = merged(model, graphs.rows(3, 64), door=door)
    report = fuse(captured, graphs.rows(3, 64))
    (fused,) = nodes_calling(captured.gm.graph, RMSNORM_ROTATE)
    assert fused.args[1] is None
    assert "residual" not in report.matched[0][1]
    Lower(provider="reference").run(captured.gm)


@pytest.mark.parametrize("door", DOORS)
def test_a_sum_of_another_shape_is_no_residual(door: str) -> None:
    inputs = graphs.rows(2, 3, 64), graphs.rows(1, 3, 64, seed=1)
    model = Model(lambda m, x, y: m.a(llama(x + y, m.weight)), a=graphs.linear(), weight=graphs.vector(64))
    captured = merged(model, *inputs, door=door)
    fuse(captured, *inputs)
    (fused,) = nodes_calling(captured.gm.graph, RMSNORM_ROTATE)
    assert fused.args[1] is None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "product",
    [
        lambda gate, up: up * torch.nn.functional.silu(gate),
        lambda gate, up: gate * torch.sigmoid(gate) * up,
        lambda gate, up: torch.mul(torch.sigmoid(gate) * gate, up),
        lambda gate, up: (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype),
    ],
)
def test_gates_as_models_write_them(door: str, product: Norm) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, dim=-1)
        return m.down(product(gate, up))

    x = graphs.rows(3, 64)
    captured = merged(Model(forward, both=graphs.linear(64, 128), down=graphs.linear()), x, door=door)
    fuse(captured, x)
    assert producers(captured) == {RMSNORM_ROTATE: 0, SILU_MUL_ROTATE: 1, INT4_SIBLINGS: 1}


def test_meta_is_kept() -> None:
    inputs = graphs.rows(3, 64), graphs.rows(3, 64, seed=1)
    captured = merged(block(llama), *inputs)
    FuseProducers(always=True).run(captured.gm)
    for node in nodes_calling(captured.gm.graph, *FUSED):
        assert module_stack(node)
        for index, user in enumerate(node.users):
            assert user.meta["val"].shape == node.meta["val"][index].shape


class TestLeftAlone:
    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize(
        ("forward", "reason"),
        [
            (lambda m, x: m.a(torch.nn.functional.gelu(x) * x), "is neither RMSNorm nor SiLU·mul"),
            (lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))), "is neither RMSNorm nor SiLU·mul"),
            (lambda m, x: m.a(x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1)), "is neither RMSNorm nor SiLU·mul"),
            (lambda m, x: m.a(x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9)), "is neither RMSNorm nor SiLU·mul"),
            (lambda m, x: m.a(x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1)), "is neither RMSNorm"),
            (lambda m, x: m.a(llama(x, m.weight)) + llama(x, m.weight), None),
            (lambda m, x: (lambda n: m.a(n) + n)(llama(x, m.weight)), "is read by others too"),
            (lambda m, x: m.a(llama(x, m.one)), "has not one value per channel"),
        ],
    )
    def test_why_not(self, door: str, forward: Callable[..., Tensor], reason: str | None) -> None:
        parts = {"a": graphs.linear(), "weight": graphs.vector(64), "one": graphs.vector(1)}
        x = graphs.rows(3, 64)
        captured = merged(Model(forward, **parts), x, door=door)
        report = fuse(captured, x)
        assert report.changed == (reason is None)
        assert all(reason is not None and reason in one for one in reasons(report))

    def test_other_widths_have_no_kernels_behind_a_producer(self) -> None:
        model = Model(lambda m, x: m.a(llama(x, m.weight)), a=graphs.linear(), weight=graphs.vector(64))
        report = fuse(merged(model, graphs.rows(3, 64), bits=8), graphs.rows(3, 64))
        assert "its weights have 8 bits" in reasons(report)[0]
        captured = merged(model, graphs.rows(3, 64))
        (node,) = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
        with captured.gm.graph.inserting_before(node):
            halves = [buffer_node(captured.gm, f"half{i}", torch.zeros(1, 64).half()) for i in range(2)]
        node.args = (*node.args, 4, [halves[0]], [halves[1]])
        assert "its weights have low-rank corrections" in reasons(fuse(captured, graphs.rows(3, 64)))[0]

    def test_what_is_computed_from_wider_tensors(self) -> None:
        model = Model(lambda m, x: m.a(llama(x, m.weight).bfloat16()), a=graphs.linear(), weight=graphs.vector(64))
        model.a.bfloat16()
        report = fuse(merged(model, graphs.rows(3, 64)), graphs.rows(3, 64))
        assert "is computed from torch.float32 and read as torch.bfloat16" in reasons(report)[0]

    def test_what_is_computed_in_fewer_bits(self) -> None:
        def narrow(x: Tensor, weight: Tensor) -> Tensor:
            half = x.bfloat16()
            return (half * torch.rsqrt(half.pow(2).mean(-1, keepdim=True) + 1e-5)).float() * weight

        model = Model(lambda m, x: m.a(narrow(x, m.weight)), a=graphs.linear(), weight=graphs.vector(64))
        report = fuse(merged(model, graphs.rows(3, 64)), graphs.rows(3, 64))
        assert "is computed in fewer bits than it is read in" in reasons(report)[0]

    @pytest.mark.parametrize("door", DOORS)
    def test_what_is_written_in_place(self, door: str) -> None:
        def forward(m: Any, x: Tensor, residual: Tensor) -> Tensor:
            total = x + residual
            total.mul_(2)
            return m.a(llama(total, m.weight)) + total

        inputs = graphs.rows(3, 64), graphs.rows(3, 64, seed=1)
        captured = merged(Model(forward, a=graphs.linear(), weight=graphs.vector(64)), *inputs, door=door)
        report = fuse(captured, *inputs)
        assert "is computed from is written in place" in reasons(report)[0]


class TestDecision:
    @pytest.mark.parametrize("door", DOORS)
    def test_what_a_compiler_would_compute_in_the_same_kernel_is_counted(
        self, door: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A norm behind a norm, as in Gemma, is one kernel with it; a linear's output and what others read are not."""
        asked: list[int] = []

        class Counting(providers.ReferenceProvider):
            name = "counting"

            def why_not_fuse(self, call: providers.SiblingCall, launches: int) -> str | None:
                asked.append(launches)
                return "counted"

        def forward(m: Any, x: Tensor) -> Tensor:
            behind_norm = x + llama(m.a(x), m.weight)
            behind_linear = behind_norm + m.b(llama(behind_norm, m.weight))
            return behind_linear + m.c(llama(behind_linear, m.weight))

        monkeypatch.setattr(providers, "_PROVIDERS", [Counting(), *providers.providers()])
        parts = {name: graphs.linear(seed=index) for index, name in enumerate("abc")}
        model = Model(forward, **parts, weight=graphs.vector(64, seed=3))
        report = FuseProducers().run(merged(model, graphs.rows(3, 64), door=door).gm)
        assert asked == [1, 0]
        assert reasons(report).count("counted") == 2

    def test_a_provider_without_such_kernels_declines(self) -> None:
        captured = merged(block(llama), graphs.rows(3, 64), graphs.rows(3, 64, seed=1))
        report = FuseProducers(provider="cpu").run(captured.gm)
        assert set(reasons(report)) == {"provider cpu has no producers that rotate"}
        assert FuseProducers(provider="reference").run(captured.gm).skipped[0][1] == "the reference has nothing to gain"

    def test_a_provider_that_cannot_lower_what_was_fused_is_refused(self) -> None:
        captured = merged(block(llama), graphs.rows(3, 64), graphs.rows(3, 64, seed=1))
        FuseProducers(always=True).run(captured.gm)
        with pytest.raises(LoweringError, match=r"provider 'cpu' does not serve int4_siblings.*has no producers"):
            Lower(provider="cpu").run(captured.gm)
        with pytest.raises(LoweringError, match=r"provider 'cuda13' does not serve .*: there is none of that name"):
            Lower(provider="cuda13").run(captured.gm)

    def test_passing_providers_over_is_reported(self) -> None:
        captured = merged(block(llama), graphs.rows(3, 64), graphs.rows(3, 64, seed=1))
        FuseProducers(always=True).run(captured.gm)
        report = Lower().run(captured.gm)
        assert any(reason == "cpu: it has no producers that rotate" for _, reason in report.skipped)
        assert captured.gm.meta["parofx_providers"] == {"reference": 2}
        assert providers.providers()[-1].name == "reference"

    def test_rotated_inputs_without_a_producer_have_no_lowering(self) -> None:
        captured = merged(Model(lambda m, x: m.a(x), a=graphs.linear()), graphs.rows(3, 64))
        (node,) = nodes_calling(captured.gm.graph, ROTATE_INT4_SIBLINGS)
        node.target, node.args = INT4_SIBLINGS, ([node.args[0]], *node.args[4:])
        with pytest.raises(LoweringError, match="reads no fused producer, and nothing else lowers it"):
            Lower().run(captured.gm)
