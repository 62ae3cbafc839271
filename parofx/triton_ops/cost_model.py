"""Which kernels compute a layer, with which launch parameters: pure functions of M, N, K and the architecture.

Launch parameters come from tables, one JSON file per architecture in `launch_tables`. The rows there are `static`:
chosen by what ahead-of-time compilation shows. `parofx tune` writes rows `tuned:<gpu>` to a file of its own, and those
come first. Nothing is timed when a model runs.

The placement of the rotation is chosen by estimated time, the sum over launches of

    fixed time + max(bytes / bandwidth, instructions / issue rate, 2·M·N·K / tensor rate) · waves

`waves` rounds programs up to whole rounds of the card's processors. Fixed times, and the shares of a card's bandwidth
and tensor rate that are reached, were measured on an H100 (`benchmarks.gpu`). Estimates rank placements; they promise
nothing.

| placement | launches | for |
|-|-|-|
| `fused` | `rotate_int4_linear` | up to 4 tokens |
| `gather` | `rotate`, product | some tokens |
| `dense` | `rotation_matrices`, `rotate_dense`, product | many tokens |

The product is `int4_linear`, or for hundreds of tokens `dequantize` and the device's own matrix product.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from parofx.errors import ConfigError
from parofx.folders import cache_folder
from parofx.triton_ops.architectures import Architecture, architecture
from parofx.triton_ops.layout import TILE_K
from parofx.triton_ops.tiles import (
    MAX_FUSED_TOKENS,
    OPERAND_ROWS,
    DenseTiles,
    DequantizeTiles,
    FusedTiles,
    LinearTiles,
    RotateTiles,
    padded_rows,
)

Placement = Literal["fused", "gather", "dense"]
Tiles = RotateTiles | DenseTiles | LinearTiles | DequantizeTiles | FusedTiles

KERNEL_TILES: Mapping[str, type[Any]] = {
    "rotate": RotateTiles,
    "rotate_dense": DenseTiles,
    "int4_linear": LinearTiles,
    "dequantize": DequantizeTiles,
    "rotate_int4_linear": FusedTiles,
}

#: What a small kernel inside a CUDA graph takes, µs.
LAUNCH_US = 1.9
#: Of a product besides its work: launch, first loads, the exchange of split-K's shares; and rotation inside it.
LINEAR_US = 4.2
FUSED_US = 4.8
#: What a rotation adds to the kernel that produces its input, µs.
PRODUCER_US = 0.9
#: Shares of the bandwidth, and of the tensor rate in `int4_linear` and in the device's own product.
BANDWIDTH_SHARE = 0.9
LINEAR_TENSOR_SHARE = 0.47
MATMUL_TENSOR_SHARE = 0.8
#: Bytes of a weight: 4 bits and its share of a 32-bit qparams word at g = 128.
BYTES_PER_WEIGHT = 0.5 + 4 / TILE_K
#: Thread instructions per weight of the int4 kernels for up to 16 tokens, prologue and epilogue included.
LINEAR_INSTRUCTIONS = 2.8
#: Warp instructions to rotate one row of one group: a round of the gather form is 16 shuffles, 16 selects and the rest.
ROUND_INSTRUCTIONS = 75
ROTATE_INSTRUCTIONS = 60
#: Every byte of rotation tables a channel needs per round, and once.
ROUND_BYTES = 5
ONCE_BYTES = 5
#: Programs should share a tile until there are two for every processor; each keeps this many K tiles at least.
_PROGRAMS_PER_PROCESSOR = 2
_FEWEST_TILES_PER_SPLIT = 4
_MOST_SPLITS = 8
#: Row tiles of a launch that splits K, at most: every weight has locks for so many.
MOST_ROW_TILES = 8
#: For more tokens than this the fp32 shares are no longer small beside the weights.
_FEW_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One row of a launch table: tiles for up to `max_tokens`, for one K, N and group size; None stands for any."""

    kernel: str
    max_tokens: int | None
    K: int | None
    N: int | None
    source: str
    tiles: Mapping[str, Any]
    group_size: int | None = None

    def serves(self, kernel: str, tokens: int, in_features: int, out_features: int, group_size: int) -> bool:
        """Say whether the row is for a call."""
        return (
            self.kernel == kernel
            and (self.max_tokens is None or tokens <= self.max_tokens)
            and self.K in (None, in_features)
            and self.N in (None, out_features)
            and self.group_size in (None, group_size)
        )


