"""Budgets on what the compiler makes of every row of the launch tables, for GPUs that need not be there.

A representative variant of each row by default; all of them with `--full-aot` (`make test-aot`). Triton caches
results by source and options, so that a second run is quick.
"""

import itertools
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from parofx.testing.aot import SHARED_LIMITS, TARGET_NAMES, CompiledKernel
from parofx.triton_ops.compiled import Variant, compile_matrices, compile_tiles
from parofx.triton_ops.cost_model import KERNEL_TILES, Row, launch_table
from parofx.triton_ops.tiles import DequantizeTiles, FusedTiles, LinearTiles, RotateTiles

#: Thread instructions per weight of the hot loop, for up to 16 tokens; of rows that no card has chosen. On a card
#: narrower tiles, with more instructions in more programs, may be faster.
LOOP_BUDGET = 2.4
#: Of rows that a card has chosen, bfloat16 included.
TUNED_LOOP_BUDGET = 3.7
#: The same in plain Triton, for rows; the compiler packs halves less well for sm_80 and sm_89.
PORTABLE_LOOP_BUDGET = {"sm_80": 4.8, "sm_89": 4.8, "sm_90": 4.5, "sm_100": 4.5, "sm_120": 4.5}
#: bfloat16 needs three shifts a word where fp16 needs one.
BFLOAT16_LOOP_BUDGET = 2.7
#: The whole `rotate_int4_linear` of one token, per weight: rotation, prologue and epilogue included. Of sm_100 tensor
#: cores take their operands from a memory of their own.
FUSED_BUDGET = {"sm_80": 3.2, "sm_89": 3.2, "sm_90": 3.2, "sm_100": 3.5, "sm_120": 3.2}
#: And of the row that an H100 has chosen.
TUNED_FUSED_BUDGET = 3.9
#: The tiles that these two budgets are stated for.
WIDE_FUSED, WIDE_LINEAR = FusedTiles(256, 4, 4, 3), LinearTiles(16, 128, 0, False, 4, 4)
#: And those of plain Triton, which packs halves best with few warps on sm_80, and its budget.
PORTABLE_LINEAR = {"sm_80": LinearTiles(8, 128, 0, True, 2, 4)}
PORTABLE_BUDGET = 4.5
#: tl.gather of 128 channels in one warp: 4 elements of a lane from the 4 of another, in each of 8 rounds.
SHUFFLES_PER_ROW = 128
TENSOR_CORE = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"
NVIDIA = tuple(name for name in TARGET_NAMES if name.startswith("sm_"))


def variants(row: Row, table: Sequence[Row], *, full: bool) -> list[Variant]:
    """What a row of a table is compiled as."""
    tokens = row.max_tokens or 1 if row.kernel == "rotate_int4_linear" else 1
    split = row.tiles.get("split_k") != 1
    if not full:
        return [Variant(tokens=tokens, split=split, group_size=row.group_size or 128)]
    found = []
    for dtype, group_size in itertools.product(("fp16", "bf16"), (128, 64, 32)):
        if row.group_size not in (None, group_size) or is_shadowed(row, table, group_size):
            continue
        common = Variant(dtype=dtype, group_size=group_size, tokens=tokens, split=split)
        found.append(common)
        if row.kernel in ("int4_linear", "rotate_int4_linear"):
            found.append(Variant(**{**vars(common), "rotations": 4}))
        if row.kernel == "int4_linear" and split:
            found.append(Variant(**{**vars(common), "split": False}))
    return found


def is_shadowed(row: Row, table: Sequence[Row], group_size: int) -> bool:
    """Say whether an earlier row serves all that this one could for a group size."""
    tokens = row.max_tokens or 10**9
    return any(one.serves(row.kernel, tokens, 4096, 4096, group_size) for one in table[: table.index(row)])


def per_weight(instructions: int, compiled: CompiledKernel, tiles: LinearTiles | FusedTiles, k_tiles: int) -> float:
    """Thread instructions of the whole program per weight."""
    return instructions * compiled.threads / (128 * k_tiles * tiles.block_n)


