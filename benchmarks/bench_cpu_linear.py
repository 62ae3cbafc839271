"""One linear with its rotation on CPU, against other libraries' 4-bit linears without one.

    python -m benchmarks.bench_cpu_linear [--shape 4096x4096] [--rows 1 16 128] [--threads 1]

All paths run in one process, in an order that changes from round to round, each timed call behind others of its own
path, until the threads of the path before sleep: those of GNU's OpenMP keep a core busy for milliseconds after a call,
at the cost of libraries with threads of their own. Weights are distinct and together larger than the last-level cache,
so that decoding reads memory. In every round the read bandwidth is measured too, by a sum, which can fall short of what
the memory gives: then shares exceed 100 %.
Rounds in which it fell by a fifth were disturbed by something else on the machine and are left out of the medians.
Errors are relative to fp64 on the same codes, each path in its own coordinates; ggml, whose formats cannot hold the
codes, quantizes anew. Results go to benchmarks/results/cpu_linear.json; --plot also draws them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _ggml
from benchmarks._cpu_peers import PEERS, Call, Codes, Peer, output_of
from parofx import cpu_ops, rotation

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
KROT = 8
#: Rows whose output is compared with fp64.
CHECKED_ROWS = 8
#: A round whose read bandwidth is below this share of the median was disturbed.
UNDISTURBED = 0.8
#: Seconds after which threads that have nothing to do no longer spin.
ASLEEP = 0.01


def main() -> None:
    """Measure, print a table for each shape and write the JSON file."""
    options = _options()
    torch.set_num_threads(options.threads)
    cpu_ops.load()
    missing = {peer.name: peer.missing() for peer in PEERS if peer.missing()}
    for name, pip in missing.items():
        print(f"absent: {name} ({pip})")
    ggml = None if any(name.startswith("ggml") for name in missing) else _ggml.describe()
    if ggml:
        print(ggml)
    rows = []
    for shape in options.shape:
        in_features, out_features = map(int, shape.split("x"))
        rows += _measure_shape(in_features, out_features, options)
    report = {
        "cpu": _cpu_name(),
        "isa": cpu_ops.active_isa(),
        "threads": options.threads,
        "weights_mib": options.weights_mib,
        "absent": missing,
        "ggml": ggml,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu_linear.json").write_text(json.dumps(report, indent=1))
    if options.plot:
        plot(report, options.plot)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="in_features x out_features")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4, help="of measuring, for each number of rows")
    parser.add_argument(
        "--weights-mib", type=int, default=_default_weights_mib(), help="of distinct packed weights per library"
    )
    parser.add_argument("--plot", type=Path, help="write a picture")
    return parser.parse_args()


def _measure_shape(in_features: int, out_features: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    weight = _random_codes(in_features, out_features)
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(KROT, in_features // GROUP_SIZE, GROUP_SIZE, generator=generator).argsort(-1)
    pairs = order.reshape(KROT, in_features).to(torch.int16)
    theta = torch.randn(KROT, in_features // 2, generator=generator).half()
    scales = (0.5 + torch.rand(1, in_features, generator=generator)).half()
    packed = cpu_ops.pack_codes(weight.codes, weight.zeros, weight.scales, GROUP_SIZE)
    blob = cpu_ops.pack_rotation(pairs, theta, scales, GROUP_SIZE)
    count = max(2, (options.weights_mib << 20) // packed[0].nbytes)
    own = [(blob.clone(), *(each.clone() for each in packed)) for _ in range(count)]
    present = [peer for peer in PEERS if not peer.missing()]
    others = {peer.name: _copies(peer, weight, count) for peer in present}
    dense = weight.dense(torch.float64)

    results = []
    for rows in options.rows:
        x = torch.randn(rows, in_features, generator=generator).bfloat16()
        rotated = rotation.rotate(x.double(), pairs, theta.double(), scales.double(), GROUP_SIZE)
        paths: dict[str, list[Call]] = {}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            paths[f"parofx {name}"] = _own_calls(own, x.to(dtype), mode=0)
        paths["parofx int8"] = _own_calls(own, x, mode=1)
        none = torch.empty(0, dtype=torch.uint8)
        without = [(none, *each[1:]) for each in own]
        paths["parofx bfloat16, no rotation"] = _own_calls(without, x, mode=0)
        paths["parofx int8, no rotation"] = _own_calls(without, x, mode=1)
        for peer in present:
            paths[peer.name] = [peer.bind(each, x, options.threads) for each in others[peer.name]]
        errors = {}
        for name, calls in paths.items():
            turned = name.startswith("parofx") and "no rotation" not in name
            expected = (rotated if turned else x.double())[:CHECKED_ROWS] @ dense
            difference = output_of(calls[0]())[:CHECKED_ROWS].double() - expected
            errors[name] = float(difference.norm() / expected.norm())
        times, bandwidth, kept = _interleave(paths, packed[0].nbytes, options.seconds)
        floor = sum(each.nbytes for each in own[0]) / bandwidth
        shape = {"in_features": in_features, "out_features": out_features, "rows": rows, "rounds": kept}
        results.append(
            shape | {"gb_per_second": bandwidth / 1e9, "floor_us": floor * 1e6, "us": times, "error": errors}
        )
        _print(results[-1])
    return results


def _random_codes(in_features: int, out_features: int) -> Codes:
    generator = torch.Generator().manual_seed(0)
    groups = in_features // GROUP_SIZE
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(4, 12, (groups, out_features), generator=generator, dtype=torch.uint8)
    scales = 0.002 + 0.01 * torch.rand(groups, out_features, generator=generator)
    return Codes(codes, zeros, scales.half(), GROUP_SIZE)


def _copies(peer: Peer, weight: Codes, count: int) -> list[Any]:
    packed = peer.prepare(weight)
    # Wider weights need fewer copies to exceed the cache.
    wanted = max(2, count // 4) if isinstance(packed, Tensor) else count
    return [peer.clone(packed) for _ in range(wanted)]


def _own_calls(layers: list[tuple[Tensor, ...]], x: Tensor, mode: int) -> list[Call]:
    op = torch.ops.parofx_cpu.rotate_linear.default

    def bind(layer: tuple[Tensor, ...]) -> Call:
        return lambda: op(x, *layer, None, 4, GROUP_SIZE, mode)

    return [bind(layer) for layer in layers]


def _interleave(paths: dict[str, list[Call]], weight_bytes: int, seconds: float) -> tuple[dict[str, float], float, int]:
    """Return the median microseconds of each path, bytes read per second, and the number of undisturbed rounds."""
    part = weight_bytes // 4
    stream = torch.ones(max(1, (256 << 20) // weight_bytes) * part)
    reads = [partial(torch.sum, piece) for piece in stream.split(part)]
    rounds: list[dict[str, float]] = []
    # A different order in each round: what ran before a path is not always the same.
    order, shuffled = list(enumerate([("read", reads), *paths.items()])), random.Random(0)
    for calls in paths.values():
        for call in calls:
            call()  # some pack weights at the first call
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        index = len(rounds)
        now = {}
        shuffled.shuffle(order)
        for offset, (name, calls) in order:
            # The paths share weights: each is elsewhere in them than the one before.
            at = index + offset * (len(calls) // len(order) + 1)
            # Layers follow layers of their own library, whose threads are awake and the others' asleep.
            asleep = time.perf_counter() + ASLEEP
            while time.perf_counter() < asleep:
                calls[(at - 1) % len(calls)]()
            now[name] = _seconds(calls[at % len(calls)])
        rounds.append(now)
    usual = statistics.median(each["read"] for each in rounds)
    kept = [each for each in rounds[1:] if each["read"] <= usual / UNDISTURBED]
    medians = {name: statistics.median(each[name] for each in kept) for name in ("read", *paths)}
    read = medians.pop("read")
    return {name: 1e6 * value for name, value in medians.items()}, weight_bytes / read, len(kept)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _print(result: dict[str, Any]) -> None:
    times, errors = result["us"], result["error"]
    table = Table(
        title=f"{result['in_features']} x {result['out_features']}, {result['rows']} rows: {result['rounds']} rounds, "
        f"{result['gb_per_second']:.1f} GB/s read"
    )
    best = min(times[peer.name] for peer in PEERS if peer.name in times)
    for heading in ("path", "us", "error", "x aten", "x best peer", "x torch bf16", "of bandwidth"):
        table.add_column(heading, justify="left" if heading == "path" else "right")
    for name, value in times.items():
        ratios = (times["aten int4pack"] / value, best / value, times["torch bf16"] / value)
        share = "" if name == "torch bf16" else f"{result['floor_us'] / value:.0%}"
        table.add_row(name, f"{value:.0f}", f"{errors[name]:.1e}", *(f"{ratio:.2f}" for ratio in ratios), share)
    Console(width=110).print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the speed of each path relative to ATen's int4 product."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    names = [name for name in rows[0]["us"] if "no rotation" not in name and name != "aten int4pack"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        ratios = [row["us"]["aten int4pack"] / row["us"][name] for row in rows]
        places = [place + (index - len(names) / 2 + 0.5) * width for place in range(len(rows))]
        # Bars begin at 1, where ATen is.
        heights = [ratio - 1 for ratio in ratios]
        axes.bar(places, heights, width, bottom=1, label=name, hatch=None if name.startswith("parofx") else "//")
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [f"{row['in_features']}x{row['out_features']}\nM = {row['rows']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("speed relative to ATen int4pack")
    about = f"{report['cpu']}, {report['isa']}, {report['threads']} thread(s)"
    axes.set_title(f"{about}; parofx rotates, the others do not", fontsize=10)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def _default_weights_mib() -> int:
    """Return twice the last-level cache, but between 400 and 1024 MiB."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    cache = int(size.read_text().strip().removesuffix("K")) // 1024 if size.exists() else 0
    return min(max(400, 2 * cache), 1024)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
