"""One linear with its rotation on CPU: codes of 3, 4 and 8 bits, and low-rank corrections, against 4 bits alone.

    python -m benchmarks.bench_cpu_formats [--shape 4096x4096] [--rows 1 128] [--threads 2]

All paths run in one process, in turn; with one row the weights of a path are distinct and together larger than the
last-level cache, so that decoding reads memory. Results go to benchmarks/results/cpu_formats.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from parofx import cpu_ops

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
KROT = 8
#: Bits and rank of the correction.
FORMATS = ((4, 0), (3, 0), (8, 0), (4, 8), (4, 16))
PACK = {3: cpu_ops.pack_plane_codes, 4: cpu_ops.pack_codes, 8: cpu_ops.pack_byte_codes}


def main() -> None:
    """Measure, print a table for each shape and number of rows, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="in_features x out_features")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10, help="of measuring, for each number of rows and mode")
    parser.add_argument("--weights-mib", type=int, default=400, help="of distinct 3-bit weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu_ops.load()
    results = []
    for shape in options.shape:
        in_features, out_features = map(int, shape.split("x"))
        weights = _weights(in_features, out_features, options.weights_mib)
        for rows in options.rows:
            x = torch.randn(rows, in_features).bfloat16()
            for mode, name in enumerate(("bfloat16", "int8")):
                microseconds = _measure(weights, x, mode, options.seconds)
                results.append({"shape": shape, "rows": rows, "activations": name, "us": microseconds})
                _print(results[-1])
    RESULTS.mkdir(exist_ok=True)
    report = {"isa": cpu_ops.active_isa(), "threads": options.threads, "results": results}
    (RESULTS / "cpu_formats.json").write_text(json.dumps(report, indent=1) + "\n")


def _weights(in_features: int, out_features: int, weights_mib: int) -> dict[int, list[tuple[Tensor, ...]]]:
    """Return enough distinct packed weights of each width: rotation, codes, scales and zeros."""
    random = torch.Generator().manual_seed(0)
    groups = in_features // GROUP_SIZE
    order = torch.rand(KROT, groups, GROUP_SIZE, generator=random).argsort(-1)
    pairs, theta = order.reshape(KROT, -1).to(torch.int16), torch.randn(KROT, in_features // 2, generator=random).half()
    rotation = cpu_ops.pack_rotation(pairs, theta, torch.ones(1, in_features).half(), GROUP_SIZE)
    packed = {}
    for bits, pack in PACK.items():
        codes = torch.randint(0, 2**bits, (in_features, out_features), generator=random, dtype=torch.uint8)
        zeros = torch.randint(0, 2**bits, (groups, out_features), generator=random, dtype=torch.uint8)
        scales = (0.002 + 0.01 * torch.rand(groups, out_features, generator=random)).half()
        packed[bits] = (rotation, *pack(codes, zeros, scales, GROUP_SIZE))
    count = max(2, (weights_mib << 20) // packed[3][1].nbytes)
    # In turn, since memory that is allocated early may be slower or faster than the rest.
    copies = [{bits: tuple(one.clone() for one in parts) for bits, parts in packed.items()} for _ in range(count)]
    return {bits: [one[bits] for one in copies] for bits in packed}


def _measure(weights: dict[int, list[tuple[Tensor, ...]]], x: Tensor, mode: int, seconds: float) -> dict[str, float]:
    """Return the median microseconds of each format."""
    op = torch.ops.parofx_cpu.rotate_linear.default
    random = Random(0)
    count, out_features = len(weights[4]), len(weights[4][0][1])
    halves = {
        rank: [[torch.randn(rank, size).half() for size in (x.shape[1], out_features) if rank] for _ in range(count)]
        for _, rank in FORMATS
    }
    times: dict[tuple[int, int], list[float]] = {one: [] for one in FORMATS}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 6:
        for bits, rank in random.sample(FORMATS, len(FORMATS)):  # none is always behind the same other one
            # Formats of one width share weights: each is elsewhere in them.
            index = (turn + rank * count // 24) % count
            arguments = (x, *weights[bits][index], None, bits, GROUP_SIZE, mode, *halves[rank][index])
            start = time.perf_counter()
            op(*arguments)
            times[bits, rank].append(time.perf_counter() - start)
        turn += 1
    return {
        f"{bits} bits" + (f", rank {rank}" if rank else ""): 1e6 * statistics.median(measured[1:])
        for (bits, rank), measured in times.items()
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['shape']}, {result['rows']} rows, {result['activations']} activations")
    for heading in ("format", "us", "of 4 bits"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for name, value in result["us"].items():
        table.add_row(name, f"{value:.0f}", f"{value / result['us']['4 bits']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
