"""Fill the tuned launch table of a GPU: time candidates of the int4 kernels on a layer's shape, keep the fastest.

Rows are written to `cost_model.tuned_table(arch)`, with the card's name as their source, and merged with the rows
that are there: a shape that is tuned again is replaced. A candidate that does not compile or does not fit the card is
passed over.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from parofx.errors import ConfigError
from parofx.triton_ops import cost_model, layout
from parofx.triton_ops.architectures import architecture_of
from parofx.triton_ops.int4_linear import int4_linear
from parofx.triton_ops.launch import make_locks, uses_ptx
from parofx.triton_ops.rotate_int4_linear import rotate_int4_linear
from parofx.triton_ops.tiles import MAX_FUSED_TOKENS, OPERAND_ROWS, FusedTiles, LinearTiles, padded_rows

#: Times a call, in µs.
Clock = Callable[[Callable[[], object]], float]
_GROUP_SIZE = 128
_KROT = 8
_CALLS = 20
_ROUNDS = 5
#: Weights are read from memory in a model: each call takes another copy, until they exceed any L2 cache.
_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """A layer: M up to `tokens`, K, N."""

    tokens: int
    in_features: int
    out_features: int


def candidates(shape: Shape, *, fused: bool) -> Iterator[LinearTiles | FusedTiles]:
    """Yield the launch parameters worth timing for a shape."""
    if fused:
        for block_n, slice_tiles, warps, stages in itertools.product((64, 128, 256), (1, 2, 4, 8), (4, 8), (3, 4)):
            if padded_rows(shape.tokens) * slice_tiles <= OPERAND_ROWS and block_n >= 16 * warps:
                yield FusedTiles(block_n, slice_tiles, warps, stages)
        return
    if shape.tokens <= 16:
        narrow = 8 if shape.tokens <= 8 else 16
        blocks = [(narrow, 64, True, 4), (narrow, 128, True, 4), (16, 64, False, 4), (16, 128, False, 4)]
    elif shape.tokens <= 64:
        blocks = [(32, 64, True, 4), (32, 128, True, 4), (32, 128, False, 4), (64, 64, True, 4), (64, 128, True, 8)]
    else:
        blocks = [(64, 64, True, 4), (64, 128, True, 4), (64, 128, True, 8), (128, 128, True, 8)]
    for (block_m, block_n, swap_ab, warps), split_k, stages in itertools.product(
        blocks, (1, 2, 4, 8) if shape.tokens <= 64 else (1,), (3, 4)
    ):
        yield LinearTiles(block_m, block_n, split_k, swap_ab, warps, stages)


def tune(shapes: Sequence[Shape], device: torch.device, source: str, clock: Clock) -> list[cost_model.Row]:
    """Return the fastest row of each kernel for each shape.

    Args:
        shapes: layers.
        device: where.
        source: of the rows, `"tuned:<gpu>"`.
        clock: times a call.

    Raises:
        ConfigError: if no candidate of a kernel runs.
    """
    rows = []
    for shape in shapes:
        for kernel in ("int4_linear", "rotate_int4_linear"):
            fused = kernel == "rotate_int4_linear"
            if fused and shape.tokens > MAX_FUSED_TOKENS:
                continue
            layer = _Layer(shape, device)
            timed: list[tuple[float, LinearTiles | FusedTiles]] = []
            refusals = []
            for tiles in candidates(shape, fused=fused):
                try:
                    timed.append((clock(lambda tiles=tiles, layer=layer: layer.call(tiles)), tiles))  # type: ignore[misc]
                except Exception as error:
                    # Out of shared memory, registers, or beyond what the compiler takes: another candidate will do.
                    refusals.append(f"{tiles}: {error}")
            if not timed:
                raise ConfigError(f"no candidate of {kernel} runs on {device} for {shape}: {refusals[0]}")
            best = min(timed, key=lambda pair: pair[0])[1]
            row = (kernel, shape.tokens, shape.in_features, shape.out_features, source, dataclasses.asdict(best))
            rows.append(cost_model.Row(*row))
    return rows


def write_rows(rows: Sequence[cost_model.Row], arch: str) -> Path:
    """Merge rows into an architecture's tuned table, those for fewer tokens first, and return the file."""
    file = cost_model.tuned_table(arch)
    present = cost_model.parse_table(file.read_text(), str(file)) if file.exists() else ()
    merged = {(row.kernel, row.K, row.N, row.group_size, row.max_tokens): row for row in (*present, *rows)}
    ordered = sorted(merged.values(), key=lambda row: (row.kernel, row.K or 0, row.N or 0, row.max_tokens or 0))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"arch": arch, "rows": [dataclasses.asdict(row) for row in ordered]}, indent=1))
    temporary.replace(file)
    for cached in (
        cost_model.launch_table,
        cost_model.choose_linear,
        cost_model.choose_product,
        cost_model.plan_layer,
    ):
        cached.cache_clear()
    return file


def tune_device(shapes: Sequence[Shape], device: torch.device) -> Path:
    """Tune the int4 kernels on a GPU for some layers and return the table that was written.

    Raises:
        ConfigError: if there is no such GPU, or no candidate runs on it.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"tuning needs a CUDA device, got {device}; there is nothing to tune on a CPU")
    source = f"tuned:{torch.cuda.get_device_name(device)}"
    return write_rows(tune(shapes, device, source, _time_on_gpu), architecture_of(device))


class _Layer:
    """A layer's tensors, with as many copies of the weight as no cache holds."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        channels, columns = shape.in_features, shape.out_features
        tiles = -(-channels // layout.TILE_K)
        copies = max(1, min(64, _CACHE_BYTES // (channels * columns // 2))) if device.type == "cuda" else 1
        words = torch.randint(-(2**15), 2**15, (tiles, columns, layout.WORDS_PER_TILE), device=device)
        # A scale of 2^-7 and a zero point of 8.
        qparams = torch.full((tiles, columns), 8 << 16 | 0x2000, dtype=torch.int32, device=device)
        self.weights = [layout.PackedWeight(words.to(torch.int16), qparams.clone()) for _ in range(copies)]
        pairs = torch.arange(_GROUP_SIZE).repeat(_KROT, channels // _GROUP_SIZE).to(torch.int16)
        theta = torch.ones(_KROT, channels // 2)
        rotation = layout.stack_rotations([layout.pack_rotation(pairs, theta, torch.ones(channels), _GROUP_SIZE)])
        self.rotation = layout.PackedRotation(*(part.to(device) for part in rotation))
        self.x = torch.randn(shape.tokens, channels, device=device).to(torch.float16)
        self.locks = make_locks(columns, device)
        self.columns = columns
        self.turn = itertools.cycle(self.weights)

    def call(self, tiles: LinearTiles | FusedTiles) -> Tensor:
        """Launch once, on the next copy of the weight."""
        weight, ends, ptx = next(self.turn), [self.columns], uses_ptx(self.x.device)
        if isinstance(tiles, FusedTiles):
            return rotate_int4_linear(self.x, self.rotation, weight, None, ends, self.locks, tiles, ptx=ptx)
        return int4_linear(self.x[None], weight, None, ends, _GROUP_SIZE, self.locks, tiles, ptx=ptx)


def _time_on_gpu(call: Callable[[], object]) -> float:
    """Return the median of a call's time in a CUDA graph of many, µs."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / _CALLS)
    return statistics.median(times)
