import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import rotation
from parofx.errors import ShapeError
from parofx.testing import RotateLinearCase, RotationCase
from parofx.triton_ops import layout

GROUP_SIZES = st.sampled_from(layout.GROUP_SIZES)


@given(group_size=GROUP_SIZES, groups=st.integers(1, 9), words=st.integers(1, 5), seed=st.integers(0, 99))
def test_unpacking_inverts_packing(group_size, groups, words, seed):
    case = RotateLinearCase(batch=(), groups=groups, group_size=group_size, krot=0, words=words, seed=seed)
    checkpoint = case.weight()[:3]
    weight = layout.pack_weight(*checkpoint, group_size)
    assert weight.words.is_contiguous()
    assert weight.words.shape == (-(-case.in_features // 128), 8 * words, 32)
    for got, expected in zip(layout.unpack_weight(weight, group_size, case.in_features), checkpoint, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_siblings_are_slices_of_the_merged_weight():
    cases = [RotateLinearCase(batch=(), groups=2, group_size=64, krot=0, words=words) for words in (3, 1, 2)]
    weights = [layout.pack_weight(*case.weight()[:3], 64) for case in cases]
    merged = layout.merge_weights(weights)
    for weight, words, qparams in zip(
        weights, merged.words.split([24, 8, 16], 1), merged.qparams.split([24, 8, 16], 1), strict=True
    ):
        assert torch.equal(weight.words, words)
        assert torch.equal(weight.qparams, qparams)


@given(group_size=GROUP_SIZES, groups=st.integers(1, 3), krot=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_packed_rotation_rotates(group_size, groups, krot, seed):
    """As the kernels do: gather, scale, and per round turn neighbours and gather."""
    case = RotationCase(batch=(3,), groups=groups, group_size=group_size, krot=krot, dtype=torch.float64, seed=seed)
    packed = layout.pack_rotation(*case.rotation(), group_size)
    order, coefficients = packed.order.long(), packed.coefficients.double()
    v = case.x().view(3, groups, group_size)
    v = v.gather(-1, order[:, 0].expand_as(v)) * coefficients[:, 0]
    for r in range(krot):
        first, second, cos, sin = v[..., 0::2], v[..., 1::2], coefficients[:, 1 + r, 0::2], coefficients[:, 1 + r, 1::2]
        v = torch.stack((cos * first + sin * second, cos * second - sin * first), -1).flatten(-2)
        v = v.gather(-1, order[:, 1 + r].expand_as(v))
    expected = rotation.rotate(case.x(), *case.rotation(), group_size)
    torch.testing.assert_close(v.view(3, -1), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    case = RotateLinearCase(batch=(), groups=2, group_size=64, krot=1, words=1)
    qweight, qzeros, scales, _ = case.weight()
    pairs, theta, channel_scales = case.rotation()
    with pytest.raises(ShapeError, match=r"group_size must be one of \(32, 64, 128\) for the Triton kernels, got 16"):
        layout.pack_weight(qweight, qzeros, scales, 16)
    with pytest.raises(ShapeError, match="group_size must divide in_features: got 128 and 64"):
        layout.pack_weight(qweight[:64], qzeros[:1], scales[:1], 128)
    with pytest.raises(
        ShapeError, match=r"scales must be float16 \(4, N\) at group_size 32, got torch.float16 \(2, 8\)"
    ):
        layout.pack_weight(qweight, qzeros, scales, 32)
    weight = layout.pack_weight(qweight, qzeros, scales, 64)
    with pytest.raises(ShapeError, match=r"words and qparams must be \(2, 8, 32\) and \(4, 8\) for 256 channels"):
        layout.unpack_weight(weight, 64, 256)
    with pytest.raises(ShapeError, match="round 0, group 0 must be a permutation"):
        layout.pack_rotation(torch.zeros_like(pairs), theta, channel_scales, 64)
    rotations = [layout.pack_rotation(pairs[:r], theta[:r], channel_scales, 64) for r in (0, 1)]
    with pytest.raises(ShapeError, match="rotations of siblings must have one K, group_size and krot"):
        layout.stack_rotations(rotations)
