import contextlib
import copy
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import transformers
from fp64 import relative_error, run
from libraries import needs_library
from rounded import round_model
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.nn.functional import linear
from zoo import LLAMA_LIKE, ZOO, decoder, tokens

import parofx
from parofx import CalibrationConfig, ParoConfig, ParoLinear
from parofx.passes import census
from parofx.passes.calibrate import Calibrate
from parofx.passes.capture import complete_inputs
from parofx.passes.derived import _cache as derived_tensors

#: Compiled against eager in fp32: other orders of summation.
FP32 = 1e-5
#: Activations and products rounded to bf16, 2⁻⁸ each.
BF16 = 1e-2
#: What four bits may cost these networks.
FOUR_BITS = 0.15
OPTIONS = {"steps": 2}


class Net(nn.Module):
    """Two siblings behind a norm, one of them with a bias, and a linear behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.left = nn.Linear(64, 128)
        self.right = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        x = self.norm(x)
        return self.down(torch.relu(self.left(x)) * self.right(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = parameter.data.half().float()  # as checkpoints hold them
    return model


def paro_net(seed: int = 0) -> nn.Module:
    """Return `Net` with `ParoLinear`s, made without `parofx.quantize`."""
    return round_model(net(seed))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (8, 64), generator=torch.Generator().manual_seed(seed))


def compiled(model: Callable, **options):
    return torch.compile(model, backend="paro", **({"fullgraph": True, "options": OPTIONS} | options))


def quietly(function: Callable, *args) -> Tensor:
    with torch.no_grad():
        return function(*args)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Spy:
    """What reaches Inductor."""

    graphs: list[GraphModule] = field(default_factory=list)
    tensors: list[list[Tensor]] = field(default_factory=list)
    patches: list[dict] = field(default_factory=list)

    def operators(self, index: int = -1) -> dict[str, int]:
        """Count the parofx operators of a graph."""
        return {name: count for name, count in census(self.graphs[index]).items() if name.startswith("parofx")}


@pytest.fixture
def spy(monkeypatch) -> Spy:
    """Let graphs run as they are instead of through Inductor, and note them."""
    noted = Spy()

    def note(gm, example_inputs, config_patches=None):
        noted.graphs.append(gm)
        real = (value for value in example_inputs if isinstance(value, Tensor) and not isinstance(value, FakeTensor))
        noted.tensors.append(list(real))
        noted.patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr("parofx.backend.compile_fx", note)
    monkeypatch.setattr("parofx.compiled_graph.compile_fx", note)
    return noted


@pytest.fixture
def inductor(monkeypatch) -> list[GraphModule]:
    """Count the graphs that Inductor compiles."""
    graphs = []
    counting = lambda gm, *args, **options: graphs.append(gm) or compile_fx(gm, *args, **options)  # noqa: E731
    monkeypatch.setattr("parofx.backend.compile_fx", counting)
    monkeypatch.setattr("parofx.compiled_graph.compile_fx", counting)
    return graphs


@pytest.fixture
def fits(monkeypatch) -> list[str]:
    """Count the transforms that are fitted."""
    counted, original = [], Calibrate.fit
    monkeypatch.setattr(Calibrate, "fit", lambda *args: counted.append(args[2].name) or original(*args))
    return counted


def float_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "the model is float" in record.getMessage()]


# --- the two kinds of models ----------------------------------------------------------------------------------------

FRESH = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
assert "parofx" not in sys.modules
assert "paro" in torch._dynamo.list_backends(exclude_tags=None)
x = torch.randn(3, 64)
with torch.no_grad():
    y = torch.compile(model, backend="paro", fullgraph=True, options={"steps": 1})(x)
    error = (y - model(x)).norm() / model(x).norm()
assert "parofx.backend" in sys.modules
assert 1e-4 < error < 0.2, error
"""


def test_a_fresh_process_needs_no_import():
    result = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the model is float; fitting 2 linears on their weights alone") == 1


def test_a_float_model_becomes_what_quantize_makes_without_data(inductor):
    model = net()
    quantized = copy.deepcopy(model)
    config = ParoConfig(calibration=CalibrationConfig(recipe="data-free", steps=2))
    parofx.quantize(quantized, config, example_inputs=inputs(), progress=False)
    assert relative_error(quietly(compiled(model), inputs()), quietly(quantized, inputs())) < FP32
    assert len(inductor) == 1
    assert all(isinstance(one, nn.Linear) for one in (model.left, model.right, model.down)), "the model stays float"


