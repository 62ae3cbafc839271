import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx.calibration.statistics import InputStatistics
from parofx.errors import DataError, ShapeError

GROUP = 4
#: One fp32 product sum per batch; a few hundred rows.
FP32_TOLERANCE = 1e-5


def sample(rows: int, groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, groups * GROUP, generator=torch.Generator().manual_seed(seed))


def expected_gram(rows: torch.Tensor) -> torch.Tensor:
    grouped = rows.double().view(len(rows), -1, GROUP)
    return torch.einsum("mgi,mgj->gij", grouped, grouped) / len(rows)


def gathered(*batches: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(batches[0].shape[-1], GROUP)
    for batch in batches:
        statistics.update(batch)
    return statistics


@given(rows=st.integers(1, 50), groups=st.integers(1, 3), cut=st.integers(0, 50), seed=st.integers(0, 99))
def test_moments_are_the_means_however_rows_are_batched_or_merged(rows: int, groups: int, cut: int, seed: int) -> None:
    x = sample(rows, groups, seed)
    whole, reversed_halves = gathered(x), gathered(x[cut:], x[:cut])
    merged = gathered(x[:cut])
    merged.merge(gathered(x[cut:]))
    for statistics in (whole, reversed_halves, merged):
        assert statistics.count == rows
        gram = statistics.block_gram
        torch.testing.assert_close(gram.double(), expected_gram(x), rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
        torch.testing.assert_close(statistics.power, gram.diagonal(dim1=1, dim2=2).flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_leading_dimensions_and_dtypes(dtype: torch.dtype) -> None:
    x = sample(12, 2).to(dtype)
    statistics = gathered(x.view(3, 4, -1))
    assert statistics.block_gram.dtype == statistics.power.dtype == torch.float32
    torch.testing.assert_close(
        statistics.block_gram.double(), expected_gram(x), rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE
    )


def test_no_rows_are_zero_moments() -> None:
    statistics = gathered(torch.empty(0, 2 * GROUP), torch.empty(2, 0, 2 * GROUP))
    assert statistics.count == 0
    assert not statistics.block_gram.any()
    assert not statistics.power.any()


def test_dead_channel_and_all_zero_batch() -> None:
    x = sample(10, 1)
    x[:, 2] = 0
    statistics = gathered(x, torch.zeros(10, GROUP))
    assert statistics.power[2] == 0
    torch.testing.assert_close(statistics.block_gram.double(), expected_gram(x) / 2, rtol=FP32_TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_squares_beyond_fp32_sums(scale: float) -> None:
    x = sample(1000, 1)
    statistics = gathered(x * scale)
    torch.testing.assert_close(
        statistics.block_gram.double() / scale**2, expected_gram(x), rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE
    )


def test_state_round_trip() -> None:
    statistics = gathered(sample(7, 2))
    restored = InputStatistics.from_tensors(statistics.to_tensors())
    assert (restored.count, restored.in_features, restored.group_size) == (7, 2 * GROUP, GROUP)
    assert torch.equal(restored.block_gram, statistics.block_gram)
    restored.update(sample(7, 2, seed=1))
    assert statistics.count == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_rows(value: float) -> None:
    x = sample(3, 1)
    x[1, 1] = value
    statistics = InputStatistics(GROUP, GROUP)
    with pytest.raises(DataError, match=r"layer 3 inputs: rows must be finite, got . NaN and . infinite values of 12"):
        statistics.update(x, where="layer 3 inputs")
    assert statistics.count == 0


@pytest.mark.parametrize("rows", [torch.zeros(3, 5), torch.zeros(3, 8, dtype=torch.int64), torch.tensor(1.0)])
def test_rows_that_do_not_fit(rows: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"rows must be floating \(…, 8\), got"):
        InputStatistics(8, GROUP).update(rows)


def test_wrong_group_size() -> None:
    with pytest.raises(ShapeError, match="group_size must divide in_features: got 4 and 10"):
        InputStatistics(10, GROUP)


def test_merge_of_other_sizes() -> None:
    with pytest.raises(ShapeError, match="in_features 8 and group_size 4, got 8 and 8"):
        InputStatistics(8, 4).merge(InputStatistics(8, 8))


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"count": torch.tensor([1])},
        {"count": torch.tensor([1]), "sums": torch.zeros(2, 4, 3, dtype=torch.float64)},
        {"count": torch.tensor([1]), "sums": torch.zeros(2, 4, 4)},
        {"count": torch.tensor(1), "sums": torch.zeros(2, 4, 4, dtype=torch.float64)},
    ],
)
def test_state_that_is_not_one(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ShapeError, match="statistics must hold count int64"):
        InputStatistics.from_tensors(tensors)
