"""What to run the first time a GPU is at hand: correctness, then speed against peers. Under ten minutes.

    python -m benchmarks.gpu [--json FILE] [--dry-run]

1. Every kernel against the fp64 reference (`parofx verify`); nothing is timed if one is wrong.
2. Layers: M tokens through one linear, in bf16 cuBLAS, PyTorch's int4 product (tinygemm), gemlite if it is installed,
   and parofx with the rotation and without it (krot = 0).
3. Models: the linears of all decoder layers of a Qwen3-1.7B- and an 8B-shaped model, one token, in one CUDA graph.

Times are medians of CUDA graphs, with weights that no cache holds. `--dry-run` runs everything once on small shapes on
whatever there is: without a GPU under Triton's interpreter, and without the peers that need one.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

GROUP_SIZE, KROT = 128, 8
TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048)
#: (K, N): q/k/v merged, o, gate/up merged and down of Qwen3-1.7B and Qwen3-8B; and how many decoder layers they have.
MODELS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "Qwen3-1.7B": (28, [(2048, 4096), (2048, 2048), (2048, 12288), (6144, 2048)]),
    "Qwen3-8B": (36, [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)]),
}
_CACHE_BYTES = 256 * 2**20
_CALLS = 20
_ROUNDS = 5
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One measured call: `kernel` on M tokens of a K × N layer, or of a model."""

    what: str
    kernel: str
    M: int
    microseconds: float


def main() -> None:
    """Verify, measure and print."""
    options = _options()
    if not torch.cuda.is_available():
        if not options.dry_run:
            sys.exit("there is no CUDA device; --dry-run goes through everything without one")
        os.environ["TRITON_INTERPRET"] = "1"
        from parofx.testing.interpreter import mend_interpreter

        mend_interpreter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=160)
    errors = _verify(device, 2 if options.dry_run else 20)
    console.print(
        f"{len(errors)} kernels agree with the reference; the worst relative error is {max(errors.values()):.1e}"
    )
    models = {"dry run": (1, [(256, 128)])} if options.dry_run else MODELS
    tokens = (1, 17) if options.dry_run else TOKENS
    timings = []
    for shape in sorted({shape for _, shapes in models.values() for shape in shapes}):
        for count in tokens:
            timings += list(_time_layer(*shape, count, device))
    for name, (layers, shapes) in models.items():
        timings += list(_time_model(name, layers, shapes, device))
    _print(timings, console)
    if options.json is not None:
        card = torch.cuda.get_device_name() if device.type == "cuda" else "none: interpreted"
        rows = [asdict(timing) for timing in timings]
        options.json.write_text(json.dumps({"gpu": card, "errors": errors, "timings": rows}, indent=1))


def _verify(device: torch.device, examples: int) -> dict[str, float]:
    from parofx.testing.kernels import kernel_checks
    from parofx.testing.verification_run import default_jobs, run_checks

    names = [check.name for check in kernel_checks(device) if check.name.startswith("triton")]
    errors = {}
    for result in run_checks(device, examples, names=names, jobs=default_jobs(device)):
        if result.error is None:
            sys.exit(f"{result.name} is wrong, so nothing is timed: {result.failure}")
        errors[result.name] = result.error
    return errors


