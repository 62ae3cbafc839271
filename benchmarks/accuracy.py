"""One table of 4-bit recipes: the same model, text, windows and evaluation code for every row.

    python -m benchmarks.accuracy MODEL --calibration a.txt --evaluation b.txt
    python -m benchmarks.accuracy MODEL … --rows 'ablation*' --seeds 0
    python -m benchmarks.accuracy MODEL … --write-tokens tokens.safetensors --rows float
    python -m benchmarks.accuracy MODEL … --peer out/hqq --peer out/autoround

MODEL is a folder, a hub id or a `.gguf` file. The weights of every row are evaluated as floats of the model's dtype, so
that rows differ in nothing but the weights. Intervals are of 95 %, over windows. Bits per weight count codes, scales,
zeros and rotations. Rows with a seed are run once per seed; the mean over seeds is followed by their standard
deviation. "of GPTQ's" is a row's perplexity gap to float over that of the GPTQ row.

Other packages quantize in environments of their own: `benchmarks/peers/` has one script per package that reads the
calibration tokens written by `--write-tokens` and leaves a folder of plain weights, which `--peer` evaluates here.

Results go to `benchmarks/results/accuracy-NAME.json`, or to `--results`, with a plot beside it, after every run;
`--resume` skips the runs that are there and are of today's settings. It does not know whether the code has changed.
Without texts it measures SmolLM2-135M-Instruct on what every Python installation has, in a few windows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import hashlib
import itertools
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import parofx
from benchmarks._accuracy_table import AccuracyTable
from benchmarks._shared_statistics import SharedStatistics
from benchmarks._texts import calibration_and_evaluation
from benchmarks.perplexity import packaged_model
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration.data import load_texts, pack_tokens
from parofx.evaluation import EvalResult, collect_logits, evaluate
from parofx.models import load_model

#: The largest file of reference logits.
_LOGITS_BYTES = 8 << 30
RESULTS = Path(__file__).parent / "results"

NEAREST = CalibrationConfig(steps=0, clip_ratios=(1.0,), rounding="nearest")
GPTQ = CalibrationConfig(
    steps=0, row_weights="equal", clip_ratios=(1.0,), rounding="feedback", damping=(0.01,), sweeps=0
)
FAST = CalibrationConfig()
BLOCKS = replace(FAST, transform_epochs=2, weight_epochs=2, tune_epochs=3, transform_learning_rate=0.01)
_GPTQ = "GPTQ (our error feedback, no transform)"
#: Row → configuration, and whether calibration data is given.
ROWS: dict[str, tuple[ParoConfig, bool]] = {
    "round to nearest": (ParoConfig(krot=0, calibration=NEAREST), False),
    _GPTQ: (ParoConfig(krot=0, calibration=GPTQ), True),
    "parofx data-free": (ParoConfig(calibration=CalibrationConfig(recipe="data-free")), False),
    "parofx fast": (ParoConfig(calibration=FAST), True),
    "parofx best": (ParoConfig(calibration=CalibrationConfig(recipe="best")), True),
    # As far as they can, they have statistics in common.
    "ablation: no transform": (ParoConfig(krot=0, calibration=replace(FAST, steps=0)), True),
    "ablation: channel scales only": (ParoConfig(krot=0, calibration=FAST), True),
    "ablation: 2 rotations": (ParoConfig(krot=2, calibration=FAST), True),
    "ablation: range objective": (ParoConfig(calibration=replace(FAST, objective="range")), True),
    "ablation: no clip search": (ParoConfig(calibration=replace(FAST, clip_ratios=(1.0,))), True),
    "ablation: no sweeps": (ParoConfig(calibration=replace(FAST, sweeps=0)), True),
    "ablation: damping chosen": (ParoConfig(calibration=replace(FAST, damping=(0.03, 0.1, 0.3))), True),
    "ablation: greedy pairs": (ParoConfig(calibration=replace(FAST, pairs="greedy")), True),
    "ablation: steps of best": (ParoConfig(calibration=replace(FAST, steps=300, rows=1024)), True),
    "ablation: rank 4": (ParoConfig(calibration=replace(FAST, compensation_rank=4)), True),
    "ablation: 3 bits": (ParoConfig(bits=3, calibration=FAST), True),
    "ablation: to nearest": (ParoConfig(calibration=replace(FAST, rounding="nearest", objective="range")), True),
    "ablation: feedback between rows, 16": (ParoConfig(calibration=replace(FAST, gradient_samples=16)), True),
    "ablation: own transform per linear": (ParoConfig(share_siblings=False, calibration=FAST), True),
    "ablation: rows count alike": (ParoConfig(calibration=replace(FAST, row_weights="equal")), True),
    "ablation: group size 64": (ParoConfig(group_size=64, calibration=FAST), True),
    "ablation: distilled": (ParoConfig(calibration=replace(FAST, distill_epochs=3)), True),
    "ablation: blocks trained": (ParoConfig(calibration=BLOCKS), True),
    "ablation: formats chosen, bits of 4": (ParoConfig(calibration=FAST), True),
    "ablation: formats chosen, bits of 3": (ParoConfig(bits=3, calibration=FAST), True),
    "ablation: formats chosen, bits of rank 4": (ParoConfig(calibration=replace(FAST, compensation_rank=4)), True),
}
#: Rows that are the same whatever the seed.
_SEEDLESS = ("round to nearest", _GPTQ, "ablation: no transform")
#: Rows whose formats are chosen under a budget: the bits that their configuration takes.
_CHOSEN = "ablation: formats chosen*"
#: What is averaged over seeds.
_MEANS = (
    "perplexity", "perplexity_error", "kl_mean", "kl_error", "kl_p99", "top1_agreement", "quantize_seconds",
    "quantize_cpu_seconds",
)  # fmt: skip
#: Options in which all runs of a table must agree.
_COMMON = (
    "model", "digest", "device", "calibration", "evaluation", "samples", "seqlen", "windows", "dtype", "kl",
    "kl_windows",
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    options = _options()
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, dtype=dtype)
    model.to(options.device)
    calibration, windows = _data(options, tokenizer)
    if options.write_tokens:
        save_file({"input_ids": calibration}, options.write_tokens)
    options.digest = _digest(calibration, windows)
    target = Path(options.results or RESULTS / f"accuracy-{_model_name(options)}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = _earlier_rows(options, target)
    if "float" not in rows:
        result = evaluate(model, windows, batch_size=options.batch_size, progress=True)
        _note(rows, "float", result, 8.0 * dtype.itemsize, (0.0, 0.0))
        _save(rows, options, target)
    gathered, reference = SharedStatistics(), _Reference(model, windows, options)
    for name, (config, with_data) in ROWS.items():
        if not any(fnmatch(name, pattern) for pattern in options.rows):
            continue
        done = {run["seed"] for run in rows[name]["seeds"]} if name in rows else set()
        for seed in options.seeds[:1] if name in _SEEDLESS else options.seeds:
            if seed in done or (done and name in _SEEDLESS):
                continue
            if fnmatch(name, _CHOSEN) and config.calibration.bits_budget is None:
                config = _with_budget(config, model)
            given = replace(
                config.calibration, seed=seed, samples=len(calibration), seqlen=max(2, calibration.shape[1])
            )
            seeded = replace(config, calibration=given)
            quantized = copy.deepcopy(model)
            start = time.perf_counter(), time.process_time()
            with gathered.shared() if options.share_statistics else contextlib.nullcontext():
                report = parofx.quantize(quantized, seeded, calibration=calibration if with_data else None)
            saved = gathered.saved
            seconds = time.perf_counter() - start[0] + saved[0], time.process_time() - start[1] + saved[1]
            result = _evaluate(parofx.dequantize(quantized, dtype=dtype), reference, windows, options)
            _note(rows, name, result, report.bits_per_weight, seconds, seed, settings=_settings_of(name))
            _save(rows, options, target)
            del quantized
            gc.collect()
    for folder in options.peer:
        peer = json.loads((Path(folder) / "peer.json").read_text())
        if peer.get("tokens") not in (None, _digest(calibration)):
            raise SystemExit(
                f"{folder} was calibrated on other tokens: write them with --write-tokens, and run it again"
            )
        quantized = load_model(folder, dtype=dtype).model.to(options.device)
        if any(isinstance(module, parofx.ParoLinear) for module in quantized.modules()):
            quantized = parofx.dequantize(quantized, dtype=dtype)
        result = _evaluate(quantized, reference, windows, options)
        name = f"{peer['name']} {peer['version']}"
        rows.pop(name, None)
        _note(rows, name, result, peer["bits_per_weight"], (peer["seconds"], peer["cpu_seconds"]))
    _save(rows, options, target)
    windows = rows["float"]["seeds"][0]["windows"]
    table = AccuracyTable(rows, f"{_model_name(options)}, {windows} windows of {options.seqlen} tokens", _GPTQ)
    table.print()
    table.plot(target.with_suffix(".png"))
    if options.markdown:
        Path(options.markdown).write_text(table.markdown())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, hub id or .gguf file")
    parser.add_argument("--calibration", action="append", default=[], help="text file; may be repeated")
    parser.add_argument("--evaluation", help="text file")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="of calibration and evaluation")
    parser.add_argument("--windows", type=int, help="evaluation windows; 100, or 8 without texts")
    parser.add_argument("--batch-size", type=int, help="of evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run of a row each; 0 1 2, or 0 without texts")
    parser.add_argument("--rows", action="append", help="name or pattern; may be repeated; all but the ablations")
    parser.add_argument("--peer", action="append", default=[], help="folder that a script of benchmarks/peers wrote")
    parser.add_argument("--write-tokens", help="also write the calibration tokens to this safetensors file")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda; seconds of a table are of one device")
    parser.add_argument("--kl", action=argparse.BooleanOptionalAction, default=True, help="also compare distributions")
    parser.add_argument("--kl-windows", type=int, help="windows that are compared; all of them without it")
    parser.add_argument("--markdown", help="also write the table to this file, as Markdown")
    parser.add_argument("--results", help="JSON file for the results, instead of benchmarks/results/accuracy-NAME.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in the results")
    parser.add_argument(
        "--share-statistics",
        action="store_true",
        help="gather statistics once for rows with the same; holds 8·K² bytes for each set of siblings, twice where "
        "damping is chosen",
    )
    options = parser.parse_args()
    if options.results and (Path(options.results).suffix != ".json" or Path(options.results).is_dir()):
        parser.error(f"--results must be a file whose name ends in .json, got {options.results}")
    if bool(options.calibration) != bool(options.evaluation):
        parser.error("give --calibration and --evaluation together: the texts must not be the same")
    small = not options.evaluation
    options.model = options.model or packaged_model()
    options.windows = options.windows or (8 if small else 100)
    options.seeds = options.seeds or ([0] if small else [0, 1, 2])
    options.rows = options.rows or (["round*", "*data-free", "*fast"] if small else ["round*", "GPTQ*", "parofx*"])
    return options


def _data(options: argparse.Namespace, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if options.evaluation:
        # Drawn from all files alike: one after the other, a long first one would crowd out the rest.
        sources = [pack_tokens(load_texts(one), tokenizer, seqlen=options.seqlen) for one in options.calibration]
        evaluation: Any = load_texts(options.evaluation)
    else:
        texts, evaluation = calibration_and_evaluation()
        sources = [pack_tokens(texts, tokenizer, seqlen=options.seqlen)]
    shares = [options.samples * (index + 1) // len(sources) for index in range(len(sources))]
    counts = [end - begin for begin, end in zip([0, *shares], shares, strict=False)]
    drawn = [
        source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]]
        for source, count in zip(sources, counts, strict=True)
    ]
    if [len(one) for one in drawn] != counts:
        raise SystemExit(f"--samples {options.samples}: the files hold {[len(one) for one in sources]} sequences")
    calibration = torch.cat(drawn)
    # Held-out sequences are the last ones, and have to be of every source.
    calibration = calibration[torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))]
    return calibration, pack_tokens(evaluation, tokenizer, seqlen=options.seqlen)[: options.windows]


def _model_name(options: argparse.Namespace) -> str:
    """Return the last part of the model's name; what follows a dot in it is no ending, but for GGUF files."""
    return Path(options.model).name.removesuffix(".gguf")


