import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parofx import affine, rotation
from parofx.calibration import range_objective
from parofx.calibration.activation_energy import ActivationEnergy, DiagonalEnergy, FeedbackEnergy
from parofx.calibration.guess_power import guess_power
from parofx.calibration.range_objective import RangeObjective, TransformFit, fit_transform
from parofx.config import CalibrationConfig
from parofx.errors import DataError, ShapeError
from parofx.pairing import make_pairs, trainable_angles
from parofx.precision import product_precision

GROUP = 16
KROT = 4
CONFIG = CalibrationConfig(steps=20, rows=32)
#: fp32 sums over a few hundred terms.
TOLERANCE = 1e-4
FP16_NORMAL = (2.0**-14, 65504.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier_weight(rows: int = 40, groups: int = 2, seed: int = 0) -> torch.Tensor:
    """Columns of very different magnitude, as the rotation is for."""
    return normal(rows, groups * GROUP, seed=seed) * normal(groups * GROUP, seed=seed + 1).exp()


def some_power(in_features: int, seed: int = 5) -> torch.Tensor:
    return (2 * normal(in_features, seed=seed)).exp()


def fit(
    *weights: torch.Tensor,
    power: torch.Tensor | None = None,
    krot: int = KROT,
    config: CalibrationConfig = CONFIG,
    seed: int = 0,
) -> TransformFit:
    return fit_transform(weights, power, bits=4, group_size=GROUP, krot=krot, config=config, seed=seed)


class WatchedEnergy(DiagonalEnergy):
    """Notes the precision in which products of fp32 matrices are computed beside it."""

    def __init__(self, power: torch.Tensor, group_size: int) -> None:
        super().__init__(power, group_size)
        self.seen: set[str] = set()

    def gradients(self, matrices: torch.Tensor, alpha: torch.Tensor) -> tuple[None, torch.Tensor]:
        self.seen |= {torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision}
        return super().gradients(matrices, alpha)


def rotated(weight: torch.Tensor, result: TransformFit) -> torch.Tensor:
    alpha = result.channel_scales.double().reciprocal()
    return rotation.rotate(weight.double(), result.pairs, result.theta.double(), alpha, GROUP)


def expected_loss(weight: torch.Tensor, power: torch.Tensor, result: TransformFit) -> float:
    """`L` from the definition: the fp16 parameters, real rotation, double precision."""
    parts = rotated(weight, result).view(len(weight), -1, GROUP)
    steps = (parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)) / 15
    energy = (power.double() * result.channel_scales[0].double() ** 2).view(-1, GROUP).sum(1)
    outputs = (weight.double() ** 2 * power.double()).sum()
    return ((steps**2).sum(0) * energy / 12).sum().item() / outputs.item()


