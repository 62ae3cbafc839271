"""The operators of linears in the CPU kernels' layout, and the way back from it."""

import pytest
import torch
from cpu_problem import make_rotation
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_layout import checkpoint
from torch import Tensor

from parofx import cpu_ops
from parofx.cpu_ops import packed_linear  # noqa: F401  (registers the operators)
from parofx.cpu_ops.layout import pack_rotation, pack_weight, place_together, unpack_rotation
from parofx.cpu_ops.layouts import PACK
from parofx.errors import ShapeError

ops = torch.ops.parofx


def held(krot: int = 2, out_features: int = 40, bits: int = 4) -> tuple[Tensor, ...]:
    """Return `(rotation, theta, weight, scales, zeros)` of a linear with K = 64 and groups of 32."""
    one = make_rotation(64, 32, krot, torch.Generator().manual_seed(0))
    rotation = pack_rotation(one.pairs, one.theta, one.channel_scales, 32)
    return rotation, one.theta, *PACK[bits](*checkpoint(64, out_features, 32, bits=bits), 32)


@given(
    groups=st.integers(1, 5),
    group_size=st.sampled_from((32, 64, 128)),
    krot=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_pairs_and_channel_scales_are_read_back(groups: int, group_size: int, krot: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (krot, groups)
    orders = torch.rand(*shape, group_size, generator=random).argsort(-1)
    pairs = orders.reshape(krot, groups * group_size).to(torch.int16)
    theta = (10 * torch.randn(krot, groups * group_size // 2, generator=random)).half()
    channel_scales = torch.randn(1, groups * group_size, generator=random).half()
    packed = pack_rotation(pairs, theta, channel_scales, group_size)
    for before, after in zip((pairs, channel_scales), unpack_rotation(packed, theta, group_size), strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)


def test_a_rotation_of_another_size_is_refused() -> None:
    rotation, theta, *_ = held()
    with pytest.raises(ShapeError, match=r"rotation must be torch.uint8 of shape \(640,\): got .* \(960,\)"):
        unpack_rotation(rotation, theta[:1], 32)


@pytest.mark.parametrize("krot", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("requires_grad", "bits"), [(True, 4), (False, 4), (True, 3), (False, 8)])
def test_opcheck(krot: int, bias: bool, requires_grad: bool, bits: int) -> None:
    rotation, theta, *weight = held(krot, 64, bits)
    torch.library.opcheck(ops.unpack_cpu_weight.default, (*weight, bits))
    torch.library.opcheck(ops.unpack_cpu_rotation.default, (rotation, theta, 32))
    for shape in ((64,), (0, 64), (3, 5, 64)):
        x = torch.randn(shape, requires_grad=requires_grad)
        halves = (torch.randn(3, 64).half(), torch.randn(3, 64).half()) if bits != 4 else ()
        arguments = (x, rotation, theta, *weight, torch.randn(64).half() if bias else None, 32, bits, *halves)
        torch.library.opcheck(ops.rotate_int4_cpu_linear.default, arguments)


@pytest.mark.parametrize("bits", PACK)
def test_one_block_of_columns_is_unpacked_to_memory_of_its_own(bits: int) -> None:
    *_, weight, scales, zeros = held(out_features=32, bits=bits)
    own = {one.data_ptr() for one in ops.unpack_cpu_weight(weight, scales, zeros, bits)}
    assert own.isdisjoint(one.data_ptr() for one in (weight, scales, zeros))


@pytest.mark.parametrize("bits", PACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_the_semantic_operator_of_what_is_unpacked(dtype: torch.dtype, bits: int) -> None:
    rotation, theta, *weight = held(out_features=96, bits=bits)
    x, bias = torch.randn(3, 64).to(dtype), torch.randn(96).half()
    pairs, channel_scales = ops.unpack_cpu_rotation(rotation, theta, 32)
    unpacked = ops.unpack_cpu_weight(*weight, bits)
    expected = ops.rotate_int4_linear(x, pairs, theta, channel_scales, *unpacked, bias, 32, bits)
    found = ops.rotate_int4_cpu_linear(x, rotation, theta, *weight, bias, 32, bits)
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert float((found - expected).double().norm() / expected.double().norm()) < tolerance


def test_merged_linears_are_slices_of_one_buffer() -> None:
    linears = [pack_weight(*checkpoint(64, out_features, 32, seed=out_features), 32) for out_features in (64, 32)]
    before = [[tensor.clone() for tensor in linear] for linear in linears]
    assert place_together(linears)
    for parts, values in zip(zip(*linears, strict=True), zip(*before, strict=True), strict=True):
        assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
        assert parts[1].storage_offset() == parts[0].numel()
        assert all(torch.equal(*pair) for pair in zip(parts, values, strict=True))
    addresses = [tensor.data_ptr() for linear in linears for tensor in linear]
    assert place_together(linears)
    assert addresses == [tensor.data_ptr() for linear in linears for tensor in linear], "a second call moves nothing"
    merged = cpu_ops.pack_weight(
        *(torch.cat([checkpoint(64, n, 32, seed=n)[i] for n in (64, 32)], dim=1) for i in range(3)), 32
    )
    for whole, parts in zip(merged, zip(*linears, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts)), "the packed tensors of the merged layer"


def test_a_narrow_last_block_keeps_linears_apart() -> None:
    linears = [pack_weight(*checkpoint(64, out_features, 32), 32) for out_features in (40, 32)]
    addresses = [tensor.data_ptr() for linear in linears for tensor in linear]
    assert not place_together(linears)
    assert addresses == [tensor.data_ptr() for linear in linears for tensor in linear]
