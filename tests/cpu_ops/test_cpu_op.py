"""The CPU operators against fp64, on whatever ISA is active; test_cpu_isa.py runs this file on each."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu_problem import Problem, make_problem
from hypothesis import given
from hypothesis import strategies as st
from libraries import needs_library
from torch import Tensor

from parofx import cpu_ops

pytestmark = needs_library
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(x: Tensor) -> Tensor:
    """A view of the same rows whose leading dimension has an odd stride."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), torch.nan, dtype=x.dtype)
    wide[:, 8:-16] = x
    return wide[:, 8:-16]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    group_size = draw(st.sampled_from((32, 64, 128)))
    return make_problem(
        group_size * draw(st.integers(1, 5)),
        tuple(draw(st.lists(st.sampled_from((1, 8, 31, 32, 33, 40, 64, 97, 160)), min_size=1, max_size=3))),
        group_size,
        draw(st.sampled_from((None, 0, 1, 2, 3, 8, 9))),
        separate=draw(st.booleans()),
        bias=draw(st.sampled_from((None, *DTYPES))),
        seed=draw(st.integers(0, 2**16)),
        bits=draw(st.sampled_from((4, 3, 8))),
        ranks=draw(st.sampled_from(((), (), (1,), (3, 8), (0, 5)))),
    )


@given(
    problem=problems(),
    rows=st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 25, 31, 48, 67)),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from((0, 1)),
    threads=st.sampled_from((1, 2, 3)),
    strided=st.booleans(),
)
def test_matches_fp64(problem: Problem, rows: int, dtype: torch.dtype, mode: int, threads: int, strided: bool) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(rows, problem.in_features).to(dtype)
    outputs = problem.run(rows_of(x) if strided else x, mode)
    problem.check(x, outputs, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_matches_fp64_at_larger_shapes(dtype: torch.dtype, mode: int, rows: int, bits: int) -> None:
    ranks = (8, 3) if rows == 8 else ()
    problem = make_problem(512, (200,) if bits == 8 else (128, 72), 128, 8, bias=torch.float16, bits=bits, ranks=ranks)
    x = torch.randn(rows, 512).to(dtype)
    problem.check(x, problem.run(x, mode), mode)


@pytest.mark.parametrize(("group_size", "bits"), [(32, 4), (64, 3), (128, 4)])
@pytest.mark.parametrize("rows", [64, 300])
def test_many_rows_of_a_deep_and_wide_linear_match_fp64(group_size: int, bits: int, rows: int) -> None:
    # More input channels, columns and rows than the kernels take at a time, and none of them in equal parts.
    torch.set_num_threads(1)
    problem = make_problem(2304 + group_size, (1100, 40), group_size, 2, bias=torch.bfloat16, bits=bits, ranks=(3, 0))
    x = torch.randn(rows, problem.in_features).bfloat16()
    problem.check(x, problem.run(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(2, 3, 4, -1),
        lambda x: x.view(2, 12, -1).transpose(0, 1),
        lambda x: x.t().contiguous().t(),
        lambda x: x[::3],
        lambda x: x[:1].expand(5, -1),
        lambda x: x[0],
        lambda x: x.view(24, 1, -1)[:, :, :],
        lambda x: x.view(1, 24, -1)[:, ::2],
        lambda x: x.view(2, 12, -1)[:, :0],
    ],
)
def test_any_strides_and_batch_dimensions(dtype: torch.dtype, view: object) -> None:
    problem = make_problem(256, (40, 64), 64, 4, separate=True)
    x = view(torch.randn(24, 256).to(dtype))  # type: ignore[operator]
    problem.check(x, problem.run(x))


def test_separate_rotations_equal_separate_calls() -> None:
    problem = make_problem(256, (64, 32), 128, 8, separate=True)
    x = torch.randn(5, 256).bfloat16()
    together = problem.run(x)
    for i in range(2):
        alone = Problem([problem.linears[i]], [problem.rotations[i]], 256, 128).run(x)
        assert torch.equal(alone[0], together[i])


def test_concatenated_siblings_are_the_merged_linear() -> None:
    problem = make_problem(256, (64, 32, 96), 64, 4)
    op, (x, rotations, weights, scales, zeros, _, *rest) = problem.call(torch.randn(3, 256))
    merged = op(x, rotations, [torch.cat(weights)], [torch.cat(scales)], [torch.cat(zeros)], [None], *rest)
    assert torch.equal(torch.cat(problem.run(x), -1), merged[0])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(("out_features", "bits"), [((200,), 4), ((200,), 8), ((200, 72), 3)])
def test_the_thread_count_changes_nothing_but_rounding(
    rows: int, mode: int, out_features: tuple[int, ...], bits: int
) -> None:
    problem = make_problem(512, out_features, 128, 8, bits=bits, ranks=(4,))
    x = torch.randn(rows, 512)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(problem.run(x, mode))
    for others in outputs[1:]:
        torch.testing.assert_close(others, outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_its_row_only(mode: int, bad: float) -> None:
    problem = make_problem(128, (32,), 64, 2)
    x = torch.randn(3, 128)
    x[1, 70] = bad
    (output,) = problem.run(x, mode)
    assert output[[0, 2]].isfinite().all()
    assert not output[1].isfinite().any()


def test_zero_rows_of_x_give_the_bias() -> None:
    problem = make_problem(128, (40,), 32, 2, bias=torch.float32)
    for mode in (0, 1):
        (output,) = problem.run(torch.zeros(2, 128), mode)
        assert torch.equal(output, problem.linears[0].bias.expand(2, -1))


def test_no_columns_give_none() -> None:
    op, (x, rotation, *packed, bias, bits, group_size, mode) = make_problem(128, (32,), 64, 2).call(torch.randn(3, 128))
    empty = [each[:0] for each in packed]
    assert op(x, rotation, *empty, bias, bits, group_size, mode).shape == (3, 0)


def test_one_openmp_runtime() -> None:
    cpu_ops.load()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))]
    assert len(runtimes) == 1


def test_the_forced_isa_runs() -> None:
    forced = os.environ.get("PAROFX_CPU_ISA")
    assert cpu_ops.active_isa() == (forced or cpu_ops.active_isa())
    assert cpu_ops.describe()["isa"] == cpu_ops.active_isa()
