"""The checks of `parofx.testing` are themselves checked: right kernels pass, each kind of wrong one is caught."""

import importlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from parofx import ops as _ops  # noqa: F401  (registers torch.ops.parofx)
from parofx import packing, rotation
from parofx.testing import (
    NARROW_OPERANDS,
    WIDE_OPERANDS,
    LinearCase,
    RotateLinearCase,
    RotationCase,
    check_int4_linear,
    check_int4_linear_case,
    check_rotate_int4_linear,
    check_rotate_int4_linear_case,
    check_rotation,
    check_rotation_case,
    linear_cases,
    reference,
    rotate_linear_cases,
    rotation_cases,
)
from parofx.testing.cases import LAYOUTS

paro = torch.ops.parofx
ROTATION = RotationCase(batch=(3,), groups=2, group_size=6, krot=2)
LINEAR = LinearCase(batch=(3,), groups=2, group_size=6, words=1)


def with_out(fn):
    def kernel(*args, out):
        return out.copy_(fn(*args))

    return kernel


def test_kernels_that_take_out_pass():
    check_rotation(with_out(paro.rotate), takes_out=True, max_examples=10)
    check_int4_linear(with_out(paro.int4_linear), takes_out=True, max_examples=10)
    check_rotate_int4_linear(with_out(paro.rotate_int4_linear), takes_out=True, max_examples=10)


