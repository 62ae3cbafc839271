import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import affine, rotation
from parofx.calibration import rounding
from parofx.calibration.rounding import choose_clipped_qparams, relative_error, rotated_block_gram, rotated_gram
from parofx.calibration.statistics import InputStatistics
from parofx.errors import ConfigError, ShapeError
from parofx.pairing import make_pairs

GROUP = 8
RATIOS = (1.0, 0.9, 0.8, 0.6)
#: fp32 sums over a few hundred terms.
TOLERANCE = 1e-4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_gram(groups: int, seed: int = 0) -> torch.Tensor:
    x = normal(groups, 3 * GROUP, GROUP, seed=seed) * torch.logspace(-1, 1, GROUP)
    return x.transpose(1, 2) @ x


def error_of(w: torch.Tensor, qparams: tuple[torch.Tensor, torch.Tensor], gram: torch.Tensor | None) -> torch.Tensor:
    delta = (affine.fake_quantize(w, *qparams, 4, GROUP) - w).view(len(w), -1, GROUP).double()
    gram = torch.eye(GROUP).expand(delta.shape[1], GROUP, GROUP) if gram is None else gram
    return torch.einsum("ngi,gij,ngj->ng", delta, gram.double(), delta)


@given(rows=st.integers(1, 9), groups=st.integers(1, 3), with_gram=st.booleans(), seed=st.integers(0, 99))
def test_each_group_gets_its_best_ratio(rows: int, groups: int, with_gram: bool, seed: int) -> None:
    w = normal(rows, groups * GROUP, seed=seed) ** 3
    gram = random_gram(groups, seed) if with_gram else None
    chosen = choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=gram)
    best = torch.stack([error_of(w, affine.choose_qparams(w, 4, GROUP, shrink=ratio), gram) for ratio in RATIOS]).amin(
        0
    )
    torch.testing.assert_close(error_of(w, chosen, gram), best, rtol=TOLERANCE, atol=1e-7)
    assert torch.equal(chosen[0], chosen[0].half().float())
    assert torch.equal(chosen[1], chosen[1].round())


def test_one_ratio_is_the_plain_range() -> None:
    w = normal(5, 2 * GROUP)
    chosen = choose_clipped_qparams(w.bfloat16(), bits=4, group_size=GROUP, clip_ratios=(1.0,), moments=None)
    for found, expected in zip(chosen, affine.choose_qparams(w.bfloat16(), 4, GROUP), strict=True):
        assert torch.equal(found, expected)


def test_an_outlier_in_a_silent_channel_is_clipped() -> None:
    w = normal(64, GROUP) * 0.1
    w[:, 3] = 1.0
    gram = torch.eye(GROUP)
    gram[3, 3] = 1e-6
    kept, _ = choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=None)
    clipped, _ = choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=gram[None])
    assert clipped.mean() < 0.9 * kept.mean()


def test_moments_beyond_fp32_leave_finite_parameters() -> None:
    w = normal(3, GROUP)
    scales, zeros = choose_clipped_qparams(
        w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=torch.full((1, GROUP, GROUP), 3e38)
    )
    assert scales.isfinite().all()
    assert zeros.isfinite().all()


@pytest.mark.parametrize("with_gram", [False, True])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, with_gram: bool) -> None:
    w = normal(11, 2 * GROUP)
    gram = random_gram(2) if with_gram else None
    whole = choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=gram)
    error = relative_error(w, w * 1.1, gram)
    monkeypatch.setattr(rounding, "_CHUNK_ELEMENTS", 4 * w.shape[1])
    for found, expected in zip(
        choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=RATIOS, moments=gram), whole, strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert relative_error(w, w * 1.1, gram) == pytest.approx(error)


