import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import rotation
from parofx.errors import ShapeError
from parofx.testing import RotationCase, check_rotation, check_rotation_case, reference, rotation_cases

# fp64 arithmetic over at most 8 rounds of unit-scale values; scales spread by a factor of 16.
FP64_TOLERANCE = 1e-12
# The same in fp32.
FP32_TOLERANCE = 2e-5
# Two 16-bit roundings, one in each direction, of values up to the group's norm.
HALF_TOLERANCE = 3e-2

double_cases = rotation_cases(dtypes=(torch.float64,))


def flat_rotation(case):
    pairs, theta, _ = case.rotation()
    return pairs, theta, torch.ones(case.in_features, dtype=torch.float64)


@given(rotation_cases(rotation_dtypes=(torch.float64,), dtypes=(torch.float64,)))
def test_reference_of_one_hot_reads_as_the_definition(case):
    """The check of the checker: one round on one group against 2×2 matrices."""
    pairs, theta, scales = case.rotation()
    if not case.krot:
        assert (reference.rotate(case.x(), pairs, theta, scales, case.group_size) == (case.x() * scales).numpy()).all()
        return
    matrix = torch.eye(case.in_features, dtype=torch.float64)
    for slot in range(case.in_features // 2):
        start = 2 * slot // case.group_size * case.group_size
        i, j = (start + int(pairs[0, 2 * slot]), start + int(pairs[0, 2 * slot + 1]))
        cos, sin = theta[0, slot].cos(), theta[0, slot].sin()
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, sin, -sin, cos
    expected = (case.x() * scales.reshape(-1)) @ matrix.T
    got = torch.from_numpy(reference.rotate(case.x(), pairs[:1], theta[:1], scales, case.group_size))
    torch.testing.assert_close(got, expected, rtol=FP64_TOLERANCE, atol=FP64_TOLERANCE * 1e3)


def test_sign_and_order_by_hand():
    """METHOD: v_i ← cosθ·v_i + sinθ·v_j, v_j ← −sinθ·v_i + cosθ·v_j; a quarter turn maps (1, 2) to (2, −1)."""
    quarter = math.pi / 2
    v = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    pairs = torch.tensor([[2, 0, 1, 3], [0, 1, 2, 3]], dtype=torch.int16)
    theta = torch.tensor([[quarter, 0.0], [0.0, quarter]], dtype=torch.float64)
    scales = torch.tensor([1.0, 1.0, 1.0, 10.0], dtype=torch.float64)
    # Round 0 turns the pair (2, 0) = (3, 1) to (1, −3); round 1 the pair (2, 3) = (1, 40) to (40, −1).
    expected = torch.tensor([[-3.0, 2.0, 40.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(rotation.rotate(v, pairs, theta, scales, 4), expected, rtol=0, atol=FP64_TOLERANCE)


@pytest.mark.parametrize("function", [rotation.rotate, rotation.inverse_rotate])
@pytest.mark.parametrize("shape", [(37, 64), (5, 7, 64), (3, 1, 64), (0, 64)])
def test_many_rows_are_rotated_some_at_a_time(function, shape, monkeypatch):
    """With the result of all at once, as which they are rotated where a gradient is recorded."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=random)
    pairs = torch.rand(2, 2, 32, generator=random).argsort(-1).reshape(2, 64)
    theta, scales = torch.randn(2, 32, generator=random), 0.5 + torch.rand(64, generator=random)
    whole = function(v, pairs, theta, scales, 32)
    monkeypatch.setattr(rotation, "BLOCK_ELEMENTS", 4 * 64 + 1)
    rows, gathered = [], rotation._channels_first
    monkeypatch.setattr(rotation, "_channels_first", lambda part: rows.append(len(part)) or gathered(part))
    torch.testing.assert_close(function(v, pairs, theta, scales, 32), whole, rtol=0, atol=1e-6)
    assert max(rows) <= 5
    rows.clear()
    function(v.requires_grad_(), pairs, theta, scales, 32).sum().backward()
    assert v.grad is not None
    assert rows == [len(v)]


def test_any_legal_input_gives_the_references_answer():
    check_rotation(rotation.rotate, max_examples=150)


@pytest.mark.parametrize("theta_dtype", [torch.float16, torch.float32])
def test_fp64_values_keep_fp64_accuracy_with_narrower_angles(theta_dtype):
    """Regression: cosines of fp16 angles were taken in fp32, 1e-8 off for fp64 values."""
    case = RotationCase(batch=(3,), groups=1, group_size=2, krot=1, dtype=torch.float64, theta_dtype=theta_dtype)
    check_rotation_case(rotation.rotate, case)


@given(rotation_cases(dtypes=(torch.float64, torch.float32, torch.float16)))
def test_inverse_undoes_rotate(case):
    tolerance = {torch.float64: FP64_TOLERANCE, torch.float32: FP32_TOLERANCE, torch.float16: HALF_TOLERANCE}
    x, (pairs, theta, scales) = case.x(), case.rotation()
    back = rotation.inverse_rotate(
        rotation.rotate(x, pairs, theta, scales, case.group_size), pairs, theta, scales, case.group_size
    )
    assert back.dtype == x.dtype
    assert back.shape == x.shape
    largest = float(x.abs().max()) if x.numel() else 0.0
    # Scales spread over 1/4..4: an error is at most 16 times larger on the way back, over the norm of the group.
    atol = tolerance[case.dtype] * 16 * largest * math.sqrt(case.group_size)
    torch.testing.assert_close(back, x, rtol=0, atol=max(atol, 1e-30))


@given(double_cases)
def test_norms_and_inner_products_are_kept(case):
    pairs, theta, ones = flat_rotation(case)
    x, y = case.x(), case.x().flip(-1)
    rotated_x = rotation.rotate(x, pairs, theta, ones, case.group_size)
    rotated_y = rotation.rotate(y, pairs, theta, ones, case.group_size)
    torch.testing.assert_close(rotated_x.norm(dim=-1), x.norm(dim=-1), rtol=FP64_TOLERANCE, atol=FP64_TOLERANCE)
    limit = FP64_TOLERANCE * float((x.norm(dim=-1) * y.norm(dim=-1)).max()) if x.numel() else 0.0
    torch.testing.assert_close((rotated_x * rotated_y).sum(-1), (x * y).sum(-1), rtol=0, atol=max(limit, 1e-30))


@given(double_cases, st.integers(1, 9))
def test_rotated_linear_is_the_linear(case, out_features):
    """`ROT(x ⊘ α) · ROT(W ⊙ α)ᵀ = x Wᵀ`."""
    x, (pairs, theta, scales) = case.x(), case.rotation()
    weight = torch.linspace(-1, 1, out_features * case.in_features, dtype=torch.float64)
    weight = weight.reshape(out_features, case.in_features)
    rotated_x = rotation.rotate(x, pairs, theta, scales, case.group_size)
    rotated_weight = rotation.rotate(weight, pairs, theta, scales.double().reciprocal(), case.group_size)
    limit = FP64_TOLERANCE * float(x.abs().max()) * case.in_features if x.numel() else 0.0
    torch.testing.assert_close(rotated_x @ rotated_weight.T, x @ weight.T, rtol=0, atol=max(limit, 1e-30))


@given(double_cases)
def test_dense_form_is_rotate_and_orthogonal(case):
    pairs, theta, ones = flat_rotation(case)
    matrices = rotation.dense_form(pairs, theta.double(), case.group_size)
    assert matrices.shape == (case.groups, case.group_size, case.group_size)
    eye = torch.eye(case.group_size, dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(matrices @ matrices.mT, eye, rtol=0, atol=FP64_TOLERANCE)
    x = case.x()
    grouped = x.reshape(*x.shape[:-1], case.groups, 1, case.group_size)
    by_matrix = (grouped @ matrices).reshape(x.shape)
    rotated = rotation.rotate(x, pairs, theta, ones, case.group_size)
    limit = FP64_TOLERANCE * float(x.abs().max()) * case.group_size if x.numel() else 0.0
    torch.testing.assert_close(by_matrix, rotated, rtol=0, atol=max(limit, 1e-30))


@given(double_cases)
def test_gather_form_is_rotate_with_involutive_partners_in_the_group(case):
    pairs, theta, ones = flat_rotation(case)
    form = rotation.gather_form(pairs, theta.double(), case.group_size)
    channels = torch.arange(case.in_features)
    v = case.x()
    for partner, cos, sin in zip(*form, strict=True):
        assert torch.equal(partner[partner], channels)
        assert not (partner == channels).any()
        assert torch.equal(partner // case.group_size, channels // case.group_size)
        v = cos * v + sin * v[..., partner]
    expected = rotation.rotate(case.x(), pairs, theta, ones, case.group_size)
    limit = FP64_TOLERANCE * float(v.abs().max()) * case.group_size if v.numel() else 0.0
    torch.testing.assert_close(v, expected, rtol=0, atol=max(limit, 1e-30))


def test_gather_form_computes_in_fp32_for_16_bit_angles():
    case = RotationCase(batch=(1,), groups=2, group_size=6, krot=3)
    pairs, theta, _ = case.rotation()
    form = rotation.gather_form(pairs, theta, 6)
    assert (form.partner.dtype, form.cos.dtype, form.sin.dtype) == (torch.int64, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", ["normal", "outliers"])
def test_16_bit_results_are_rounded_once(dtype, values):
    """Within a unit in the last place of the rounded fp64 result, up to fp32 errors; rounding each round is not."""
    case = RotationCase(batch=(65,), groups=3, group_size=128, krot=8, dtype=dtype, values=values)
    x, (pairs, theta, scales) = case.x(), case.rotation()
    expected = torch.from_numpy(reference.rotate(x, pairs, theta, scales, 128))
    rounded = expected.to(dtype)
    unit = (rounded.nextafter(torch.full_like(rounded, torch.inf)) - rounded).double()
    norms = (x.double() * scales.double()).reshape(65, 3, 128).norm(dim=-1, keepdim=True).expand(65, 3, 128)
    allowed = unit + 16 * torch.finfo(torch.float32).eps * norms.reshape(65, -1)

    got = rotation.rotate(x, pairs, theta, scales, 128)
    assert got.dtype == dtype
    assert ((got.double() - rounded.double()).abs() <= allowed).all()

    each_round = (x * scales.to(dtype)).to(dtype)
    ones = torch.ones(case.in_features)
    for r in range(8):
        each_round = rotation.rotate(each_round, pairs[r : r + 1], theta[r : r + 1], ones, 128)
    assert ((each_round.double() - rounded.double()).abs() > allowed).float().mean() > 0.1


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (0,), ()])
@pytest.mark.parametrize("krot", [0, 1, 8])
def test_autograd_of_rotate_and_memory_lean_backward(shape, krot):
    case = RotationCase(batch=shape, groups=3, group_size=6, krot=krot, dtype=torch.float64)
    pairs, theta, scales = case.rotation()
    inputs = [case.x(), theta.double(), scales.double()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    rotated = rotation.rotate(inputs[0], pairs, inputs[1], inputs[2], 6)
    grad = torch.linspace(-1, 1, rotated.numel(), dtype=torch.float64).reshape(rotated.shape)
    expected = torch.autograd.grad(rotated, inputs, grad, materialize_grads=True)
    got = rotation.rotate_backward(grad, inputs[0].detach(), pairs, inputs[1].detach(), inputs[2].detach(), 6)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=FP64_TOLERANCE, atol=FP64_TOLERANCE)


def test_gradcheck_of_rotate():
    case = RotationCase(batch=(3,), groups=2, group_size=6, krot=3, dtype=torch.float64)
    pairs, theta, scales = case.rotation()
    inputs = [tensor.double().requires_grad_() for tensor in (case.x(), theta, scales)]
    assert torch.autograd.gradcheck(lambda v, t, s: rotation.rotate(v, pairs, t, s, 6), inputs)


@pytest.mark.parametrize("krot", [1, 4])
def test_gradcheck_of_dense_form(krot):
    case = RotationCase(batch=(1,), groups=2, group_size=6, krot=krot)
    pairs, theta, _ = case.rotation()
    assert torch.autograd.gradcheck(lambda t: rotation.dense_form(pairs, t, 6), [theta.double().requires_grad_()])


def test_gradients_of_half_angles_and_scales_have_their_dtype():
    case = RotationCase(batch=(5,), groups=2, group_size=6, krot=3, dtype=torch.float32)
    pairs, theta, scales = case.rotation()
    grads = rotation.rotate_backward(case.x(), case.x(), pairs, theta, scales, 6)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float16, torch.float16]
    assert [grad.shape for grad in grads] == [case.x().shape, theta.shape, scales.shape]
    dense = theta.clone().requires_grad_()
    rotation.dense_form(pairs, dense, 6).sum().backward()
    assert dense.grad.dtype == torch.float16


def test_compute_dtype():
    assert rotation.compute_dtype(torch.float64) == torch.float64
    assert rotation.compute_dtype(torch.bfloat16) == torch.float32


good = {"pairs": torch.zeros(2, 8, dtype=torch.int16), "theta": torch.zeros(2, 4), "scales": torch.ones(8)}


@pytest.mark.parametrize(
    ("changed", "group_size", "message"),
    [
        ({}, 3, "group_size must be even and at least 2, got 3"),
        ({}, 0, "group_size must be even and at least 2, got 0"),
        ({}, 6, "group_size must divide in_features: got 6 and 8; pass another group_size"),
        (
            {"pairs": torch.zeros(2, 6, dtype=torch.int16)},
            4,
            r"pairs must be an integer tensor \(krot, 8\), got torch.int16 \(2, 6\)",
        ),
        ({"pairs": torch.zeros(8, dtype=torch.int16)}, 4, r"pairs must be an integer tensor .* got torch.int16 \(8,\)"),
        ({"pairs": torch.zeros(2, 8)}, 4, "pairs must be an integer tensor .* got torch.float32"),
        (
            {"theta": torch.zeros(3, 4)},
            4,
            r"theta must be a floating tensor \(2, 4\) to fit pairs, got torch.float32 \(3, 4\)",
        ),
        ({"theta": torch.zeros(2, 4, dtype=torch.int32)}, 4, "theta must be a floating tensor .* got torch.int32"),
        ({"scales": torch.ones(4)}, 4, r"scales must be \(8,\) or \(1, 8\), got \(4,\)"),
        ({"scales": torch.ones(8, 1)}, 4, r"scales must be \(8,\) or \(1, 8\), got \(8, 1\)"),
    ],
)
@pytest.mark.parametrize("fn", [rotation.rotate, rotation.inverse_rotate])
def test_bad_shapes_are_refused(fn, changed, group_size, message):
    with pytest.raises(ShapeError, match=message):
        fn(torch.ones(3, 8), **(good | changed), group_size=group_size)


def test_dense_form_refuses_bad_shapes():
    with pytest.raises(ShapeError, match="group_size must divide in_features: got 6 and 8"):
        rotation.dense_form(good["pairs"], good["theta"], 6)


@given(rotation_cases())
def test_check_pairs_takes_permutations(case):
    rotation.check_pairs(case.rotation().pairs, case.group_size)


def test_check_pairs_names_the_round_and_group():
    pairs = torch.tensor([[0, 1, 3, 2], [1, 0, 2, 2]], dtype=torch.int16)
    with pytest.raises(
        ShapeError, match=r"layer.pairs: round 1, group 0 must be a permutation of 0..3, got \[1, 0, 2, 2\]"
    ):
        rotation.check_pairs(pairs, 4, "layer.pairs")
    with pytest.raises(ShapeError, match="round 0, group 1"):
        rotation.check_pairs(torch.tensor([[0, 1, 2, 3]]), 2)
