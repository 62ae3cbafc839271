"""Tokens per second of `transformers` models: prefill of one sequence, and decoding with a static cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

ROUNDS = 3
#: Tokens that the static cache holds. One length for all calls means one compiled graph.
CACHE_LENGTH = 128
PROMPT_LENGTH = 32
NEW_TOKENS = 24


@dataclass(frozen=True)
class Variant:
    """A model, the `torch.compile` backend it runs with (`None`: eagerly), and its forward, so compiled."""

    model: Any
    backend: str | None
    forward: Any

    @classmethod
    def of(cls, model: Any, backend: str | None) -> Variant:
        """Return a variant whose forward will be compiled when it is first called."""
        return cls(model, backend, model if backend is None else torch.compile(model, backend=backend))


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians over rounds."""

    prefill: float
    decode: float


class Stopwatch:
    """A `generate` streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note a token's time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generation_options(model: Any, backend: str | None) -> dict[str, Any]:
    """Return arguments of `generate` that decode with a static cache, compiled with `backend`."""
    options: dict[str, Any] = {"past_key_values": StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)}
    if backend is None:
        return options | {"disable_compile": True}
    config = CompileConfig(backend=backend, mode="default")
    # Without it transformers compiles on accelerators only.
    config._compile_all_devices = True
    return options | {"compile_config": config}


def measure(variants: Mapping[str, Variant], tokens: Tensor) -> dict[str, Speed]:
    """Time all variants in turn, `ROUNDS` times, after one round that compiles.

    Args:
        variants: by name.
        tokens: int64 `(1, seqlen)`: the prefill; its beginning is the prompt of decoding.
    """
    prefills: dict[str, list[float]] = {name: [] for name in variants}
    decodes: dict[str, list[float]] = {name: [] for name in variants}
    prompt = tokens[:, :PROMPT_LENGTH]
    for index in range(ROUNDS + 1):
        for name, variant in variants.items():
            with torch.no_grad():
                start = time.perf_counter()
                variant.forward(tokens, use_cache=False)
                prefill = time.perf_counter() - start
            watch = Stopwatch()
            variant.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                **generation_options(variant.model, variant.backend),
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                streamer=watch,
            )
            # The prompt, then the token that the prefill gave: what follows is decoding.
            gaps = [later - earlier for earlier, later in zip(watch.times[1:], watch.times[2:], strict=False)]
            if index:
                prefills[name].append(prefill)
                decodes[name].append(statistics.median(gaps))
    return {
        name: Speed(tokens.shape[1] / statistics.median(prefills[name]), 1 / statistics.median(decodes[name]))
        for name in variants
    }