@given(groups=st.integers(1, 3), krot=st.integers(0, 4), seed=st.integers(0, 99))
def test_rotated_gram_is_the_gram_of_rotated_inputs(groups: int, krot: int, seed: int) -> None:
    in_features = groups * GROUP
    pairs = make_pairs(in_features, GROUP, krot, seed=seed)
    theta = normal(krot, in_features // 2, seed=seed).half()
    channel_scales = (normal(1, in_features, seed=seed + 1).exp()).half()
    x = normal(40, in_features, seed=seed + 2)
    before, after = InputStatistics(in_features, GROUP), InputStatistics(in_features, GROUP)
    before.update(x)
    after.update(rotation.rotate(x, pairs, theta, channel_scales, GROUP))
    found = rotated_block_gram(before.block_gram, pairs, theta, channel_scales, GROUP)
    scale = after.block_gram.abs().amax().item()
    torch.testing.assert_close(found, after.block_gram, rtol=TOLERANCE, atol=TOLERANCE * scale)


@given(groups=st.integers(1, 3), krot=st.integers(0, 4), seed=st.integers(0, 99))
def test_rotated_full_gram_is_the_gram_of_rotated_inputs(groups: int, krot: int, seed: int) -> None:
    in_features = groups * GROUP
    pairs = make_pairs(in_features, GROUP, krot, seed=seed)
    theta = normal(krot, in_features // 2, seed=seed).half()
    channel_scales = (normal(1, in_features, seed=seed + 1).exp()).half()
    x = normal(40, in_features, seed=seed + 2)
    turned = rotation.rotate(x, pairs, theta, channel_scales, GROUP)
    found = rotated_gram(x.t() @ x, pairs, theta, channel_scales, GROUP)
    expected = turned.t() @ turned
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * expected.abs().amax().item())


def test_relative_error_is_that_of_the_outputs() -> None:
    x, w = normal(50, GROUP), normal(6, GROUP, seed=1)
    w_hat = w + 0.1 * normal(6, GROUP, seed=2)
    gram = (x.t() @ x / len(x))[None]
    expected = (x @ (w_hat - w).t()).square().sum() / (x @ w.t()).square().sum()
    assert relative_error(w, w_hat, gram) == pytest.approx(expected.item(), rel=TOLERANCE)
    plain = (w_hat - w).square().sum() / w.square().sum()
    assert relative_error(w, w_hat, None) == pytest.approx(plain.item(), rel=TOLERANCE)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e20, 1e37])
def test_relative_error_of_very_small_and_very_large_weights(scale: float) -> None:
    w, delta = normal(3, GROUP), 0.1 * normal(3, GROUP, seed=1)
    expected = relative_error(w, w + delta, None)
    assert relative_error(w * scale, (w + delta) * scale, None) == pytest.approx(expected, rel=1e-3)


def test_relative_error_of_a_zero_weight() -> None:
    assert relative_error(torch.zeros(2, GROUP), torch.zeros(2, GROUP), None) == 0.0


def test_errors() -> None:
    w = normal(3, 2 * GROUP)
    wrong = torch.zeros(1, GROUP, GROUP)
    with pytest.raises(ConfigError, match="clip_ratios must hold at least one ratio"):
        choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=(), moments=None)
    with pytest.raises(ShapeError, match=r"weight must be \(N, K\) with K divisible by group_size 5"):
        choose_clipped_qparams(w, bits=4, group_size=5, clip_ratios=(1.0,), moments=None)
    with pytest.raises(ShapeError, match=r"block_gram must be \(2, 8, 8\) for 16 channels"):
        choose_clipped_qparams(w, bits=4, group_size=GROUP, clip_ratios=(1.0,), moments=wrong)
    with pytest.raises(ShapeError, match="block_gram must be"):
        rotated_block_gram(wrong, make_pairs(16, GROUP, 2, seed=0), torch.zeros(2, 8), torch.ones(16), GROUP)
    with pytest.raises(ShapeError, match=r"gram must be \(16, 16\) to fit the rotation, got \(8, 8\)"):
        rotated_gram(wrong[0], make_pairs(16, GROUP, 2, seed=0), torch.zeros(2, 8), torch.ones(16), GROUP)
    with pytest.raises(ShapeError, match="two matrices of one shape"):
        relative_error(w, w[:2], None)
    with pytest.raises(ShapeError, match="block_gram must be"):
        relative_error(w, w, wrong)


def test_squares_are_weighed_where_error_feedback_follows():
    w = torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, GROUP, generator=torch.Generator().manual_seed(1)) ** 4
    options = {"bits": 3, "group_size": GROUP, "clip_ratios": RATIOS}
    found = choose_clipped_qparams(w, moments=weights, **options)
    expected = choose_clipped_qparams(w, moments=torch.diag_embed(weights), **options)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    plain = choose_clipped_qparams(w, moments=None, **options)
    assert not torch.equal(found[0], plain[0])
    with pytest.raises(ShapeError, match=r"weights of squares must be \(2, 8\)"):
        choose_clipped_qparams(w, moments=weights[:, 1:], **options)
