import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from rounded import random_rotation, round_linear
from torch import nn

from parofx.errors import ShapeError
from parofx.nn import ROTATION_NAMES, TENSOR_NAMES, ParoLinear, check_tensors, tensor_specs
from parofx.testing import NARROW_OPERANDS, RotateLinearCase, check_rotate_int4_linear, rotate_linear_cases

CHECKPOINT = {
    "qweight": (torch.int32, (12, 2)),
    "qzeros": (torch.int32, (2, 2)),
    "scales": (torch.float16, (2, 16)),
    "theta": (torch.float16, (3, 6)),
    "pairs": (torch.int16, (3, 12)),
    "channel_scales": (torch.float16, (1, 12)),
    "bias": (torch.float16, (16,)),
}


def tensors_of(case):
    pairs, theta, channel_scales = case.rotation()
    tensors = case.weight()._asdict() | {"pairs": pairs, "theta": theta, "channel_scales": channel_scales}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def some_tensors(*, bias=True):
    return tensors_of(RotateLinearCase(batch=(1,), groups=2, group_size=6, krot=3, words=2, bias=bias))


def some_linear(*, bias=True):
    return ParoLinear.from_tensors(some_tensors(bias=bias))


def some_input(*batch, dtype=torch.float32):
    return torch.randn(*batch, 12, generator=torch.Generator().manual_seed(9)).to(dtype)


def described(module):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}


def equal_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_forward_gives_the_references_answer():
    def forward(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size, bits=4):
        tensors = {
            "qweight": qweight,
            "qzeros": qzeros,
            "scales": scales,
            "theta": theta,
            "pairs": pairs,
            "channel_scales": channel_scales.reshape(1, -1),
        }
        module = ParoLinear.from_tensors(tensors if bias is None else tensors | {"bias": bias})
        assert (module.group_size, module.bits) == (group_size, bits)
        return module(x)

    cases = rotate_linear_cases(rotation_dtypes=(torch.float16,), bits=(4, 3, 8))
    # Kernels may round activations to bf16 before they multiply.
    check_rotate_int4_linear(forward, cases=cases, tolerances=NARROW_OPERANDS)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_the_checkpoints(bias):
    expected = CHECKPOINT if bias else {name: CHECKPOINT[name] for name in TENSOR_NAMES}
    assert described(some_linear(bias=bias)) == expected
    assert described(ParoLinear(12, 16, group_size=6, krot=3, bias=bias)) == expected
    assert tensor_specs(12, 16, 6, 3, bias=bias) == expected
    assert list(some_linear(bias=bias).state_dict()) == list(
        ParoLinear(12, 16, group_size=6, krot=3, bias=bias).state_dict()
    )
    assert set(ROTATION_NAMES) < set(TENSOR_NAMES)


def test_there_are_no_parameters():
    assert list(some_linear().parameters()) == []


