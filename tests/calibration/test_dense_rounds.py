import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx.calibration.dense_rounds import DenseRounds
from parofx.errors import ShapeError
from parofx.pairing import make_pairs
from parofx.rotation import dense_form

#: Eight fp32 rounds.
TOLERANCE = 1e-5


@given(
    group_size=st.sampled_from([2, 6, 16]),
    groups=st.integers(1, 3),
    krot=st.integers(0, 8),
    method=st.sampled_from(["matching", "greedy"]),
    seed=st.integers(0, 99),
)
def test_matrices_and_gradient_are_those_of_dense_form(
    group_size: int, groups: int, krot: int, method: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(groups * group_size, group_size, krot, method=method, seed=seed)
    rounds = DenseRounds(pairs, group_size)
    for _ in range(2):  # the second use must not see the first
        theta = torch.randn(krot, groups * group_size // 2, generator=generator).requires_grad_()
        grad = torch.randn(groups, group_size, group_size, generator=generator)
        expected = dense_form(pairs, theta, group_size).transpose(1, 2)
        torch.testing.assert_close(rounds.forward(theta.detach()), expected, rtol=TOLERANCE, atol=TOLERANCE)
        (expected_grad,) = torch.autograd.grad(expected, theta, grad)
        torch.testing.assert_close(rounds.backward(grad), expected_grad, rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(ShapeError, match="group_size must divide in_features"):
        DenseRounds(torch.zeros(1, 10, dtype=torch.int16), 4)