@dataclass(frozen=True)
class Plan:
    """What to launch for a layer: where the rotation happens, its tiles unless fused, and the product's tiles."""

    placement: Placement
    rotation: RotateTiles | DenseTiles | None
    linear: LinearTiles | DequantizeTiles | FusedTiles


def tuned_table(arch: str) -> Path:
    """Return the file of an architecture's tuned rows: in `$PAROFX_CACHE`, or the user's cache folder."""
    return cache_folder() / "launch_tables" / f"{arch}.json"


def parse_table(text: str, where: str) -> tuple[Row, ...]:
    """Return the rows of a launch table.

    Raises:
        ConfigError: naming the file, if it is no launch table.
    """
    try:
        rows = tuple(Row(**row) for row in json.loads(text)["rows"])
        for row in rows:
            tiles = KERNEL_TILES[row.kernel](**row.tiles)
            if isinstance(tiles, FusedTiles):
                tiles.check(row.max_tokens or MAX_FUSED_TOKENS)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{where} must be a launch table of kernels {sorted(KERNEL_TILES)}, got {error!r}; delete or tune it anew"
        ) from error
    return rows


@functools.cache
def launch_table(arch: str) -> tuple[Row, ...]:
    """Return an architecture's rows in the order they are asked: tuned ones, then the static ones.

    Raises:
        ConfigError: if there is no such architecture, or a table is malformed.
    """
    static = Path(__file__).parent / "launch_tables" / f"{architecture(arch).name}.json"
    rows = parse_table(static.read_text(), str(static))
    tuned = tuned_table(arch)
    if tuned.exists():
        rows = parse_table(tuned.read_text(), str(tuned)) + rows
    return rows


def find_row(kernel: str, tokens: int, in_features: int, out_features: int, arch: str, group_size: int = TILE_K) -> Row:
    """Return the first row of the launch table that serves a call.

    Raises:
        ConfigError: if none does.
    """
    for row in launch_table(arch):
        if row.serves(kernel, tokens, in_features, out_features, group_size):
            return row
    raise ConfigError(f"no launch parameters of {kernel} for {tokens} tokens on {arch}; it is not for so many")


def choose_rotate(tokens: int, in_features: int, arch: str) -> RotateTiles:
    """Return the launch parameters of `rotate`."""
    return RotateTiles(**find_row("rotate", tokens, in_features, in_features, arch).tiles)


def choose_dense(tokens: int, in_features: int, arch: str) -> DenseTiles:
    """Return the launch parameters of `rotate_dense`."""
    return DenseTiles(**find_row("rotate_dense", tokens, in_features, in_features, arch).tiles)


@functools.lru_cache(maxsize=4096)
def choose_linear(tokens: int, in_features: int, out_features: int, arch: str, group_size: int = TILE_K) -> LinearTiles:
    """Return the launch parameters of `int4_linear`; a `split_k` that the table leaves open is computed."""
    tiles = LinearTiles(**find_row("int4_linear", tokens, in_features, out_features, arch, group_size).tiles)
    if tiles.split_k == 0:
        tiles = replace(tiles, split_k=choose_split(tokens, in_features, out_features, tiles, architecture(arch)))
    return tiles