def check_budgets(row: Row, arch: str, variant: Variant) -> None:
    tiles = KERNEL_TILES[row.kernel](**row.tiles)
    compiled = compile_tiles(tiles, arch, variant)
    assert compiled.spills == 0
    assert compiled.shared_bytes <= SHARED_LIMITS[arch]
    if isinstance(tiles, RotateTiles):
        # Rows of one group never meet; the last gathers of a group of 32 may go through shared memory.
        if arch in NVIDIA and variant.group_size == 128:
            assert compiled.count("BAR") == 0
            assert compiled.count("SHFL") <= 1.07 * SHUFFLES_PER_ROW * tiles.block_m
        return
    if isinstance(tiles, DequantizeTiles):
        return
    assert compiled.occurrences(TENSOR_CORE)
    if arch not in NVIDIA or not isinstance(tiles, LinearTiles | FusedTiles):
        return
    assert compiled.count("LDGSTS.E.BYPASS.128") > 0
    most = 2 if isinstance(tiles, FusedTiles) else 16
    if variant.group_size != 128 or (row.max_tokens or 17) > most:
        return
    loop = per_weight(compiled.hot_loop.count(), compiled, tiles, 1)
    if row.source != "static":
        assert loop <= TUNED_LOOP_BUDGET
    elif variant.portable:
        assert loop <= PORTABLE_LOOP_BUDGET[arch] or variant.dtype == "bf16" or variant.rotations > 1
    else:
        assert loop <= (LOOP_BUDGET if variant.dtype == "fp16" else BFLOAT16_LOOP_BUDGET)


@pytest.mark.parametrize("arch", TARGET_NAMES)
def test_every_row_keeps_its_budgets(arch, request):
    full = request.config.getoption("--full-aot")
    if arch == "sm_89" and not full:
        pytest.skip("it compiles to the same as sm_80; --full-aot looks")
    table = launch_table(arch)
    looked_at = table if full else representative(table)
    rows, chosen = zip(*((row, one) for row in looked_at for one in variants(row, table, full=full)), strict=True)
    arguments = rows, [arch] * len(rows), chosen
    if full:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(what_is_over_budget, *arguments))
    else:
        found = list(map(what_is_over_budget, *arguments))
    failures = [failure for failure in found if failure]
    assert not failures, "\n".join(failures)


def representative(table: Sequence[Row]) -> list[Row]:
    """The first row of each kernel, and the last of the product."""
    found = {row.kernel: row for row in reversed(table)}
    products = [row for row in table if row.kernel == "int4_linear"]
    return [*found.values(), products[-1]]


def what_is_over_budget(row: Row, arch: str, variant: Variant) -> str | None:
    try:
        check_budgets(row, arch, variant)
    except AssertionError:
        # pytest does not explain assertions in another process.
        (frame,) = (one for one in traceback.extract_tb(sys.exc_info()[2]) if one.name == "check_budgets")
        return f"{row.kernel} {dict(row.tiles)} {variant}: {frame.line}"
    return None


@pytest.mark.parametrize("arch", FUSED_BUDGET)
def test_rotation_and_product_in_one_launch_are_cheap(arch, request):
    if arch == "sm_89" and not request.config.getoption("--full-aot"):
        pytest.skip("it compiles to the same as sm_80; --full-aot looks")
    compiled, tiles = compile_tiles(WIDE_FUSED, arch, Variant()), WIDE_FUSED.slice_tiles
    assert compiled.spills == 0
    assert per_weight(compiled.executed(tiles), compiled, WIDE_FUSED, tiles) <= FUSED_BUDGET[arch]


def test_the_tiles_that_an_h100_chose_for_one_token_do_not_grow():
    """They run faster than the wide ones there, for 3.9 instructions a weight."""
    row = next(row for row in launch_table("sm_90") if row.kernel == "rotate_int4_linear")
    tiles = FusedTiles(**row.tiles)
    compiled = compile_tiles(tiles, "sm_90", Variant())
    assert (row.max_tokens, row.source) == (1, "tuned:NVIDIA H100 80GB HBM3")
    assert per_weight(compiled.executed(tiles.slice_tiles), compiled, tiles, tiles.slice_tiles) <= TUNED_FUSED_BUDGET


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_loop_of_the_product(arch, portable):
    tiles = PORTABLE_LINEAR.get(arch, WIDE_LINEAR) if portable else WIDE_LINEAR
    compiled = compile_tiles(tiles, arch, Variant(portable=portable))
    assert compiled.spills == 0
    assert per_weight(compiled.hot_loop.count(), compiled, tiles, 1) <= (PORTABLE_BUDGET if portable else LOOP_BUDGET)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_matrices_of_the_dense_rotation(arch):
    compiled = compile_matrices(arch, Variant())
    assert compiled.spills == 0
    assert compiled.shared_bytes <= SHARED_LIMITS[arch]


def test_a_kernel_without_a_loop_says_so():
    compiled = CompiledKernel("sm_90", 1, 0, 1, 0, "", ())
    with pytest.raises(LookupError, match="the kernel has no loop"):
        _ = compiled.hot_loop
    assert compiled.executed(3) == 0