def test_prefill_and_decode_are_fitted_once_and_say_so_once(spy, fits, caplog):
    fast, model = compiled(model := net()), model
    for rows in (8, 1, 3):
        assert relative_error(quietly(fast, inputs(rows, 64)), quietly(model, inputs(rows, 64))) < FOUR_BITS
    assert len(spy.graphs) == 3
    assert fits == ["left", "down"]
    assert len(float_lines(caplog)) == 1
    assert float_lines(caplog)[0].startswith("paro: the model is float; fitting 3 linears on their weights alone. ")


def test_graphs_share_packed_tensors(spy):
    for model in (net(), paro_net()):
        fast = compiled(model)
        for rows in (8, 1):
            quietly(fast, inputs(rows, 64))
        first, second = ({t.data_ptr(): t for t in tensors} for tensors in spy.tensors[-2:])
        apart = [tensor for address, tensor in second.items() if address not in first]
        assert all(
            tensor.shape[-1] == 64 and tensor.dtype == torch.float32 and tensor.numel() == 64 for tensor in apart
        )
        assert len(apart) <= 1, "only the activation differs"
        float_weights = {model.left.weight.data_ptr()} if isinstance(model.left, nn.Linear) else set()
        assert not float_weights & {*first, *second}, "no graph reads a float weight"


@needs_library
@pytest.mark.parametrize("bits", [{}, {"0": 3, "2": 8, "3.q": 3, "3.k": 3}], ids=["4 bits", "other widths"])
def test_a_lowered_model_holds_one_copy_of_its_weights(bits):
    """Prefill, decode and dynamic graphs read the modules' own tensors; merged siblings are slices of one buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    model.append(nn.ModuleDict({name: nn.Linear(512, 256) for name in "qk"}))
    model.forward = lambda x: (lambda y: model[3]["q"](y) * model[3]["k"](y))(model[2](model[1](model[0](x))))
    model = round_model(model, group_size=128, krot=2, bits=lambda name: bits.get(name, 4))
    linears = [module for module in model.modules() if isinstance(module, ParoLinear)]
    state = copy.deepcopy(model.state_dict())
    size = sum(layer.packed_bytes() for layer in linears)
    gc.collect()
    others = _storages()
    for layer in linears:
        others -= {buffer.untyped_storage()._cdata for buffer in layer.buffers()}
    fast = compiled(model)
    for rows, function in ((8, fast), (1, fast), (77, compiled(model, dynamic=True))):
        x = inputs(rows, 512)
        assert relative_error(quietly(function, x), quietly(model, x)) < FP32
    del x
    gc.collect()
    alive = {cdata: nbytes for cdata, nbytes in _sizes().items() if cdata not in others}
    assert 0.9 * size < sum(alive.values()) <= 1.1 * size
    q, k = (layer.get_buffer("cpu_weight") for layer in linears[2:])
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def _sizes() -> dict[int, int]:
    """Return the storages of all tensors alive."""
    tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.layout == torch.strided]
    return {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors if not one.is_meta}


def _storages() -> set[int]:
    return set(_sizes())


def test_a_functional_linear_is_lowered_like_any_other(spy, caplog):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64) / 8)
            self.v = nn.Parameter(torch.randn(64, 32) / 8)

        def forward(self, x):
            return linear(x, self.w).relu() @ self.v + linear(x, self.w, self.v[0].repeat(2)).sum()

    torch.manual_seed(0)
    model = Custom().eval()
    assert relative_error(quietly(compiled(model), inputs()), quietly(model, inputs())) < FOUR_BITS
    assert "fitting 2 linears" in float_lines(caplog)[0]
    names = set(census(spy.graphs[0]))
    assert not any("linear" in name and not name.startswith("parofx") for name in names), names
    assert not any("matmul" in name for name in names)


def test_paro_linears_are_lowered_one_call_for_siblings(inductor, spy):
    model = paro_net()
    assert relative_error(quietly(compiled(model), inputs()), quietly(model, inputs())) < FP32
    operators = {name: count for name, count in spy.operators().items() if "getitem" not in name}
    assert sum(operators.values()) == 2, operators
    assert "parofx.rotate_int4_linear.default" not in operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_paro_linears_through_inductor(dtype):
    model, x = paro_net().to(dtype), inputs().to(dtype)
    tolerance = {torch.float32: FP32, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    result = quietly(compiled(model), x)
    assert result.dtype == dtype
    assert relative_error(result, quietly(model, x)) < tolerance


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_activations_differ_from_float_by_their_rounding_only(dtype, spy):
    model, x = paro_net().to(dtype), inputs().to(dtype)
    expected = quietly(model.double(), x.double())
    result = quietly(compiled(model.to(dtype), options={"activations": "int8"}), x)
    assert result.dtype == dtype
    # One step of int8 is a 127th of a group's largest value: about 0.7 % of a product, twice in a row here.
    assert 1e-3 < relative_error(result, expected) < 2e-2
    assert spy.operators()["parofx_cpu.rotate_linear.default"] == 1


def test_int8_activations_have_no_gradient():
    model, x = paro_net(), inputs().requires_grad_()
    with pytest.raises(
        BackendCompilerFailed, match=r"'reference' does not serve .*does not quantize activations to int8"
    ):
        compiled(model, options={"activations": "int8"})(x)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_compiles_without_a_graph_break(name, spy, caplog):
    spec = ZOO[name]
    model = spec.build()
    given = complete_inputs(model, spec.inputs())
    quantized = round_model(copy.deepcopy(model))
    run(compiled(model, options={"steps": 0}), given)
    assert len(spy.graphs) == 1
    assert f"fitting {spec.quantized} linears" in float_lines(caplog)[0]
    assert sum(spy.operators().values()) in _calls(name)
    torch._dynamo.reset()
    assert relative_error(run(compiled(quantized), given), run(quantized, given)) < FP32
    assert len(spy.graphs) == 2
    assert sum(spy.operators().values()) >= min(_calls(name))


def _calls(name: str) -> tuple[int, ...]:
    """Return how many operator calls the linears may become: one for each transform."""
    transforms = ZOO[name].transforms
    if name == "albert":  # runs one layer, of four transforms, three times
        return (transforms + 2 * 4,)
    return (transforms,)


class Untied(nn.Module):
    """A language model whose head is told by its embedding's shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)

    def forward(self, x):
        if not x.is_floating_point():
            x = self.embed(x)
        return self.head(torch.relu(self.body(x)))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**LLAMA_LIKE | {"num_hidden_layers": 1, "vocab_size": 256})
    return transformers.LlamaForCausalLM(config).eval()


