"""What `calibration=` may be, brought to one form: batches of keyword arguments for the model.

| `calibration` | becomes |
|-|-|
| a string | the documents of that source (`sources.load_texts`), or `"self"`: text the model itself writes |
| strings or conversations | tokens, concatenated and cut to windows (`pack_tokens`) |
| a tensor `(samples, …)` | batches of `batch_size` |
| tensors, mappings or tuples | one batch each: the first argument, keyword arguments, positional arguments |
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parofx.calibration.sources import Document, check_document, load_texts
from parofx.checks import warn_of_long_windows
from parofx.config import CalibrationConfig
from parofx.errors import DataError

__all__ = ["SELF_SOURCE", "Batch", "batches", "load_texts", "pack_tokens", "sample_from_model"]

#: The source whose text the model writes itself.
SELF_SOURCE = "self"
#: Text is read until it holds this many times the tokens asked for; the windows are drawn from it.
_POOL = 16


@dataclass(frozen=True)
class Batch:
    """One forward of calibration data.

    Args:
        inputs: keyword arguments of the model's `forward`.
        attention_mask: bool `(batch, sequence)`, true where a row counts; `None` if all do.
    """

    inputs: dict[str, Any]
    attention_mask: Tensor | None = None

    @property
    def samples(self) -> int:
        """The length of the first dimension of the inputs."""
        return next((len(value) for value in self.inputs.values() if isinstance(value, Tensor) and value.dim()), 1)


def batches(
    calibration: object, model: nn.Module, config: CalibrationConfig, *, tokenizer: Any | None = None
) -> list[Batch]:
    """Bring calibration data of any accepted kind to batches, at most `config.samples` samples in all.

    Everything is read and checked here, before a model is touched. Batches that came as such keep their size.

    Args:
        calibration: see the table of this module.
        model: whose `forward` names the arguments.
        config: `seqlen`, `samples`, `batch_size` and `seed` apply.
        tokenizer: needed for text.

    Raises:
        DataError: if there is no data, an item is of no accepted kind, a text comes without a tokenizer, or an input
            is not finite; the message names the item.
    """
    if isinstance(calibration, (str, Path)):
        if str(calibration) == SELF_SOURCE:
            warn_of_long_windows(config.seqlen, model)
            tokens = sample_from_model(model, tokenizer, config)
            return _split(tokens, model, config.batch_size)
        calibration = load_texts(calibration)
    if isinstance(calibration, Tensor):
        return _split(calibration[: config.samples] if calibration.dim() else calibration, model, config.batch_size)
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise DataError(
            "calibration must be None, a source, an iterable of strings or an iterable of model inputs, "
            f"got {type(calibration).__name__}"
        )
    items = iter(calibration)
    first = next(items, None)
    if first is None:
        raise DataError("calibration holds no item: expected at least one text or one batch of model inputs")
    if isinstance(first, str) or _is_conversation(first):
        if tokenizer is None:
            raise DataError("calibration holds text, and text needs a tokenizer: pass tokenizer=")
        if not callable(tokenizer):
            raise DataError(
                f"tokenizer must be a tokenizer, got {tokenizer!r}; load it with AutoTokenizer.from_pretrained"
            )
        tokens = pack_tokens(
            _documents(first, items), tokenizer, seqlen=config.seqlen, samples=config.samples, seed=config.seed
        )
        _check_vocabulary(tokens, model)
        warn_of_long_windows(config.seqlen, model)
        return _split(tokens, model, config.batch_size)
    return _given_batches(first, items, model, config.samples)


def pack_tokens(
    texts: Iterable[Document], tokenizer: Any, *, seqlen: int, samples: int | None = None, seed: int = 0
) -> Tensor:
    """Tokenize, concatenate and cut texts to windows: `(samples, seqlen)`, int64.

    Documents are joined by the tokenizer's end token. A tokenizer that begins a text with a start token has one at the
    beginning of every window, because models trained so read windows without it badly. Conversations go through the
    chat template. The rest that fills no window is dropped.

    Args:
        texts: strings or conversations.
        tokenizer: of `transformers`, or any callable with the same answer.
        seqlen: tokens of a window.
        samples: windows drawn at random, without overlap, from the first `16 · samples · seqlen` tokens; `None` gives
            all windows of all texts, in order. Too little text gives the windows there are, with a warning.
        seed: of the draw.

    Raises:
        DataError: if the texts do not fill one window, saying how many tokens were needed and found.
    """
    start = _start_tokens(tokenizer)
    body = seqlen - len(start)
    limit = None if samples is None else _POOL * samples * body
    stream: list[int] = []
    for text in texts:
        stream += _tokenize(text, tokenizer)
        if getattr(tokenizer, "eos_token_id", None) is not None:
            stream.append(tokenizer.eos_token_id)
        if limit is not None and len(stream) >= limit:
            break
    found = len(stream) // body
    if not found:
        raise DataError(
            f"too little text: a window of {seqlen} tokens needs {body} tokens of text, found {len(stream)}; "
            "give more text or shorter windows (seqlen)"
        )
    windows = torch.tensor(stream[: found * body], dtype=torch.int64).view(found, body)
    if start:
        windows = torch.cat((torch.tensor(start).expand(found, -1), windows), dim=1)
    if samples is None:
        return windows
    if found < samples:
        warnings.warn(
            f"the text fills {found} windows of {seqlen} tokens, {samples} were asked for "
            f"({samples * body} tokens needed, {len(stream)} found): using {found}",
            stacklevel=2,
        )
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    return windows[order[:samples]]


def sample_from_model(model: nn.Module, tokenizer: Any | None, config: CalibrationConfig) -> Tensor:
    """Let the model write its own calibration text: `(samples, seqlen)` tokens, sampled at temperature 1.

    Each sequence starts from the start token (the end token where there is none) and does not stop at an end token.

    Raises:
        DataError: if the model cannot generate, or the tokenizer has no token to start from.
    """
    generate = getattr(model, "generate", None)
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(tokenizer, "eos_token_id", None)
    if generate is None or start is None:
        raise DataError(
            f"calibration {SELF_SOURCE!r} needs a model with generate() and a tokenizer with a start or end token, "
            f"got {type(model).__name__} and {type(tokenizer).__name__}; pass texts or model inputs"
        )
    device = next(model.parameters()).device
    parts = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for begin in range(0, config.samples, config.batch_size):
            rows = min(config.batch_size, config.samples - begin)
            prompt = torch.full((rows, 1), start, dtype=torch.int64, device=device)
            parts.append(
                generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=config.seqlen - 1,
                    max_new_tokens=config.seqlen - 1,
                    pad_token_id=start,
                ).cpu()
            )
    return torch.cat(parts)


def _documents(first: object, rest: Iterator[object]) -> Iterator[Document]:
    yield check_document(first, "calibration item 0")
    for index, item in enumerate(rest, start=1):
        yield check_document(item, f"calibration item {index}")


def _is_conversation(item: object) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(part, Mapping) and "role" in part for part in item)


def _tokenize(text: Document, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError("the data holds conversations, and the tokenizer has no chat template to render them with")
        text = str(tokenizer.apply_chat_template(text, tokenize=False))
    # A whole book in one call would be warned about for being longer than the model's context; it is cut later.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start_tokens(tokenizer: Any) -> list[int]:
    start = getattr(tokenizer, "bos_token_id", None)
    return [start] if start is not None and list(tokenizer("")["input_ids"])[:1] == [start] else []


def _split(tokens: Tensor, model: nn.Module, batch_size: int) -> list[Batch]:
    if not tokens.dim() or not len(tokens):
        raise DataError(f"calibration must hold at least one sample, got a tensor of shape {tuple(tokens.shape)}")
    chunks = torch.split(tokens, batch_size)
    return [_batch(chunk, model, index * batch_size) for index, chunk in enumerate(chunks)]


def _given_batches(first: object, rest: Iterator[object], model: nn.Module, samples: int) -> list[Batch]:
    result = [_batch(first, model, 0)]
    count = result[0].samples
    while count < samples:
        item = next(rest, None)
        if item is None:
            break
        result.append(_batch(item, model, count))
        count += result[-1].samples
    return result


def _batch(item: object, model: nn.Module, first_sample: int) -> Batch:
    """Bind one item to the arguments of `model.forward` and check its numbers."""
    where = f"calibration sample {first_sample}"
    if isinstance(item, Mapping):
        inputs = dict(item)
    elif isinstance(item, (Tensor, tuple, list)):
        arguments = (item,) if isinstance(item, Tensor) else tuple(item)
        try:
            bound = inspect.signature(model.forward).bind_partial(*arguments)
        except TypeError as error:
            raise DataError(f"{where}: {type(model).__name__}.forward does not take it: {error}") from error
        inputs = dict(bound.arguments)
    else:
        raise DataError(f"{where}: expected a tensor, a mapping or a tuple of inputs, got {type(item).__name__}")
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        kinds = {name: type(value).__name__ for name, value in inputs.items()}
        raise DataError(f"{where}: expected at least one tensor among the inputs, got {kinds}{_remedy(item)}")
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            _check_tensor(name, value, first_sample)
            if name == getattr(model, "main_input_name", None) and not value.is_floating_point():
                _check_tokens(name, value, first_sample, model)
    mask = inputs.get("attention_mask")
    # A mask of more dimensions says who sees whom, not which rows are padding.
    return Batch(inputs, mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)


def _remedy(item: object) -> str:
    if isinstance(item, Mapping):
        texts = next((name for name, value in item.items() if isinstance(value, str)), None)
        return "" if texts is None else f"; of rows with text give the strings: [row[{texts!r}] for row in rows]"
    if isinstance(item, (list, tuple)) and all(isinstance(one, int) for one in item):
        return "; token ids are given as a tensor: torch.tensor([ids])"
    return ""


def _vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens a model has embeddings for, where it says."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)
    try:
        return getattr(embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of a Transformers model that has none
        return None


def _check_tokens(name: str, tokens: Tensor, first_sample: int, model: nn.Module) -> None:
    """Refuse tokens that the model has no embedding for; on a GPU they would end the whole process."""
    known = _vocabulary(model)
    if known is None:
        return
    wrong = ((tokens < 0) | (tokens >= known)).nonzero()
    if len(wrong):
        at = wrong[0]
        raise DataError(
            f"calibration sample {first_sample + int(at[0])}: {name} holds token {int(tokens[tuple(at)])}, and "
            f"{type(model).__name__} has embeddings for 0 to {known - 1}; give what the model's own tokenizer gives"
        )


def _check_vocabulary(tokens: Tensor, model: nn.Module) -> None:
    """Refuse tokens that the model has no embedding for, which another model's tokenizer gives."""
    known = _vocabulary(model)
    if known is not None and int(tokens.max()) >= known:
        raise DataError(
            f"the tokenizer gives token {int(tokens.max())}, and {type(model).__name__} has embeddings for {known}; "
            "pass the model's own tokenizer"
        )


def _check_tensor(name: str, value: Tensor, first_sample: int) -> None:
    if not value.numel():
        raise DataError(f"calibration sample {first_sample}: {name} is empty, of shape {tuple(value.shape)}")
    # Masks hold −inf on purpose.
    if value.is_floating_point() and "mask" not in name:
        finite = value.isfinite().reshape(len(value) if value.dim() else 1, -1).all(1)
        if not finite.all():
            sample = first_sample + int(finite.logical_not().nonzero()[0])
            raise DataError(f"calibration sample {sample}: {name} holds NaN or infinite values")
