"""The Triton kernels against the fp64 reference; on a GPU, or in `test_interpreted.py` without one."""

import numpy as np
import pytest
import torch

from parofx.errors import ConfigError, ShapeError
from parofx.testing import RotateLinearCase, check_rotate_int4_linear_case, reference
from parofx.testing.interpreter import is_interpreting
from parofx.testing.kernels import kernel_checks
from parofx.triton_ops import layout

pytestmark = pytest.mark.gpu

#: What the project promises, as ‖error‖ / ‖output‖.
RELATIVE_ERROR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
#: The interpreter takes milliseconds per program, a GPU none: the first compiles in seconds, so fewer cases are enough.
EXAMPLES = 5 if is_interpreting() else 20


def packed(case):
    rotation = layout.stack_rotations([layout.pack_rotation(*case.rotation(), case.group_size)])
    qweight, qzeros, scales, bias = case.weight()
    return rotation, layout.pack_weight(qweight, qzeros, scales, case.group_size), bias


def layer(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size):
    """A whole layer as the cost model would have it."""
    from parofx.triton_ops import launch

    rotation = layout.stack_rotations([layout.pack_rotation(pairs, theta, channel_scales, group_size)])
    weight = layout.pack_weight(qweight, qzeros, scales, group_size)
    locks = launch.make_locks(scales.shape[1], x.device)
    out = launch.rotate_int4_linear(x, rotation, weight, bias, [scales.shape[1]], locks)
    return out.reshape(*x.shape[:-1], scales.shape[1])


def test_every_kernel_with_every_row_of_the_launch_tables(device):
    checks = [check for check in kernel_checks(device) if check.name.startswith("triton")]
    kernels = {check.name.split()[1].rstrip(",") for check in checks}
    assert kernels == {"rotate", "rotate_dense", "int4_linear", "dequantize", "rotate_int4_linear"}
    failures = []
    for check in checks:
        try:
            check.run(EXAMPLES)
        except AssertionError as error:
            failures.append(f"{check.name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", RELATIVE_ERROR)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17, 64, 65, 130])
def test_a_layer_by_the_cost_model(tokens, dtype, device):
    case = RotateLinearCase(
        batch=(tokens,), groups=3, group_size=128, krot=8, words=17, bias=True, dtype=dtype, device=str(device)
    )
    assert check_rotate_int4_linear_case(layer, case) <= RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("placement", ["fused", "gather", "dense"])
def test_every_placement_and_group_size(placement, group_size, device):
    from parofx.triton_ops import cost_model, launch

    case = RotateLinearCase(
        batch=(3,), groups=5, group_size=group_size, krot=3, words=3, bias=True, dtype=torch.float16, device=str(device)
    )
    channels, columns = case.in_features, 24
    linear = cost_model.choose_linear(3, channels, columns, "sm_90")
    plan = {
        "fused": cost_model.Plan("fused", None, cost_model.choose_fused(3, channels, columns, "sm_90")),
        "gather": cost_model.Plan("gather", cost_model.choose_rotate(3, channels, "sm_90"), linear),
        "dense": cost_model.Plan("dense", cost_model.choose_dense(3, channels, "sm_90"), linear),
    }[placement]
    rotation, weight, bias = packed(case)
    got = launch.run_plan(plan, case.x(), rotation, weight, bias, [columns], launch.make_locks(columns, device))
    expected = reference.rotate_int4_linear(case.x(), *case.rotation(), *case.weight(), group_size)
    error = np.linalg.norm(reference.float64(got) - expected) / np.linalg.norm(expected)
    assert error <= RELATIVE_ERROR[torch.float16]


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_siblings_with_a_rotation_each(count, tokens, device):
    """Column ranges that are no multiples of a tile; each gets its own rotation's activations."""
    from parofx.triton_ops import launch

    cases = [
        RotateLinearCase(
            batch=(tokens,), groups=2, group_size=128, krot=2, words=17 - 3 * index, bias=True, seed=index,
            dtype=torch.float16, device=str(device),
        )
        for index in range(count)
    ]  # fmt: skip
    x = cases[0].x()
    weight = layout.merge_weights([packed(case)[1] for case in cases])
    rotation = layout.stack_rotations([layout.pack_rotation(*case.rotation(), 128) for case in cases])
    bias = torch.cat([case.weight().bias for case in cases])
    ends = np.cumsum([8 * case.words for case in cases]).tolist()
    got = launch.rotate_int4_linear(x, rotation, weight, bias, ends, launch.make_locks(ends[-1], device))
    for case, part in zip(cases, got.tensor_split(ends[:-1], dim=1), strict=True):
        expected = reference.rotate_int4_linear(x, *case.rotation(), *case.weight(), 128)
        error = np.linalg.norm(reference.float64(part) - expected) / np.linalg.norm(expected)
        assert error <= RELATIVE_ERROR[torch.float16]