def _broken_before_the_head(model: nn.Module) -> Callable:
    def run(embedded):
        hidden = model.model(inputs_embeds=embedded).last_hidden_state
        torch._dynamo.graph_break()
        return model.lm_head(hidden)

    return run


HEADS: dict[str, tuple[Callable, Callable, int]] = {
    "embeddings given": (llama, lambda model: lambda x: model(inputs_embeds=x).logits, 7),
    "graph break": (llama, _broken_before_the_head, 7),
    "head alone": (llama, lambda model: lambda x: model.lm_head(x), 0),
    "shape of a table of the model": (Untied, lambda model: model, 1),
    "head alone, by shape": (Untied, lambda model: lambda x: model.head(x), 0),
}


@pytest.mark.parametrize(("make", "way", "quantized"), HEADS.values(), ids=HEADS)
def test_the_output_head_stays_float_where_no_embedding_is_looked_up(make, way, quantized, spy, caplog):
    """Regression: the head was told by the embedding table that the graph looks up, and quantized without one."""
    torch.manual_seed(0)
    model = make().eval()
    head = model.lm_head if make is llama else model.head
    x = inputs(2, 5, head.in_features)
    quietly(compiled(way(model), fullgraph=False, options={"steps": 0}), x)
    assert sum("fitting" in line for line in float_lines(caplog)) == bool(quantized)
    if quantized:
        assert f"fitting {quantized} linears" in float_lines(caplog)[0]
    linears = [node for gm in spy.graphs for node in gm.graph.nodes if "linear" in str(node.target)]
    assert any(not str(node.target).startswith("parofx") for node in linears), "the head is a float linear still"


def test_dynamo_explains_no_graph_break():
    model = ZOO["llama"].build()
    explanation = torch._dynamo.explain(model)(input_ids=ZOO["llama"].inputs()["input_ids"])
    assert (explanation.graph_break_count, explanation.graph_count) == (0, 1)


def test_a_graph_without_linears_goes_to_inductor(inductor, caplog):
    class Wave(nn.Module):
        def forward(self, x):
            return torch.sin(x) + 1

    x = inputs().requires_grad_()
    result = compiled(Wave())(x)
    assert relative_error(result, torch.sin(x) + 1) < FP32
    assert relative_error(torch.autograd.grad(result.sum(), x)[0], torch.cos(x)) < FP32
    assert len(inductor) == 1
    assert not float_lines(caplog)


