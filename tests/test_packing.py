import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parofx import packing
from parofx.errors import ConfigError, ShapeError
from parofx.testing import linear_cases, reference

shapes = st.tuples(st.sampled_from((4, 3, 8)), st.integers(0, 7), st.integers(1, 5))
codes_drawn = shapes.flatmap(
    lambda drawn: st.tuples(
        st.just(drawn[0]),
        hnp.arrays(
            np.uint8,
            (drawn[1], packing.COLUMNS_PER_RUN[drawn[0]] * drawn[2]),
            elements=st.integers(0, 2 ** drawn[0] - 1),
        ),
    )
)
words_drawn = shapes.flatmap(
    lambda drawn: st.tuples(
        st.just(drawn[0]),
        hnp.arrays(
            np.int32,
            (1 + drawn[1], (3 if drawn[0] == 3 else 1) * drawn[2]),
            elements=st.integers(-(2**31), 2**31 - 1),
        ),
    )
)


@given(codes_drawn)
def test_unpack_undoes_pack(drawn):
    bits, codes = drawn[0], torch.from_numpy(drawn[1])
    words = packing.pack_words(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (codes.shape[0], codes.shape[1] * bits // 32))
    assert torch.equal(packing.unpack_words(words, bits), codes)


@given(words_drawn)
def test_pack_undoes_unpack(drawn):
    bits, words = drawn[0], torch.from_numpy(drawn[1])
    assert torch.equal(packing.pack_words(packing.unpack_words(words, bits), bits), words)


@given(words_drawn)
def test_unpack_is_the_references(drawn):
    bits, words = drawn[0], torch.from_numpy(drawn[1])
    assert torch.equal(packing.unpack_words(words, bits).double(), torch.from_numpy(reference.unpack(words, bits)))


def test_no_rows():
    codes = torch.zeros(0, 16, dtype=torch.uint8)
    assert packing.pack_words(codes).shape == (0, 2)
    assert torch.equal(packing.unpack_words(packing.pack_words(codes)), codes)


def test_nibble_order_by_hand():
    """Bits 4i..4i+3 hold column (0,2,4,6,1,3,5,7)[i]: columns 0..7 holding 0..7 read, from the top, 7 5 3 1 6 4 2 0."""
    words = packing.pack_words(torch.arange(8, dtype=torch.uint8).reshape(1, 8))
    assert words.tolist() == [[0x75316420]]


def test_byte_and_plane_order_by_hand():
    assert packing.pack_words(torch.arange(4, dtype=torch.uint8)[None], 8).tolist() == [[0x03020100]]
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, [0, 1, 31]] = torch.tensor([1, 6, 7], dtype=torch.uint8)  # 001, 110 and 111
    assert packing.pack_words(codes, 3).tolist() == [[1 - 2**31, 2 - 2**31, 2 - 2**31]]


def test_words_are_signed():
    """Column 7 holds the top nibble: 8 and above makes the word negative, and nothing spills over."""
    codes = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 8], [15] * 8, [1, 0, 0, 0, 0, 0, 0, 15]], dtype=torch.uint8)
    words = packing.pack_words(codes)
    assert words.tolist() == [[-(2**31)], [-1], [-(2**28) + 1]]
    assert torch.equal(packing.unpack_words(words), codes)


def test_non_contiguous_codes_and_words():
    codes = torch.arange(16 * 24).reshape(24, 16).remainder(16).to(torch.uint8)
    words = packing.pack_words(codes.t())
    assert torch.equal(words, packing.pack_words(codes.t().contiguous()))
    wide = torch.stack((words, torch.zeros_like(words)), dim=-1).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(packing.unpack_words(wide), codes.t())