@functools.lru_cache(maxsize=4096)
def choose_product(
    tokens: int, in_features: int, out_features: int, arch: str, group_size: int = TILE_K
) -> LinearTiles | DequantizeTiles:
    """Return how rotated activations are multiplied: in one int4 kernel, or by dequantizing first."""
    card = architecture(arch)
    linear = choose_linear(tokens, in_features, out_features, arch, group_size)
    if dequantize_us(tokens, in_features, out_features, card) < linear_us(
        tokens, in_features, out_features, linear, card
    ):
        return DequantizeTiles(**find_row("dequantize", tokens, in_features, out_features, arch).tiles)
    return linear


def choose_fused(tokens: int, in_features: int, out_features: int, arch: str, group_size: int = TILE_K) -> FusedTiles:
    """Return the launch parameters of `rotate_int4_linear`."""
    return FusedTiles(**find_row("rotate_int4_linear", tokens, in_features, out_features, arch, group_size).tiles)


def choose_split(tokens: int, in_features: int, out_features: int, tiles: LinearTiles, card: Architecture) -> int:
    """Return how many programs share an output tile: a power of two, until the card is full."""
    row_tiles = math.ceil(tokens / tiles.block_m)
    output_tiles = row_tiles * math.ceil(out_features / tiles.block_n)
    tiles_k = math.ceil(in_features / TILE_K)
    split = 1
    while (
        row_tiles <= MOST_ROW_TILES
        and split < (_MOST_SPLITS if tokens <= _FEW_TOKENS else _MOST_SPLITS // 2)
        and output_tiles * split < _PROGRAMS_PER_PROCESSOR * card.processors
        and tiles_k >= 2 * split * _FEWEST_TILES_PER_SPLIT
    ):
        split *= 2
    return split


@functools.lru_cache(maxsize=4096)
def plan_layer(
    tokens: int, in_features: int, out_features: int, group_size: int, krot: int, arch: str, *, rotations: int = 1
) -> Plan:
    """Return the fastest plan, by estimate, of a layer whose input is not rotated yet.

    Args:
        tokens: M.
        in_features: K.
        out_features: N of all siblings together.
        group_size: channels per group.
        krot: rounds.
        arch: architecture.
        rotations: of siblings that have one each.
    """
    card = architecture(arch)
    gather = choose_rotate(tokens, in_features, arch)
    linear = choose_product(tokens, in_features, out_features, arch, group_size)
    product = product_us(tokens, in_features, out_features, linear, card)
    plans: list[tuple[float, Plan]] = []
    if tokens <= MAX_FUSED_TOKENS:
        fused = choose_fused(tokens, in_features, out_features, arch, group_size)
        if padded_rows(tokens) * fused.slice_tiles <= OPERAND_ROWS:
            time = fused_us(tokens, in_features, out_features, group_size, krot, fused, card)
            plans.append((time, Plan("fused", None, fused)))
    time = rotate_us(tokens, in_features, group_size, krot, card, rotations)
    plans.append((time + product, Plan("gather", gather, linear)))
    if tokens > OPERAND_ROWS:
        dense = choose_dense(tokens, in_features, arch)
        time = dense_us(tokens, in_features, group_size, krot, card, rotations)
        plans.append((time + product, Plan("dense", dense, linear)))
    return min(plans, key=lambda pair: pair[0])[1]


def rotate_us(tokens: int, in_features: int, group_size: int, krot: int, card: Architecture, rotations: int) -> float:
    """Return the estimated time of `rotate`, µs."""
    moved = (2 + 2 * rotations) * tokens * in_features + rotations * rotation_bytes(in_features, krot)
    rows = rotations * tokens * in_features / group_size
    return LAUNCH_US + max(
        _transfer_us(moved, card), rows * 32 * rotate_instructions(group_size, krot) / card.issue_rate
    )


def dense_us(tokens: int, in_features: int, group_size: int, krot: int, card: Architecture, rotations: int) -> float:
    """Return the estimated time of `rotate_dense`, the making of its matrices included, µs."""
    moved = (2 + 2 * rotations) * tokens * in_features + 4 * rotations * in_features * group_size
    products = 2 * rotations * tokens * in_features * group_size
    # The gathered load and the scaling of x: per element a few instructions.
    elements = rotations * tokens * in_features
    busy = max(_transfer_us(moved, card), products / card.tensor_tflops / 1e6, 6 * elements / card.issue_rate)
    return rotate_us(group_size, in_features, group_size, krot, card, rotations) + LAUNCH_US + busy


def product_us(
    tokens: int, in_features: int, out_features: int, tiles: LinearTiles | DequantizeTiles, card: Architecture
) -> float:
    """Return the estimated time of what `choose_product` chose, µs."""
    if isinstance(tiles, DequantizeTiles):
        return dequantize_us(tokens, in_features, out_features, card)
    return linear_us(tokens, in_features, out_features, tiles, card)


def dequantize_us(tokens: int, in_features: int, out_features: int, card: Architecture) -> float:
    """Return the estimated time of `dequantize` and the device's own product, µs."""
    weights = in_features * out_features
    written = _transfer_us((BYTES_PER_WEIGHT + 2) * weights, card)
    products = 2 * tokens * weights / card.tensor_tflops / 1e6 / MATMUL_TENSOR_SHARE
    read = _transfer_us(2 * weights + 2 * tokens * (in_features + out_features), card)
    return LAUNCH_US + LINEAR_US + written + max(products, read)


def linear_us(tokens: int, in_features: int, out_features: int, tiles: LinearTiles, card: Architecture) -> float:
    """Return the estimated time of `int4_linear`, µs."""
    rows = math.ceil(tokens / tiles.block_m)
    programs = rows * math.ceil(out_features / tiles.block_n) * tiles.split_k
    weights = in_features * out_features
    moved = BYTES_PER_WEIGHT * weights + 2 * tokens * (in_features + out_features)
    products = 2 * rows * tiles.block_m * weights / card.tensor_tflops / 1e6 / LINEAR_TENSOR_SHARE
    return LINEAR_US + max(
        _transfer_us(moved, card),
        rows * weights * LINEAR_INSTRUCTIONS / card.issue_rate * _waves(programs, card),
        products * _waves(programs, card),
    )


def fused_us(
    tokens: int, in_features: int, out_features: int, group_size: int, krot: int, tiles: FusedTiles, card: Architecture
) -> float:
    """Return the estimated time of `rotate_int4_linear`, µs."""
    columns = math.ceil(out_features / tiles.block_n)
    programs = columns * math.ceil(in_features / TILE_K / tiles.slice_tiles)
    weights = in_features * out_features
    moved = BYTES_PER_WEIGHT * weights + 2 * tokens * (in_features + out_features) + rotation_bytes(in_features, krot)
    # Every column of programs rotates all of x, and loads weights only then.
    lines = columns * padded_rows(tokens) * in_features / group_size
    rotating = lines * 32 * rotate_instructions(group_size, krot) / card.issue_rate
    issued = weights * LINEAR_INSTRUCTIONS / card.issue_rate * _waves(programs, card)
    return FUSED_US + rotating + max(_transfer_us(moved, card), issued)


def rotation_bytes(in_features: int, krot: int) -> int:
    """Return the size of a packed rotation."""
    return in_features * (ONCE_BYTES + ROUND_BYTES * krot)


def rotate_instructions(group_size: int, krot: int) -> float:
    """Return the warp instructions that rotate one row of one group in gather form, load and store included."""
    # Of a group of 64 a lane holds 2 channels, and gathers 2 from 2; of 128 it gathers 4 from 4.
    return ROTATE_INSTRUCTIONS + krot * ROUND_INSTRUCTIONS * math.pow(group_size / TILE_K, 1.5)


def _transfer_us(moved: float, card: Architecture) -> float:
    return moved / card.bandwidth_gbs / BANDWIDTH_SHARE / 1e3


def _waves(programs: int, card: Architecture) -> float:
    """Return by how much whole rounds of programs exceed even shares of the work."""
    return math.ceil(programs / card.processors) * card.processors / programs