@given(
    groups=st.integers(1, 2),
    krot=st.integers(0, 3),
    method=st.sampled_from(["matching", "greedy"]),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_autograd(groups: int, krot: int, method: str, seed: int) -> None:
    in_features = groups * GROUP
    weight, power = normal(12, in_features, seed=seed), some_power(in_features, seed)
    pairs = make_pairs(in_features, GROUP, krot, method=method, seed=seed)
    theta = normal(krot, in_features // 2, seed=seed + 1).requires_grad_()
    log_alpha = (0.3 * normal(in_features, seed=seed + 2)).requires_grad_()

    matrix = rotation.dense_form(pairs, theta, GROUP)
    parts = torch.bmm((weight * log_alpha.exp()).view(12, groups, GROUP).transpose(0, 1), matrix)
    spans = parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)
    energy = (power / log_alpha.exp() ** 2).view(groups, GROUP).sum(1)
    (spans.square().sum(1) * energy).log().sum().backward()

    objective = RangeObjective(weight, DiagonalEnergy(power, GROUP), pairs, bits=4, group_size=GROUP)
    grad_theta, grad_log_alpha = objective.gradients(theta.detach(), log_alpha.detach(), slice(None))
    expected = theta.grad * trainable_angles(pairs, GROUP)
    torch.testing.assert_close(grad_theta, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(grad_log_alpha, log_alpha.grad, rtol=TOLERANCE, atol=TOLERANCE)


class FirstGradients:
    """An energy whose gradients are those of the first call."""

    is_costly = False

    def __init__(self, energy: ActivationEnergy) -> None:
        self._energy, self._first = energy, None

    def gradients(self, matrices: Tensor, alpha: Tensor) -> tuple[Tensor | None, Tensor]:
        if self._first is None:
            self._first = self._energy.gradients(matrices, alpha)
        return self._first


@pytest.mark.parametrize("costly", [False, True])
def test_only_costly_gradients_of_the_energy_serve_two_steps(costly: bool) -> None:
    rows, pairs = normal(12, 2 * GROUP), make_pairs(2 * GROUP, GROUP, 2, seed=0)
    gram = torch.eye(2 * GROUP) + 0.1 * normal(2 * GROUP, 5) @ normal(5, 2 * GROUP)
    gram = gram @ gram.t()
    energy = FeedbackEnergy(gram, GROUP, 0.1) if costly else DiagonalEnergy(gram.diagonal(), GROUP)
    states = [(normal(2, GROUP, seed=seed), normal(2 * GROUP, seed=seed)) for seed in (1, 2, 3)]

    def gradients(energy: ActivationEnergy, lagging: tuple[bool, ...] = (False, False, False)) -> list[list[Tensor]]:
        objective = RangeObjective(rows, energy, pairs, bits=4, group_size=GROUP)
        calls = zip(states, lagging, strict=True)
        return [
            [one.clone() for one in objective.gradients(*state, slice(None), lagging=lags)] for state, lags in calls
        ]

    fresh, from_the_first = gradients(energy), gradients(FirstGradients(energy))
    # The first call has none before it to lag behind.
    expected = [fresh[0], from_the_first[1] if costly else fresh[1], fresh[2]]
    torch.testing.assert_close(gradients(energy, (True, True, False)), expected, rtol=0, atol=0)
    assert not torch.equal(fresh[1][1], from_the_first[1][1])


@given(groups=st.integers(1, 3), krot=st.integers(0, 4), with_power=st.booleans(), seed=st.integers(0, 99))
def test_a_fit_is_lossless_safe_and_never_worse(groups: int, krot: int, with_power: bool, seed: int) -> None:
    in_features = groups * GROUP
    weight = outlier_weight(20, groups, seed)
    power = some_power(in_features, seed) if with_power else None
    result = fit(weight, power=power, krot=krot, config=dataclasses.replace(CONFIG, steps=6), seed=seed)

    assert (result.pairs.dtype, tuple(result.pairs.shape)) == (torch.int16, (krot, in_features))
    assert (result.theta.dtype, tuple(result.theta.shape)) == (torch.float16, (krot, in_features // 2))
    assert (result.channel_scales.dtype, tuple(result.channel_scales.shape)) == (torch.float16, (1, in_features))
    low, high = FP16_NORMAL
    assert result.channel_scales.ge(low).logical_and(result.channel_scales.le(high)).all()
    assert result.loss_after <= result.loss_before
    assert result.improved == (result.loss_after < result.loss_before)

    x = normal(5, in_features, seed=seed).double()
    x_rot = rotation.rotate(x, result.pairs, result.theta.double(), result.channel_scales.double(), GROUP)
    torch.testing.assert_close(x_rot @ rotated(weight, result).t(), x @ weight.double().t())


@pytest.mark.parametrize("with_power", [False, True])
def test_losses_are_those_of_the_definition_on_all_rows(monkeypatch: pytest.MonkeyPatch, with_power: bool) -> None:
    monkeypatch.setattr(range_objective, "_CHUNK_ELEMENTS", 7 * 2 * GROUP)
    weight = outlier_weight(100)
    power = some_power(2 * GROUP) if with_power else None
    result = fit(weight, power=power)
    given_power = guess_power(weight) if power is None else power
    assert result.loss_after == pytest.approx(expected_loss(weight, given_power, result), rel=1e-3)
    identity = fit(weight, power=power, config=dataclasses.replace(CONFIG, steps=0))
    assert result.loss_before == pytest.approx(expected_loss(weight, given_power, identity), rel=1e-3)


def test_the_loss_predicts_the_error_of_rounding() -> None:
    weight, power = outlier_weight(200), some_power(2 * GROUP)
    result = fit(weight, power=power)
    w_rot = rotated(weight, result).float()
    delta = affine.fake_quantize(w_rot, *affine.choose_qparams(w_rot, 4, GROUP), 4, GROUP) - w_rot
    alpha = result.channel_scales.float().reciprocal()
    delta = rotation.inverse_rotate(delta, result.pairs, result.theta.float(), alpha, GROUP)
    relative = (delta.square() * power).sum() / (weight.square() * power).sum()
    assert relative.item() == pytest.approx(result.loss_after, rel=0.2)


def test_more_rounds_and_more_steps_help() -> None:
    weight, power = outlier_weight(128), some_power(2 * GROUP)
    scales_only = fit(weight, power=power, krot=0)
    short, full = fit(weight, power=power), fit(weight, power=power, config=dataclasses.replace(CONFIG, steps=80))
    assert full.loss_after < short.loss_after < scales_only.loss_after < 0.8 * scales_only.loss_before
    assert full.theta.any()


def test_same_seed_same_fit_and_other_seed_other_pairs() -> None:
    weight = outlier_weight(100)
    first, second, other = fit(weight), fit(weight), fit(weight, seed=1)
    for name in ("pairs", "theta", "channel_scales"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.loss_after == second.loss_after
    assert not torch.equal(first.pairs, other.pairs)


def test_siblings_are_one_matrix_in_any_dtype() -> None:
    weight = outlier_weight(48).bfloat16()
    joined = fit(weight.float())
    tied = fit(weight[:8], weight[8:40], weight[40:])
    assert torch.equal(joined.theta, tied.theta)
    assert torch.equal(joined.channel_scales, tied.channel_scales)


def test_zero_steps_leave_the_identity() -> None:
    result = fit(outlier_weight(), power=some_power(2 * GROUP), config=dataclasses.replace(CONFIG, steps=0))
    assert not result.theta.any()
    assert (result.channel_scales == 1).all()
    assert result.loss_before == result.loss_after
    assert not result.improved


def test_dummy_pairs_keep_angle_zero() -> None:
    config = dataclasses.replace(CONFIG, pairs="greedy")
    result = fit_transform([normal(40, 12)], None, bits=4, group_size=6, krot=5, config=config, seed=1)
    trainable = trainable_angles(result.pairs, 6)
    assert not trainable.all()
    assert not result.theta[~trainable].any()
    assert result.theta[trainable].any()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights(value: float) -> None:
    result = fit(torch.full((8, 2 * GROUP), value))
    assert result.theta.isfinite().all()
    assert result.channel_scales.isfinite().all()
    assert 0 <= result.loss_after <= result.loss_before
    if value == 0:
        assert result.loss_before == 0


def test_dead_channels_and_dead_inputs() -> None:
    weight, power = outlier_weight(), some_power(2 * GROUP)
    weight[:, 3] = 0
    power[5] = 0
    power[GROUP:] = 0
    result = fit(weight, power=power)
    assert result.improved
    assert result.channel_scales.isfinite().all()
    all_dead = fit(weight, power=torch.zeros(2 * GROUP))
    all_alike = fit(weight, power=torch.ones(2 * GROUP))
    assert torch.equal(all_dead.theta, all_alike.theta)
    assert all_dead.loss_after == pytest.approx(all_alike.loss_after)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_fit_does_not_depend_on_magnitude(scale: float) -> None:
    weight, power = outlier_weight(), some_power(2 * GROUP)
    result, plain = fit(weight * scale, power=power / scale), fit(weight, power=power)
    assert result.channel_scales.isfinite().all()
    assert result.loss_before == pytest.approx(plain.loss_before, rel=1e-3)
    assert result.loss_after <= result.loss_before
    if 1e-10 < scale < 1e10:
        assert result.loss_after == pytest.approx(plain.loss_after, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_steps_of_unusual_weights_fit_fp16(scale: float) -> None:
    weight = outlier_weight() * scale
    result = fit(weight)
    steps, _ = affine.choose_qparams(rotated(weight, result).float(), 4, GROUP)
    assert steps.min() > FP16_NORMAL[0]
    assert steps.max() < FP16_NORMAL[1]


@pytest.mark.parametrize(
    "weights", [[], [torch.zeros(4)], [torch.zeros(4, 16), torch.zeros(4, 32)], [torch.zeros(0, 16)]]
)
def test_weights_that_do_not_fit(weights: list[torch.Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"siblings' weights must be matrices \(N_i, K\) of one K"):
        fit(*weights)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ShapeError, match="group_size must be even and divide in_features"):
        fit(torch.ones(4, 24))


def test_power_of_another_size() -> None:
    with pytest.raises(ShapeError, match=r"power must be \(16,\) to fit the weights, got \(8,\)"):
        fit(torch.ones(4, 16), power=torch.ones(8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_power_that_is_not_one(value: float) -> None:
    power = torch.ones(16)
    power[2] = value
    with pytest.raises(DataError, match="power must be finite and not negative"):
        fit(torch.ones(4, 16), power=power)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    weight = torch.ones(4, 16)
    weight[1, 2] = value
    with pytest.raises(DataError, match="weights must be finite"):
        fit(weight)


def test_a_fit_multiplies_in_fp32_whatever_the_user_has_set() -> None:
    """Products of bf16 or TF32 factors would make moments of little damping indefinite."""
    energy, expected = WatchedEnergy(some_power(2 * GROUP), GROUP), fit(outlier_weight())
    with product_precision("fast"):
        found = fit_transform(
            [outlier_weight()], None, bits=4, group_size=GROUP, krot=KROT, config=CONFIG, seed=0, energy=energy
        )
        assert torch.equal(fit(outlier_weight()).theta, expected.theta)
    assert energy.seen == {"ieee"}
    assert found.improved
