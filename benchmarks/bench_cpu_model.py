"""Prefill and decode of whole language models on CPU: bfloat16, torchao's int4, llama.cpp, and parofx.

    python -m benchmarks.bench_cpu_model [--model qwen3-0.6b] [--layers 4] [--threads 1]

Models have the shape of a known one and random weights. Each variant lives in a process of its own, which gives its
peak memory, and all are measured in turn, so that whatever else the machine does hits all of them. `--layers` cuts the
models for a quick run; their output heads stay whole. Results go to benchmarks/results/cpu_model.json, beside those of
variants that were measured before; ratios are to the first variant of one run.

Leave OMP_WAIT_POLICY unset and the machine idle. A decoded token is several hundred short parallel loops: with
`passive`, threads sleep and are woken for each of them, and where another process takes a core from threads that spin,
all wait for it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import _ggml

RESULTS = Path(__file__).parent / "results"
#: Published shapes: arguments of the configuration classes.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How a model is made ready; `config` are fields of `ParoConfig`, None where parofx has no part in it.

    `ggml` is llama.cpp's type of the linears' weights, for what it runs itself.
    """

    name: str
    config: dict[str, Any] | None = None
    activations: str = "float"
    package: str | None = None
    ggml: str | None = None


VARIANTS = (
    Variant("bf16 inductor"),
    Variant("torchao int4", package="torchao"),
    Variant("parofx", {}),
    Variant("parofx int8 activations", {}, "int8"),
    Variant("parofx krot=0", {"krot": 0}),
    Variant("parofx, a transform per linear", {"share_siblings": False}),
    Variant("parofx, quantized head", {"lm_head": 4}),
    Variant("parofx int8, quantized head", {"lm_head": 4}, "int8"),
    Variant("parofx, 8-bit head", {"lm_head": 8}),
    Variant("llama.cpp Q4_0, 6-bit head", ggml="Q4_0"),
    Variant("llama.cpp Q4_K, 6-bit head", ggml="Q4_K"),
)


