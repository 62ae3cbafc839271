import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import both_ways, needs_library

from parofx.calibration import compiled
from parofx.calibration.dense_rounds import DenseRounds
from parofx.errors import ShapeError
from parofx.pairing import make_pairs
from parofx.rotation import dense_form

#: Eight fp32 rounds.
TOLERANCE = 1e-5


@pytest.mark.parametrize("in_cpp", both_ways)
@given(
    group_size=st.sampled_from([2, 6, 16, 32, 48, 64, 128]),
    groups=st.integers(1, 3),
    krot=st.integers(0, 8),
    method=st.sampled_from(["matching", "greedy"]),
    seed=st.integers(0, 99),
)
def test_matrices_and_gradient_are_those_of_dense_form(
    in_cpp: bool, group_size: int, groups: int, krot: int, method: str, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not in_cpp:
            patch.setattr(compiled, "has_loops_for", lambda _: False)
        check_matrices_and_gradient(group_size, groups, krot, method, seed)


def check_matrices_and_gradient(group_size: int, groups: int, krot: int, method: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pairs = make_pairs(groups * group_size, group_size, krot, method=method, seed=seed)
    rounds = DenseRounds(pairs, group_size)
    rounds._after.fill_(torch.nan)
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


def test_pairs_that_leave_channels_out() -> None:
    with pytest.raises(ShapeError, match="pairs: round 1, group 0 must be a permutation"):
        DenseRounds(torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]], dtype=torch.int16), 4)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_computed_with_in_fp32(dtype: torch.dtype) -> None:
    rounds = DenseRounds(make_pairs(32, 16, 2, method="greedy", seed=0), 16)
    theta, grad = torch.linspace(-2, 2, 32).view(2, 16).to(dtype), torch.linspace(-1, 1, 512).view(2, 16, 16).to(dtype)
    expected = rounds.forward(theta.float()).clone(), rounds.backward(grad.float())
    torch.testing.assert_close((rounds.forward(theta), rounds.backward(grad)), expected, rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"partners": torch.full((2, 32), 16)}, "partners must be channels of the same group"),
        ({"partners": torch.zeros(2, 32, dtype=torch.int32)}, "partners must be a contiguous int64"),
        ({"cosines": torch.ones(2, 31)}, r"cosines must be a contiguous fp32 CPU tensor \(2, 32\)"),
        ({"after": torch.zeros(2, 32, 8)}, "groups must be of a multiple of 16"),
        ({"grad": torch.zeros(32, 16)}, "give both grad and crossed, or none"),
        ({"grad": torch.zeros(32, 16), "crossed": torch.zeros(1, 32)}, "crossed must be a contiguous"),
    ],
)
def test_wrong_arguments_of_the_operator_are_refused(wrong: dict[str, torch.Tensor], message: str) -> None:
    given = {
        "after": torch.zeros(2, 32, 16),
        "partners": torch.arange(32).repeat(2, 1),
        "cosines": torch.ones(2, 32),
        "sines": torch.zeros(2, 32),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.parofx_cpu.dense_rounds(**(given | wrong))