def _digest(*tokens: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in tokens)).hexdigest()[:16]


def _with_budget(config: ParoConfig, model: Any) -> ParoConfig:
    """Return a configuration that may spend on formats what another takes, corrections included."""
    budget = parofx.plan_quantization(model, config).bits_per_weight
    return replace(config, calibration=replace(config.calibration, bits_budget=budget, compensation_rank=0))


class _Reference:
    """The float model's logits on the windows that are compared, computed once and mapped from a temporary file.

    Where they would be too many for one, it is the model itself.
    """

    def __init__(self, model: Any, windows: torch.Tensor, options: argparse.Namespace) -> None:
        self._model, self._windows, self._batch_size = model, windows[: options.kl_windows], options.batch_size
        self._folder = tempfile.TemporaryDirectory(prefix="parofx-logits-")
        self._logits: torch.Tensor | None = None

    def get(self) -> Any:
        """Return the model, or log-probabilities, fp16 `(compared windows, seqlen, vocabulary)`."""
        vocabulary = self._model.config.get_text_config().vocab_size
        if 2 * self._windows.numel() * vocabulary > _LOGITS_BYTES:
            return self._model
        if self._logits is None:
            path = Path(self._folder.name) / "logits"
            self._logits = collect_logits(self._model, self._windows, path=path, batch_size=self._batch_size)
        return self._logits