def narrow_linear(x, qweight, qzeros, scales, bias, group_size):
    """What a tensor core does: weights and activations in the input's dtype, sums in fp32."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = packing.dequantize_linear(qweight, qzeros, scales, x.dtype)
    bias = None if bias is None else bias.to(work)
    return torch.nn.functional.linear(x.to(work), weight.to(work), bias).to(x.dtype)


def test_16_bit_operands_are_within_the_narrow_tolerance_only():
    def narrow_rotate_linear(x, pairs, theta, channel_scales, *packed):
        return narrow_linear(rotation.rotate(x, pairs, theta, channel_scales, packed[-1]), *packed)

    check_int4_linear(narrow_linear)
    check_rotate_int4_linear(narrow_rotate_linear)
    case = LinearCase(batch=(33,), groups=3, group_size=128, words=5, dtype=torch.float16)
    check_int4_linear_case(narrow_linear, case, tolerances=NARROW_OPERANDS)
    with pytest.raises(AssertionError, match="elements are wrong"):
        check_int4_linear_case(narrow_linear, case, tolerances=WIDE_OPERANDS)


def transposed_rotation(v, pairs, theta, scales, group_size):
    return rotation.rotate(v, pairs, -theta, scales, group_size)


def without_channel_scales(v, pairs, theta, scales, group_size):
    return rotation.rotate(v, pairs, theta, torch.ones_like(scales), group_size)


def rounds_reversed(v, pairs, theta, scales, group_size):
    return rotation.rotate(v, pairs.flip(0), theta.flip(0), scales, group_size)


def rounded_after_each_round(v, pairs, theta, scales, group_size):
    v, ones = (v * scales.reshape(-1)).to(v.dtype), torch.ones_like(scales)
    for r in range(len(pairs)):
        v = rotation.rotate(v, pairs[r : r + 1], theta[r : r + 1], ones, group_size)
    return v


def last_row_not_written(v, *args):
    result = torch.empty(v.shape, dtype=v.dtype)
    result[..., :-1] = rotation.rotate(v, *args)[..., :-1]
    return result


@pytest.mark.parametrize(
    "wrong",
    [transposed_rotation, without_channel_scales, rounds_reversed, rounded_after_each_round, last_row_not_written],
)
def test_wrong_rotations_are_caught(wrong):
    with pytest.raises(AssertionError, match="elements are wrong"):
        check_rotation(wrong, max_examples=200)


def natural_nibble_order(x, qweight, qzeros, scales, bias, group_size):
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    weight = packing.dequantize_linear(qweight, qzeros, scales, torch.float64)
    weight = weight.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    return torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)


def zeros_off_by_one(x, qweight, qzeros, scales, bias, group_size):
    row_sums = x.unflatten(-1, (-1, group_size)).sum(-1)
    return (paro.int4_linear(x, qweight, qzeros, scales, bias, group_size) - row_sums @ scales.to(x.dtype)).to(x.dtype)


def without_bias(x, qweight, qzeros, scales, bias, group_size):
    return paro.int4_linear(x, qweight, qzeros, scales, None, group_size)


@pytest.mark.parametrize("wrong", [natural_nibble_order, zeros_off_by_one, without_bias])
def test_wrong_linears_are_caught(wrong):
    with pytest.raises(AssertionError, match="elements are wrong"):
        check_int4_linear(wrong, max_examples=200)


def test_a_failure_names_the_worst_element_and_prints_a_case_to_keep():
    def wrong(*args):
        result = paro.rotate(*args)
        result[:, 3] = torch.nan
        result[:, 5] += 1.0
        return result

    with pytest.raises(AssertionError, match=r"6 of 36 elements are wrong \(3 NaN\); the worst is \[0, 3\]") as caught:
        check_rotation_case(wrong, ROTATION)
    printed = str(caught.value).splitlines()[-1].strip()
    assert eval(printed, {"RotationCase": RotationCase, "torch": torch}) == ROTATION


def test_the_smallest_case_is_reported_by_hypothesis():
    with pytest.raises(AssertionError) as caught:
        check_rotation(transposed_rotation, max_examples=200)
    assert "RotationCase(" in "".join(caught.value.__notes__)


def changes_its_input(v, *args):
    v += 1
    return rotation.rotate(v, *args)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changes_its_input, "must not change its inputs: argument 0 differs after the call"),
        (lambda *args: paro.rotate(*args).double(), r"expected the input's torch.float32 on cpu, got torch.float64"),
        (lambda *args: paro.rotate(*args)[:1], r"expected shape \(3, 12\), got \(1, 12\)"),
        (last_row_not_written, r"3 of 36 elements are wrong \(3 NaN\)"),
    ],
)
def test_wrong_manners_are_caught(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_rotation_case(wrong, ROTATION)


def test_a_kernel_must_fill_the_out_it_is_given():
    with pytest.raises(AssertionError, match="must return the tensor it was given as out"):
        check_rotation_case(lambda *args, out: paro.rotate(*args), ROTATION, takes_out=True)
    with pytest.raises(AssertionError, match=r"36 of 36 elements are wrong \(36 NaN\)"):
        check_rotation_case(lambda *args, out: out, ROTATION, takes_out=True)
    with pytest.raises(AssertionError, match=r"24 of 24 elements are wrong \(24 NaN\)"):
        check_int4_linear_case(lambda *args, out: out, LINEAR, takes_out=True)


def test_poisoning_ends_with_the_call():
    check_rotation_case(paro.rotate, ROTATION)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (0,), (3,), (2, 3)])
def test_layouts_are_what_they_say(layout, batch):
    x = RotationCase(batch=batch, groups=2, group_size=6, krot=1, layout=layout).x()
    assert x.shape == (*batch, 12)
    if batch == (2, 3):
        strides = {
            "contiguous": (36, 12, 1),
            "sliced": (72, 24, 1),
            "strided": (72, 24, 2),
            "transposed": (3, 1, 6),
            "expanded": (0, 0, 1),
        }
        assert x.stride() == strides[layout]


def test_cases_are_reproducible_and_seeds_differ():
    case = RotateLinearCase(batch=(3,), groups=2, group_size=6, krot=2, words=2, bias=True)
    other = RotateLinearCase(**(vars(case) | {"seed": 1}))
    for build in (lambda c: [c.x()], RotateLinearCase.rotation, RotateLinearCase.weight):
        assert all(torch.equal(one, two) for one, two in zip(build(case), build(case), strict=True))
        assert all(not torch.equal(one, two) for one, two in zip(build(case), build(other), strict=True))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(rotate_linear_cases())
def test_cases_are_legal(case):
    """The checkpoint's dtypes and shapes; pairs are permutations; the reference is finite in the case's dtype."""
    pairs, theta, scales = case.rotation()
    qweight, qzeros, steps, bias = case.weight()
    rotation.check_shapes(case.in_features, pairs, theta, scales, case.group_size)
    rotation.check_pairs(pairs, case.group_size)
    packing.check_packed_shapes(qweight, qzeros, steps)
    assert (pairs.dtype, qweight.dtype, qzeros.dtype, steps.dtype) == (
        torch.int16,
        torch.int32,
        torch.int32,
        torch.float16,
    )
    assert (bias is not None) == case.bias
    expected = reference.rotate_int4_linear(case.x(), pairs, theta, scales, *case.weight(), case.group_size)
    assert (abs(expected) < torch.finfo(torch.float16).max).all()


@given(
    rotation_cases(
        group_sizes=(32,), krots=(8,), dtypes=(torch.bfloat16,), rotation_dtypes=(torch.float16,), max_groups=1
    )
)
def test_rotation_cases_can_be_narrowed(case):
    assert (case.group_size, case.krot, case.groups) == (32, 8, 1)
    assert (case.x().dtype, case.rotation().theta.dtype, case.rotation().scales.dtype) == (
        torch.bfloat16,
        torch.float16,
        torch.float16,
    )


@given(linear_cases(max_words=1, layouts=("contiguous",)))
def test_linear_cases_can_be_narrowed(case):
    assert case.x().is_contiguous()
    assert case.weight().scales.shape[1] == 8


def test_every_mode_of_codes_is_in_the_words():
    lowest, highest = (LinearCase(batch=(1,), groups=1, group_size=2, words=1, codes=c) for c in ("lowest", "highest"))
    assert (reference.unpack(lowest.weight().qweight) == 0).all()
    assert (reference.unpack(highest.weight().qweight) == 15).all()


def test_reference_linear_by_hand():
    """Two groups of two rows: row k of Wq is (codes − zero)·scale; the first word holds its column numbers."""
    qweight = torch.tensor([[0x75316420], [0x00000001], [-1], [0]], dtype=torch.int32)
    qzeros = torch.tensor([[0x11111111], [0]], dtype=torch.int32)
    scales = torch.tensor([[0.5] * 8, [2.0] * 8])
    expected = [[-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], [0.0, *[-0.5] * 7], [30.0] * 8, [0.0] * 8]
    assert reference.dequantize(qweight, qzeros, scales).tolist() == expected
    x = torch.tensor([[1.0, 2.0, 0.0, 7.0]])
    got = reference.int4_linear(x, qweight, qzeros, scales, torch.arange(8.0))
    assert got.tolist() == [[-0.5, 0.0, 1.5, 3.0, 4.5, 6.0, 7.5, 9.0]]


def test_pinned_fused_case():
    case = RotateLinearCase(batch=(3,), groups=1, group_size=128, krot=1, words=1, dtype=torch.float16)
    check_rotate_int4_linear_case(paro.rotate_int4_linear, case)


def test_without_hypothesis_the_import_says_what_to_do(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("parofx.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"parofx.testing needs Hypothesis, .* pip install hypothesis"):
        importlib.import_module("parofx.testing")
