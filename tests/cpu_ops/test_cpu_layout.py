"""The kernel layouts and their inverses."""

import itertools
import time

import pytest
import torch
from cpu_problem import PACK_CODES, make_rotation
from hypothesis import given
from hypothesis import strategies as st

from parofx import cpu_ops
from parofx.cpu_ops.layout import NIBBLE_COLUMNS
from parofx.cpu_ops.layouts import PACK, UNPACK
from parofx.packing import COLUMNS_PER_RUN, unpack_words, words_per_row

Checkpoint = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def checkpoint(in_features: int, out_features: int, group_size: int, seed: int = 0, bits: int = 4) -> Checkpoint:
    random = torch.Generator().manual_seed(seed)
    limits = (-(2**31), 2**31)
    groups, words = in_features // group_size, words_per_row(out_features, bits)
    return (
        torch.randint(*limits, (in_features, words), generator=random, dtype=torch.int32),
        torch.randint(*limits, (groups, words), generator=random, dtype=torch.int32),
        torch.randn(groups, out_features, generator=random).half(),
    )


def codes_of(words: torch.Tensor) -> torch.Tensor:
    """The checkpoint's rule, one nibble at a time."""
    codes = torch.zeros(words.shape[0], words.shape[1] * 8, dtype=torch.uint8)
    for i, column in enumerate(NIBBLE_COLUMNS):
        codes[:, column::8] = ((words >> (4 * i)) & 15).to(torch.uint8)
    return codes


