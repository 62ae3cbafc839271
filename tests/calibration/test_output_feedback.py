"""Error feedback between rows: never worse than nearest, better than rows alone, and the formula of its docstring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parofx import affine
from parofx.calibration import output_feedback
from parofx.calibration.feedback import RoundedWeight, damped, round_with_feedback
from parofx.calibration.output_feedback import joint_error, round_with_output_feedback
from parofx.errors import ShapeError

GROUP = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(size: int, *, rank: int, seed: int = 0) -> Tensor:
    """Return moments `(size, size)` of which a few directions hold the most."""
    directions = normal(size, rank, seed=seed) * torch.logspace(0, -1.5, rank)
    return directions @ directions.t() / rank


def rounded(weight: Tensor, gram: Tensor, outputs: list[Tensor] | None, *, bits: int | Tensor = 4) -> RoundedWeight:
    widths = [bits] * len(weight) if isinstance(bits, int) else bits.tolist()
    grids = [affine.choose_qparams(row[None], width, GROUP) for row, width in zip(weight, widths, strict=True)]
    scales, zeros = (torch.cat(one) for one in zip(*grids, strict=True))
    form = {"bits": bits, "group_size": GROUP, "sweeps": 1}
    if outputs is None:
        return round_with_feedback(weight, gram, scales, zeros, **form)
    return round_with_output_feedback(weight, gram, scales, zeros, outputs=outputs, **form)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 150), groups=st.integers(1, 3), rank=st.integers(1, 40), bits=st.sampled_from([3, 4, 8]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_it_is_never_worse_than_nearest(rows, groups, rank, bits, seed):
    weight = normal(rows, groups * GROUP, seed=seed)
    gram = damped(correlated(groups * GROUP, rank=rank, seed=seed + 1), 0.1)
    outputs = correlated(rows, rank=rank, seed=seed + 2)
    result = rounded(weight, gram, [outputs], bits=bits)
    scales, zeros = affine.choose_qparams(weight, bits, GROUP)
    nearest = RoundedWeight(affine.quantize(weight, scales, zeros, bits, GROUP), scales, zeros)
    moments = damped(outputs, output_feedback._DAMPING)
    found, plain = (joint_error(weight - one.dequantized(), gram, moments) for one in (result, nearest))
    assert found <= plain * (1 + 1e-4)
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) < 2**bits
    torch.testing.assert_close(result.zeros, zeros)


def test_rows_that_join_lose_less_than_rows_alone():
    weight, gram = normal(256, 4 * GROUP), damped(correlated(4 * GROUP, rank=20, seed=1), 0.1)
    outputs = correlated(256, rank=30, seed=2)
    moments = damped(outputs, output_feedback._DAMPING)
    joined, alone = (
        joint_error(weight - rounded(weight, gram, one).dequantized(), gram, moments) for one in ([outputs], None)
    )
    assert joined < 0.8 * alone


def test_rows_that_have_nothing_to_do_with_one_another_are_rounded_alone():
    weight, gram = normal(70, 2 * GROUP), damped(correlated(2 * GROUP, rank=20), 0.1)
    outputs = torch.diag(torch.logspace(-1, 1, 70))
    joined, alone = rounded(weight, gram, [outputs]), rounded(weight, gram, None)
    assert (joined.codes != alone.codes).float().mean() < 1e-3


def test_the_error_falls_apart_into_blocks_as_the_docstring_says(monkeypatch):
    monkeypatch.setattr(output_feedback, "_LEAST_ROWS", 3)
    outputs, gram = correlated(11, rank=4).double(), correlated(6, rank=3, seed=1).double()
    chain, error = output_feedback._Chain.of(outputs, 0), normal(11, 6, seed=2).double()
    assert [len(block.rows) for block in chain.blocks] == [4, 4, 3]
    parts = 0.0
    for block in chain.blocks:
        joined = error[block.rows] + block.taken_over.t() @ error[block.later]
        inside = chain.moments[block.rows][:, block.rows]
        # What is left of S inside a block behind the blocks before it: its Schur complement.
        before = torch.tensor([row for row in range(11) if row not in {*block.rows.tolist(), *block.later.tolist()}])
        if len(before):
            across = chain.moments[block.rows][:, before]
            inside = inside - across @ torch.linalg.solve(chain.moments[before][:, before], across.t())
        parts += torch.trace(inside @ joined @ gram @ joined.t()).item()
    assert parts == pytest.approx(joint_error(error, gram, chain.moments), rel=1e-6)


def test_siblings_of_unequal_sizes_and_widths():
    sizes = (90, 33, 1)
    weight, gram = normal(sum(sizes), 2 * GROUP), damped(correlated(2 * GROUP, rank=9), 0.1)
    outputs = [correlated(size, rank=5, seed=size) for size in sizes]
    bits = torch.tensor([4, 3, 8]).repeat_interleave(torch.tensor(sizes))
    joined = rounded(weight, gram, outputs, bits=bits)
    assert (joined.codes <= 2 ** bits[:, None] - 1).all()
    # Each by its own moments: what stands beside it changes nothing.
    alone = rounded(weight[:90], gram, outputs[:1], bits=4)
    assert (joined.codes[:90] != alone.codes).float().mean() < 0.02


def test_silent_outputs_and_dead_channels_are_survived():
    weight, outputs = normal(64, 2 * GROUP), correlated(64, rank=5)
    outputs[10], outputs[:, 10] = 0.0, 0.0
    gram = correlated(2 * GROUP, rank=5)
    gram[3], gram[:, 3] = 0.0, 0.0
    for moments in (outputs, torch.zeros_like(outputs)):
        result = rounded(weight, damped(gram, 0.1), [moments])
        assert result.dequantized().isfinite().all()
        assert (weight - result.dequantized()).abs().max() < 3 * result.scales.max()


@pytest.mark.parametrize("shapes", [[(4, 4)], [(3, 3), (3, 3)], [(5, 4)], [(5,)], []])
def test_moments_of_other_rows_are_refused(shapes):
    with pytest.raises(ShapeError, match="add up to 5 rows, got"):
        rounded(normal(5, GROUP), damped(torch.eye(GROUP), 0.1), [torch.ones(shape) for shape in shapes])
