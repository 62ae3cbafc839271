import pytest
import torch

from parofx.calibration.guess_power import guess_power


def test_small_columns_are_guessed_to_carry_power() -> None:
    weight = torch.ones(4, 6) * torch.tensor([1.0, 1.0, 1.0, 2.0, 0.9, 0.0])
    assert guess_power(weight).tolist() == pytest.approx([1, 1, 1, 1, 0.9**-8, 10])


def test_a_zero_weight_tells_nothing() -> None:
    assert guess_power(torch.zeros(2, 3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_magnitude_does_not_count(scale: float) -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guess_power(scale * weight), guess_power(weight))
