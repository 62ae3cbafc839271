"""The two layouts a `ParoLinear` holds its tensors in: what is done to the module leaves its values alone."""

import copy
import io
import pickle
import threading

import pytest
import torch
from fp64 import relative_error
from libraries import needs_library
from rounded import random_rotation, round_linear
from torch import nn

from parofx import cpu_ops, kernel_layouts
from parofx.cpu_ops.packed_linear import CpuLayout
from parofx.errors import ShapeError
from parofx.nn import ROTATION_NAMES, TENSOR_NAMES, ParoLinear

pytestmark = needs_library

#: The kernels against the reference in fp32: other orders of summation.
FP32 = 1e-5
K, N, GROUP = 128, 72, 32


def some_linear(seed: int = 0, *, bias: bool = True, krot: int = 3, bits: int = 4, rank: int = 0) -> ParoLinear:
    generator = torch.Generator().manual_seed(seed)
    out_features = 96 if bits == 3 else N
    weight = torch.randn(out_features, K, generator=generator)
    shift = torch.randn(out_features, generator=generator) if bias else None
    module = round_linear(weight, shift, random_rotation(K, GROUP, krot, seed), GROUP, bits)
    if rank:
        halves = {
            f"compensation_{half}": torch.randn(rank, size, generator=generator).half()
            for half, size in (("down", K), ("up", out_features))
        }
        module = ParoLinear.from_tensors(dict(module.state_dict()) | halves)
    return module


def some_input(*batch: int) -> torch.Tensor:
    return torch.randn(*(batch or (3,)), K, generator=torch.Generator().manual_seed(9))


def reference(tensors, x, bits=4):
    names = ("pairs", "theta", "channel_scales", "qweight", "qzeros", "scales")
    halves = (tensors.get("compensation_down"), tensors.get("compensation_up"))
    given = (*(tensors[name] for name in names), tensors.get("bias"))
    return torch.ops.parofx.rotate_int4_linear(x, *given, GROUP, bits, *halves)


def same(one, other) -> bool:
    return list(one) == list(other) and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in other
    )


