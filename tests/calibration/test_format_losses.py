from __future__ import annotations

import pytest
import torch

from parofx import CalibrationConfig
from parofx.calibration.format_losses import TransformFormat, format_losses

FORM = TransformFormat(64, 4)
CONFIG = CalibrationConfig(steps=4, clip_ratios=(1.0, 0.8))


def weight() -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2e-5, 2e-4, 0.02, 40.0])
def test_without_data_a_loss_is_relative(size):
    """Steps outside fp16's range are moved into it by the channel scales, which says nothing about the error."""
    expected = format_losses([weight()], [None], None, FORM, [(3, 4, 8)], CONFIG)
    found = format_losses([weight() * size], [None], None, FORM, [(3, 4, 8)], CONFIG)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_short_floats_are_summed_in_longer_ones(dtype):
    matrix = (weight() * 2e-5).to(dtype)
    expected = format_losses([matrix.float()], [None], None, FORM, [(3, 4)], CONFIG)
    torch.testing.assert_close(format_losses([matrix], [None], None, FORM, [(3, 4)], CONFIG), expected)


def test_without_data_a_loss_is_half_the_relative_squared_error():
    matrix = weight()
    [[loss]] = format_losses([matrix], [None], None, TransformFormat(64, 0), [(4,)], CalibrationConfig(steps=0))
    grouped = matrix.view(48, 2, 64)
    step = (grouped.amax(2) - grouped.amin(2)) / 15
    # Clipping gains a little over steps from end to end.
    expected = 64 * float((step**2 / 12).sum() / matrix.square().sum()) / 2
    assert 0.75 * expected < loss < 1.05 * expected


def test_weights_of_zero_lose_nothing():
    [[loss]] = format_losses([torch.zeros(16, 128)], [None], None, FORM, [(4,)], CONFIG)
    assert loss == 0
