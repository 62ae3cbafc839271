"""How far a model's predictions are from the text, and from another model's: perplexity, KL divergence, top-1.

For each token after a window's first, with `p` the reference's and `q` the model's distribution over the vocabulary,

    perplexity = exp(mean −log q[token])      KL = Σ_v p_v·(log p_v − log q_v)      top-1 = [argmax p = argmax q]

Tokens of a window depend on one another, so standard errors are taken over windows.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from parofx import kept_float
from parofx.allocation import keeping_pages
from parofx.checks import warn_of_long_windows
from parofx.errors import DataError
from parofx.nn import ParoLinear
from parofx.precision import unemulated_linears

#: Logits of one forward that a batch size chosen here stays below.
_LOGITS_BYTES = 512 * 2**20
#: Elements of a `(rows, vocabulary)` chunk that are in fp32 at a time: 64 MiB.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured. KL is in nats; the last five are `None` without a reference.

    Args:
        tokens: predicted tokens, `windows · (seqlen − 1)`.
        windows: independent stretches of text.
        seconds: wall clock, with the reference's forwards.
        perplexity: on the tokens.
        perplexity_error: its standard error over windows; `None` for one window.
        kl_mean: mean over tokens of KL(reference ‖ model).
        kl_error: its standard error over windows; `None` for one window.
        kl_p99: the KL that one token in a hundred exceeds.
        top1_agreement: fraction of tokens whose most likely continuation is the same.
        reference_perplexity: of the reference, on the same tokens.
    """

    tokens: int
    windows: int
    seconds: float
    perplexity: float
    perplexity_error: float | None
    kl_mean: float | None = None
    kl_error: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    reference_perplexity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    reference: nn.Module | Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> EvalResult:
    """Measure a causal language model on windows of text.

    Args:
        model: takes `input_ids`, returns logits `(batch, seqlen, vocabulary)`, bare or as `.logits`.
        tokens: int64 `(windows, seqlen)`, as `parofx.calibration.data.pack_tokens` makes them.
        reference: the float model, run side by side; or its logits `(windows, seqlen, vocabulary)` from
            `collect_logits`.
        batch_size: windows per forward; `None` keeps one forward's logits below half a GiB.
        progress: show a bar.

    Raises:
        DataError: if the tokens are no windows, or logits are not finite or do not fit the tokens.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not len(tokens) or tokens.is_floating_point():
        raise DataError(
            f"tokens must be integers (windows, seqlen ≥ 2), at least one, got {tokens.dtype} {tuple(tokens.shape)}"
        )
    warn_of_long_windows(tokens.shape[1], model)
    start = time.perf_counter()
    nll, kl, agreed, reference_nll = [], [], [], []
    with _evaluation_mode(model, reference), keeping_pages():
        for rows in _slices(tokens, batch_size or _batch_size(model, tokens), progress):
            batch = tokens[rows]
            logits = _logits(model, batch)
            expected = None
            if reference is not None:
                expected = reference[rows] if isinstance(reference, Tensor) else _logits(reference, batch)
                _check_fit(expected, logits)
            for index, window in enumerate(batch):
                losses, divergences, same, reference_losses = _compare(
                    logits[index], None if expected is None else expected[index], window
                )
                nll.append(losses)
                kl.append(divergences)
                agreed.append(same)
                reference_nll.append(reference_losses)
    losses, divergences, same = torch.stack(nll), torch.stack(kl), torch.stack(agreed)
    perplexity, loss_error = math.exp(losses.mean()), _standard_error(losses)
    compared = reference is not None
    return EvalResult(
        tokens=losses.numel(),
        windows=len(losses),
        seconds=time.perf_counter() - start,
        perplexity=perplexity,
        # The derivative of exp carries the error of the mean loss to the perplexity.
        perplexity_error=None if loss_error is None else perplexity * loss_error,
        kl_mean=float(divergences.mean()) if compared else None,
        kl_error=_standard_error(divergences) if compared else None,
        kl_p99=float(np.quantile(divergences.numpy(), 0.99)) if compared else None,
        top1_agreement=float(same.double().mean()) if compared else None,
        reference_perplexity=math.exp(torch.stack(reference_nll).mean()) if compared else None,
    )


@contextlib.contextmanager
def reference_head(model: nn.Module, reference: nn.Module) -> Iterator[bool]:
    """Let a model with a quantized output head use the reference's, for as long as the context lasts.

    What then is left of the divergence is that of all other linears. Yields whether there is a quantized head, and the
    reference has one of its size to lend.
    """
    own = kept_float.output_head(model)
    lent: Any = kept_float.output_head(reference)
    sizes = ("in_features", "out_features")
    if not isinstance(own, ParoLinear) or any(getattr(lent, one, None) != getattr(own, one) for one in sizes):
        yield False
        return
    device = next(buffer.device for buffer in own.buffers())
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
    lent = copy.deepcopy(lent).to(device=device, dtype=dtype)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is own]
    try:
        for name in names:
            model.set_submodule(name, lent)
        yield True
    finally:
        for name in names:
            model.set_submodule(name, own)


def collect_logits(model: nn.Module, tokens: Tensor, *, path: str | Path, batch_size: int | None = None) -> Tensor:
    """Write the logits of a float model to a file, to compare several models with it without running it again.

    The file takes `2 · windows · seqlen · vocabulary` bytes and is mapped, not read, into memory.

    Args:
        model: as for `evaluate`.
        tokens: int64 `(windows, seqlen)`.
        path: of the file; it is overwritten.
        batch_size: as for `evaluate`.

    Returns:
        fp16 `(windows, seqlen, vocabulary)`, log-probabilities.
    """
    result: Tensor | None = None
    with _evaluation_mode(model, None):
        for rows in _slices(tokens, batch_size or _batch_size(model, tokens), progress=False):
            logits = _logits(model, tokens[rows])
            if result is None:
                shape = (*tokens.shape, logits.shape[-1])
                result = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float16).view(shape)
            for target, window in zip(result[rows], logits, strict=True):
                for part in _chunks(window):
                    target[part] = window[part].float().log_softmax(-1).half()
    if result is None:
        raise DataError(f"tokens must hold at least one window, got shape {tuple(tokens.shape)}")
    return result


def _compare(logits: Tensor, expected: Tensor | None, window: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return at each of a window's `seqlen − 1` predictions the loss, KL, top-1 agreement and the reference's loss."""
    losses, divergences, same, expected_losses = [], [], [], []
    targets = window[1:].to(logits.device)
    for part in _chunks(logits[:-1]):
        log_q = logits[:-1][part].float().log_softmax(-1)
        losses.append(-log_q.gather(-1, targets[part, None]).squeeze(-1))
        if expected is None:
            continue
        log_p = expected[:-1][part].to(log_q.device).float().log_softmax(-1)
        expected_losses.append(-log_p.gather(-1, targets[part, None]).squeeze(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
        # Where p is 0 the entry counts nothing, though −inf minus −inf is NaN; where only q is, KL is infinite.
        log_ratio = (log_p - log_q).nan_to_num_(nan=0.0, posinf=math.inf)
        divergences.append(log_p.exp_().mul_(log_ratio).sum(-1))
    empty = torch.empty(0)
    loss = torch.cat(losses).cpu()
    if not loss.isfinite().all():
        raise DataError("the model's logits are not finite: its loss on the text is NaN or infinite")
    kl, agreed, reference_loss = (torch.cat(parts or [empty]).cpu() for parts in (divergences, same, expected_losses))
    return loss, kl, agreed, reference_loss


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for begin in range(0, len(logits), rows):
        yield slice(begin, min(begin + rows, len(logits)))


def _slices(tokens: Tensor, batch_size: int, progress: bool) -> Iterable[slice]:
    rows = [slice(begin, min(begin + batch_size, len(tokens))) for begin in range(0, len(tokens), batch_size)]
    return track(rows, description="evaluating", console=Console(stderr=True), disable=not progress)


def _batch_size(model: nn.Module, tokens: Tensor) -> int:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 2**16
    return max(1, _LOGITS_BYTES // (4 * tokens.shape[1] * vocabulary))


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), batch.device)
    # A cache of keys and values would be filled for nothing. A compiled module hides its signature.
    signature = inspect.signature(getattr(model, "_orig_mod", model).forward)
    options = {"use_cache": False} if "use_cache" in signature.parameters else {}
    with unemulated_linears(model):
        output = model(batch.to(device), **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or tuple(logits.shape[:2]) != tuple(batch.shape) or logits.dim() != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"expected logits ({batch.shape[0]}, {batch.shape[1]}, vocabulary), the model gave {got}")
    return logits


def _check_fit(expected: Tensor, logits: Tensor) -> None:
    if expected.shape != logits.shape:
        raise DataError(
            f"the reference's logits must have the model's shape {tuple(logits.shape)}, got {tuple(expected.shape)}: "
            "compare models of one vocabulary, on the same tokens"
        )


@contextlib.contextmanager
def _evaluation_mode(*models: object) -> Iterator[None]:
    training = [model for model in models if isinstance(model, nn.Module) and model.training]
    for model in training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in training:
            model.train()


def _standard_error(values: Tensor) -> float | None:
    """Return the standard error of the mean of `values (windows, predictions)`, over windows."""
    means = values.double().mean(1)
    return None if len(means) < 2 else float(means.std() / math.sqrt(len(means)))
