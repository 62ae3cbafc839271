import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx.testing import interpreter

ALL_BITS = np.arange(2**16, dtype=np.uint16)


def test_bfloat16_is_rounded_as_torch_does():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e3
    expected = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(interpreter.round_to_bfloat16(values.numpy()), expected)


def test_widening_is_exact():
    widened = interpreter.widen_bfloat16(ALL_BITS)
    finite = np.isfinite(widened)
    np.testing.assert_array_equal(interpreter.round_to_bfloat16(widened)[finite], ALL_BITS[finite])


@given(a=st.integers(0, 2**32 - 1), b=st.integers(0, 2**32 - 1), c=st.integers(0, 2**32 - 1))
def test_lop3_follows_its_table(a, b, c):
    inputs = [np.array([value], dtype=np.uint32) for value in (a, b, c)]
    [got] = interpreter.evaluate_ptx("lop3.b32 $0, $1, $2, $3, 0xea;", inputs, 1)
    assert got[0] == (a & b) | c


def test_halves_are_computed_apart():
    one_and_two = np.array([0x40003C00], dtype=np.uint32)
    [got] = interpreter.evaluate_ptx("sub.f16x2 $0, $1, $2;", [one_and_two, one_and_two[:, ...] * 0], 1)
    assert got[0] == 0x40003C00
    [got] = interpreter.evaluate_ptx("fma.rn.f16x2 $0, $1, $1, $1;", [one_and_two], 1)
    np.testing.assert_array_equal(got.view(np.float16), [2, 6])


def test_unknown_instructions_are_refused():
    with pytest.raises(NotImplementedError, match=r"PTX instruction 'popc\.b32' is not one of"):
        interpreter.evaluate_ptx("popc.b32 $0, $1;", [np.zeros(1, np.uint32)], 1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs interpreted")
def test_only_a_process_that_interprets_is_mended():
    assert not interpreter.is_interpreting()
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before it is imported"):
        interpreter.mend_interpreter()
