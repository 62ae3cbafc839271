"""Distillation of tiny models: its loss, its gradients, what it keeps, and what it reports."""

from __future__ import annotations

import dataclasses
from typing import Any

import graphs
import pytest
import tiny
import torch
from torch import Tensor

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration import distillation
from parofx.calibration.distillation import Distiller, few_at_a_time
from parofx.calibration.fitting import FittedTransform, fit
from parofx.calibration.fixed_codes import continuous, with_fixed_codes
from parofx.calibration.progress import BlockProgress
from parofx.passes.transforms import find_transforms
from parofx.report import StageReport

G = 32


def settings(**options: object) -> CalibrationConfig:
    chosen = {
        "steps": 4, "validation_samples": 4, "autocast": False, "distill_epochs": 3, "distill_learning_rate": 3e-3,
    }  # fmt: skip
    return CalibrationConfig(**(chosen | options))


def sure_model() -> Any:
    """Return a tiny language model whose logits are not flat."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def tokens(rows: int, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(count: int, rows: int, **others: Any) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(rows, seed=seed), "use_cache": False, **others} for seed in range(count)]


class Model:
    """A PREPARED graph with a fit to nearest of each transform at 3 bits, as calibration on weights alone has it."""

    def __init__(self, model: Any, data: list[dict[str, Any]], config: CalibrationConfig) -> None:
        self.config, self.data = config, data
        given = {key: value for key, value in data[0].items() if key != "arg0"}
        captured = parofx.capture(model, data[0]["arg0"]) if "arg0" in data[0] else parofx.capture(model, **given)
        self.gm = parofx.prepare(captured, ParoConfig(bits=3, group_size=G, krot=3, calibration=config))
        self.transforms = find_transforms(self.gm)
        self.weights = {linear.name: linear.weight for one in self.transforms for linear in one.linears}
        self.fits: dict[str, FittedTransform] = {}
        for one in self.transforms:
            weights = [linear.weight for linear in one.linears]
            self.fits[one.name] = fit(
                weights, None, bits=[3] * len(weights), group_size=G, krot=3,
                config=dataclasses.replace(config, rounding="nearest"),
            )  # fmt: skip

    def distiller(self, **options: object) -> Distiller:
        config = dataclasses.replace(self.config, **options)
        return Distiller(self.gm, self.transforms, self.fits, self.weights, self.data, config)

    def distill(self, **options: object) -> tuple[dict[str, FittedTransform], StageReport]:
        with torch.no_grad(), BlockProgress(self.transforms, enabled=False) as progress:
            return self.distiller(**options).run(progress)


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model(sure_model(), batches(6, 2), settings())


def test_it_lowers_the_held_out_divergence_and_keeps_the_codes(llama):
    found, stage = llama.distill()
    assert stage.name == "distillation"
    assert stage.after < 0.97 * stage.before
    trained, codes = with_fixed_codes(llama.transforms, llama.fits)
    for name, one in found.items():
        assert all(torch.equal(new, old) for new, old in zip(one.codes, codes[name], strict=True))
        assert all(torch.equal(new[1], old[1]) for new, old in zip(one.grids, llama.fits[name].grids, strict=True))
        assert (one.theta.dtype, one.channel_scales.dtype) == (torch.float16, torch.float16)
        assert not torch.equal(one.grids[0][0], llama.fits[name].grids[0][0])
        assert torch.equal(one.grids[0][0].half().float(), one.grids[0][0]), "scales that fp16 holds"
    # What is told is the loss of what is stored.
    distiller = llama.distiller()
    with torch.no_grad():
        told = distiller._held_out_loss(with_fixed_codes(llama.transforms, found)[0])
        start = distiller._held_out_loss(trained)
    assert told == pytest.approx(stage.after, rel=1e-6)
    assert start == pytest.approx(stage.before, rel=1e-6)


def test_the_loss_is_the_divergence_from_the_float_model(llama):
    distiller = llama.distiller()
    trained, _ = with_fixed_codes(llama.transforms, llama.fits)
    weights = {name: one for transform in trained.values() for name, one in transform.effective_weights().items()}
    model = sure_model()
    ids = torch.cat([batch["input_ids"] for batch in llama.data])[-4:]
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        q = model(ids).logits.double().log_softmax(-1)
        loss = distiller._held_out_loss(trained)
    assert loss == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_gradients_are_those_of_the_loss(llama):
    distiller = llama.distiller()
    trained, _ = with_fixed_codes(llama.transforms, llama.fits)
    tensors = continuous(trained.values())
    for tensor in tensors:
        tensor.requires_grad_(True)
    with torch.enable_grad():
        distiller._accumulate(trained, 0, 1.0)
    direction = [torch.randn(one.shape, generator=torch.Generator().manual_seed(1)) for one in tensors]
    slope = sum((one.grad * way).sum().item() for one, way in zip(tensors, direction, strict=True))
    assert all(one.grad.abs().sum() > 0 for one in tensors)
    losses, step = [], 1e-3
    with torch.no_grad():
        for sign in (1, -1):
            for one, way in zip(tensors, direction, strict=True):
                one.add_(way, alpha=sign * step)
            losses.append(distiller._compare(trained, 0)[0])
            for one, way in zip(tensors, direction, strict=True):
                one.sub_(way, alpha=sign * step)
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2)


def test_what_is_no_better_is_not_kept(llama):
    found, stage = llama.distill(distill_learning_rate=9.0, distill_epochs=1)
    assert (stage.kept, stage.after) == ("as it was", stage.before)
    assert not stage.improved
    assert all(found[name] is one for name, one in llama.fits.items())


def test_how_many_run_at_a_time_changes_nothing(llama, monkeypatch):
    found = []
    for limit in (1 << 28, 1):
        monkeypatch.setattr(distillation, "_LOGITS", limit)
        sizes = [len(one["input_ids"]) for one in few_at_a_time(llama.gm, llama.data, llama.config)]
        assert sizes == ([2] * 6 if limit > 1 else [1] * 12)
        distiller = llama.distiller(distill_batch_size=4)
        trained, _ = with_fixed_codes(llama.transforms, llama.fits)
        tensors = continuous(trained.values())
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            for index in distiller._steps[0]:
                distiller._accumulate(trained, index, 1 / len(distiller._steps[0]))
        with torch.no_grad():
            found.append((distiller._held_out_loss(trained), torch.cat([one.grad.flatten() for one in tensors])))
    (loss, gradients), (apart, added) = found
    assert loss == pytest.approx(apart, rel=1e-5)
    torch.testing.assert_close(gradients, added, rtol=1e-3, atol=1e-6)


def test_a_mask_of_other_rows_leaves_none_out():
    class Decoder(graphs.Stack):
        """A decoder's output has the encoder's shape, not its mask."""

        def forward(self, x: Tensor, attention_mask: Tensor, decoder_x: Tensor) -> Tensor:
            encoded = (x * attention_mask[..., None]).mean(1, keepdim=True)
            return super().forward(decoder_x) + encoded

    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    example = {"x": graphs.rows(2, 7, 64), "attention_mask": torch.ones(2, 7), "decoder_x": graphs.rows(2, 5, 64)}
    one = {"x": graphs.rows(2, 5, 64, seed=1), "attention_mask": mask, "decoder_x": graphs.rows(2, 5, 64, seed=2)}
    model = Model(Decoder(1).eval(), [example, one], settings())
    trained, _ = with_fixed_codes(model.transforms, model.fits)
    with torch.no_grad():
        _, _, (gradient,) = model.distiller(distill_batch_size=2)._compare(trained, 1)
    assert (gradient.abs().sum(-1) > 0).all()


def test_rows_of_padding_do_not_count():
    padded = batches(2, 2, attention_mask=torch.tensor([[1] * 12, [1] * 7 + [0] * 5]))
    model = Model(sure_model(), padded, settings(validation_samples=2))
    trained, _ = with_fixed_codes(model.transforms, model.fits)
    losses = []
    for filler in (1, 9):
        for batch in padded:
            batch["input_ids"][1, 7:] = filler
        with torch.no_grad():
            losses.append(model.distiller()._held_out_loss(trained))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_outputs_that_are_no_distributions_count_by_their_relative_error():
    data = [{"arg0": graphs.rows(4, 6, 64, seed=seed)} for seed in range(4)]
    model = Model(graphs.Stack(2).eval(), data, settings())
    _, stage = model.distill()
    assert 0 < stage.after < stage.before < 1


def test_outputs_that_no_weight_changes_do_no_harm():
    class Echo(graphs.Stack):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x * 2

    model = Model(Echo(1).eval(), [{"arg0": graphs.rows(4, 6, 64, seed=seed)} for seed in range(4)], settings())
    assert model.distill()[1].improved


def test_a_model_without_linears_is_left_alone():
    config = ParoConfig(calibration=settings())
    report = parofx.quantize(
        torch.nn.Sequential(torch.nn.ReLU()), config, calibration=[torch.ones(2, 3)], progress=False
    )
    assert (report.linears, report.blocks) == ((), ())


def test_a_divergence_is_summed_in_parts(monkeypatch):
    output, target = (3 * torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3])
    leaf = output.clone().requires_grad_()
    p, q = target.log_softmax(-1), leaf.log_softmax(-1)
    expected = ((p.exp() * (p - q)).sum(-1) * mask).sum() / mask.sum()
    expected.backward()
    monkeypatch.setattr(distillation, "_CHUNK_ELEMENTS", 14)
    loss, gradient = distillation._divergence(output, target, lambda rows: rows * mask[..., None])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


def test_logits_that_are_minus_infinity_add_nothing():
    output, target = (torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    expected, gradient = distillation._divergence(output, target, lambda rows: rows)
    never = torch.full((1, 4, 2), -torch.inf)
    both = (torch.cat([one, never], -1) for one in (output, target))
    loss, wider = distillation._divergence(*both, lambda rows: rows)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(wider, torch.cat([gradient, torch.zeros_like(never)], -1))


def test_quantize_reports_it_and_resumes_before_it(tmp_path):
    config = ParoConfig(
        bits=3, group_size=G, krot=2,
        calibration=settings(batch_size=4, seqlen=12, rounding="nearest", work_dir=str(tmp_path)),
    )  # fmt: skip
    states, reports = [], []
    for _ in range(2):
        model = sure_model()
        reports.append(parofx.quantize(model, config, calibration=tokens(12), progress=False))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    (block,) = reports[0].blocks
    assert (block.name, [stage.name for stage in block.stages]) == ("the whole model", ["distillation"])
    assert block.stages[0].improved
    # Errors are measured anew behind what was trained.
    same = dataclasses.replace(config.calibration, distill_epochs=0, work_dir=None)
    plain = parofx.quantize(
        sure_model(), dataclasses.replace(config, calibration=same), calibration=tokens(12), progress=False
    )
    before, after = (([linear.relative_error for linear in one.linears]) for one in (plain, reports[0]))
    assert before != after
    assert all(0.3 < new / old < 3 for new, old in zip(after, before, strict=True))


def test_relative_errors_are_those_of_the_float_models_inputs():
    data = [{"arg0": graphs.rows(8, 64, seed=seed)} for seed in range(4)]
    model = Model(graphs.Stack(1).eval(), data, settings(row_weights="equal", validation_samples=8))
    trained, _ = with_fixed_codes(model.transforms, model.fits)
    errors = model.distiller()._relative_errors(trained)
    first = model.transforms[0]
    inputs: list[Tensor] = []
    stack = graphs.Stack(1).eval()
    name = first.linears[0].name
    stack.get_submodule(name).register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        stack(data[-1]["arg0"])
    weight = model.weights[name]
    wrong = trained[first.name].effective_weights()[name] - weight
    expected = (inputs[0] @ wrong.t()).square().sum() / (inputs[0] @ weight.t()).square().sum()
    assert errors[first.name][0] == pytest.approx(expected.item(), rel=1e-4)
