"""Decode and prefill of a whole language model on a GPU: bfloat16 by Inductor, and parofx, both in CUDA graphs.

    python -m benchmarks.gpu_model [--model qwen3-1.7b] [--layers 4] [--json FILE]

Models have the shape of a known one and random weights; quantized layers hold random codes and rotations, whose speed
is that of any. Each compiled model is compared with the eager one first. Variants are timed in interleaved rounds, and
medians count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from parofx.linear_tensors import ROTATION_NAMES
from parofx.nn import ParoLinear

GROUP_SIZE, KROT = 128, 8
CACHE_LENGTH, PREFILL = 512, 2048
_STEPS, _ROUNDS = 20, 5
_COMMON = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 4096}
#: Published shapes: arguments of `Qwen3Config`.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-1.7b": {
        **_COMMON, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_COMMON, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    """Check, measure and print."""
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device")
    shape = SHAPES[options.model] | ({"num_hidden_layers": options.layers} if options.layers else {})
    with torch.no_grad():
        variants = {"bf16 Inductor": Variant(random_model(shape), "inductor")}
        quantized = random_model(shape)
        quantize_at_random(quantized)
        variants["parofx"] = Variant(quantized, "paro")
        rows = {name: variant.prepare() for name, variant in variants.items()}
        for what in ("decode", "prefill"):
            times: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(_ROUNDS):
                for name, variant in variants.items():
                    times[name].append(_milliseconds(getattr(variant, what)))
            for name, row in rows.items():
                row[f"{what}, ms"] = statistics.median(times[name])
        for name, variant in variants.items():
            rows[name]["kernels"] = _kernels(variant.decode)
    _print(options.model, rows)
    if options.json is not None:
        record = {"gpu": torch.cuda.get_device_name(), "model": options.model, "shape": shape, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1))


def random_model(shape: dict[str, Any]) -> Any:
    """Return a model with random weights, bfloat16 on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        config = transformers.Qwen3Config(**shape)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def quantize_at_random(model: nn.Module) -> None:
    """Replace every linear but the output head by a `ParoLinear` of random codes; siblings share a rotation."""
    head, shared = model.get_output_embeddings(), {}  # type: ignore[operator, var-annotated]
    for name, module in list(model.named_modules()):
        if module is head or not isinstance(module, nn.Linear):
            continue
        tensors = _random_linear(module.in_features, module.out_features)
        rotation = shared.setdefault((name.rpartition(".")[0], module.in_features), tensors)
        tensors |= {part: rotation[part] for part in ROTATION_NAMES}
        model.set_submodule(name, ParoLinear.from_tensors(tensors).eval())


def _random_linear(channels: int, columns: int) -> dict[str, Tensor]:
    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns // 8), device="cuda").to(torch.int32)

    groups = channels // GROUP_SIZE
    pairs = torch.rand(KROT, groups, GROUP_SIZE, device="cuda").argsort(-1).reshape(KROT, channels)
    return {
        "qweight": words(channels),
        "qzeros": torch.full_like(words(groups), -0x77777778),  # eight zero points of 8
        "scales": torch.full((groups, columns), 0.2 / channels**0.5, dtype=torch.float16, device="cuda"),
        "theta": torch.randn(KROT, channels // 2, device="cuda").half(),
        "pairs": pairs.to(torch.int16),
        "channel_scales": torch.ones(1, channels, dtype=torch.float16, device="cuda"),
    }


class Variant:
    """A model, compiled by a backend for one token with a static cache, and for a prompt without one."""

    def __init__(self, model: Any, backend: str) -> None:
        self.model, self.backend = model, backend
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        self.token = torch.randint(0, 1000, (1, 1), device="cuda")
        # A cache takes its memory at the first step, and CUDA graphs want to know where it lies.
        model(self.token, past_key_values=self.cache, use_cache=True)
        self.prompt = torch.randint(0, 1000, (1, PREFILL), device="cuda")
        # Each has graphs of its own: a compiled module guards on one shape at a time.
        self._one, self._many = (
            torch.compile(model.forward, backend=backend, mode="reduce-overhead", dynamic=False) for _ in range(2)
        )

    def prepare(self) -> dict[str, Any]:
        """Compile; return the error of the compiled model against the eager one, and what weights take in memory."""
        row: dict[str, Any] = {}
        expected = self.model(self.prompt, use_cache=False, logits_to_keep=1).logits.float()
        got = self.prefill().float()
        row["relative error"] = float((got - expected).norm() / expected.norm())
        for _ in range(4):
            self.decode()
            self.prefill()
        tensors = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
        row["weights, MiB"] = sum(one.nbytes for one in tensors.values()) / 2**20
        return row

    def decode(self) -> Tensor:
        """Return the logits of one token."""
        return self._one(self.token, past_key_values=self.cache, use_cache=True).logits  # type: ignore[no-any-return]

    def prefill(self) -> Tensor:
        """Return the last logits of the prompt."""
        return self._many(self.prompt, use_cache=False, logits_to_keep=1).logits  # type: ignore[no-any-return]


def _milliseconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_STEPS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _STEPS


def _kernels(call: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    return dict(counts.most_common())


def _print(name: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table("", *rows, "ratio", title=f"{name}-shaped model, {torch.cuda.get_device_name()}")
    tokens = {"decode": 1, "prefill": PREFILL}
    for what, count in tokens.items():
        speeds = [1e3 * count / row[f"{what}, ms"] for row in rows.values()]
        table.add_row(f"{what}, tokens/s", *(f"{speed:.0f}" for speed in speeds), f"{speeds[-1] / speeds[0]:.2f}")
    sizes = [row["weights, MiB"] for row in rows.values()]
    table.add_row("weights, MiB", *(f"{size:.0f}" for size in sizes), f"{sizes[-1] / sizes[0]:.2f}")
    table.add_row("kernels of a decode step", *(str(sum(row["kernels"].values())) for row in rows.values()))
    table.add_row("relative error against eager", *(f"{row['relative error']:.1e}" for row in rows.values()))
    Console(width=120).print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-1.7b")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