def test_split_k_is_deterministic(device):
    case = RotateLinearCase(
        batch=(1,), groups=9, group_size=128, krot=8, words=9, dtype=torch.float16, device=str(device)
    )
    args = (case.x(), *case.rotation(), *case.weight(), 128)
    first = layer(*args)
    for _ in range(3):
        assert torch.equal(layer(*args), first)


def test_a_cuda_graph_replays(device):
    from parofx.triton_ops import launch

    case = RotateLinearCase(
        batch=(1,), groups=8, group_size=128, krot=8, words=64, dtype=torch.float16, device=str(device)
    )
    rotation, weight, bias = packed(case)
    x, locks = case.x(), launch.make_locks(512, device)

    def call():
        return launch.rotate_int4_linear(x, rotation, weight, bias, [512], locks)

    expected = call()
    if is_interpreting():  # which knows no graphs: there a second call must do
        assert torch.equal(call(), expected)
        return
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused(device):
    from parofx.triton_ops import launch
    from parofx.triton_ops.int4_linear import int4_linear
    from parofx.triton_ops.rotate import rotate
    from parofx.triton_ops.rotate_dense import rotate_dense
    from parofx.triton_ops.rotate_int4_linear import rotate_int4_linear
    from parofx.triton_ops.tiles import DenseTiles, FusedTiles, LinearTiles, RotateTiles

    case = RotateLinearCase(
        batch=(5,), groups=2, group_size=64, krot=1, words=2, dtype=torch.float16, device=str(device)
    )
    rotation, weight, _ = packed(case)
    x, locks = case.x(), launch.make_locks(16, device)
    narrow = x[:, :64]
    fused, linear = FusedTiles(64, 1, 4, 2), LinearTiles(16, 32, 2, False, 4, 2)
    with pytest.raises(ShapeError, match=r"x must be \(M, 128\) with contiguous rows, got \(5, 64\)"):
        rotate(narrow, rotation, RotateTiles(1, 1))
    with pytest.raises(ShapeError, match=r"x must be float16 or bfloat16 \(M, 128\) with contiguous rows"):
        rotate_dense(x.float(), rotation, DenseTiles(16, 4))
    with pytest.raises(ShapeError, match=r"x must be \(M, 128\) with contiguous rows and 1 tiles of 128"):
        rotate_int4_linear(narrow, rotation, weight, None, [16], locks, fused, ptx=True)
    with pytest.raises(ConfigError, match="rotate_int4_linear takes 1 to 4 tokens, got 5"):
        rotate_int4_linear(x, rotation, weight, None, [16], locks, fused, ptx=True)
    with pytest.raises(ConfigError, match="must be at most 8, got 8 and 4"):
        rotate_int4_linear(x[:4], rotation, weight, None, [16], locks, FusedTiles(32, 8, 4, 2), ptx=True)
    with pytest.raises(ShapeError, match=r"K in 1 tiles of 128, got \(1, 5, 256\)"):
        int4_linear(torch.cat((x, x), 1)[None], weight, None, [16], 64, locks, linear, ptx=True)
    with pytest.raises(ShapeError, match=r"bias must be \(16,\), one number per column of all siblings, got \(8,\)"):
        int4_linear(x[None], weight, x.new_zeros(8), [16], 64, locks, linear, ptx=True)
    with pytest.raises(ShapeError, match="ends must be 1 rising columns, the last 16, got \\[8\\]"):
        int4_linear(x[None], weight, None, [8], 64, locks, linear, ptx=True)
    with pytest.raises(ShapeError, match="one launch takes 1 to 4 rotations, got 5"):
        int4_linear(x.expand(5, 5, 128), weight, None, [1, 2, 3, 4, 16], 64, locks, linear, ptx=True)
    with pytest.raises(ShapeError, match=r"locks must be 1 int32 zeros, got 0 torch\.int32"):
        int4_linear(x[None], weight, None, [16], 64, locks[:0], linear, ptx=True)