@pytest.mark.parametrize(("krot", "bits", "rank"), [(0, 4, 0), (3, 4, 0), (3, 3, 0), (0, 8, 3), (3, 4, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_first_forward_packs_and_the_state_dict_stays(krot, bits, rank, bias):
    module = some_linear(bias=bias, krot=krot, bits=bits, rank=rank)
    before = copy.deepcopy(module.state_dict())
    assert module.layout == "checkpoint"
    result = module(some_input())
    assert module.layout == "cpu"
    assert relative_error(result, reference(before, some_input(), bits)) < FP32
    assert same(module.state_dict(), before)
    assert same(nn.Sequential(module).state_dict(), {f"0.{key}": value for key, value in before.items()})
    assert same(module.checkpoint_tensors(), before)
    assert module.layout == "cpu", "reading it changes nothing"
    assert same(module.unpack_().state_dict(), before)
    assert {name for name, _ in module.named_buffers()} == set(before)


def test_a_correction_is_part_of_the_weight():
    module, x = some_linear(rank=3).pack_(), some_input()
    assert "compensation_rank=3" in repr(module)
    assert module.packed_bytes() == sum(tensor.nbytes for tensor in module.state_dict().values())
    expected = nn.functional.linear(x, module.dequantized_weight(), module.bias.float())
    assert relative_error(module(x), expected) < FP32
    plain = {name: tensor for name, tensor in module.state_dict().items() if "compensation" not in name}
    assert relative_error(ParoLinear.from_tensors(plain)(x), expected) > 0.1
    copied = ParoLinear(K, N, group_size=GROUP, krot=3, bias=True, compensation_rank=3)
    copied.pack_()
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied(x), module(x))
    with pytest.raises(ShapeError, match=r"missing \['compensation_up'\]"):
        ParoLinear.from_tensors(plain | {"compensation_down": module.compensation_down})
    fast = torch.compile(module.eval(), backend="paro", fullgraph=True)
    with torch.no_grad():
        assert relative_error(fast(x), expected) < FP32


def test_layouts_change_under_autocast():
    expected = some_linear().state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        module = some_linear().pack_()
        assert module(some_input()).dtype == torch.bfloat16
        assert same(module.state_dict(), expected)
        assert same(module.unpack_().state_dict(), expected)
    assert module(some_input()).dtype == torch.float32


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_there_is_one_copy(bits):
    module = some_linear(bits=bits)
    packed_size = module.packed_bytes()
    module.pack_()
    assert {name for name, _ in module.named_buffers()} == {*CpuLayout.buffers, "bias"}
    resident = sum(buffer.nbytes for buffer in module.buffers())
    rotation = module.get_buffer("cpu_rotation").nbytes
    zeros = module.get_buffer("cpu_zeros").nbytes
    assert resident <= packed_size + rotation + zeros
    assert module.get_buffer("cpu_weight").nbytes == module.out_features * K * bits // 8
    assert module.packed_bytes() == packed_size


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_tensor_read_by_name_is_the_modules_own(name):
    module, expected = some_linear(), some_linear()
    module.pack_()
    tensor = getattr(module, name)
    assert module.layout == "checkpoint"
    assert torch.equal(tensor, getattr(expected, name))
    tensor.copy_(tensor.flip(-1) if name not in ("theta", "channel_scales") else tensor * 0.5)
    result = module(some_input())
    assert module.layout == "cpu"
    assert relative_error(result, reference(module.state_dict(), some_input())) < FP32
    assert relative_error(result, expected(some_input())) > 0.01


@pytest.mark.parametrize("name", TENSOR_NAMES)
def test_a_tensor_that_is_set_counts(name):
    module, other = some_linear().pack_(), some_linear(seed=1)
    setattr(module, name, getattr(other, name))
    assert module.layout == "checkpoint"
    assert relative_error(module(some_input()), reference(module.state_dict(), some_input())) < FP32
    assert same({name: module.state_dict()[name]}, {name: other.state_dict()[name]})


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_load_state_dict(assign, packed):
    module, other = some_linear(), some_linear(seed=1)
    expected = other.state_dict() if assign else other.pack_().state_dict()
    if packed:
        module.pack_()
    before = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    assert module.load_state_dict(expected, assign=assign) == ([], [])
    assert module.layout == ("cpu" if packed else "checkpoint")
    if not assign:
        # Rotation tensors may be siblings' too, and are replaced.
        kept = CpuLayout.weight_buffers if packed else set(before) - set(ROTATION_NAMES)
        assert all(module.get_buffer(name).data_ptr() == before[name] for name in kept)
    assert same(module.state_dict(), expected)
    assert torch.equal(module(some_input()), other(some_input()))


def test_load_state_dict_is_strict_in_either_layout():
    state = some_linear(seed=1).state_dict()
    for module in (some_linear(), some_linear().pack_()):
        layout = module.layout
        with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"theta".*Unexpected key.*"cpu_weight"'):
            module.load_state_dict({key: state[key] for key in state if key != "theta"} | {"cpu_weight": state["bias"]})
        with pytest.raises(RuntimeError, match="size mismatch for qweight"):
            module.load_state_dict(state | {"qweight": state["qweight"][:8]})
        assert module.layout == layout
        # As in any module, what did fit is loaded.
        assert torch.equal(module.state_dict()["theta"], state["theta"])
        assert relative_error(module(some_input()), reference(module.state_dict(), some_input())) < FP32


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(_saved(module), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_whole_and_apart(copied):
    module = some_linear().pack_()
    before, output = copy.deepcopy(module.state_dict()), module(some_input())
    other = copied(module)
    assert same(other.state_dict(), before)
    assert torch.equal(other(some_input()), output)
    other.qweight.zero_()
    assert same(module.state_dict(), before)
    assert torch.equal(module(some_input()), output)


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_layout(dtype):
    module = some_linear().pack_()
    before = copy.deepcopy(module.state_dict())
    addresses = [buffer.data_ptr() for buffer in module.buffers()]
    module.to(dtype).to("cpu").float()
    assert module.layout == "cpu"
    assert addresses == [buffer.data_ptr() for buffer in module.buffers()]
    assert same(module.state_dict(), before)
    x = some_input().to(dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert module(x).dtype == dtype
    assert relative_error(module(x), reference(before, x.double())) < tolerance


def test_a_device_without_kernels_gets_the_checkpoints_layout():
    module = some_linear().pack_().to("meta")
    assert module.layout == "checkpoint"
    assert {name for name, _ in module.named_buffers()} == {*TENSOR_NAMES, "bias"}
    assert all(buffer.is_meta for buffer in module.buffers())
    assert module(some_input().to("meta")).shape == (3, N)
    module.load_state_dict(some_linear().state_dict(), assign=True)
    assert torch.equal(module(some_input()), some_linear()(some_input()))
    assert module.layout == "cpu"


def test_new_memory_on_the_same_device_is_packed_anew():
    module = some_linear().pack_()
    expected = module(some_input())
    module._apply(torch.clone)
    assert module.layout == "checkpoint"
    assert torch.equal(module(some_input()), expected)
    module.to_empty(device="cpu")
    assert module.layout == "checkpoint", "kernels never see what was never written"


def test_share_memory():
    module = some_linear().pack_()
    expected = module(some_input())
    module.share_memory()
    assert module.layout == "cpu"
    assert all(buffer.is_shared() for buffer in module.buffers())
    assert torch.equal(module(some_input()), expected)


def test_siblings_share_a_rotation_in_either_layout():
    tensors = random_rotation(K, GROUP, 3, seed=0)
    one, other = (round_linear(torch.randn(N, K), None, tensors, GROUP) for _ in range(2))
    assert one.theta is other.theta
    one.pack_()
    other.pack_()
    assert one.get_buffer("cpu_rotation") is other.get_buffer("cpu_rotation")
    assert one.get_buffer("cpu_theta") is other.get_buffer("cpu_theta")
    assert one.pairs is other.pairs
    assert one.theta is other.theta
    one.pack_()
    other.pack_()
    assert one.get_buffer("cpu_rotation") is other.get_buffer("cpu_rotation")


def test_a_write_to_one_sibling_does_not_reach_a_packed_one():
    tensors = random_rotation(K, GROUP, 3, seed=0)
    one, other = (round_linear(torch.randn(N, K), None, tensors, GROUP) for _ in range(2))
    state, expected = copy.deepcopy(other.pack_().state_dict()), other(some_input())
    one.pack_().theta.add_(1)
    assert torch.equal(other(some_input()), expected)
    assert same(other.state_dict(), state)
    assert torch.equal(other.theta, state["theta"])
    assert not torch.equal(one.theta, state["theta"])


def test_inference_mode_leaves_ordinary_tensors():
    module = some_linear()
    with torch.inference_mode():
        module(some_input())
    assert not any(buffer.is_inference() for buffer in module.buffers())
    x = some_input().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_gives_the_gradient_of_the_input(dtype):
    module = some_linear()
    state = copy.deepcopy(module.state_dict())
    x = some_input(2, 5).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    assert module.layout == "cpu"
    reference(state, y).square().sum().backward()
    assert relative_error(x.grad, y.grad) < FP32


def test_strides_and_empty_batches():
    module = some_linear()
    for x in (some_input(0), some_input(1), some_input(4, 7).transpose(0, 1), some_input(8)[::3]):
        expected = reference(module.state_dict(), x)
        result = module(x)
        assert result.shape == expected.shape
        assert not x.numel() or relative_error(result, expected) < FP32


def test_without_kernels_the_reference_serves(monkeypatch):
    module = some_linear()
    expected = module(some_input())
    packed, fresh = copy.deepcopy(module), some_linear()
    monkeypatch.setattr(cpu_ops, "is_available", lambda: False)
    monkeypatch.setattr(cpu_ops, "why_unavailable", lambda: "no compiler")
    assert CpuLayout().why_not(torch.device("cpu"), GROUP) == "the kernels are not available: no compiler"
    assert relative_error(fresh(some_input()), expected) < FP32
    assert fresh.layout == "checkpoint"
    assert relative_error(packed(some_input()), expected) < FP32


@pytest.mark.parametrize(
    ("device", "group_size", "reason"),
    [("cuda", 128, "device cuda is not cpu"), ("cpu", 48, "group_size 48 is not one of (32, 64, 128)")],
)
def test_why_not_the_cpu_layout(device, group_size, reason):
    assert CpuLayout().why_not(torch.device(device), group_size) == reason
    assert kernel_layouts.choose(torch.device(device), group_size) is None


def test_pairs_that_are_no_permutation_are_refused():
    module = some_linear()
    module.pairs.zero_()
    with pytest.raises(ShapeError, match=r"pairs must hold a permutation of 0\.\.31"):
        module(some_input())


def test_threads_that_call_at_once_pack_once():
    module = some_linear()
    expected, results = reference(module.state_dict(), some_input()), []
    barrier = threading.Barrier(4)

    def call() -> None:
        barrier.wait()
        results.append(module(some_input()))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(relative_error(result, expected) < FP32 for result in results)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("packed", [True, False])
def test_plain_compilers_take_it_as_one_graph(backend, packed):
    torch._dynamo.reset()
    module = some_linear()
    expected = reference(module.state_dict(), some_input())
    if packed:
        module.pack_()
    fast = torch.compile(module, backend=backend, fullgraph=True)
    assert relative_error(fast(some_input()), expected) < FP32
    assert module.layout == "cpu"
    module.scales.mul_(2)
    assert relative_error(fast(some_input()), reference(module.state_dict(), some_input())) < FP32


@pytest.mark.parametrize("packed", [True, False])
def test_export(packed):
    module = some_linear()
    expected = reference(module.state_dict(), some_input())
    if packed:
        module.pack_()
    program = torch.export.export(module, (some_input(),), strict=False)
    assert module.layout == ("cpu" if packed else "checkpoint"), "exporting leaves the module alone"
    assert relative_error(program.module()(some_input()), expected) < FP32
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    name = "rotate_int4_cpu_linear" if packed else "rotate_int4_linear"
    assert calls == [f"parofx.{name}.default"]


def test_a_forward_that_reads_a_tensor_by_name_exports():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = some_linear().pack_()

        def forward(self, x):
            return self.inner(x) + self.inner.scales.float().sum()

    model = Reader()
    expected = model(some_input())
    model.inner.pack_()
    program = torch.export.export(model, (some_input(),), strict=False)
    assert model.inner.layout == "cpu"
    assert relative_error(program.module()(some_input()), expected) < FP32


def test_what_a_copy_hands_out_is_its_own():
    """Regression: tensors were shared by content, so that a write into one model reached its copy."""
    torch.manual_seed(0)
    first = ParoLinear(64, 16, group_size=32, krot=3, bias=False).eval()
    first.theta.normal_()
    before, x = copy.deepcopy(first), torch.randn(2, 64)
    expected = first(x)
    after = copy.deepcopy(first)
    for other in (before, after):
        other(x)
        assert other.theta is not first.theta
    first.theta.zero_()
    for other in (before, after):
        assert torch.equal(other(x), expected)
