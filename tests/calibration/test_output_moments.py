"""Moments of gradients at linears' outputs: what is summed, over which rows, and what calibration makes of them."""

from __future__ import annotations

import dataclasses

import graphs
import pytest
import tiny
import torch
import transformers

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration import data_run, output_moments
from parofx.calibration.output_moments import OutputMoments, measure_output_moments
from parofx.calibration.sensitivity import _token_score, backward_of_likelihood
from parofx.errors import ConfigError
from parofx.passes.linears import find_embeddings
from parofx.passes.transforms import find_transforms

TOKENS = torch.randint(0, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
#: As many as rounding needs to be well determined, of a model whose logits are not flat.
CONFIG = CalibrationConfig(steps=3, samples=8, seqlen=16, batch_size=2, validation_samples=2, clip_ratios=(1.0,))


def model():
    made = tiny.model()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)
    return made


def prepared(data):
    gm = parofx.prepare(parofx.capture(model(), **data), ParoConfig(group_size=32))
    return gm, {linear.name: linear.weight for one in find_transforms(gm) for linear in one.linears}


def test_each_position_counts_alike():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(9, 5, generator=generator) * torch.logspace(-20, 15, 9)[:, None]
    moments = OutputMoments(5)
    moments.update(gradients[:4])
    moments.update(gradients[4:].double())
    units = gradients.double() / gradients.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(moments.parts[0].double(), units.t() @ units, rtol=1e-5, atol=1e-5)


def test_what_vanishes_or_overflows_says_nothing():
    moments = OutputMoments(3)
    moments.update(torch.tensor([[0.0, 0.0, 0.0], [torch.inf, 1.0, 0.0], [torch.nan, 1.0, 0.0], [0.0, 2.0, 0.0]]))
    assert moments.parts[0].tolist() == [[0.0] * 3, [0.0, 1.0, 0.0], [0.0] * 3]


def test_many_outputs_are_kept_in_parts(monkeypatch):
    monkeypatch.setattr(output_moments, "WIDEST", 4)
    gradients = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    moments = OutputMoments(10)
    moments.update(gradients)
    whole = gradients / gradients.norm(dim=1, keepdim=True)
    assert [len(part) for part in moments.parts] == [4, 3, 3]
    for part, columns in zip(moments.parts, whole.split([4, 3, 3], 1), strict=True):
        torch.testing.assert_close(part, columns.t() @ columns)


@pytest.mark.parametrize("masked", [False, True])
def test_the_first_sequences_are_measured_without_their_padding(masked):
    mask = (torch.arange(12) < torch.tensor([12, 5, 9, 12])[:, None]).long()
    data = {"input_ids": TOKENS, "use_cache": False} | ({"attention_mask": mask} if masked else {})
    gm, weights = prepared(data)
    found = measure_output_moments(gm, weights, [data], samples=3, seed=7)
    assert found.keys() == weights.keys()
    rows = int(mask[:3].sum()) if masked else 36
    for name, moments in found.items():
        (part,) = moments.parts
        # Every row has length 1. The first key and value of a sequence may have no gradient at a flat softmax.
        assert rows - 3 <= part.trace() <= rows + 1e-3, name
        torch.testing.assert_close(part, part.t())
    again = measure_output_moments(gm, weights, [data], samples=3, seed=7)
    assert all(torch.equal(found[name].parts[0], again[name].parts[0]) for name in found)
    other = measure_output_moments(gm, weights, [data], samples=3, seed=8)
    assert any(not torch.equal(found[name].parts[0], other[name].parts[0]) for name in found)