def test_what_quantize_left_float_stays_float_behind_a_graph_break(spy, caplog):
    class Broken(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 64)

        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return self.head(x)

    torch.manual_seed(0)
    model = Broken().eval()
    head = model.head
    round_model(model)
    model.head = head
    result = quietly(compiled(model, fullgraph=False), inputs())
    assert relative_error(result, quietly(model, inputs())) < FP32
    assert len(spy.graphs) == 2
    assert not float_lines(caplog)


class Held:
    """Holds a model without being a module."""

    def __init__(self, model: nn.Module) -> None:
        self.models = [model]

    def run(self, x):
        return self.models[0](x)

    def run_apart(self, x):
        model = self.models[0]
        x = model.norm(x)
        x = torch.relu(model.left(x)) * model.right(x)
        torch._dynamo.graph_break()
        return model.down(x)


def test_what_quantize_left_float_stays_float_alone(spy, caplog):
    """Regression: only modules that the compiled frame sees were asked whether they hold a `ParoLinear`."""
    model = net()
    config = ParoConfig(modules_to_not_convert=("down",), calibration=CalibrationConfig(steps=0))
    parofx.quantize(model, config, example_inputs=inputs(), progress=False)
    for one in (model, copy.deepcopy(model)):
        expected = quietly(one, inputs())
        assert relative_error(quietly(compiled(Held(one).run_apart, fullgraph=False), inputs()), expected) < FP32
        hidden = inputs(8, 128)
        assert relative_error(quietly(compiled(one.down), hidden), quietly(one.down, hidden)) < FP32
    assert not float_lines(caplog)


def test_a_float_linear_and_one_left_float_share_no_graph(spy):
    model, other = net(), net(seed=3)
    config = ParoConfig(modules_to_not_convert=("down",), calibration=CalibrationConfig(steps=0))
    parofx.quantize(model, config, example_inputs=inputs(), progress=False)
    hidden = inputs(8, 128)
    for down, least, most in (
        (other.down, 1e-3, FOUR_BITS),
        (model.down, -1, FP32),
        (net(seed=4).down, 1e-3, FOUR_BITS),
    ):
        assert least < relative_error(quietly(compiled(down), hidden), quietly(down, hidden)) < most
    assert len(spy.graphs) == 2


def test_a_float_model_beside_a_quantized_one_is_converted(spy, caplog):
    both = [paro_net(), net(seed=1)]

    def first(x):
        return both[0](x)

    def second(x):
        return both[1](x)

    assert relative_error(quietly(compiled(first), inputs()), quietly(both[0], inputs())) < FP32
    assert relative_error(quietly(compiled(second), inputs()), quietly(both[1], inputs())) > 1e-3
    assert "fitting 3 linears" in float_lines(caplog)[0]


