"""The Triton kernels by what the compiler makes of them, for GPUs that need not be there.

    python -m benchmarks.triton_static [--json FILE] [--arch sm_90] [-M 1 -M 16] [-K 4096] [-N 4096]

One row per kernel, architecture and number of tokens M, with the launch parameters of the launch tables (fp16, groups
of 128, 8 rounds):

| column | is |
|-|-|
| `registers`, `spills`, `shared_bytes` | of a thread; bytes a thread spills; of a program |
| `occupancy` | warps that fit a processor, of what it can hold, by registers and shared memory |
| `instructions_per_weight` | SASS instructions a thread executes × threads of a program ÷ weights of a program |
| `launches` | of the kernel, and of those it needs |
| `bytes` | weights, activations in and out, rotation tables, fp32 shares of split-K |
| `estimated_us` | `LAUNCH_US·launches + max(bandwidth, issue, wave)` |
| `rotation_overhead` | `estimated_us` against the same kernel with krot = 0, minus 1 |

with, for P programs on a card of S processors that issue I thread instructions a clock at f GHz,

    bandwidth = bytes / (GB/s·1000)
    issue     = P·instructions / (S·I·f·1000)
    wave      = ⌈P/S⌉·instructions / (I·f·1000)          (instructions of one whole program)

Prologue and epilogue count; both sides of a branch do. Estimates are for comparing, not for promising. AMD's assembly
is not counted: its rows have no instructions and are estimated by bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parofx.testing.aot import CompiledKernel
from parofx.triton_ops import cost_model
from parofx.triton_ops.architectures import ARCHITECTURES, Architecture
from parofx.triton_ops.compiled import Variant, compile_matrices, compile_tiles
from parofx.triton_ops.layout import TILE_K
from parofx.triton_ops.tiles import MAX_FUSED_TOKENS, FusedTiles, LinearTiles

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE, KROT = 128, 8
TOKENS = (1, 4, 16, 64, 1024)
#: Registers of a processor, and warps it can hold (sm_80 to sm_100: 64; sm_89 and sm_120: 48).
_REGISTERS = 65536
_WARPS = {"sm_80": 64, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}


def main() -> None:
    """Compile, estimate and print."""
    options = _options()
    rows = [
        row
        for arch in options.arch or ARCHITECTURES
        for tokens in options.M or TOKENS
        for row in measure(arch, tokens, options.K, options.N)
    ]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(rows, indent=1))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=200).print(table)


def measure(arch: str, tokens: int, in_features: int, out_features: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one architecture and number of tokens."""
    card = ARCHITECTURES[arch]
    shape = {"arch": arch, "M": tokens, "N": out_features, "K": in_features}
    activations = 2 * tokens * (in_features + out_features)
    weights = cost_model.BYTES_PER_WEIGHT * in_features * out_features
    linear = cost_model.choose_linear(tokens, in_features, out_features, arch)
    programs = math.ceil(tokens / linear.block_m) * math.ceil(out_features / linear.block_n) * linear.split_k
    tiles_k = math.ceil(in_features / TILE_K / linear.split_k)
    shares = 8 * tokens * out_features * linear.split_k if linear.split_k > 1 else 0
    for portable in (False, True):
        name = "int4_linear_portable" if portable else "int4_linear"
        compiled = compile_tiles(linear, arch, Variant(split=linear.split_k > 1, portable=portable))
        yield _row(name, shape, compiled, card, tiles_k, programs, weights + activations + shares, linear)

    if tokens <= MAX_FUSED_TOKENS:
        fused = cost_model.choose_fused(tokens, in_features, out_features, arch)
        splits = math.ceil(in_features / TILE_K / fused.slice_tiles)
        programs = math.ceil(out_features / fused.block_n) * splits
        moved = weights + activations + 8 * tokens * out_features * splits
        rows = []
        for krot in (0, KROT):
            compiled = compile_tiles(fused, arch, Variant(tokens=tokens, krot=krot))
            tables = cost_model.rotation_bytes(in_features, krot)
            args = (compiled, card, fused.slice_tiles, programs, moved + tables, fused)
            rows.append(_row("rotate_int4_linear", shape, *args))
        yield rows[1] | {"rotation_overhead": rows[1]["estimated_us"] / rows[0]["estimated_us"] - 1}

    groups = in_features // GROUP_SIZE
    moved = 4 * tokens * in_features + cost_model.rotation_bytes(in_features, KROT)
    rotate = cost_model.choose_rotate(tokens, in_features, arch)
    programs = math.ceil(tokens / rotate.block_m) * groups
    yield _row("rotate", shape, compile_tiles(rotate, arch, Variant()), card, 1, programs, moved)
    if tokens > 16:
        dense = cost_model.choose_dense(tokens, in_features, arch)
        programs = math.ceil(tokens / dense.block_m) * groups
        matrices = 2 * in_features * GROUP_SIZE
        args = (compile_tiles(dense, arch, Variant()), card, 1, programs, moved + matrices)
        row = _row("rotate_dense", shape, *args)
        made = _row("rotation_matrices", shape, compile_matrices(arch, Variant()), card, 1, 32 * groups, matrices)
        yield row | {"launches": 2, "estimated_us": row["estimated_us"] + made["estimated_us"]}


def _row(
    name: str,
    shape: dict[str, Any],
    compiled: CompiledKernel,
    card: Architecture,
    trips: int,
    programs: int,
    moved: float,
    tiles: LinearTiles | FusedTiles | None = None,
) -> dict[str, Any]:
    instructions = compiled.executed(trips) * compiled.threads
    per_processor = card.issue * card.clock_ghz * 1e3
    bandwidth = moved / card.bandwidth_gbs / 1e3
    issue = programs * instructions / card.processors / per_processor
    wave = math.ceil(programs / card.processors) * instructions / per_processor
    per_weight = instructions / (trips * TILE_K * tiles.block_n) if tiles and compiled.code else None
    return {
        "kernel": name,
        **shape,
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared_bytes": compiled.shared_bytes,
        "occupancy": _occupancy(compiled, card),
        "instructions_per_weight": per_weight,
        "launches": 1,
        "bytes": round(moved),
        "estimated_us": cost_model.LAUNCH_US + max(bandwidth, issue, wave),
        "rotation_overhead": None,
    }


def _occupancy(compiled: CompiledKernel, card: Architecture) -> float | None:
    if compiled.arch not in _WARPS:
        return None
    limits = [
        _REGISTERS // (max(1, compiled.registers) * compiled.threads),
        card.shared_bytes // max(1, compiled.shared_bytes),
        _WARPS[compiled.arch] // compiled.num_warps,
    ]
    return min(limits) * compiled.num_warps / _WARPS[compiled.arch]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "triton_static.json", help="where the rows go")
    parser.add_argument("--arch", action="append", choices=sorted(ARCHITECTURES), help="repeatable; by default all")
    parser.add_argument("-M", action="append", type=int, help=f"tokens; repeatable; by default {TOKENS}")
    parser.add_argument("-K", type=int, default=4096)
    parser.add_argument("-N", type=int, default=4096)
    return parser.parse_args()


if __name__ == "__main__":
    main()