def test_from_tensors_does_not_copy():
    tensors = some_tensors()
    module = ParoLinear.from_tensors(tensors)
    assert all(getattr(module, name).data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    assert (module.in_features, module.out_features, module.group_size, module.krot) == (12, 16, 6, 3)


def test_a_new_module_rotates_by_nothing():
    """All codes, zeros and scales are 0; the rotation is the identity, and legal."""
    module = ParoLinear(12, 16, group_size=6, krot=3, bias=True)
    check_tensors(module.state_dict())
    module.scales.fill_(1.0)
    module.qzeros.fill_(-1)
    torch.testing.assert_close(module.dequantized_weight(), torch.full((16, 12), -15.0), rtol=0, atol=0)
    torch.testing.assert_close(module(torch.ones(2, 12)), torch.full((2, 16), -180.0), rtol=0, atol=0)


CASTS = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "to_dtype": lambda module: module.to(torch.bfloat16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float64),
    "to_like": lambda module: module.to(torch.zeros(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_leave_the_quantization_alone(cast):
    module = some_linear()
    before, output = copy.deepcopy(module.state_dict()), module(some_input(3))
    # Inside a container, as `model.half()` reaches it; the float neighbour is cast.
    model = nn.Sequential(nn.Linear(12, 12), module)
    dtype = cast(model)[0].weight.dtype
    assert cast(model)[0].weight.dtype == dtype
    assert described(module) == CHECKPOINT
    assert equal_tensors(module.state_dict(), before)
    assert torch.equal(module(some_input(3)), output)


def test_to_meta_keeps_names_dtypes_and_shapes():
    module = some_linear().to("meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    assert described(module) == CHECKPOINT
    assert module(torch.ones(3, 12, device="meta")).shape == (3, 16)
    assert described(module.to_empty(device="cpu")) == CHECKPOINT
    assert not any(buffer.is_meta for buffer in module.buffers())


def test_meta_construction_loads_by_assignment():
    module = ParoLinear(12, 16, group_size=6, krot=3, bias=True, device="meta")
    assert all(buffer.is_meta for buffer in module.buffers())
    module.load_state_dict(some_tensors(), assign=True)
    assert torch.equal(module(some_input(3)), some_linear()(some_input(3)))


def test_casts_keep_buffers_that_are_slices_of_a_larger_one():
    """Merged siblings are slices of one tensor: their rows are not contiguous."""
    tensors = some_tensors()
    wide = torch.cat((tensors["qweight"], tensors["qweight"]), dim=1)
    module = ParoLinear.from_tensors(tensors | {"qweight": wide[:, 2:]})
    expected = module(some_input(3))
    module.half().to("cpu")
    assert described(module) == CHECKPOINT
    assert torch.equal(module(some_input(3)), expected)


def test_deepcopy_is_independent():
    module = some_linear()
    twin = copy.deepcopy(module)
    assert equal_tensors(twin.state_dict(), module.state_dict())
    twin.qweight.zero_()
    assert not torch.equal(twin(some_input(3)), module(some_input(3)))


def test_pickle_and_torch_save():
    module = some_linear()
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(some_input(3)), module(some_input(3)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert equal_tensors(torch.load(file, weights_only=True), module.state_dict())


def test_load_state_dict_is_strict():
    module = ParoLinear(12, 16, group_size=6, krot=3, bias=True)
    module.load_state_dict(some_tensors())
    assert equal_tensors(module.state_dict(), some_linear().state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        module.load_state_dict(some_tensors(bias=False))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        some_linear(bias=False).load_state_dict(some_tensors())
    with pytest.raises(RuntimeError, match="size mismatch for theta"):
        module.load_state_dict(some_tensors() | {"theta": torch.zeros(2, 6, dtype=torch.float16)})


class Siblings(nn.Module):
    """Two linears that hold one rotation."""

    def __init__(self, seed, *, shared):
        super().__init__()
        rotations = [random_rotation(64, 32, 3, seed), random_rotation(64, 32, 3, seed if shared else seed + 1)]
        if shared:
            rotations[1] = rotations[0]
        weights = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(seed))
        self.q, self.k = (round_linear(weight, None, one, 32) for weight, one in zip(weights, rotations, strict=True))

    def forward(self, x):
        return self.q(x) + self.k(x)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_siblings_load_rotations_that_differ(packed, assign):
    """Regression: what one sibling loaded was written into the tensors that all of them held."""
    module, other = Siblings(0, shared=True), Siblings(5, shared=False)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    expected = other(x)
    assert module.q.theta is module.k.theta
    if packed:
        module(x)
    module.load_state_dict(state, assign=assign)
    assert equal_tensors(module.state_dict(), state)
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_siblings_load_one_rotation_and_hold_it_once(packed):
    module, again, other = Siblings(0, shared=True), Siblings(0, shared=True), Siblings(5, shared=True)
    state = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    for one in (module, again):
        if packed:
            one.q.pack_(), one.k.pack_()
        one.load_state_dict(state)
    name = "cpu_theta" if module.q.layout == "cpu" else "theta"
    assert module.q.get_buffer(name) is module.k.get_buffer(name)
    assert module.q.theta is module.k.theta
    if not packed:
        assert module.q.theta is not again.q.theta, "nothing but siblings share"
    assert equal_tensors(module.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("pairs", (1, 3), 1, r"k.pairs: round 1, group 0 must be a permutation of 0..31"),
        ("scales", (0, 2), torch.inf, r"k.scales: must be finite, got 1 values that are not"),
        ("theta", (0, 0), 1e6, r"k.theta: must be finite, got 1 values that are not"),
        ("channel_scales", (0, 4), 1e-12, r"k.channel_scales: weights are divided by them, got 1 zeros"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_impossible_values_are_not_loaded(packed, name, index, value, message):
    module = Siblings(0, shared=True)
    state = {key: tensor.clone() for key, tensor in Siblings(5, shared=True).state_dict().items()}
    expected = {key: tensor.clone() for key, tensor in module.state_dict().items() if key.startswith("k.")}
    key = f"k.{name}"
    state[key] = state[key].float() if name in ("theta", "channel_scales") else state[key]
    state[key][index] = value
    if packed:
        module.q.pack_(), module.k.pack_()
    layout = module.k.layout
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    found = module.state_dict()
    assert equal_tensors({key: found[key] for key in expected}, expected), "the linear is as it was"
    assert module.k.layout == layout


@given(rotate_linear_cases(rotation_dtypes=(torch.float16,), dtypes=(torch.float64,), bits=(4, 3, 8)))
def test_dequantized_weight_is_the_forward_of_the_identity(case):
    tensors = tensors_of(case)
    tensors["channel_scales"] = tensors["channel_scales"].reshape(1, -1)
    bias = tensors.pop("bias", None)
    module = ParoLinear.from_tensors(tensors)
    weight = module.dequantized_weight(torch.float64)
    assert weight.shape == (case.out_features, case.in_features)
    # fp64 from end to end; a weight is a sum over its group of at most 128 products below 7.
    identity = torch.eye(case.in_features, dtype=torch.float64)
    torch.testing.assert_close(module(identity).T, weight, rtol=0, atol=1e-11)
    # Another association of the same sums, and the bias on top.
    if bias is not None:
        module = ParoLinear.from_tensors(tensors | {"bias": bias})
    x = case.x()
    expected = nn.functional.linear(x, weight, None if bias is None else bias.double())
    largest = float(x.abs().max()) if x.numel() else 0.0
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11 * (1 + largest) * case.in_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_weight_is_rounded_once(dtype):
    module = some_linear()
    exact = module.dequantized_weight(torch.float64)
    weight = module.dequantized_weight(dtype)
    assert weight.dtype == dtype
    # One rounding to `dtype`, of a value that fp32 computed.
    torch.testing.assert_close(weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (1,), (), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_inputs_dtype_and_batch(batch, dtype):
    output = some_linear()(some_input(*batch, dtype=dtype))
    assert (output.dtype, tuple(output.shape)) == (dtype, (*batch, 16))


def test_non_contiguous_inputs():
    module, x = some_linear(), some_input(4, 5)
    for view in (x.transpose(0, 1), x[::2, 1:], x[:1].expand(3, 5, 12)):
        torch.testing.assert_close(module(view), module(view.contiguous()), rtol=0, atol=0)


def test_gradient_of_the_input():
    module, x = some_linear(), some_input(3, dtype=torch.float64).requires_grad_()
    module(x).sum().backward()
    expected = module.dequantized_weight(torch.float64).sum(0).expand(3, 12)
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)


def test_repr_and_packed_bytes():
    module = some_linear()
    assert repr(module) == "ParoLinear(in_features=12, out_features=16, bias=True, bits=4, group_size=6, krot=3)"
    by_hand = 4 * 24 + 4 * 4 + 2 * 32 + 2 * 18 + 2 * 36 + 2 * 12 + 2 * 16
    assert module.packed_bytes() == by_hand


@pytest.mark.parametrize(
    ("sizes", "group_size"), [((12, 16), 5), ((12, 16), 0), ((12, 12), 6), ((12, 16), 3), ((12, 16), 24)]
)
def test_sizes_that_do_not_fit_are_refused(sizes, group_size):
    """Regression: odd group sizes, which leave a channel without a partner, were taken."""
    message = (
        f"group_size must be even and divide in_features, 8 must divide out_features: got group_size {group_size},"
    )
    with pytest.raises(ShapeError, match=message):
        ParoLinear(*sizes, group_size=group_size, krot=1, bias=False)


def test_missing_and_unexpected_tensors_are_listed():
    tensors = some_tensors()
    del tensors["theta"], tensors["pairs"]
    message = r"mlp: expected \['qweight'.*up\]'\], missing \['theta', 'pairs'\], unexpected \['g_idx', 'weight'\]"
    with pytest.raises(ShapeError, match=message):
        check_tensors(tensors | {"weight": torch.ones(1), "g_idx": torch.ones(1)}, "mlp")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "qweight",
            torch.zeros(12, 2),
            r"ParoLinear.qweight: expected torch.int32 \(12, 2\), got torch.float32 \(12, 2\)",
        ),
        ("qzeros", torch.zeros(2, 2, dtype=torch.int16), "ParoLinear.qzeros: expected torch.int32"),
        ("scales", torch.zeros(2, 16), r"ParoLinear.scales: expected torch.float16 \(2, 16\), got torch.float32"),
        (
            "theta",
            torch.zeros(2, 6).half(),
            r"theta: expected torch.float16 \(3, 6\), got torch.float16 \(2, 6\) .*krot 3",
        ),
        ("pairs", torch.zeros(3, 12, dtype=torch.int32), r"pairs: expected torch.int16 \(3, 12\), got torch.int32"),
        ("channel_scales", torch.ones(12).half(), r"channel_scales: expected torch.float16 \(1, 12\), got .* \(12,\)"),
        ("bias", torch.zeros(8).half(), r"bias: expected torch.float16 \(16,\), got torch.float16 \(8,\)"),
        (
            "pairs",
            torch.zeros(3, 12, dtype=torch.int16),
            "ParoLinear.pairs: round 0, group 0 must be a permutation of 0..5",
        ),
        ("scales", torch.zeros(2, 24).half(), r"qweight \(K, bits·N/32\), qzeros .* must agree"),
    ],
)
def test_contradicting_tensors_are_refused(name, tensor, message):
    with pytest.raises(ShapeError, match=message):
        ParoLinear.from_tensors(some_tensors() | {name: tensor})


def test_odd_group_sizes_in_tensors_are_refused():
    tensors = some_tensors() | {"scales": torch.ones(4, 16).half(), "qzeros": torch.zeros(4, 2, dtype=torch.int32)}
    with pytest.raises(ShapeError, match=r"group_size \(rows of qweight over rows of scales\) must be even, got 3"):
        check_tensors(tensors)


def test_meta_tensors_are_checked_but_for_their_values():
    check_tensors({name: tensor.to("meta") for name, tensor in some_tensors().items()})
