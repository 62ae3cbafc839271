import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import affine
from parofx.calibration import column_blocks, feedback
from parofx.calibration.feedback import RoundedWeight, damped, output_error, round_with_feedback
from parofx.errors import ConfigError, ShapeError

GROUP = 4
#: Errors are sums of fp32 products; two ways to sum them differ by this much.
TOLERANCE = 1e-4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(columns: int, seed: int = 0) -> torch.Tensor:
    """Return second moments of inputs that mix a few sources, with channels of very different power."""
    mixing = normal(max(1, columns // 2), columns, seed=seed) * torch.logspace(-1, 1, columns)
    rows = normal(64, len(mixing), seed=seed + 1) @ mixing + 0.1 * normal(64, columns, seed=seed + 2)
    return rows.t() @ rows / len(rows)


def rounded(weight, gram, *, bits=4, shrink=1.0, sweeps=1):
    scales, zeros = affine.choose_qparams(weight, bits, GROUP, shrink=shrink)
    result = round_with_feedback(weight, gram, scales, zeros, bits=bits, group_size=GROUP, sweeps=sweeps)
    nearest = affine.fake_quantize(weight, scales, zeros, bits, GROUP)
    return result, output_error(weight, result.dequantized(), gram), output_error(weight, nearest, gram)


@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    bits=st.sampled_from((2, 3, 4, 8)),
    damping=st.sampled_from((0.01, 0.3)),
    shrink=st.sampled_from((1.0, 0.6)),
    sweeps=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_no_row_is_worse_than_rounded_to_nearest(rows, groups, bits, damping, shrink, sweeps, seed):
    weight = normal(rows, groups * GROUP, seed=seed)
    gram = damped(correlated_gram(groups * GROUP, seed), damping)
    result, error, nearest = rounded(weight, gram, bits=bits, shrink=shrink, sweeps=sweeps)
    assert (error <= nearest * (1 + TOLERANCE)).all()
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) < 2**bits
    assert torch.equal(result.scales, result.scales.half().float())
    assert torch.equal(result.zeros, result.zeros.round().clamp(0, 2**bits - 1))


def test_it_pays_and_sweeps_pay_more():
    weight = normal(32, 8 * GROUP)
    gram = damped(correlated_gram(8 * GROUP), 0.01)
    errors = [float(rounded(weight, gram, sweeps=sweeps)[1].sum()) for sweeps in (0, 1, 3)]
    nearest = float(rounded(weight, gram)[2].sum())
    assert errors[0] < 0.6 * nearest
    assert errors[2] <= errors[1] < 0.95 * errors[0]


@given(seed=st.integers(0, 30))
def test_a_swept_weight_is_at_a_minimum_of_each_code(seed):
    """After a sweep of its own, no single code can be moved to a better place."""
    weight, gram = normal(2, GROUP, seed=seed), damped(correlated_gram(GROUP, seed), 0.1)
    result, _, _ = rounded(weight, gram, sweeps=40)
    best = output_error(weight, result.dequantized(), gram)
    for column, code in itertools.product(range(GROUP), range(16)):
        codes = result.codes.clone()
        codes[:, column] = code
        other = RoundedWeight(codes, result.scales, result.zeros).dequantized()
        assert (output_error(weight, other, gram) >= best * (1 - TOLERANCE)).all()


def test_feedback_is_the_recursion_of_the_docstring():
    """`e H eᵀ = Σ_k D_k r_k²` where `r_k` is the rounding error of column k alone."""
    weight, gram = normal(5, 3 * GROUP), damped(correlated_gram(3 * GROUP), 0.1).double()
    scales, zeros = (one.double() for one in affine.choose_qparams(weight, 8, GROUP))
    start = RoundedWeight(affine.quantize(weight, scales, zeros, 8, GROUP), scales, zeros)
    problem = feedback._Problem(weight, gram, start, 8, GROUP)
    columns = feedback.ColumnFactor.of(gram)
    order, factor = columns.order, columns.lower
    problem.feed_back(columns)
    error = (problem.target - problem.steps * problem.scales.repeat_interleave(GROUP, 0))[order]
    own = factor.t() @ error
    step = problem.scales.repeat_interleave(GROUP, 0)[order]
    inside = ((problem.codes().t() > 0) & (problem.codes().t() < 255))[order]
    assert (own.abs() <= step / 2 + 1e-9)[inside].all()
    pivots = torch.linalg.cholesky(gram[order][:, order]).diagonal().square()
    expected = (pivots[:, None] * own.square()).sum(0)
    found = output_error(weight, weight - error[order.argsort()].t(), gram)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_factor_is_one_of_the_moments():
    gram = damped(correlated_gram(3 * GROUP), 0.1).double()
    columns = feedback.ColumnFactor.of(gram)
    assert not torch.equal(columns.order, torch.arange(3 * GROUP))
    product = columns.lower * columns.residual[columns.order] @ columns.lower.t()
    torch.testing.assert_close(product, gram[columns.order][:, columns.order])
    assert torch.equal(columns.lower.diagonal(), torch.ones(3 * GROUP, dtype=torch.float64))


@pytest.mark.parametrize("sweeps", [0, 2])
def test_moments_may_have_any_strides(sweeps):
    weight, gram = normal(5, 40 * GROUP), damped(correlated_gram(40 * GROUP), 0.1)
    scales, zeros = affine.choose_qparams(weight, 4, GROUP)
    options = {"bits": 4, "group_size": GROUP, "sweeps": sweeps}
    found = round_with_feedback(weight, gram.t(), scales, zeros, **options)
    wide = torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(found.codes, round_with_feedback(wide, gram.t().contiguous(), scales, zeros, **options).codes)


@pytest.mark.parametrize(
    ("scale_dtype", "zero_dtype", "gram_dtype"),
    [
        (torch.float32, torch.int32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_grids_may_be_of_other_dtypes_than_moments(scale_dtype, zero_dtype, gram_dtype):
    weight, gram = normal(6, 12), damped(correlated_gram(12), 0.1)
    scales, zeros = affine.choose_qparams(weight, 4, GROUP)
    options = {"bits": 4, "group_size": GROUP, "sweeps": 1}
    expected = round_with_feedback(weight, gram, scales, zeros, **options)
    found = round_with_feedback(weight, gram.to(gram_dtype), scales.to(scale_dtype), zeros.to(zero_dtype), **options)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.float(), expected.scales)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight = normal(6, 2 * GROUP)
    gram = torch.diag(torch.logspace(-1, 1, 2 * GROUP))
    scales, zeros = affine.choose_qparams(weight, 4, GROUP)
    result = round_with_feedback(weight, gram, scales, zeros, bits=4, group_size=GROUP, sweeps=0)
    assert torch.equal(result.codes, affine.quantize(weight, scales, zeros, 4, GROUP))
    assert torch.equal(result.scales, scales)


def test_refitted_scales_undo_a_wrong_range():
    weight = normal(8, 2 * GROUP)
    gram = damped(correlated_gram(2 * GROUP), 0.1)
    wide, zeros = affine.choose_qparams(weight, 8, GROUP, shrink=1.3)
    result = round_with_feedback(weight, gram, wide, zeros, bits=8, group_size=GROUP, sweeps=1)
    assert (result.scales != wide).any()
    before = output_error(weight, affine.fake_quantize(weight, wide, zeros, 8, GROUP), gram)
    assert (output_error(weight, result.dequantized(), gram) < before).all()


@pytest.mark.parametrize("columns", [GROUP, 3 * GROUP])
def test_chunks_and_blocks_change_nothing(monkeypatch, columns):
    weight, gram = normal(11, columns), damped(correlated_gram(columns), 0.1)
    whole, _, _ = rounded(weight, gram, sweeps=2)
    monkeypatch.setattr(feedback, "_CHUNK_ELEMENTS", 4 * columns)
    monkeypatch.setattr(column_blocks, "BLOCK", 5)
    pieces, _, _ = rounded(weight, gram, sweeps=2)
    assert torch.equal(pieces.codes, whole.codes)
    torch.testing.assert_close(pieces.scales, whole.scales)


@pytest.mark.parametrize("power", [1e-30, 1e30])
def test_any_magnitude_of_inputs(power):
    gram = damped(correlated_gram(2 * GROUP) * power, 0.1)
    _, error, nearest = rounded(normal(4, 2 * GROUP), gram)
    assert error.isfinite().all()
    assert (error <= nearest).all()


def test_dead_channels_and_silent_inputs():
    gram = correlated_gram(2 * GROUP)
    gram[3], gram[:, 3] = 0, 0
    weight = normal(4, 2 * GROUP)
    weight[:, GROUP:] = 0  # a group of zeros
    result, error, nearest = rounded(weight, damped(gram, 0.01))
    assert (error <= nearest * (1 + TOLERANCE)).all()
    # Its scale is the smallest there is; codes other than zero in it correct next to nothing.
    assert result.dequantized()[:, GROUP:].abs().max() <= 15 * 1.5 * affine.SMALLEST_SCALE
    silent, _, _ = rounded(weight, damped(torch.zeros(2 * GROUP, 2 * GROUP), 0.01))
    assert torch.equal(silent.codes, affine.quantize(weight, *affine.choose_qparams(weight, 4, GROUP), 4, GROUP))


def test_damping_is_relative_to_the_mean_power():
    gram = correlated_gram(8)
    expected = gram / gram.diagonal().mean() + 0.1 * torch.eye(8)
    torch.testing.assert_close(damped(gram, 0.1), expected)
    assert torch.equal(damped(torch.zeros(3, 3), 0.1), torch.eye(3))


def test_errors():
    with pytest.raises(ConfigError, match="damping must be positive, got 0"):
        damped(torch.eye(4), 0)
    weight = normal(2, 8)
    scales, zeros = affine.choose_qparams(weight, 4, GROUP)
    with pytest.raises(ShapeError, match=r"gram must be \(8, 8\) for a weight \(2, 8\), got \(4, 4\)"):
        round_with_feedback(weight, torch.eye(4), scales, zeros, bits=4, group_size=GROUP, sweeps=0)
    with pytest.raises(ShapeError, match=r"scales and zeros must be \(2, 2\)"):
        round_with_feedback(weight, torch.eye(8), scales[:1], zeros, bits=4, group_size=GROUP, sweeps=0)
