import pytest
import torch

from parofx import affine
from parofx.calibration.feedback import RoundedWeight
from parofx.calibration.fitting import choose_damping, fit, rotate_weight
from parofx.calibration.statistics import InputStatistics
from parofx.config import CalibrationConfig
from parofx.errors import ConfigError
from parofx.rotation import inverse_rotate

G, K = 32, 64


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(K, generator=generator).exp()
    return [torch.randn(n, K, generator=generator) * channels for n in (48, 16)]


def inputs(seed: int = 0, rows: int = 256) -> torch.Tensor:
    """Return rows of correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, K, generator=generator) @ torch.randn(K, K, generator=torch.Generator().manual_seed(7))


def statistics(seed: int = 0, *, full: bool = False, rows: int = 256) -> InputStatistics:
    result = InputStatistics(K, G, full=full)
    result.update(inputs(seed, rows))
    return result


def fitted(given=None, observed=None, held_out=None, bits=None, **options):
    config = CalibrationConfig(**({"steps": 30} | options))
    given = given or weights()
    return fit(given, observed, held_out, bits=bits or [4] * len(given), group_size=G, krot=4, config=config)


@pytest.mark.parametrize(
    "observed", [None, statistics(), statistics(full=True)], ids=["weights alone", "nearest", "feedback"]
)
def test_tensors_are_what_a_checkpoint_holds(observed):
    result = fitted(observed=observed)
    assert (result.pairs.dtype, tuple(result.pairs.shape)) == (torch.int16, (4, K))
    assert (result.theta.dtype, tuple(result.theta.shape)) == (torch.float16, (4, K // 2))
    assert (result.channel_scales.dtype, tuple(result.channel_scales.shape)) == (torch.float16, (1, K))
    assert [tuple(scales.shape) for scales, _ in result.grids] == [(48, K // G), (16, K // G)]
    for scales, zeros in result.grids:
        assert torch.equal(scales, scales.half().float())
        assert torch.equal(zeros, zeros.round().clamp(0, 15))
    assert result.loss_after < result.loss_before
    assert result.angle_rms == pytest.approx(float(result.theta.float().pow(2).mean().sqrt()))
    assert result.angle_rms > 0.01
    if observed is None or not observed.full:
        assert result.codes is result.nearest_errors is result.damping is None
        assert result.weight(0) is None
    else:
        assert [(one.dtype, tuple(one.shape)) for one in result.codes] == [
            (torch.uint8, (48, K)),
            (torch.uint8, (16, K)),
        ]
        assert result.damping == 0.1  # nothing is held out: the middle candidate


def test_errors_are_those_of_the_outputs():
    """The reported error is E‖(W − Ŵ)x‖² / E‖Wx‖² for inputs that have the given moments inside each group."""
    observed = statistics()
    result = fitted(observed=observed)
    rotation = (result.pairs, result.theta, result.channel_scales)
    for weight, grid, error in zip(weights(), result.grids, result.errors, strict=True):
        rounded = affine.fake_quantize(rotate_weight(weight, *rotation, G), *grid, 4, G)
        reciprocal = result.channel_scales.float().reciprocal()
        back = inverse_rotate(rounded, result.pairs, result.theta, reciprocal, G)
        expected = energy(back - weight, observed.block_gram) / energy(weight, observed.block_gram)
        assert error == pytest.approx(expected, rel=1e-3)


def test_feedback_lowers_the_error_of_the_outputs_and_says_by_how_much():
    x = inputs()
    result = fitted(observed=statistics(full=True))
    assert result.codes is not None
    for index, weight in enumerate(weights()):
        found = result.weight(index)
        measured = float((x @ (found - weight).t()).square().sum() / (x @ weight.t()).square().sum())
        # Moments are of inputs rounded to bf16 where that is faster.
        assert result.errors[index] == pytest.approx(measured, rel=0.02)
        assert result.errors[index] < 0.8 * result.nearest_errors[index]


def test_a_fit_to_what_feedback_leaves_leaves_less():
    def error(seed, objective):
        found = fitted(weights(seed), statistics(seed, full=True, rows=1024), objective=objective)
        return sum(found.errors)

    ratios = [error(seed, "ldl") / error(seed, "range") for seed in range(4)]
    assert sum(ratios) / 4 < 0.97


@pytest.mark.parametrize("objective", ["ldl", "range"])
def test_too_little_damping_is_said(objective):
    with pytest.raises(ConfigError, match=r"singular: error feedback needs a larger CalibrationConfig\.damping"):
        fitted(observed=statistics(full=True, rows=8), damping=(1e-9,), objective=objective)


@pytest.mark.parametrize(
    ("observed", "options"),
    [(None, {}), (statistics(), {}), (statistics(full=True), {"rounding": "nearest"})],
    ids=["weights alone", "nearest", "nearest on full moments"],
)
def test_without_feedback_a_fit_expects_rounding_to_nearest(observed, options):
    found, expected = (fitted(observed=observed, objective=objective, **options) for objective in ("ldl", "range"))
    assert torch.equal(found.theta, expected.theta)
    assert found.loss_after == expected.loss_after


def test_a_weight_rounded_with_feedback_has_its_codes_as_the_nearest_ones():
    """So a graph that holds the weight needs no codes besides; also in 16 bit."""
    result = fitted(observed=statistics(full=True))
    rotation = (result.pairs, result.theta, result.channel_scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for index, (codes, grid) in enumerate(zip(result.codes, result.grids, strict=True)):
            rotated = rotate_weight(result.weight(index).to(dtype), *rotation, G)
            assert torch.equal(affine.quantize(rotated, *grid, 4, G), codes)
            assert torch.equal(RoundedWeight(codes, *grid).dequantized(), affine.fake_quantize(rotated, *grid, 4, G))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fit_is_the_same_whatever_the_default_dtype(dtype):
    given, observed = weights(), statistics(full=True)
    expected, before = fitted(given, observed), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = fitted(given, observed)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.theta, expected.theta)
    assert all(map(torch.equal, found.codes, expected.codes))


def test_damping_is_the_best_on_held_out_input():
    few, many = statistics(1, full=True, rows=24), statistics(2, full=True, rows=2048)
    weight = torch.cat(weights())
    scales, zeros = affine.choose_qparams(weight, 4, G)
    candidates = (0.001, 0.1, 1.0)

    def chosen(observed, held_out):
        config = CalibrationConfig(damping=candidates)
        return choose_damping(weight, scales, zeros, observed.gram, held_out.gram, bits=4, config=config)

    assert chosen(few, few) < chosen(few, many)
    everything = statistics(1, full=True, rows=24)
    everything.merge(many)
    assert fitted(observed=everything, held_out=many, damping=candidates).damping > 0.001
    assert fitted(observed=everything, damping=candidates).damping == 0.1


def energy(weight: torch.Tensor, block_gram: torch.Tensor) -> float:
    groups = weight.view(len(weight), -1, G)
    return float(torch.einsum("ngi,gij,ngj->", groups, block_gram, groups))


def test_no_steps_leave_the_weights_where_they_are():
    result = fitted(steps=0)
    assert not result.theta.any()
    assert torch.equal(result.channel_scales, torch.ones(1, K).half())
    assert result.loss_after == result.loss_before


def test_the_caller_may_have_switched_gradients_off():
    with torch.no_grad():
        without = fitted()
    assert torch.equal(without.theta, fitted().theta)
    assert not without.theta.requires_grad
    assert not any(part.requires_grad for grid in without.grids for part in grid)


def test_rotating_a_weight_divides_by_the_scales_that_are_stored():
    result = fitted()
    weight = weights()[0].to(torch.bfloat16)
    rotated = rotate_weight(weight, result.pairs, result.theta, result.channel_scales, G)
    assert rotated.dtype == torch.float32
    # An orthogonal rotation keeps the norm of what was scaled.
    expected = (weight.float() / result.channel_scales.float()).norm(dim=1)
    torch.testing.assert_close(rotated.norm(dim=1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("full", [False, True], ids=["nearest", "feedback"])
def test_siblings_may_have_codes_of_different_widths(full):
    """Each has the codes and the grid of its own width, as if all had it: the rotation does not depend on it."""
    mixed = fitted(observed=statistics(full=full), bits=[3, 8])
    uniform = {bits: fitted(observed=statistics(full=full), bits=[bits, bits]) for bits in (3, 8)}
    for index, bits in enumerate((3, 8)):
        assert torch.equal(mixed.theta, uniform[bits].theta)
        assert mixed.errors[index] == uniform[bits].errors[index]
        for part, expected in zip(mixed.grids[index], uniform[bits].grids[index], strict=True):
            assert torch.equal(part, expected)
        if full:
            assert torch.equal(mixed.codes[index], uniform[bits].codes[index])
    assert mixed.errors[0] > 100 * mixed.errors[1]
