import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parofx import rotation
from parofx.calibration.activation_energy import DiagonalEnergy, FeedbackEnergy
from parofx.pairing import make_pairs

GROUP = 8
DAMPING = 0.1
#: fp32 factors of well-conditioned matrices.
TOLERANCE = 2e-4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_gram(groups: int, seed: int) -> Tensor:
    """Moments of correlated inputs of very different power."""
    size = groups * GROUP
    rows = (normal(4 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)) * normal(size, seed=seed + 2).exp()
    return rows.T @ rows / len(rows)


def some_transform(groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Matrices `(groups, out, in)` of four rounds, and α `(groups, 1, g)`."""
    pairs = make_pairs(groups * GROUP, GROUP, 4, method="matching", seed=seed)
    theta = normal(4, groups * GROUP // 2, seed=seed)
    matrices = rotation.dense_form(pairs, theta, GROUP).mT.contiguous()
    return matrices, (0.3 * normal(groups, 1, GROUP, seed=seed + 1)).exp()


def unpredicted(moments: Tensor, order: list[int]) -> float:
    """Sum of each channel's variance given the channels behind it, each by its own least-squares problem in fp64."""
    total = 0.0
    for at, channel in enumerate(order):
        rest = order[at + 1 :]
        explained = moments[channel, rest] @ torch.linalg.solve(moments[rest][:, rest], moments[rest, channel])
        total += (moments[channel, channel] - explained).item()
    return total


@given(groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_feedback_energy_is_what_later_channels_do_not_predict(groups: int, seed: int) -> None:
    """From the definition: what weaker groups predict is taken off, then within the group what weaker outputs do."""
    gram = some_gram(groups, seed).double()
    matrices, alpha = some_transform(groups, seed)
    energy = FeedbackEnergy(gram.float(), GROUP, DAMPING)
    totals = energy.totals(matrices, alpha)
    power = gram.diagonal().view(groups, GROUP)
    torch.testing.assert_close(energy.power, (power / power.max()).float())
    falling = power.sum(1).argsort(descending=True).tolist()
    damped = gram + DAMPING * gram.diagonal().diag()
    for at, group in enumerate(falling):
        own = list(range(group * GROUP, (group + 1) * GROUP))
        behind = [one * GROUP + i for one in falling[at + 1 :] for i in range(GROUP)]
        across = damped[own][:, behind]
        left = gram[own][:, own] - across @ torch.linalg.solve(damped[behind][:, behind], across.T)
        mixed = (matrices / alpha)[group].double()
        outputs = mixed @ left @ mixed.T
        added = DAMPING * (power[group] / alpha[group, 0].double().square()).mean()
        outputs += added * torch.eye(GROUP, dtype=torch.float64)
        order = outputs.diagonal().argsort(descending=True).tolist()
        expected = unpredicted(outputs, order) / power.max().item()
        assert totals[group].item() == pytest.approx(expected, rel=TOLERANCE)


@given(groups=st.integers(1, 3), seed=st.integers(0, 99), feedback=st.booleans())
def test_gradients_are_those_of_the_totals(groups: int, seed: int, feedback: bool) -> None:
    moments = some_gram(groups, seed)
    if feedback:
        energy: DiagonalEnergy | FeedbackEnergy = FeedbackEnergy(moments, GROUP, DAMPING)
    else:
        energy = DiagonalEnergy(moments.diagonal(), GROUP)
    matrices, alpha = some_transform(groups, seed)
    grad_matrices, grad_log_alpha = energy.gradients(matrices, alpha)
    grad_matrices = torch.zeros_like(matrices) if grad_matrices is None else grad_matrices
    step, turn, stretch = 1e-6, normal(*matrices.shape, seed=seed + 3).double(), normal(*alpha.shape, seed=seed + 4)

    def at(sign: int) -> Tensor:
        moved = matrices.double() + sign * step * turn
        return energy.totals(moved, alpha.double() * (sign * step * stretch.double()).exp()).log().sum()

    slope = ((at(1) - at(-1)) / (2 * step)).item()
    along = (grad_matrices * turn).sum() + (grad_log_alpha * stretch[:, 0]).sum()
    assert along.item() == pytest.approx(slope, rel=5e-3, abs=5e-3)


def test_feedback_leaves_less_than_rounding_to_nearest() -> None:
    gram = some_gram(3, 5)
    matrices, alpha = some_transform(3, 5)
    left = FeedbackEnergy(gram, GROUP, DAMPING).totals(matrices, alpha)
    nearest = DiagonalEnergy(gram.diagonal() / gram.diagonal().max(), GROUP).totals(matrices, alpha)
    assert (left < (1 + DAMPING) * nearest).all()
    assert left.sum() < 0.7 * nearest.sum()


def test_silent_channels_and_groups_have_energy() -> None:
    gram = some_gram(2, 0)
    gram[:GROUP] = gram[:, :GROUP] = 0
    gram[GROUP + 1] = gram[:, GROUP + 1] = 0
    matrices, alpha = some_transform(2, 0)
    for one in (gram, torch.zeros(2 * GROUP, 2 * GROUP), 1e-30 * gram, 1e30 * gram):
        energy = FeedbackEnergy(one, GROUP, DAMPING)
        assert energy.totals(matrices, alpha).gt(0).all()
        assert all(part.isfinite().all() for part in energy.gradients(matrices, alpha))
