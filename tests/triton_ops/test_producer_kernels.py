"""The producers that rotate against their fp64 reference; on a GPU, or in `test_interpreted.py` without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parofx import ops
from parofx.errors import ShapeError
from parofx.testing import RotationCase
from parofx.triton_ops import layout
from parofx.triton_ops.producer_tiles import gate_tiles, norm_tiles

pytestmark = [
    pytest.mark.gpu,
    # The interpreter computes with NumPy, which warns where a device is silent: exp(60000) is infinity.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Largest error over largest value: half a unit in the last place, and what sums in another order cost.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
WARP = 64 if torch.version.hip else 32

sizes = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from((1, 0, 2, 5, 17)),
        "groups": st.sampled_from((1, 2, 3, 7, 9)),
        "group_size": st.sampled_from((128, 64, 32)),
        "krot": st.sampled_from((8, 0, 1, 3)),
        "rotations": st.sampled_from((1, 2, 3)),
        "dtype": st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
        "seed": st.integers(0, 1000),
    }
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """Rotations in both layouts, and matrices to read."""

    def __init__(
        self, tokens: int, groups: int, group_size: int, krot: int, rotations: int, dtype: torch.dtype, seed: int
    ) -> None:
        self.tokens, self.channels, self.group_size, self.dtype = tokens, groups * group_size, group_size, dtype
        cases = [
            RotationCase(batch=(tokens,), groups=groups, group_size=group_size, krot=krot, device=DEVICE, seed=seed + i)
            for i in range(rotations)
        ]
        self.rotations = [list(parts) for parts in zip(*(case.rotation() for case in cases), strict=True)]
        packed = [layout.pack_rotation(*case.rotation(), group_size) for case in cases]
        self.packed = layout.stack_rotations(packed)
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *, sliced: bool = False) -> Tensor:
        """Return `(M, K)`, or the same as columns of a wider matrix."""
        columns = self.channels * (2 if sliced else 1)
        values = torch.randn(self.tokens, columns, generator=self.generator)
        return values.to(DEVICE, self.dtype)[:, columns - self.channels :]

    def close(self, got: Tensor, expected: Tensor) -> None:
        assert got.dtype == self.dtype
        assert got.shape == expected.shape
        if got.numel():
            error = (got.double() - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE[self.dtype], f"relative error {error:.2e}"


@given(sizes, st.booleans(), st.booleans(), st.sampled_from((0.0, 1.0)), st.booleans())
@example(
    {"tokens": 1, "groups": 9, "group_size": 128, "krot": 8, "rotations": 3, "dtype": torch.float16, "seed": 0},
    True, True, 1.0, True,
)  # fmt: skip
@settings(max_examples=20)
def test_rmsnorm_rotate(sizes: dict, has_residual: bool, has_weight: bool, offset: float, sliced: bool) -> None:
    from parofx.triton_ops.rmsnorm_rotate import rmsnorm_rotate

    problem = Problem(**sizes)
    x, residual = problem.matrix(sliced=sliced), problem.matrix() if has_residual else None
    weight = problem.matrix()[:1].flatten() if has_weight and problem.tokens else None
    tiles = norm_tiles(problem.channels, problem.group_size, WARP)
    out, total = rmsnorm_rotate(x, residual, weight, offset, 1e-5, problem.packed, tiles)
    assert (total is None) == (residual is None)
    h = x if residual is None else x + residual
    if total is not None:
        assert torch.equal(total, h)
    wide = None if weight is None else weight.double()
    expected = ops.rmsnorm_rotate(
        h.double(), None, wide, offset, 1e-5, *problem.rotations, problem.group_size
    )
    problem.close(out, torch.stack(expected))


@given(sizes, st.booleans(), st.sampled_from((1, 4)))
@example(
    {"tokens": 5, "groups": 3, "group_size": 128, "krot": 8, "rotations": 2, "dtype": torch.bfloat16, "seed": 0},
    True, 4,
)  # fmt: skip
@settings(max_examples=20)
def test_silu_mul_rotate(sizes: dict, sliced: bool, block_m: int) -> None:
    from parofx.triton_ops.producer_tiles import GateTiles
    from parofx.triton_ops.silu_mul_rotate import silu_mul_rotate

    problem = Problem(**sizes)
    # Gates beyond what exp can hold: silu is 0 or the gate itself.
    gate, up = 20 * problem.matrix(sliced=sliced), problem.matrix(sliced=sliced)
    out = silu_mul_rotate(gate, up, problem.packed, GateTiles(block_m, 1))
    expected = ops.silu_mul_rotate(gate.double(), up.double(), *problem.rotations, problem.group_size)
    problem.close(out, torch.stack(expected))


def test_gates_that_overflow() -> None:
    from parofx.triton_ops.silu_mul_rotate import silu_mul_rotate

    problem = Problem(1, 1, 128, 1, 1, torch.float16, 0)
    gate = torch.full_like(problem.matrix(), -60000.0)
    out = silu_mul_rotate(gate, problem.matrix(), problem.packed, gate_tiles(1, 128, 128))
    assert torch.equal(out, torch.zeros_like(out))


def test_tensors_that_do_not_fit_are_refused() -> None:
    from parofx.triton_ops.rmsnorm_rotate import rmsnorm_rotate
    from parofx.triton_ops.silu_mul_rotate import silu_mul_rotate

    problem = Problem(2, 2, 128, 1, 1, torch.float16, 0)
    x, tiles = problem.matrix(), norm_tiles(256, 128, WARP)
    with pytest.raises(ShapeError, match=r"x must be torch.float16 \(2, 256\) with contiguous rows, got .* \(2, 128\)"):
        rmsnorm_rotate(x[:, :128], None, None, 0.0, 1e-5, problem.packed, tiles)
    with pytest.raises(ShapeError, match=r"residual must be torch.float16 \(2, 256\) .* got torch.float32"):
        rmsnorm_rotate(x, x.float(), None, 0.0, 1e-5, problem.packed, tiles)
    with pytest.raises(ShapeError, match=r"weight must be \(256,\) and contiguous, got \(128,\)"):
        rmsnorm_rotate(x, None, x[0, :128], 0.0, 1e-5, problem.packed, tiles)
    with pytest.raises(ShapeError, match=r"up must be torch.float16 \(2, 256\) .* of strides \(1, 2\)"):
        silu_mul_rotate(x, x.t().contiguous().t(), problem.packed, gate_tiles(2, 256, 128))