def test_attention_that_is_one_call_is_listed(spy, caplog):
    """`nn.MultiheadAttention` is one call for Dynamo: its linears stay float, and the log says so."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(64, 2, batch_first=True)
            self.out = nn.Linear(64, 64)

        def forward(self, x):
            return self.out(self.attend(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = Attention().eval()
    caplog.set_level(logging.DEBUG, logger="parofx")
    assert relative_error(quietly(compiled(model), inputs(2, 5, 64)), quietly(model, inputs(2, 5, 64))) < FOUR_BITS
    assert "fitting 1 linears" in float_lines(caplog)[0]
    for name in ("attend.in_proj_weight", "attend.out_proj"):
        lines = [record.getMessage() for record in caplog.records if name in record.getMessage()]
        assert any("inside one call of multi_head_attention_forward" in line for line in lines)


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kernels", "no compiler"])
def kernels(request, monkeypatch) -> str:
    """Let the native kernels be there or not."""
    if request.param == "no compiler":
        monkeypatch.setattr("parofx.cpu_ops.is_available", lambda: False)
        monkeypatch.setattr("parofx.cpu_ops.why_unavailable", lambda: "there is no compiler")
    return request.param


@pytest.mark.parametrize("make", [net, paro_net])
def test_autocast_gives_the_dtype_of_a_float_model(make, kernels, spy):
    """Regression: linears kept fp32, and a provider was chosen for the dtype that a float linear would have had."""
    model, plain = make(), net()
    linears = nn.Sequential(model.left, nn.ReLU(), model.down).eval()
    expected = quietly(linears, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert quietly(plain.left, inputs()).dtype == torch.bfloat16
        eager, fast = quietly(linears, inputs()), quietly(compiled(linears), inputs())
        whole = quietly(compiled(model), inputs())
        assert whole.dtype == quietly(plain, inputs()).dtype == torch.bfloat16
    assert eager.dtype == fast.dtype == torch.bfloat16
    assert relative_error(eager, expected) < BF16
    assert relative_error(fast, expected) < (FOUR_BITS if make is net else BF16)
    # Linears that read one tensor still are one call: equal casts are one node.
    assert sum(count for name, count in spy.operators().items() if "getitem" not in name) == 2


@pytest.mark.parametrize("make", [net, paro_net])
def test_autocast_around_a_part_of_the_model(make, kernels):
    model = make()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = model.left(x)
        return h, model.down(h.float())

    with torch.no_grad():
        h, y = compiled(run)(inputs())
        wanted = run(inputs())
    assert (h.dtype, y.dtype) == (torch.bfloat16, torch.float32)
    for one, other in zip((h, y), wanted, strict=True):
        assert relative_error(one, other) < (FOUR_BITS if make is net else BF16)


def test_autocast_leaves_double_alone():
    model = paro_net().double()
    x = inputs().double()
    expected = quietly(model.left, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quietly(model.left, x), expected)
        assert quietly(compiled(model.left), x).dtype == torch.float64


def test_fits_are_the_same_under_autocast(spy):
    x = inputs().bfloat16()
    weights = []
    for enabled in (False, True):
        model = net().left.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weights.append(quietly(compiled(model), x))
        torch._dynamo.reset()
    assert torch.equal(*weights)


# --- sizes, grad modes, gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [net, paro_net])
def test_dynamic_sizes_share_a_graph(make, inductor):
    model, tolerance = make(), FOUR_BITS if make is net else FP32
    fast = compiled(model, dynamic=True)
    counts = []
    for shape in ((2, 8, 64), (3, 5, 64), (7, 17, 64)):
        x = inputs(*shape)
        assert relative_error(quietly(fast, x), quietly(model, x)) < tolerance
        counts.append(len(inductor))
    # The norm's epsilon makes Dynamo start over within the first call.
    assert counts == counts[:1] * 3
    strided = inputs(17, 3, 64).transpose(0, 1)
    assert relative_error(quietly(fast, strided), quietly(model, strided)) < tolerance


@pytest.mark.parametrize("make", [net, paro_net])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_every_grad_mode(make, context, inductor):
    model = make()
    fast = compiled(model)
    with context():
        results = [fast(inputs()), fast(inputs())]
        assert torch.is_grad_enabled() == (context is contextlib.nullcontext)
    assert all(not result.requires_grad for result in results)
    assert torch.equal(*results)
    assert relative_error(results[0], quietly(model, inputs())) < (FOUR_BITS if make is net else FP32)
    assert len(inductor) == 1
    if context is contextlib.nullcontext:
        with pytest.raises(RuntimeError, match="does not require grad"):
            results[0].sum().backward()


def test_a_no_grad_region_inside_the_model():
    class Inside(Net):
        def forward(self, x):
            with torch.no_grad():
                scale = x.abs().amax() + 1
            return super().forward(x / scale) * scale

    torch.manual_seed(0)
    model = round_model(Inside().eval())
    result = compiled(model)(inputs())
    assert not result.requires_grad
    assert relative_error(result, quietly(model, inputs())) < FP32


def test_an_input_that_requires_grad_gets_it():
    model = paro_net()
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    result = compiled(model)(x)
    assert relative_error(torch.autograd.grad(result.square().sum(), x)[0], expected) < FP32
    assert relative_error(result, model(x)) < FP32


def test_a_float_model_gives_the_gradient_of_its_quantized_form():
    model = net()
    quantized = copy.deepcopy(model)
    config = ParoConfig(calibration=CalibrationConfig(recipe="data-free", steps=2))
    parofx.quantize(quantized, config, example_inputs=inputs(), progress=False)
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(quantized(x).square().sum(), x)[0]
    result = torch.autograd.grad(compiled(model)(x).square().sum(), x)[0]
    assert relative_error(result, expected) < FP32


# --- options and refusals -------------------------------------------------------------------------------------------


def test_training_mode_is_refused_with_the_module_named(spy):
    model = net()
    model.right.train()
    fast = compiled(model)
    with pytest.raises(BackendCompilerFailed, match=r"are in training mode: right; call model\.eval\(\) first"):
        fast(inputs())
    model.train()
    with pytest.raises(BackendCompilerFailed, match=r"training mode: norm, left, right …; call model\.eval\(\)"):
        fast(inputs())
    model.eval()
    assert fast(inputs()).shape == (8, 64)


@pytest.mark.parametrize("make", [net, paro_net])
def test_training_mode_is_refused_wherever_the_model_is_held(make, spy):
    """Regression: only modules that the compiled frame sees were asked for their mode."""
    model = make().train()
    held, listed = Held(model), [model]
    for function in (held.run, lambda x: listed[0](x)):
        with pytest.raises(BackendCompilerFailed, match=r"these modules are in training mode: .*call model\.eval\(\)"):
            compiled(function)(inputs())
    model.eval()
    assert compiled(held.run)(inputs()).shape == (8, 64)
    outer = nn.Sequential(model).train()
    model.eval()
    with pytest.raises(BackendCompilerFailed, match="these modules are in training mode: Sequential; call"):
        compiled(outer)(inputs())


def test_calls_in_training_mode_are_refused(spy):
    model = net()

    def forward(x):
        return nn.functional.dropout(model(x), 0.1)

    with pytest.raises(BackendCompilerFailed, match=r"these calls are in training mode: dropout \(\w+\); call"):
        compiled(forward)(inputs())
    assert compiled(lambda x: nn.functional.dropout(model(x), 0.1, training=False))(inputs()).shape == (8, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"options": {"group_sizes": 64}},
            r"unknown options \['group_sizes'\] for backend 'paro'; accepted are \['bits',",
        ),
        ({"options": {"group_size": 60}}, r"group_size must be one of \(128, 64, 32\), got 60"),
        ({"options": {"steps": -1}}, "steps must be an integer of at least 0, got -1"),
        ({"options": {"provider": "abacus"}}, r"provider must be one of \[.*'reference'.*\], got 'abacus'"),
        ({"options": {"provider": 5}}, "provider must be a provider's name for backend 'paro', got 5"),
        ({"options": {"inductor": 5}}, "inductor must be a mapping of Inductor's options for backend 'paro', got 5"),
        ({"options": {"activations": "int4"}}, r"activations must be one of \('float', 'int8'\) .*got 'int4'"),
        ({"mode": "fast", "options": None}, r"mode must be one of \['default', .*'reduce-overhead'\] .*got 'fast'"),
    ],
    ids=["unknown", "group size", "steps", "provider", "provider type", "inductor", "activations", "mode"],
)
def test_wrong_options_are_refused(options, message, spy):
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(net(), **options)(inputs())


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "default"])
def test_modes_of_inductor_are_accepted(mode, monkeypatch):
    patches = []

    def note(gm, example_inputs, config_patches=None):
        patches.append(config_patches)
        return compile_fx(gm, example_inputs, config_patches=config_patches)

    monkeypatch.setattr("parofx.compiled_graph.compile_fx", note)
    model = paro_net()
    result = quietly(torch.compile(model, backend="paro", mode=mode), inputs())
    assert relative_error(result, quietly(model, inputs())) < FP32
    assert patches == [{"cpp.min_chunk_size": mock.ANY} | torch._inductor.list_mode_options(mode)]


def test_options_reach_passes_and_inductor(spy, caplog):
    model = net()
    options = OPTIONS | {
        "modules_to_not_convert": ["right"],
        "provider": "reference",
        "group_size": 32,
        "inductor": {"epilogue_fusion": False},
    }
    quietly(compiled(model, options=options), inputs())
    assert "fitting 2 linears" in float_lines(caplog)[0]
    assert spy.operators() == {"parofx.reference_int4_siblings.default": 2}
    groups = {node.args[-1] for node in spy.graphs[0].graph.nodes if "reference_int4" in str(node.target)}
    assert groups == {32}
    assert spy.patches == [{"cpp.min_chunk_size": mock.ANY, "epilogue_fusion": False}]


@pytest.mark.parametrize(("threads", "chunk"), [(1, 16384), (4, 4096), (64, 512)])
def test_short_loops_keep_to_one_thread(threads, chunk, spy, monkeypatch):
    """Not fewer elements for a thread than Inductor asks for itself, nor than the caller does."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for given in ({}, {"cpp.min_chunk_size": 7}):
        torch._dynamo.reset()
        quietly(torch.compile(paro_net(), backend="paro", options={"inductor": given}), inputs())
    assert spy.patches == [{"cpp.min_chunk_size": chunk}, {"cpp.min_chunk_size": 7}]


