import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx.calibration import statistics as statistics_module
from parofx.calibration.statistics import InputStatistics, OutputNorm
from parofx.errors import DataError, ShapeError

GROUP = 4
#: One fp32 product sum per batch; a few hundred rows.
FP32_TOLERANCE = 1e-5
#: Factors with 8 significant bits; products of a few units.
BF16_TOLERANCE = 0.05


SIZES = {"count": torch.tensor([1]), "group_size": torch.tensor([4])}


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


@given(rows=st.integers(1, 20), groups=st.integers(1, 3), outputs=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows_relative_to_outputs_count_alike_whatever_their_length(
    rows: int, groups: int, outputs: int, seed: int
) -> None:
    x = sample(rows, groups, seed)
    weights = [sample(outputs, groups, seed + 1), sample(2, groups, seed + 2)]
    lengths = torch.logspace(-6, 6, rows)[:, None]
    found = InputStatistics(x.shape[1], GROUP)
    found.update(x * lengths, relative_to=OutputNorm(weights))
    both = torch.cat(weights).double()
    chance = both.square().sum() / x.shape[1] * x.double().square().sum(-1)
    norms = ((x.double() @ both.t()).square().sum(-1) + 1e-3 * chance).sqrt()
    torch.testing.assert_close(found.block_gram.double(), expected_gram(x / norms[:, None]), rtol=0.02, atol=0.02)
    assert found.count == rows


def test_rows_that_give_nothing_do_not_become_infinite() -> None:
    weight = torch.zeros(3, GROUP)
    weight[:, 0] = 1.0
    rows = torch.zeros(3, GROUP)
    rows[1, 1], rows[2, 0] = 5.0, 2.0  # one of zeros, one that the weight does not see, one that it sees
    for weights in ([weight], [torch.zeros(3, GROUP)]):
        statistics = InputStatistics(GROUP, GROUP)
        statistics.update(rows, relative_to=OutputNorm(weights))
        assert torch.isfinite(statistics.block_gram).all()
    assert not statistics.block_gram.any()


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


@pytest.mark.parametrize("full", [False, True])
def test_state_round_trip(full: bool) -> None:
    statistics = InputStatistics(2 * GROUP, GROUP, full=full)
    statistics.update(sample(7, 2))
    restored = InputStatistics.from_tensors(statistics.to_tensors())
    assert (restored.count, restored.in_features, restored.group_size) == (7, 2 * GROUP, GROUP)
    assert restored.full is full
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


@given(rows=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_full_moments_hold_those_of_groups(rows: int, groups: int, seed: int) -> None:
    x = sample(rows, groups, seed)
    full = InputStatistics(groups * GROUP, GROUP, full=True)
    full.update(x[: rows // 2])
    full.update(x[rows // 2 :])
    assert full.full
    expected = x.double().t() @ x.double() / rows
    torch.testing.assert_close(full.gram.double(), expected, rtol=BF16_TOLERANCE, atol=BF16_TOLERANCE)
    torch.testing.assert_close(full.gram, full.gram.t())
    for index, block in enumerate(full.block_gram):
        channels = slice(index * GROUP, (index + 1) * GROUP)
        assert torch.equal(block, full.gram[channels, channels])
    assert torch.equal(full.power, full.gram.diagonal())


def test_full_moments_are_gathered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(9, 3)
    whole, pieces = (InputStatistics(3 * GROUP, GROUP, full=True) for _ in range(2))
    whole.update(x)
    monkeypatch.setattr(statistics_module, "_COLUMNS", 5)
    pieces.update(x)
    torch.testing.assert_close(pieces.gram, whole.gram, rtol=BF16_TOLERANCE, atol=BF16_TOLERANCE)


def test_gathering_leaves_the_precision_of_products_alone() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    InputStatistics(GROUP, GROUP, full=True).update(sample(3, 1))
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


def test_moments_between_groups_that_were_not_kept() -> None:
    with pytest.raises(ShapeError, match="moments between groups must have been kept to be read; pass full=True"):
        _ = gathered(sample(4, 2)).gram


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
        SIZES | {"sums": torch.zeros(2, 4, 3, dtype=torch.float64)},
        SIZES | {"sums": torch.zeros(2, 4, 4)},
        SIZES | {"count": torch.tensor(1), "sums": torch.zeros(2, 4, 4, dtype=torch.float64)},
    ],
)
def test_state_that_is_not_one(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ShapeError, match="statistics must hold count and group_size int64"):
        InputStatistics.from_tensors(tensors)


@pytest.mark.parametrize("full", [False, True])
def test_rows_count_alike_in_whatever_batches_they_come(full):
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rows[4] *= 1.3e5
    found = []
    for size in (6, 1):
        found.append(InputStatistics(64, 32, full=full))
        for part in rows.split(size):
            found[-1].update(part)
    small = [one.block_gram / one.block_gram.amax() for one in found]
    torch.testing.assert_close(small[0], small[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("peak", [1e-45, 1e-38, 3e38])
def test_rows_of_any_size_are_summed(peak):
    statistics = InputStatistics(32, 32)
    statistics.update(torch.full((2, 32), peak))
    assert statistics._sums.isfinite().all()
    assert (statistics._sums > 0).all()


def test_known_lengths_of_outputs_are_taken_and_those_that_overflowed_computed() -> None:
    x = sample(9, 2)
    weights = [sample(7, 2, 1), sample(2, 2, 2)]
    lengths = (x @ torch.cat(weights).t()).norm(dim=1)
    grams = []
    for known in (None, lengths, 2 * lengths, torch.where(lengths > lengths.median(), torch.inf, lengths)):
        statistics = InputStatistics(x.shape[1], GROUP)
        statistics.update(1e3 * x, relative_to=OutputNorm(weights), lengths=None if known is None else 1e3 * known)
        grams.append(statistics.block_gram)
    computed, taken, doubled, overflowed = grams
    torch.testing.assert_close(taken, computed, rtol=1e-5, atol=1e-6)
    assert torch.equal(overflowed, computed)
    assert 0.24 < float(doubled.diagonal(dim1=1, dim2=2).sum() / computed.diagonal(dim1=1, dim2=2).sum()) < 0.3