def _evaluate(model: Any, reference: _Reference, windows: torch.Tensor, options: argparse.Namespace) -> EvalResult:
    """Measure perplexity on all windows and what the reference is for on the first of them, which takes longer."""
    how = {"batch_size": options.batch_size, "progress": True}
    if not options.kl or options.kl_windows is None:
        return evaluate(model, windows, reference=reference.get() if options.kl else None, **how)
    compared = evaluate(model, windows[: options.kl_windows], reference=reference.get(), **how)
    return replace(
        evaluate(model, windows, **how),
        kl_mean=compared.kl_mean,
        kl_error=compared.kl_error,
        kl_p99=compared.kl_p99,
        top1_agreement=compared.top1_agreement,
    )


def _earlier_rows(options: argparse.Namespace, target: Path) -> dict[str, Any]:
    """Return the rows that are kept: those of runs on the same data."""
    if not options.resume or not target.exists():
        return {}
    earlier = json.loads(target.read_text())
    wanted, found = _settings(options), earlier["options"]
    differing = [name for name in _COMMON if wanted[name] != found.get(name)]
    if differing:
        told = ", ".join(f"{name} {found.get(name)} (now {wanted[name]})" for name in differing)
        raise SystemExit(f"--resume: {target} was measured with {told}; give the same options, or leave out --resume")
    rows: dict[str, Any] = earlier["rows"]
    # A row that was renamed or removed is told from a peer's by having settings.
    changed = [
        name
        for name, row in rows.items()
        if (name in ROWS or "settings" in row) and (name not in ROWS or row.get("settings") != _settings_of(name))
    ]
    if changed:
        names = (target.with_suffix(f".earlier{number or ''}.json") for number in itertools.count())
        kept = next(path for path in names if not path.exists())
        shutil.copyfile(target, kept)
        print(f"--resume: not known to be of today's settings, and left out: {', '.join(changed)}; {kept} keeps them")
    return {name: row for name, row in rows.items() if name not in changed}