def test_loops_over_any_number_of_rows_are_inductors_own(spy, monkeypatch):
    """Compiled for a few rows, it may be called with thousands."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    quietly(torch.compile(paro_net(), backend="paro", dynamic=True), inputs())
    assert spy.patches == [{"cpp.min_chunk_size": torch._inductor.config.cpp.min_chunk_size}]


# --- parameters that change -----------------------------------------------------------------------------------------


def _scale(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(-2)


def _replace(model: Net) -> None:
    model.down.weight = nn.Parameter(torch.flip(model.down.weight.detach(), [0]))


def _assign_data(model: Net) -> None:
    model.left.weight.data = -3 * model.left.weight.data


FLOAT_CHANGES: dict[str, Callable[[Net], None]] = {
    "weight in place": lambda model: _scale(model.right.weight),
    "weight replaced": _replace,
    "weight data assigned": _assign_data,
    "bias in place": lambda model: _scale(model.down.bias),
    "bias replaced": lambda model: setattr(model.down, "bias", nn.Parameter(torch.arange(64.0))),
    "norm in place": lambda model: _scale(model.norm.weight),
    "state dict": lambda model: model.load_state_dict(net(seed=5).state_dict()),
    "all replaced": lambda model: model.load_state_dict(net(seed=5).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", FLOAT_CHANGES.values(), ids=FLOAT_CHANGES)
def test_a_changed_float_model_is_packed_anew(change, spy):
    model = net()
    fast = compiled(model)
    before = quietly(fast, inputs())
    change(model)
    after = quietly(fast, inputs())
    assert relative_error(after, before) > 0.2
    assert relative_error(after, quietly(model, inputs())) < FOUR_BITS
    assert len(spy.graphs) == 1, "nothing is compiled again"


PARO_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "scales in place": lambda model: _scale(model.down.scales),
    "theta in place": lambda model: model.left.theta.add_(1),
    "channel scales": lambda model: _scale(model.left.channel_scales),
    "bias": lambda model: _scale(model.down.bias),
    "buffer replaced": lambda model: setattr(model.right, "qweight", torch.flip(model.right.qweight, [0])),
    "state dict": lambda model: model.load_state_dict(paro_net(seed=5).state_dict()),
}


@pytest.mark.parametrize("provider", [None, "reference"])
@pytest.mark.parametrize("change", PARO_CHANGES.values(), ids=PARO_CHANGES)
def test_a_changed_paro_linear_is_never_stale(change, provider, spy):
    model = paro_net()
    fast = compiled(model, options={"provider": provider})
    before = quietly(fast, inputs())
    change(model)
    after = quietly(fast, inputs())
    assert relative_error(after, before) > 0.05
    assert relative_error(after, quietly(model, inputs())) < FP32


def test_a_change_is_announced_once_and_leaves_nothing_behind(spy, caplog, fits):
    model = net()
    fast = compiled(model)
    quietly(fast, inputs())
    sizes = []
    for _ in range(4):
        _scale(model.left.weight)
        quietly(fast, inputs())
        gc.collect()  # graphs are cycles
        sizes.append(sum(len(entries) for entries in derived_tensors.values()))
    assert len(set(sizes)) == 1, "what was derived from old weights is dropped"
    changes = [record for record in caplog.records if "parameters changed" in record.getMessage()]
    assert len(changes) == 4
    assert len(float_lines(caplog)) == 1
    assert fits == ["left", "down", *["left"] * 4]


def test_a_compiled_graph_keeps_no_model_alive():
    for make in (net, paro_net):
        model = make()
        fast = compiled(model)
        quietly(fast, inputs())
        tensors = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
        del model, fast
        gc.collect()
        assert [reference() for reference in tensors if reference() is not None] == []


def test_what_was_packed_for_a_model_goes_with_it():
    from parofx.compiled_graph import CompiledGraph

    model = net()
    fast = compiled(model)
    quietly(fast, inputs())
    weights = {weakref.ref(parameter) for parameter in model.parameters()}

    def packed():
        graphs = [one for one in gc.get_objects() if type(one) is CompiledGraph]
        return [
            entry for one in graphs for entry in one._packed.values() if {s.reference for s in entry.states} & weights
        ]

    assert packed()
    del model, fast
    gc.collect()
    assert not packed()


def test_entries_may_go_while_the_dead_are_looked_for():
    """The garbage collector may find dead parameters in the middle of it."""
    from parofx.compiled_graph import CompiledGraph, _Packed

    class Dying:
        def alive(self):
            Dying.alive = lambda self: False
            graph._forget_the_dead()
            return False

    graph = CompiledGraph.__new__(CompiledGraph)
    graph._packed = {key: _Packed((Dying(),), ()) for key in range(3)}
    graph._forget_the_dead()
    assert graph._packed == {}


# --- several models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [net, paro_net])
def test_models_that_share_code_do_not_share_weights(make, spy, fits, caplog):
    model = make()
    models = [model, copy.deepcopy(model), make(seed=5)]
    with torch.no_grad():
        models[1].down.bias += 1
    fast = [compiled(one) for one in (*models, models[0])]
    caplog.set_level(logging.INFO, logger="parofx")
    for _ in range(2):
        for one, own in zip(fast, (*models, models[0]), strict=True):
            error = relative_error(quietly(one, inputs()), quietly(own, inputs()))
            assert error < (FOUR_BITS if make is net else FP32)
    fitted, packed = len(fits), sum("other parameters" in record.getMessage() for record in caplog.records)
    assert fitted == (2 * 3 if make is net else 0)
    quietly(fast[0], inputs()), quietly(fast[2], inputs())
    assert len(fits) == fitted
    assert packed == sum("other parameters" in record.getMessage() for record in caplog.records)
    assert not any("parameters changed" in record.getMessage() for record in caplog.records)


def test_layers_compiled_one_by_one_share_a_graph(spy, fits):
    layers = nn.Sequential(*(net(seed) for seed in range(4)))
    expected = quietly(layers, inputs())
    for layer in layers:
        layer.compile(backend="paro", fullgraph=True, options=OPTIONS)
    for _ in range(2):
        assert relative_error(quietly(layers, inputs()), expected) < 2 * FOUR_BITS
    assert len(fits) == 4 * 2


# --- generate -------------------------------------------------------------------------------------------------------


ONE_LAYER = LLAMA_LIKE | {"num_hidden_layers": 1}
GENERATORS = {
    "llama": decoder("llama", **ONE_LAYER),
    "gemma3": decoder("gemma3_text", **ONE_LAYER, head_dim=32, sliding_window=8, query_pre_attn_scalar=32),
}


@pytest.mark.parametrize("architecture", GENERATORS)
@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
def test_generate_with_a_static_cache(architecture, quantized, inductor):
    from transformers.generation.configuration_utils import CompileConfig

    model = GENERATORS[architecture]()
    if quantized:
        round_model(model)
    prompt = tokens()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    compile_config = CompileConfig(backend="paro", fullgraph=True, options=OPTIONS, mode=None)
    # Transformers compiles nothing on CPU unless it is told to.
    compile_config._compile_all_devices = True
    graphs_by_token = []

    def count(input_ids: Tensor, scores: Tensor) -> Tensor:
        graphs_by_token.append(len(inductor))
        return scores

    options["attention_mask"] = torch.ones_like(prompt)
    fast = model.generate(prompt, **options, compile_config=compile_config, logits_processor=[count])
    assert graphs_by_token[0] == 0, "the prompt is not compiled"
    assert graphs_by_token[1] >= 1
    assert len(set(graphs_by_token[2:])) == 1, "later tokens compile nothing"
    if quantized:
        eager = model.generate(prompt, **options, disable_compile=True)
        assert torch.equal(fast, eager)
    assert fast.shape == (2, prompt.shape[1] + 8)


def test_packed_tensors_are_static_inputs():
    """CUDA graphs copy what is not: all weights at every call."""
    from torch._functorch import aot_autograd

    found = []
    describe = aot_autograd._try_get_metadata_from_dynamo

    def spy(gm, *args):
        described = describe(gm, *args)
        found.append(([node.name for node in gm.graph.find_nodes(op="placeholder")], described[1]))
        return described

    model = round_model(net()).to(torch.bfloat16)
    with mock.patch.object(aot_autograd, "_try_get_metadata_from_dynamo", spy), torch.no_grad():
        torch.compile(model, backend="paro", options={"provider": "aten"})(torch.randn(2, 64, dtype=torch.bfloat16))
    ((names, static),) = found
    assert any(name.startswith("packed_") for name in names)
    assert {names[index] for index in static} == {name for name in names if not name.startswith("l_x")}