@given(
    groups=st.integers(1, 5),
    group_size=st.sampled_from((32, 64, 128)),
    runs=st.integers(1, 20),
    bits=st.sampled_from((4, 3, 8)),
    seed=st.integers(0, 2**16),
)
def test_unpack_inverts_pack(groups: int, group_size: int, runs: int, bits: int, seed: int) -> None:
    in_features, out_features = groups * group_size, runs * COLUMNS_PER_RUN[bits]
    original = checkpoint(in_features, out_features, group_size, seed, bits)
    packed = PACK[bits](*original, group_size)
    shapes = [(out_features, in_features * bits // 8), *[(out_features, groups)] * 2]
    assert [tuple(each.shape) for each in packed] == shapes
    back = UNPACK[bits](*packed, group_size, in_features, out_features)
    for before, after in zip(original, back, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


@given(
    groups=st.integers(1, 3),
    group_size=st.sampled_from((32, 64, 128)),
    runs=st.integers(1, 14),
    bits=st.sampled_from((4, 3, 8)),
)
def test_packed_weights_and_packed_codes_agree(groups: int, group_size: int, runs: int, bits: int) -> None:
    out_features = runs * COLUMNS_PER_RUN[bits]
    qweight, qzeros, scales = checkpoint(groups * group_size, out_features, group_size, bits=bits)
    codes, zeros = (
        codes_of(words) if bits == 4 else unpack_words(words, bits).contiguous() for words in (qweight, qzeros)
    )
    expected = PACK_CODES[bits](codes, zeros, scales, group_size)
    for ours, theirs in zip(PACK[bits](qweight, qzeros, scales, group_size), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_first_words_are_where_layout_h_says() -> None:
    codes = torch.arange(128 * 40).reshape(128, 40) % 16
    weight, _, _ = cpu_ops.pack_codes(codes, torch.zeros(1, 40), torch.ones(1, 40).half(), 128)
    words = weight.flatten().view(torch.int32)
    for column, chunk, at in ((0, 0, 0), (31, 0, 31), (5, 3, 3 * 32 + 5), (32, 0, 16 * 32), (39, 2, 16 * 32 + 23)):
        expected = codes[8 * chunk : 8 * chunk + 8, column].tolist()
        assert [int(words[at]) >> (4 * j) & 15 for j in range(8)] == expected


def test_the_first_words_of_three_bits_are_where_layout_h_says() -> None:
    codes = torch.randint(0, 8, (128, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight, _, _ = cpu_ops.pack_plane_codes(codes, torch.zeros(1, 40).byte(), torch.ones(1, 40).half(), 128)
    words = weight.flatten().view(torch.int32)
    assert len(words) == 40 * 128 * 3 // 32
    for column, chunk, first in ((0, 0, 0), (31, 1, 31), (5, 6, 3 * 32 + 5), (32, 3, 12 * 32), (39, 14, 12 * 32 + 79)):
        low, high = words[first + (32 if column < 32 else 8) * (chunk % 4 // 2)], first + 2 * (32 if column < 32 else 8)
        found = [
            (int(low) >> (4 * j + chunk % 2 * 2) & 3) | (int(words[high]) >> (4 * j + chunk % 4) & 1) << 2
            for j in range(8)
        ]
        assert found == codes[8 * chunk : 8 * chunk + 8, column].tolist()


def test_the_kernel_layout_is_no_larger_than_five_percent() -> None:
    for group_size, bits in itertools.product((32, 64, 128), PACK):
        original = checkpoint(256, 96, group_size, bits=bits)
        packed = PACK[bits](*original, group_size)
        assert sum(t.nbytes for t in packed) <= 1.05 * sum(t.nbytes for t in original)


@pytest.mark.parametrize("bits", PACK)
def test_unpack_accepts_an_unaligned_slice(bits: int) -> None:
    original = checkpoint(128, 32, 64, bits=bits)
    weight, scales, zeros = PACK[bits](*original, 64)
    shifted = torch.cat((torch.zeros(1, dtype=torch.uint8), weight.flatten()))[1:].view(weight.shape)
    assert torch.equal(UNPACK[bits](shifted, scales, zeros, 64, 128, 32)[0], original[0])


def test_packing_is_fast() -> None:
    original = checkpoint(4096, 4096, 128)
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other measure what else the machine does
    for _ in range(5):
        start = time.thread_time()
        cpu_ops.pack_weight(*original, 128)
        seconds.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < 0.1


def test_rotation_sizes() -> None:
    for krot, size in ((0, 4), (1, 10), (8, 45)):
        rotation = make_rotation(256, 64, krot, torch.Generator())
        blob = cpu_ops.pack_rotation(rotation.pairs, rotation.theta, rotation.channel_scales, 64)
        assert blob.dtype == torch.uint8
        assert blob.shape == (size * 256,)


def test_what_does_not_fit_is_refused() -> None:
    qweight, qzeros, scales = checkpoint(128, 32, 64)
    with pytest.raises(ValueError, match="group_size must be one of"):
        cpu_ops.pack_weight(qweight, qzeros, scales, 16)
    with pytest.raises(ValueError, match="group_size must divide in_features: got 128 and 64"):
        cpu_ops.pack_weight(qweight[:64], qzeros, scales, 128)
    with pytest.raises(ValueError, match=r"scales must be torch.float16 of shape \(2, 32\): got torch.float32"):
        cpu_ops.pack_weight(qweight, qzeros, scales.float(), 64)
    with pytest.raises(ValueError, match=r"qweight must be torch.int32 of shape \(128, 3\): got .*\(128, 4\)"):
        cpu_ops.pack_plane_weight(qweight, qzeros, scales, 64)
    packed = cpu_ops.pack_weight(qweight, qzeros, scales, 64)
    with pytest.raises(ValueError, match="multiple of 8 in a checkpoint: got 30"):
        cpu_ops.unpack_weight(*packed, 64, 128, 30)
    with pytest.raises(ValueError, match="out_features must be positive: got 0"):
        cpu_ops.unpack_weight(*packed, 64, 128, 0)
    rotation = make_rotation(128, 64, 2, torch.Generator())
    rotation.pairs[1, 3] = rotation.pairs[1, 4]
    with pytest.raises(ValueError, match=r"permutation of 0\.\.63"):
        cpu_ops.pack_rotation(rotation.pairs, rotation.theta, rotation.channel_scales, 64)
    with pytest.raises(ValueError, match=r"theta must be .* of shape \(2, 64\)"):
        cpu_ops.pack_rotation(rotation.pairs, rotation.theta[:, 1:], rotation.channel_scales, 64)