@given(linear_cases(bits=(4, 3, 8)))
def test_linear_round_trip_and_weight(case):
    qweight, qzeros, scales, _ = case.weight()
    codes, steps, zeros = packing.unpack_linear(qweight, qzeros, scales)
    assert codes.shape == (case.out_features, case.in_features)
    assert steps.shape == zeros.shape == (case.out_features, case.groups)
    assert packing.packed_bits(qweight, scales) == case.bits
    packed = packing.pack_linear(codes, steps, zeros, bits=case.bits)
    for one, other in zip(packed, (qweight, qzeros, scales), strict=True):
        assert one.dtype == other.dtype
        assert one.is_contiguous()
        assert torch.equal(one, other)
    expected = torch.from_numpy(reference.dequantize(qweight, qzeros, scales)).T
    assert torch.equal(packing.dequantize_linear(qweight, qzeros, scales, torch.float64), expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # (q − z) and s are exact in fp32 and so is their product: 9 and 11 significant bits. One rounding remains.
        assert torch.equal(packing.dequantize_linear(qweight, qzeros, scales, dtype), expected.to(dtype))


def test_float_zeros_are_rounded_to_codes():
    codes = torch.zeros(8, 4, dtype=torch.uint8)
    _, qzeros, _ = packing.pack_linear(codes, torch.ones(8, 1), torch.full((8, 1), 7.0), bits=4)
    assert packing.unpack_words(qzeros).tolist() == [[7] * 8]


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_other_widths_are_refused(bits):
    message = rf"bits must be one of \(3, 4, 8\) to be packed, got {bits}"
    with pytest.raises(ConfigError, match=message):
        packing.check_packable(bits)
    with pytest.raises(ConfigError, match=message):
        packing.unpack_words(torch.zeros(1, 1, dtype=torch.int32), bits)
    with pytest.raises(ConfigError, match=message):
        packing.pack_linear(torch.zeros(8, 4, dtype=torch.uint8), torch.ones(8, 1), torch.zeros(8, 1), bits=bits)


@pytest.mark.parametrize(
    ("shape", "bits", "columns"),
    [((8,), 4, 8), ((2, 7), 4, 8), ((2, 2, 8), 4, 8), ((2, 40), 3, 32), ((2, 6), 8, 4)],
)
def test_pack_refuses_shapes(shape, bits, columns):
    with pytest.raises(ShapeError, match=rf"codes must be \(rows, N\) with N a multiple of {columns}, got"):
        packing.pack_words(torch.zeros(shape, dtype=torch.uint8), bits)


@pytest.mark.parametrize(("code", "bits"), [(-1, 4), (16, 4), (256, 4), (8, 3), (256, 8)])
def test_pack_refuses_codes_out_of_range(code, bits):
    codes = torch.zeros(1, 32, dtype=torch.int32)
    codes[0, 3] = code
    with pytest.raises(ShapeError, match=rf"codes must lie in 0\.\.{2**bits - 1}, got"):
        packing.pack_words(codes, bits)


@pytest.mark.parametrize("words", [torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)])
def test_unpack_refuses_what_is_no_int32_matrix(words):
    with pytest.raises(ShapeError, match="words must be an int32 matrix, got"):
        packing.unpack_words(words)


def test_unpack_refuses_words_that_are_no_whole_runs():
    with pytest.raises(ShapeError, match=r"int32 matrix with a multiple of 3 columns, got torch.int32 \(2, 4\)"):
        packing.unpack_words(torch.zeros(2, 4, dtype=torch.int32), 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((8, 1), (2, 1), (2, 8, 1)), "qweight, qzeros and scales must be matrices, got"),
        (((8, 1), (2, 1), (2, 16)), r"agree on one of \(3, 4, 8\) bits, got \(8, 1\), \(2, 1\) and \(2, 16\)"),
        (((8, 4), (2, 4), (2, 48)), r"agree on one of \(3, 4, 8\) bits, got \(8, 4\)"),
        (((8, 0), (2, 0), (2, 0)), r"agree on one of \(3, 4, 8\) bits, got \(8, 0\)"),
        (((8, 1), (3, 1), (2, 8)), r"bits, got \(8, 1\), \(3, 1\) and \(2, 8\)"),
        (((8, 1), (3, 1), (3, 8)), "the 3 rows of scales must divide the 8 rows of qweight"),
        (((8, 1), (0, 1), (0, 8)), "the 0 rows of scales must divide the 8 rows of qweight"),
    ],
)
def test_contradictions_are_refused(shapes, message):
    dtypes = (torch.int32, torch.int32, torch.float16)
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ShapeError, match=message):
        packing.unpack_linear(*tensors)