def _settings_of(name: str) -> dict[str, Any]:
    """Return what a row is configured to, as it is read back from a file."""
    config, with_data = ROWS[name]
    settings = asdict(config) | {"with_data": with_data, "shares_transforms": config.shares_transforms}
    read_back: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return read_back


def _note(
    rows: dict[str, Any],
    name: str,
    result: EvalResult,
    bits: float,
    seconds: tuple[float, float],
    seed: int | None = None,
    *,
    settings: dict[str, Any] | None = None,
) -> None:
    """Add a run to its row; one of ours has settings."""
    runs = rows[name]["seeds"] if name in rows else []
    wall, cpu = seconds
    runs.append({"seed": seed, "quantize_seconds": wall, "quantize_cpu_seconds": cpu, **result.to_dict()})
    rows[name] = {"bits_per_weight": bits, "seeds": runs} | ({"settings": settings} if settings else {})
    for key in _MEANS:
        values = [run[key] for run in runs]
        rows[name][key] = None if None in values else statistics.mean(values)
    several = len(runs) > 1
    rows[name]["perplexity_spread"] = statistics.stdev(run["perplexity"] for run in runs) if several else None


def _settings(options: argparse.Namespace) -> dict[str, str]:
    return {key: str(value) for key, value in vars(options).items()}


def _save(rows: dict[str, Any], options: argparse.Namespace, target: Path) -> None:
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"options": _settings(options), "rows": rows}, indent=1))
    unfinished.replace(target)


if __name__ == "__main__":
    main()
