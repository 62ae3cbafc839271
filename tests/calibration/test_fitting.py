import pytest
import torch

from parofx import affine
from parofx.calibration.fitting import fit, rotate_weight
from parofx.config import CalibrationConfig
from parofx.rotation import inverse_rotate

G, K = 32, 64


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(K, generator=generator).exp()
    return [torch.randn(n, K, generator=generator) * channels for n in (48, 16)]


def gram(seed: int = 0) -> torch.Tensor:
    rows = torch.randn(256, K // G, G, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("mgi,mgj->gij", rows, rows) / len(rows)


def fitted(given=None, block_gram=None, **options):
    config = CalibrationConfig(**({"steps": 30} | options))
    power = None if block_gram is None else block_gram.diagonal(dim1=1, dim2=2).flatten()
    return fit(given or weights(), power, block_gram, bits=4, group_size=G, krot=4, config=config)


@pytest.mark.parametrize("block_gram", [None, gram()], ids=["weights alone", "statistics"])
def test_tensors_are_what_a_checkpoint_holds(block_gram):
    result = fitted(block_gram=block_gram)
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


def test_errors_are_those_of_the_outputs():
    """The reported error is E‖(W − Ŵ)x‖² / E‖Wx‖² for inputs that have the given moments inside each group."""
    block_gram = gram()
    result = fitted(block_gram=block_gram)
    rotation = (result.pairs, result.theta, result.channel_scales)
    for weight, grid, error in zip(weights(), result.grids, result.errors, strict=True):
        rounded = affine.fake_quantize(rotate_weight(weight, *rotation, G), *grid, 4, G)
        reciprocal = result.channel_scales.float().reciprocal()
        back = inverse_rotate(rounded, result.pairs, result.theta, reciprocal, G)
        assert error == pytest.approx(energy(back - weight, block_gram) / energy(weight, block_gram), rel=1e-3)


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
