import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import affine
from parofx.config import QUANTIZER_BITS
from parofx.errors import ConfigError, ShapeError

# fp32 arithmetic on codes up to 255: one step is divided and multiplied with half a dozen roundings.
FP32_SLACK = 1e-4

bits_drawn = st.sampled_from(QUANTIZER_BITS)


@st.composite
def weights(draw):
    """Draw `(weight (N, K), group_size)`, with the contents and the strides that quantizers get wrong."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    group_size = draw(st.sampled_from((1, 2, 6, 32, 100)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    w = torch.randn(rows, groups * group_size, generator=generator)
    w = w * 10.0 ** draw(st.integers(-7, 6))
    w = draw(st.sampled_from((torch.clone, torch.abs, lambda t: -t.abs(), torch.zeros_like, lambda t: t + 3.0)))(w)
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided")))
    if layout == "transposed":
        w = w.t().contiguous().t()
    elif layout == "strided":
        w = w.repeat_interleave(2, dim=1)[:, ::2]
    return w, group_size


@given(weights(), bits_drawn)
def test_error_is_at_most_half_a_step_in_range(drawn, bits):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size)
    restored = affine.dequantize(affine.quantize(w, scales, zeros, bits, group_size), scales, zeros, group_size)
    step = scales.repeat_interleave(group_size, 1)
    zero = zeros.repeat_interleave(group_size, 1)
    lowest, highest = -zero * step, (affine.quant_max(bits) - zero) * step
    in_range = (w >= lowest) & (w <= highest)
    error = (w - restored).abs()
    assert (error[in_range] <= (0.5 + FP32_SLACK) * step[in_range]).all()
    # Outside, the code is the end of the range that is nearer.
    torch.testing.assert_close(restored[~in_range], torch.clamp(w, lowest, highest)[~in_range], rtol=1e-5, atol=0)


@given(weights(), bits_drawn)
def test_range_covers_the_group_but_for_the_rounding_of_the_scale(drawn, bits):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size)
    restored = affine.fake_quantize(w, scales, zeros, bits, group_size)
    parts = affine.grouped(w, group_size)
    span = parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)
    shortfall = (span - affine.quant_max(bits) * scales).clamp(min=0)
    # Rounding to fp16 loses 2^-11 of the span; subnormal scales lose up to 2^-25 a step, overflowing ones anything.
    ordinary = scales < affine.LARGEST_SCALE
    assert (shortfall[ordinary] <= 2**-11 * span[ordinary] + affine.quant_max(bits) * 2**-25).all()
    bound = ((0.5 + FP32_SLACK) * scales + shortfall).repeat_interleave(group_size, 1)
    assert ((w - restored).abs() <= bound).all()


@given(weights(), bits_drawn)
def test_qparams_are_what_the_checkpoint_stores(drawn, bits):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size)
    assert scales.shape == zeros.shape == (w.shape[0], w.shape[1] // group_size)
    assert scales.dtype == zeros.dtype == torch.float32
    assert torch.equal(scales, scales.half().float())
    assert (scales > 0).all()
    assert torch.equal(zeros, zeros.round().clamp(0, affine.quant_max(bits)))


@given(weights(), bits_drawn)
def test_fake_quantize_is_quantize_and_dequantize_and_idempotent(drawn, bits):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size)
    codes = affine.quantize(w, scales, zeros, bits, group_size)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= affine.quant_max(bits)
    restored = affine.fake_quantize(w, scales, zeros, bits, group_size)
    assert torch.equal(restored, affine.dequantize(codes, scales, zeros, group_size))
    assert torch.equal(affine.quantize(restored, scales, zeros, bits, group_size), codes)


@given(weights(), bits_drawn)
def test_strides_do_not_matter(drawn, bits):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size)
    again = affine.choose_qparams(w.contiguous(), bits, group_size)
    assert torch.equal(scales, again[0])
    assert torch.equal(zeros, again[1])
    codes = affine.quantize(w, scales, zeros, bits, group_size)
    assert torch.equal(codes, affine.quantize(w.contiguous(), scales, zeros, bits, group_size))


@pytest.mark.parametrize(
    ("values", "restored"),
    [
        # A group of one sign must not be clipped: without zero in its range [5, 6] becomes [1, 1]. The scale is
        # 6/15, rounded down to fp16, so that 5 is just above 12.5 steps.
        ([5.0, 6.0], [5.2, 6.0]),
        ([-6.0, -5.0], [-6.0, -5.2]),
        ([3.0, 3.0], [3.0, 3.0]),
        ([-3.0, -3.0], [-3.0, -3.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([-7.0, 8.0], [-7.0, 8.0]),
    ],
)
def test_four_bit_by_hand(values, restored):
    w = torch.tensor([values])
    scales, zeros = affine.choose_qparams(w, 4, 2)
    got = affine.fake_quantize(w, scales, zeros, 4, 2)
    # The scale is rounded to fp16: 2^-11 of each value.
    torch.testing.assert_close(got, torch.tensor([restored]), rtol=2**-11, atol=0)


def test_zero_is_exact():
    w = torch.tensor([[-1.0, 0.0, 2.0, 0.3], [0.0, 5.0, 6.0, 7.0]])
    for bits in QUANTIZER_BITS:
        restored = affine.fake_quantize(w, *affine.choose_qparams(w, bits, 4), bits, 4)
        assert (restored[w == 0] == 0).all()


def test_groups_of_zeros_have_the_smallest_scale():
    scales, zeros = affine.choose_qparams(torch.zeros(2, 8), 4, 4)
    assert torch.equal(scales, torch.full((2, 2), affine.SMALLEST_SCALE).half().float())
    assert (zeros == 0).all()


@pytest.mark.parametrize("magnitude", [1e6, 1e30, 3e38])
def test_weights_beyond_fp16_scales_stay_finite(magnitude):
    w = torch.tensor([[-magnitude, 0.0, 1.0, magnitude]])
    scales, zeros = affine.choose_qparams(w, 4, 4)
    assert scales.item() == pytest.approx(min(2 * magnitude / 15, affine.LARGEST_SCALE))
    assert scales.half().isfinite().all()
    restored = affine.fake_quantize(w, scales, zeros, 4, 4)
    assert restored.isfinite().all()
    assert restored[0, 0] <= 0 <= restored[0, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_weight_dtypes(dtype):
    w = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales, zeros = affine.choose_qparams(w, 4, 16)
    expected = affine.choose_qparams(w.float(), 4, 16)
    assert torch.equal(scales, expected[0])
    assert torch.equal(zeros, expected[1])
    restored = affine.fake_quantize(w, scales, zeros, 4, 16)
    assert restored.dtype == dtype
    torch.testing.assert_close(
        restored, affine.fake_quantize(w.float(), scales, zeros, 4, 16).to(dtype), rtol=1e-7, atol=0
    )


def test_shrink_clips_the_range():
    w = torch.tensor([[-4.0, 1.0, 2.0, 8.0], [-4.0, 1.0, 2.0, 8.0]])
    full, _ = affine.choose_qparams(w, 4, 4)
    half, _ = affine.choose_qparams(w, 4, 4, shrink=0.5)
    each, _ = affine.choose_qparams(w, 4, 4, shrink=torch.tensor([[1.0], [0.5]]))
    torch.testing.assert_close(half, full / 2, rtol=1e-3, atol=0)
    assert torch.equal(each, torch.stack((full[0], half[1])))


def test_fractional_zeros_are_rounded_and_clamped():
    w = torch.linspace(-1, 1, 8).reshape(1, 8)
    scales = torch.full((1, 1), 0.125)
    expected = affine.fake_quantize(w, scales, torch.full((1, 1), 8.0), 4, 8)
    assert torch.equal(affine.fake_quantize(w, scales, torch.full((1, 1), 7.6), 4, 8), expected)
    highest = affine.fake_quantize(w, scales, torch.full((1, 1), 15.0), 4, 8)
    assert torch.equal(affine.fake_quantize(w, scales, torch.full((1, 1), 99.0), 4, 8), highest)


def straight_through(w, scales, zeros, bits, group_size):
    """The quantizer with `round` as the identity in the backward, by autograd."""

    def rounded(t):
        return t + (t.round() - t).detach()

    top = affine.quant_max(bits)
    scale = scales.repeat_interleave(group_size, 1)
    zero = rounded(zeros.clamp(0, top)).repeat_interleave(group_size, 1)
    return ((rounded(w / scale) + zero).clamp(0, top) - zero) * scale


@given(weights(), bits_drawn, st.sampled_from((1.0, 0.5)))
def test_straight_through_gradients_are_autograds(drawn, bits, shrink):
    w, group_size = drawn
    scales, zeros = affine.choose_qparams(w, bits, group_size, shrink=shrink)
    leaves = [tensor.double().detach().requires_grad_() for tensor in (w, scales, zeros + 0.25)]
    grad = torch.linspace(-1, 1, w.numel(), dtype=torch.float64).reshape(w.shape)
    output = straight_through(*leaves, bits, group_size)
    expected = torch.autograd.grad(output, leaves, grad)
    inputs = [leaf.detach() for leaf in leaves]
    torch.testing.assert_close(affine.fake_quantize(*inputs, bits, group_size), output.detach())
    got = affine.fake_quantize_backward(grad, *inputs, bits, group_size)
    # Values at the very end of the range may count as inside or clamped.
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max() + 1e-300))


def test_straight_through_gradients_by_hand():
    """One value inside the range, one clamped below, one above: scale 1, zero 2, codes 0..3."""
    w = torch.tensor([[0.25, -9.0, 9.0]], dtype=torch.float64)
    scales, zeros = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    grad_w, grad_scales, grad_zeros = affine.fake_quantize_backward(torch.ones_like(w), w, scales, zeros, 2, 3)
    assert grad_w.tolist() == [[1.0, 0.0, 0.0]]
    assert grad_scales.tolist() == [[(0 - 0.25) + (0 - 2) + (3 - 2)]]
    assert grad_zeros.tolist() == [[-2.0]]


def test_zeros_out_of_range_get_no_gradient():
    w = torch.tensor([[-9.0, 9.0]])
    _, _, grad_zeros = affine.fake_quantize_backward(
        torch.ones(1, 2), w, torch.ones(1, 1), torch.full((1, 1), -1.0), 4, 2
    )
    assert grad_zeros.item() == 0.0


def test_quant_max():
    assert [affine.quant_max(bits) for bits in QUANTIZER_BITS] == [3, 7, 15, 255]


@pytest.mark.parametrize("bits", [0, 1, 5, 16, "4"])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=r"bits must be one of \(2, 3, 4, 8\), got"):
        affine.choose_qparams(torch.ones(1, 4), bits, 4)


@pytest.mark.parametrize(("shape", "group_size"), [((4,), 4), ((1, 2, 4), 4), ((2, 6), 4), ((2, 6), 0)])
def test_bad_weights_are_refused(shape, group_size):
    with pytest.raises(ShapeError, match=r"weight must be \(N, K\) with K divisible by group_size"):
        affine.choose_qparams(torch.ones(shape), 4, group_size)


@pytest.mark.parametrize("which", [0, 1])
def test_bad_qparams_are_refused(which):
    qparams = [torch.ones(2, 2), torch.ones(2, 2)]
    qparams[which] = torch.ones(2, 3)
    message = r"scales and zeros must be \(2, 2\) for a weight \(2, 8\) at group_size 4, got"
    with pytest.raises(ShapeError, match=message):
        affine.quantize(torch.ones(2, 8), *qparams, 4, 4)
    with pytest.raises(ShapeError, match=message):
        affine.dequantize(torch.ones(2, 8, dtype=torch.uint8), *qparams, 4)
    with pytest.raises(ShapeError, match=message):
        affine.fake_quantize(torch.ones(2, 8), *qparams, 4, 4)