def test_gradients_are_those_of_drawn_tokens():
    """The Gram matrix of a likelihood's gradients at the last linear, in closed form from the probabilities."""
    data = {"input_ids": TOKENS, "use_cache": False}
    gm, _ = prepared(data)
    vocabularies = frozenset(len(table) for table in find_embeddings(gm))
    sums: dict[str, torch.Tensor] = {}

    def record(node, _, gradient, masks):
        name = node.args[1].meta["parofx_linear"]
        rows = gradient.flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + rows.t() @ rows

    backward_of_likelihood(gm, [data] * 60, vocabularies, record, seeds=range(60))
    made = model()
    caught: list[torch.Tensor] = []
    made.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, out: caught.append(out))
    made.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    logits = made(**data).logits
    probabilities = logits.detach().double().softmax(-1)
    expected = torch.zeros(64, 64, dtype=torch.float64)
    scores = []
    for token in range(tiny.VOCAB):
        likelihood = logits.log_softmax(-1)[..., token].sum()
        (gradient,) = torch.autograd.grad(likelihood, caught[0], retain_graph=True)
        scores.append(gradient.double() * probabilities[..., token, None].sqrt())
    for score in scores:
        expected += score.flatten(0, -2).t() @ score.flatten(0, -2)
    found = sums["model.layers.1.mlp.down_proj"] / 60
    assert (found - expected).norm() < 0.25 * expected.norm()


def report(**options):
    config = ParoConfig(group_size=32, krot=2, calibration=CalibrationConfig(**(CONFIG.to_dict() | options)))
    quantized, batches = graphs.Stack(2).eval(), [graphs.rows(2, 8, 64, seed=seed) for seed in range(4)]
    made = parofx.quantize(quantized, config, calibration=batches, progress=False)
    return quantized, made


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"gradient_samples": 3}, True),
        ({"gradient_samples": 3, "distill_epochs": 1}, True),
        ({}, False),
        ({"gradient_samples": 3, "rounding": "nearest", "objective": "range"}, False),
        ({"gradient_samples": 3, "compensation_rank": 2}, False),
        ({"gradient_samples": 3, "tune_epochs": 1}, False),
    ],
)
def test_when_gradients_are_taken(options, measured, monkeypatch):
    asked: list[int] = []

    def watched(*arguments, samples, seed):
        asked.append(samples)
        return measure_output_moments(*arguments, samples=samples, seed=seed)

    monkeypatch.setattr(data_run, "measure_output_moments", watched)
    report(**options)
    assert asked == ([3] if measured else [])


def test_codes_follow_the_gradients_and_repeat():
    (joined, made), (again, _), (alone, plain) = (report(gradient_samples=count) for count in (4, 4, 0))
    changed = 0
    for name, module in joined.named_modules():
        if isinstance(module, parofx.ParoLinear):
            one, two, three = (where.get_submodule(name).qweight for where in (joined, again, alone))
            assert torch.equal(one, two)
            changed += not torch.equal(one, three)
    assert changed > 0
    assert all(one.joins_rows for one in made.transforms)
    assert not any(one.joins_rows for one in plain.transforms)
    for one, other in zip(made.linears, plain.linears, strict=True):
        # By the outputs alone it looks worse, and not by much.
        assert one.relative_error < 3 * other.relative_error


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "8"])
def test_a_count_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="gradient_samples must be an integer of at least 0"):
        CalibrationConfig(gradient_samples=value)


def test_what_gets_no_gradient_is_told(caplog):
    data = {"input_ids": TOKENS, "use_cache": False}
    gm, weights = prepared(data)
    weights["unused"] = torch.zeros(8, 64)
    with caplog.at_level("WARNING", "parofx"):
        measure_output_moments(gm, weights, [data], samples=1, seed=0)
    assert [one.args for one in caplog.records if one.name == "parofx"] == [("unused",)]


@pytest.mark.parametrize("inputs", [True, False])
def test_inputs_are_kept_only_for_those_who_ask(inputs):
    data = {"input_ids": TOKENS, "use_cache": False}
    gm, _ = prepared(data)
    seen: list[bool] = []

    def record(node, value, gradient, masks):
        seen.append(value is not None)

    backward_of_likelihood(gm, [data], frozenset(), record, seeds=[0], inputs=inputs)
    assert len(seen) == 14
    assert set(seen) == {inputs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_sure_predictions_keep_their_direction(dtype):
    """In 16 bits 1 − p is 0 long before p is 1; directions count, so it must not be lost."""
    head = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).double()
    logits = torch.zeros(64, 50)
    logits[:, 7] = 13.0  # p = 0.99989
    logits = logits.to(dtype)
    score = _token_score(logits, torch.Generator().manual_seed(0)).double()
    probabilities = logits.double().softmax(-1)
    expected = torch.nn.functional.one_hot(score.argmax(-1), 50) - probabilities
    cosine = torch.nn.functional.cosine_similarity(score @ head, expected @ head)
    assert (score.argmax(-1) == 7).sum() > 60
    assert cosine.min() > 0.999