@dataclass
class Measurement:
    """One variant's rounds: seconds of a prefill, median seconds of a decoded token."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    linear_mib: float = 0.0


def main() -> None:
    """Measure every model, print a table for each and write the JSON file."""
    options = _options()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cpu_model.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name in options.model:
        report.setdefault(name, {}).update(_measure(name, options))
        path.write_text(json.dumps(report, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="decoder layers, fewer than the real model has")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", nargs="+", default=[each.name for each in VARIANTS])
    return parser.parse_args()


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    workers = {}
    for variant in VARIANTS:
        if variant.name not in options.variant:
            continue
        if missing := _missing(variant):
            print(f"absent: {variant.name} ({missing})")
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, name, variant, options))
        process.start()
        theirs.close()  # so that a process that dies is noticed
        # One after the other: what a process needs to get ready is no concern of the others.
        workers[variant.name] = (process, ours, Measurement(linear_mib=ours.recv()))
    for _ in range(options.rounds):
        for _, connection, measured in workers.values():
            connection.send(True)
            prefill, decode, measured.peak_mib = connection.recv()
            measured.prefill.append(prefill)
            measured.decode.append(decode)
    for process, connection, _ in workers.values():
        connection.send(False)
        process.join()
    rows: dict[str, dict[str, Any]] = {
        name: {
            "prefill_tokens_per_second": options.prompt / statistics.median(measured.prefill),
            "decode_tokens_per_second": 1 / statistics.median(measured.decode),
            "peak_mib": measured.peak_mib,
            "model_mib": measured.linear_mib,
        }
        for name, (_, _, measured) in workers.items()
    }
    first = next(iter(rows.values()))
    settings = {key: getattr(options, key) for key in ("layers", "prompt", "tokens", "rounds", "threads")}
    settings["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY")
    for row in rows.values():
        row.update(settings)
        for phase in ("prefill", "decode"):
            key = f"{phase}_tokens_per_second"
            row[f"{phase}_ratio"] = row[key] / first[key]
    _print(name, rows)
    return rows


def _missing(variant: Variant) -> str | None:
    """Return how to get what is not installed, or None."""
    if variant.ggml:
        return _ggml.why_not()
    if variant.package and importlib.util.find_spec(variant.package) is None:
        return f"pip install {variant.package}"
    return None


def _serve(connection: Connection, name: str, variant: Variant, options: argparse.Namespace) -> None:
    """Make the model ready, compile it, then measure a round at every request."""
    torch.set_num_threads(options.threads)
    torch._dynamo.config.cache_size_limit = 64
    torch.manual_seed(0)
    if variant.ggml:
        _serve_llama_cpp(connection, name, variant.ggml, options)
        return
    model = _random_model(name, options.layers)
    backend, compile_options = _prepare(model, variant)
    compiled = torch.compile(model, backend=backend, options=compile_options, dynamic=False)
    prompt = torch.randint(0, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _round(compiled, model.config, prompt, options.tokens)
        gc.collect()
        connection.send(sum(each.nbytes for each in (*model.parameters(), *model.buffers())) / 2**20)
        while connection.recv():
            times = _round(compiled, model.config, prompt, options.tokens)
            connection.send((*times, _peak_mib()))


def _serve_llama_cpp(connection: Connection, name: str, kind: str, options: argparse.Namespace) -> None:
    """The same for llama.cpp, which has a model and a cache of its own."""
    from benchmarks._llama_cpp import Model

    model = Model(_shape(name, options.layers), kind, options.prompt + options.tokens, options.threads)
    prompt = torch.randint(0, 1000, (options.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    model.round(prompt, options.tokens)
    connection.send(model.mib)
    while connection.recv():
        prefill, *gaps = model.round(prompt, options.tokens)
        connection.send((prefill, statistics.median(gaps), _peak_mib()))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _shape(name: str, layers: int | None) -> tuple[str, dict[str, Any]]:
    kind, sizes = SHAPES[name]
    return kind, sizes | ({"num_hidden_layers": layers} if layers else {})


def _random_model(name: str, layers: int | None) -> Any:
    import transformers

    kind, sizes = _shape(name, layers)
    config = getattr(transformers, kind)(**sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.__init__(config)  # to_empty left its buffers unset
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model.eval()


def _prepare(model: nn.Module, variant: Variant) -> tuple[str, dict[str, Any] | None]:
    """Quantize in place; return the backend and its options."""
    if variant.config is not None:
        import parofx

        # A step, so that transforms differ: equal ones would be rotated with once.
        calibration = parofx.CalibrationConfig(recipe="data-free", steps=1, clip_ratios=(1.0,))
        config = parofx.ParoConfig(**variant.config, calibration=calibration)
        parofx.quantize(model, config, progress=False)
        return "paro", {"activations": variant.activations}
    if variant.package == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        head = model.get_output_embeddings()  # type: ignore[operator]
        quantize_(
            model,
            PrototypeInt4WeightOnlyConfig(group_size=128),
            lambda module, _: isinstance(module, nn.Linear) and module is not head,
        )
    return "inductor", None


def _round(model: Any, config: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill and the median seconds of a token behind it."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=prompt.shape[1] + tokens)
    times = [time.perf_counter()]
    ids, position = prompt, 0
    for _ in range(tokens):
        places = torch.arange(position, position + ids.shape[1])
        logits = model(
            input_ids=ids, position_ids=places[None], past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        position += ids.shape[1]
        ids = logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return times[1] - times[0], statistics.median(gaps)


def _print(name: str, rows: dict[str, dict[str, Any]]) -> None:
    table = Table(title=name)
    for heading in ("variant", "prefill tok/s", "decode tok/s", "x prefill", "x decode", "peak MiB", "model MiB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for variant, row in rows.items():
        prefill, decode = row["prefill_tokens_per_second"], row["decode_tokens_per_second"]
        shown = (f"{row[key]:.2f}" for key in ("prefill_ratio", "decode_ratio"))
        memory = (f"{row['peak_mib']:.0f}", f"{row['model_mib']:.0f}")
        table.add_row(variant, f"{prefill:.1f}", f"{decode:.2f}", *shown, *memory)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
