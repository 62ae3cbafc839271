import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import both_ways, needs_library

from parofx import cpu_ops
from parofx.calibration import column_blocks, compiled
from parofx.calibration.column_blocks import ColumnBlock, Grid

GROUP = 4
#: Of a step: how far values may be off that are sums of fp32 products, in two orders.
TOLERANCE = 1e-3


def problem(columns: int, rows: int, seed: int):
    """Return random steps, a block of all columns in any order, and a narrow grid, so that some steps are clamped."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    groups = -(-columns // GROUP)
    zeros = torch.randint(0, 16, (groups, rows), generator=generator).float()
    grid = Grid(0.1 + 0.2 * torch.rand(groups, rows, generator=generator), -zeros, 15 - zeros, GROUP)
    channels = torch.randperm(groups * GROUP, generator=generator)[:columns]
    block = ColumnBlock(channels, normal(columns, rows), 0.2 * normal(columns, columns))
    steps = (grid.low + torch.randint(0, 16, (groups, rows), generator=generator)).repeat_interleave(GROUP, 0)
    return steps, block, grid, normal(columns, rows), 0.5 + torch.rand(columns, generator=generator)


def run(kind: str, steps, block, grid, exact, curvature):
    """Return the steps and the changes."""
    steps, changes = steps.clone(), torch.full_like(block.base, torch.nan)
    block = ColumnBlock(block.channels, block.base.clone(), block.coupling)
    if kind == "feedback":
        column_blocks.feed_back(steps, changes, block, grid, exact)
    else:
        column_blocks.descend(steps, changes, block, grid, curvature)
    return steps, changes


@pytest.mark.parametrize("in_cpp", both_ways)
@given(
    kind=st.sampled_from(("feedback", "descent")),
    columns=st.sampled_from((1, 7, 64, 127, 128)),
    rows=st.sampled_from((1, 63, 64, 65, 130)),
    seed=st.integers(0, 99),
)
def test_every_column_is_nearest_to_what_those_before_it_leave(in_cpp, kind, columns, rows, seed):
    steps, block, grid, exact, curvature = problem(columns, rows, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "has_loops_for", lambda _: in_cpp)
        found, changes = run(kind, steps, block, grid, exact, curvature)
    group = block.channels // GROUP
    scale, low, high = (one[group].double() for one in (grid.scales, grid.low, grid.high))
    before = torch.ones(columns, columns).tril(-1) if kind == "descent" else torch.ones(columns, columns).triu(1)
    value = block.base.double() + (block.coupling * before).double() @ changes.double()
    own = found[block.channels].double()
    if kind == "feedback":
        wanted, change = value / scale, exact - own * scale
    else:
        old = steps[block.channels].double()
        wanted, change = old + value / (scale * curvature[:, None]), (own - old) * scale
    assert ((own - wanted.clamp(low, high)).abs() <= 0.5 + TOLERANCE).all()
    assert torch.equal(own, own.round().clamp(low, high))
    torch.testing.assert_close(changes.double(), change.double(), rtol=1e-5, atol=1e-5)
    others = torch.ones(len(steps), dtype=torch.bool).index_fill_(0, block.channels, False)
    assert torch.equal(found[others], steps[others])


@needs_library
def test_not_a_number_stays_one():
    steps, block, grid, exact, curvature = problem(3, 5, 0)
    block.base[1, 2] = torch.nan
    found, _ = run("feedback", steps, block, grid, exact, curvature)
    assert found[block.channels[1], 2].isnan()
    assert not found[:, 3].isnan().any()


@needs_library
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": torch.zeros(3, 4)}, r"base must be a contiguous fp32 CPU tensor \(3, 5\), got \(3, 4\)"),
        ({"base": torch.zeros(3, 5, dtype=torch.float64)}, r"base must be .* got \(3, 5\) of Double"),
        ({"coupling": torch.zeros(3, 6)[:, ::2]}, "coupling must be a contiguous"),
        ({"channels": torch.tensor([0, 1, 4])}, r"channels must be in \[0, 4\), got 4"),
        ({"channels": torch.zeros(3, dtype=torch.int32)}, "channels must be a contiguous int64"),
        ({"channels": torch.zeros(129, dtype=torch.int64)}, "at most 128 columns, got 129"),
        ({"group_size": 3}, "divisible by group_size 3"),
        ({"exact": None}, "give exact for feedback, or curvature for descent"),
    ],
)
def test_wrong_arguments_of_the_operator_are_refused(wrong, message):
    arguments = {
        "steps": torch.zeros(4, 5),
        "changes": torch.zeros(3, 5),
        "base": torch.zeros(3, 5),
        "coupling": torch.zeros(3, 3),
        "channels": torch.arange(3),
        "scales": torch.ones(1, 5),
        "low": torch.zeros(1, 5),
        "high": torch.ones(1, 5),
        "group_size": 4,
        "exact": torch.zeros(3, 5),
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.parofx_cpu.round_columns(**(arguments | wrong))


def test_what_is_missing_is_told_once(monkeypatch, caplog):
    def load():
        raise cpu_ops.BuildUnavailableError("no C++ compiler")

    compiled._warn_once.cache_clear()
    monkeypatch.setattr(cpu_ops, "load", load)
    assert not any(compiled.has_loops_for(torch.zeros(2)) for _ in range(3))
    assert [one.getMessage() for one in caplog.records] == [
        "calibration takes longer without its compiled loops: no C++ compiler"
    ]
    assert not compiled.has_loops_for(torch.zeros(2, dtype=torch.float64))
    compiled._warn_once.cache_clear()


def test_a_build_that_fails_is_no_slow_calibration(monkeypatch):
    def load():
        raise cpu_ops.BuildFailedError("strange flag")

    monkeypatch.setattr(cpu_ops, "load", load)
    with pytest.raises(cpu_ops.BuildFailedError, match="strange flag"):
        compiled.has_loops_for(torch.zeros(2))
