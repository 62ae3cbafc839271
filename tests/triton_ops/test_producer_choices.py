"""The tables of launch parameters and of costs are those of the docstrings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parofx.triton_ops.architectures import ARCHITECTURES
from parofx.triton_ops.producer_cost import why_not_in_producer
from parofx.triton_ops.producer_tiles import gate_tiles, norm_tiles


@pytest.mark.parametrize(
    ("in_features", "group_size", "warp_size", "block_groups", "num_warps"),
    [
        (4096, 128, 32, 8, 8),
        (14336, 128, 32, 8, 8),
        (2048, 64, 32, 8, 8),
        (2048, 32, 32, 4, 1),
        (2048, 64, 64, 4, 1),
        (256, 128, 32, 2, 2),
    ],
)
def test_the_table_of_norm_tiles(in_features, group_size, warp_size, block_groups, num_warps):
    tiles = norm_tiles(in_features, group_size, warp_size)
    assert (tiles.block_groups, tiles.num_warps) == (block_groups, num_warps)


@given(st.integers(1, 500), st.sampled_from((32, 64, 128)), st.sampled_from((32, 64)))
def test_norm_tiles_are_powers_of_two_and_no_wider_than_the_row(groups, group_size, warp_size):
    tiles = norm_tiles(groups * group_size, group_size, warp_size)
    for size in (tiles.block_groups, tiles.block_sum, tiles.num_warps):
        assert size > 0
        assert size & (size - 1) == 0
    assert tiles.num_warps * warp_size <= 1024
    assert tiles.block_sum < 2 * groups * group_size


@pytest.mark.parametrize(("rows", "block_m"), [(1, 1), (16, 1), (32, 2), (64, 4), (4096, 4)])
def test_rows_of_a_gate_program(rows, block_m):
    assert gate_tiles(rows, 14336, 128).block_m == block_m


@pytest.mark.parametrize(("tokens", "in_producer"), [(1, True), (4, True), (16, True), (2048, False)])
def test_the_table_of_costs(tokens, in_producer):
    reason = why_not_in_producer(tokens, 4096, 4096, 128, 8, "sm_90")
    assert (reason is None) == in_producer
    if reason is not None:
        assert reason.startswith(f"rotating for {tokens} tokens takes")


def test_inputs_that_need_kernels_of_their_own_use_up_what_is_saved():
    assert why_not_in_producer(16, 4096, 4096, 128, 8, "sm_90", launches=1) is not None


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_decides(arch):
    """From 16 to 32 tokens a rotation has a kernel of its own or the producer; the producer saves the launch."""
    assert why_not_in_producer(16, 4096, 4096, 128, 8, arch) is None
    assert why_not_in_producer(16, 4096, 6144, 128, 8, arch, rotations=3) is None