def test_outputs_in_parts_are_rounded_part_by_part(monkeypatch):
    monkeypatch.setattr(output_moments, "WIDEST", 48)
    (parted, made), (_, plain) = (report(gradient_samples=count) for count in (4, 0))
    assert all(
        one.relative_error < 3 * two.relative_error for one, two in zip(made.linears, plain.linears, strict=True)
    )
    assert all(module.qweight.numel() for module in parted.modules() if isinstance(module, parofx.ParoLinear))


def test_moments_are_freed_where_their_block_is_fitted(monkeypatch):
    left: list[int] = []
    run = data_run.DataRun._run_segment

    def watched(self, *arguments):
        found = run(self, *arguments)
        left.append(len(self._outputs))
        return found

    monkeypatch.setattr(data_run.DataRun, "_run_segment", watched)
    report(gradient_samples=2)
    assert left == [3, 0]


def test_an_unused_count_is_told(caplog):
    with caplog.at_level("WARNING", "parofx"):
        report(gradient_samples=3, compensation_rank=2)
    assert "gradient_samples=3 is not used" in caplog.text


def test_a_quantized_head_is_rounded_as_without():
    heads = []
    for count in (0, 4):
        quantized = tiny.model(hidden_size=128, intermediate_size=256, vocab_size=24)
        calibration = dataclasses.replace(CONFIG, gradient_samples=count)
        config = ParoConfig(group_size=32, krot=2, lm_head=4, calibration=calibration)
        parofx.quantize(quantized, config, calibration=TOKENS.repeat(2, 2)[:, :16], progress=False)
        heads.append(quantized.lm_head.qweight)
    assert torch.equal(*heads)


def test_a_run_that_only_resumes_takes_no_gradients(tmp_path, monkeypatch):
    report(gradient_samples=3, work_dir=str(tmp_path / "work"))
    monkeypatch.setattr(data_run, "measure_output_moments", None)
    report(gradient_samples=3, work_dir=str(tmp_path / "work"))


class Twice(torch.nn.Module):
    """One linear at two places, as the layers of models that share them."""

    def __init__(self):
        super().__init__()
        self.a = graphs.linear()

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


def test_a_linear_that_runs_twice_is_measured_at_both_places():
    x = graphs.rows(2, 8, 64)
    gm = parofx.prepare(parofx.capture(Twice().eval(), x=x), ParoConfig(group_size=32))
    weights = {linear.name: linear.weight for one in find_transforms(gm) for linear in one.linears}
    found = measure_output_moments(gm, weights, [{"x": x}], samples=2, seed=0)
    assert found["a"].parts[0].trace() == pytest.approx(2 * 16, rel=1e-4)


def test_encoder_and_decoder_are_both_measured():
    t5 = transformers.T5Config(
        vocab_size=tiny.VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    made = transformers.T5ForConditionalGeneration(t5).eval()
    data = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False}
    gm = parofx.prepare(parofx.capture(made, **data), ParoConfig(group_size=32))
    weights = {linear.name: linear.weight for one in find_transforms(gm) for linear in one.linears}
    found = measure_output_moments(gm, weights, [data], samples=2, seed=0)
    rows = {name: round(float(one.parts[0].trace())) for name, one in found.items()}
    assert rows["encoder.block.0.layer.1.DenseReluDense.wo"] == 24
    assert rows["decoder.block.0.layer.2.DenseReluDense.wo"] == 10
    # The decoder reads what the encoder gave, at the encoder's positions.
    assert rows["decoder.block.0.layer.1.EncDecAttention.v"] == 24


def test_fewer_sequences_than_asked_for_are_told(caplog):
    data = {"input_ids": TOKENS, "use_cache": False}
    gm, weights = prepared(data)
    with caplog.at_level("WARNING", "parofx"):
        measure_output_moments(gm, weights, [data], samples=4, seed=0)
        assert "asks for" not in caplog.text
        measure_output_moments(gm, weights, [data], samples=5, seed=0)
    assert "asks for 5 sequences, and there are 4" in caplog.text
