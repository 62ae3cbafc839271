"""Perplexity, KL divergence and top-1 against straightforward formulas in fp64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from parofx import evaluation, precision
from parofx.errors import DataError
from parofx.evaluation import collect_logits, evaluate

VOCAB = 11
#: fp32 log-softmax against fp64.
TOLERANCE = 1e-5


class Table(nn.Module):
    """Logits by token, nothing else."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator).to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def windows(count: int = 5, seqlen: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (count, seqlen), generator=torch.Generator().manual_seed(9))


def expected(model: Table, reference: Table, tokens: Tensor) -> dict[str, float]:
    log_q = model.table.detach().double().log_softmax(-1)[tokens[:, :-1]]
    log_p = reference.table.detach().double().log_softmax(-1)[tokens[:, :-1]]
    loss = -log_q.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    count = math.sqrt(len(tokens))
    return {
        "perplexity": float(loss.mean().exp()),
        "perplexity_error": float(loss.mean().exp() * loss.mean(1).std() / count),
        "kl_mean": float(kl.mean()),
        "kl_error": float(kl.mean(1).std() / count),
        "kl_p99": float(kl.flatten().quantile(0.99)),
        "top1_agreement": float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        "reference_perplexity": float((-log_p.gather(-1, tokens[:, 1:, None])).mean().exp()),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100, None])
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 2**24])
def test_against_formulas(monkeypatch: pytest.MonkeyPatch, batch_size: int | None, chunk: int) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK_ELEMENTS", chunk)
    model, reference, tokens = Table(0), Table(1), windows()
    result = evaluate(model, tokens, reference=reference, batch_size=batch_size)
    for name, value in expected(model, reference, tokens).items():
        assert getattr(result, name) == pytest.approx(value, rel=TOLERANCE), name
    assert (result.tokens, result.windows) == (30, 5)


def test_a_model_agrees_with_itself() -> None:
    result = evaluate(Table(0), windows(), reference=Table(0))
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0.0, 0.0, 1.0)


def test_without_a_reference_only_the_text_counts() -> None:
    result = evaluate(Table(0), windows())
    assert result.perplexity == pytest.approx(expected(Table(0), Table(0), windows())["perplexity"], rel=TOLERANCE)
    compared = (result.kl_mean, result.kl_error, result.kl_p99, result.top1_agreement, result.reference_perplexity)
    assert set(compared) == {None}
    assert result.to_dict()["tokens"] == 30


def test_one_window_has_no_standard_error() -> None:
    result = evaluate(Table(0), windows(1), reference=Table(1))
    assert (result.perplexity_error, result.kl_error) == (None, None)


def test_collected_logits_stand_for_the_reference(tmp_path: Path) -> None:
    model, reference, tokens = Table(0), Table(1), windows()
    logits = collect_logits(reference, tokens, path=tmp_path / "logits", batch_size=2)
    assert logits.shape == (5, 7, VOCAB)
    assert (tmp_path / "logits").stat().st_size == 2 * 5 * 7 * VOCAB
    direct, stored = evaluate(model, tokens, reference=reference), evaluate(model, tokens, reference=logits)
    # The stored log-probabilities are rounded to fp16.
    assert stored.kl_mean == pytest.approx(direct.kl_mean, abs=2e-3)
    assert stored.top1_agreement == direct.top1_agreement


def test_impossible_tokens_do_not_make_the_divergence_undefined() -> None:
    model, reference = Table(0), Table(1)
    with torch.no_grad():
        model.table[:, -1] = reference.table[:, -1] = float("-inf")
    tokens = windows().clamp(max=VOCAB - 2)
    result = evaluate(model, tokens, reference=reference)
    assert result.kl_mean is not None
    assert math.isfinite(result.kl_mean)


def test_low_precision_logits_are_compared_in_fp32() -> None:
    model, reference = Table(0, torch.bfloat16), Table(1, torch.bfloat16)
    result = evaluate(model, windows(), reference=reference)
    assert result.kl_mean == pytest.approx(expected(model, reference, windows())["kl_mean"], rel=TOLERANCE)


def test_a_transformers_model_is_evaluated_and_stays_in_its_mode() -> None:
    model, tokens = tiny.model().train(), torch.randint(0, tiny.VOCAB, (3, 9))
    result = evaluate(model, tokens, reference=tiny.model(seed=1), progress=True)
    assert model.training
    assert result.perplexity == pytest.approx(tiny.VOCAB, rel=0.5)
    assert result.kl_mean is not None
    assert result.kl_mean > 0


def test_the_batch_size_keeps_logits_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_LOGITS_BYTES", 4 * tiny.VOCAB * 9 * 2)
    model, seen = tiny.model(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    evaluate(model, torch.zeros(5, 9, dtype=torch.int64))
    assert seen == [2, 2, 1]


@pytest.mark.parametrize(
    "tokens", [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(2, 4)]
)
def test_what_are_no_windows_is_refused(tokens: Tensor) -> None:
    with pytest.raises(DataError, match="tokens must be integers"):
        evaluate(Table(0), tokens)


def test_no_window_has_no_logits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one window"):
        collect_logits(Table(0), torch.zeros(0, 4, dtype=torch.int64), path=tmp_path / "logits", batch_size=1)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = Table(0)
    with torch.no_grad():
        model.table[3] = float("nan")
    with pytest.raises(DataError, match="logits are not finite"):
        evaluate(model, windows())


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"the model's shape \(5, 7, 11\), got \(5, 7, 12\)"):
        evaluate(Table(0), windows(), reference=torch.zeros(5, 7, 12))


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(DataError, match=r"expected logits \(5, 7, vocabulary\), the model gave \(5, 7\)"):
        evaluate(nn.Identity(), windows())


class Sixteen(Table):
    """Its logits are products of bf16 factors."""

    def __init__(self) -> None:
        super().__init__(0, torch.bfloat16)
        self.head = nn.Linear(VOCAB, VOCAB, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(super().forward(tokens))


@pytest.mark.parametrize("compiled", [False, True])
def test_16_bit_products_are_not_emulated_but_in_compiled_models(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    wide = []
    true_linear = precision.linear
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: False)
    monkeypatch.setattr(precision, "linear", lambda *given: wide.append(1) or true_linear(*given))
    torch.manual_seed(0)
    model = Sixteen()
    plain = evaluate(model, windows(), batch_size=5)
    count = len(wide)
    assert count == 1
    torch.compiler.reset()
    result = evaluate(torch.compile(model, backend="eager") if compiled else model, windows(), batch_size=5)
    assert len(wide) == (count if compiled else 2 * count)
    assert result.perplexity == pytest.approx(plain.perplexity, rel=1e-2)