def _time_layer(channels: int, columns: int, tokens: int, device: torch.device) -> Iterator[Timing]:
    copies = min(64, _CACHE_BYTES // (channels * columns // 2) + 1) if device.type == "cuda" else 1
    x = torch.randn(tokens, channels, device=device, dtype=torch.bfloat16)
    for kernel, calls in _contestants(x, columns, copies):
        yield Timing(f"{channels}x{columns}", kernel, tokens, _median_us(calls, device))


def _time_model(name: str, layers: int, shapes: list[tuple[int, int]], device: torch.device) -> Iterator[Timing]:
    """Time one token through all linears of a model, each with weights of its own."""
    calls: dict[str, list[Call]] = {}
    for channels, columns in shapes:
        x = torch.randn(1, channels, device=device, dtype=torch.bfloat16)
        for kernel, copies in _contestants(x, columns, layers):
            calls.setdefault(kernel, []).extend(copies)
    for kernel, all_calls in calls.items():
        yield Timing(name, kernel, 1, _median_us(all_calls, device, whole=True))


def _contestants(x: Tensor, columns: int, copies: int) -> Iterator[tuple[str, list[Call]]]:
    """Yield each kernel's calls, one for each copy of the weight."""
    channels = x.shape[1]
    if x.device.type == "cuda":
        weights = [torch.randn(columns, channels, device=x.device, dtype=x.dtype) for _ in range(copies)]
        yield "bf16 cuBLAS", [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
        del weights
        yield "PyTorch int4 (tinygemm)", list(_tinygemm(x, columns, copies))
        if importlib.util.find_spec("gemlite") is not None:
            yield "gemlite int4", list(_gemlite(x, columns, copies))
    yield "parofx", list(_parofx(x, columns, copies, KROT))
    yield "parofx, krot 0", list(_parofx(x, columns, copies, 0))


def _parofx(x: Tensor, columns: int, copies: int, krot: int) -> Iterator[Call]:
    from parofx.triton_ops import launch, layout

    channels = x.shape[1]
    pairs = torch.rand(krot, channels // GROUP_SIZE, GROUP_SIZE).argsort(-1).reshape(krot, channels).to(torch.int16)
    theta, ones = torch.randn(krot, channels // 2), torch.ones(channels)
    rotation = layout.stack_rotations([layout.pack_rotation(pairs, theta, ones, GROUP_SIZE)])
    rotation = layout.PackedRotation(*(part.to(x.device) for part in rotation))
    for _ in range(copies):
        weight = _random_weight(channels, columns, x.device)
        locks = launch.make_locks(columns, x.device)
        yield lambda weight=weight, locks=locks: launch.rotate_int4_linear(x, rotation, weight, None, [columns], locks)


def _random_weight(channels: int, columns: int, device: torch.device) -> Any:
    from parofx.triton_ops import layout

    words = torch.randint(-(2**15), 2**15, (channels // 128, columns, 32), device=device).to(torch.int16)
    # A scale of 2^-7 and a zero point of 8.
    qparams = torch.full((channels // GROUP_SIZE, columns), 8 << 16 | 0x2000, dtype=torch.int32, device=device)
    return layout.PackedWeight(words, qparams)


def _tinygemm(x: Tensor, columns: int, copies: int) -> Iterator[Call]:
    channels = x.shape[1]
    for _ in range(copies):
        codes = torch.randint(0, 256, (columns, channels // 2), dtype=torch.uint8, device=x.device)
        weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        steps = torch.ones(channels // GROUP_SIZE, columns, 2, dtype=x.dtype, device=x.device)
        yield lambda weight=weight, steps=steps: torch.ops.aten._weight_int4pack_mm(x, weight, GROUP_SIZE, steps)


def _gemlite(x: Tensor, columns: int, copies: int) -> Iterator[Call]:
    from gemlite.core import DType, GemLiteLinearTriton

    channels = x.shape[1]
    for _ in range(copies):
        linear = GemLiteLinearTriton(
            4, group_size=GROUP_SIZE, in_features=channels, out_features=columns,
            input_dtype=DType.BF16, output_dtype=DType.BF16,
        )  # fmt: skip
        codes = torch.randint(0, 16, (columns, channels), dtype=torch.uint8, device=x.device)
        steps = torch.ones(columns * channels // GROUP_SIZE, 1, dtype=x.dtype, device=x.device)
        linear.pack(codes, steps, 8 * steps, bias=None)
        yield lambda linear=linear: linear(x)


def _median_us(calls: list[Call], device: torch.device, *, whole: bool = False) -> float:
    """Return the median time of one call, or of all of them if `whole`, µs."""
    sequence = calls if whole else list(itertools.islice(itertools.cycle(calls), max(_CALLS, len(calls))))
    share = 1 if whole else len(sequence)
    if device.type != "cuda":
        start = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - start)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sequence:
            call()
    times = []
    for _ in range(_ROUNDS):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        times.append(1e3 * start_event.elapsed_time(end_event) / share)
    return statistics.median(times)


def _print(timings: list[Timing], console: Console) -> None:
    kernels = list(dict.fromkeys(timing.kernel for timing in timings))
    cells = {(timing.what, timing.M, timing.kernel): timing.microseconds for timing in timings}
    table = Table("what", "M", *(f"{kernel}, µs" for kernel in kernels), "rotation overhead")
    for what, tokens in dict.fromkeys((timing.what, timing.M) for timing in timings):
        times = [cells.get((what, tokens, kernel)) for kernel in kernels]
        overhead = cells[what, tokens, "parofx"] / cells[what, tokens, "parofx, krot 0"] - 1
        shown = ["" if value is None else f"{value:.1f}" for value in times]
        table.add_row(what, str(tokens), *shown, f"{overhead:+.1%}")
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--dry-run", action="store_true", help="go through everything once, on small shapes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
