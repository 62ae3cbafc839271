import pytest
import torch

from parofx import precision
from parofx.precision import (
    attention,
    autocast_while_training,
    linear,
    multiplies_16_bit,
    product_precision,
    unemulated_linears,
)

BACKENDS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


@pytest.mark.parametrize(("kind", "inside"), [("fast", ["bf16", "tf32"]), ("exact", ["ieee", "ieee"])])
def test_it_is_set_inside_and_put_back_behind(kind, inside):
    before = [backend.fp32_precision for backend in BACKENDS]
    with product_precision(kind):
        assert [backend.fp32_precision for backend in BACKENDS] == inside
    assert [backend.fp32_precision for backend in BACKENDS] == before


def test_exact_products_are_fp32_inside_fast_ones():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with product_precision("fast"), product_precision("exact"):
        error = (x @ x).double() - x.double() @ x.double()
    assert error.abs().max() < 1e-4


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: not request.param)
    monkeypatch.setattr(precision, "_MANY_ROWS", 1)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 70), (1, 70), (0, 70)])
def test_a_linear_rounds_once(dtype, with_bias, shape, emulated):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).to(dtype) for size in (shape, (33, 70)))
    bias = torch.randn(33, generator=generator).to(dtype) if with_bias else None
    result = linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert result.dtype == dtype
    assert result.shape == exact.shape
    # Sums are fp32; PyTorch's own products may round them before they add the bias.
    rounded = exact.abs() + (0 if bias is None or emulated else (exact - bias.double()).abs())
    assert ((result.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * rounded + 2e-5).all()


def test_gradients_go_through_wide_products(emulated):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 70, generator=generator).bfloat16().requires_grad_() for size in (5, 33))
    upstream = torch.randn(5, 33, generator=generator).bfloat16()
    linear(x, weight).backward(upstream)
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight.detach().double(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad.double(), upstream.double().t() @ x.detach().double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [None, "bool", "float", "causal"])
def test_attention_has_the_gradients_of_fp64(dtype, masked, emulated, monkeypatch):
    seen = []

    def watched(*given, **options):
        seen.append((given[0].dtype, torch.backends.mkldnn.matmul.fp32_precision))
        return true_attention(*given, **options)

    true_attention = precision.ATTENTION
    monkeypatch.setattr(precision, "ATTENTION", watched)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, 5, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    mask = None if masked in (None, "causal") else torch.ones(5, 5, dtype=torch.bool).tril()
    by_place = (0.0, masked == "causal")  # dropout, and whether it is causal, as captured graphs have them
    if masked == "float":
        mask = torch.zeros(5, 5, dtype=dtype).masked_fill(~mask, -30.0)
    upstream = torch.randn(2, 4, 5, 16, generator=generator).to(dtype)
    results = []
    for wanted in (dtype, torch.float64):
        leaves = [one.to(wanted, copy=True).requires_grad_() for one in given]
        wide = mask.to(wanted) if masked == "float" else mask
        with product_precision("fast"):
            result = attention(*leaves, wide, *by_place, scale=0.3, enable_gqa=True)
        assert result.dtype == wanted
        result.backward(upstream.to(wanted))
        results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for one, exact in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=3e-2, atol=3e-2)
    with torch.no_grad():
        without = attention(*given, mask, *by_place, scale=0.3, enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = (one.clone().requires_grad_() for one in given)
        cast = attention(*leaves, mask, *by_place, scale=0.3, enable_gqa=True)
    for one in (without, cast):
        torch.testing.assert_close(one.double(), results[1][0], rtol=3e-2, atol=3e-2)
    assert [of for of, _ in seen] == [torch.float32 if emulated else dtype, torch.float64, dtype, dtype]
    assert (seen[0][1] == "ieee") == emulated


def test_what_an_accelerator_multiplies_is_left_alone():
    assert multiplies_16_bit("cuda")
    assert isinstance(multiplies_16_bit("cpu"), bool)


def test_training_does_not_emulate_bf16(emulated):
    x = torch.randn(4, 8)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast_while_training("cpu", dtype, enabled=True):
            assert (x @ x.t()).dtype == (torch.float32 if emulated else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), autocast_while_training("cpu", torch.float32, enabled=False):
        assert (x @ x.t()).dtype == torch.float32


def test_gradients_of_fp16_models_do_not_vanish(emulated):
    x, weight = (torch.full(size, 0.1, dtype=torch.float16, requires_grad=True) for size in ((4, 8), (3, 8)))
    with autocast_while_training("cpu", torch.float16, enabled=True):
        output = linear(x, weight)
    assert output.dtype == torch.bfloat16
    (output.float() * 1e-9).sum().backward()


def test_wide_products_are_exact_inside_fast_ones(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: False)
    seen = []
    true_linear = torch.nn.functional.linear

    def watched(*arguments):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return true_linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with product_precision("fast"):
        linear(torch.ones(16, 4, dtype=torch.float16), torch.ones(3, 4, dtype=torch.float16))
    assert seen == ["ieee"]


def test_few_rows_and_mixed_dtypes_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: False)
    monkeypatch.setattr(precision, "product_precision", None)  # it is not asked for
    weight = torch.ones(3, 4, dtype=torch.bfloat16)
    assert linear(torch.ones(3, 5, 4, dtype=torch.bfloat16), weight).shape == (3, 5, 3)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.ones(32, 4, dtype=torch.bfloat16), weight, torch.ones(3))


class Own(torch.Tensor):
    """A subclass with a product of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return (
            "its own" if func is torch.nn.functional.linear else super().__torch_function__(func, types, args, kwargs)
        )


class Calls(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3).bfloat16()

    def forward(self, x):
        functional = torch.nn.functional.linear(input=x, weight=self.layer.weight, bias=self.layer.bias)
        return self.layer(x), functional


@pytest.fixture
def products(monkeypatch):
    """The dtypes of what `linear` is asked to multiply."""
    seen = []
    true_linear = precision.linear

    def watched(input, weight, bias=None):
        seen.append(input.dtype)
        return true_linear(input, weight, bias)

    monkeypatch.setattr(precision, "linear", watched)
    return seen


@pytest.mark.usefixtures("emulated")
def test_linears_of_any_module_are_not_emulated_inside(products):
    module, x = Calls(), torch.randn(2, 4).bfloat16()
    outside, _ = module(x)
    with unemulated_linears(module):
        inside, functional = module(x)
        assert torch.nn.functional.linear(x, module.layer.weight.detach().as_subclass(Own)) == "its own"
    assert products == [torch.bfloat16] * 2
    assert torch.equal(inside, functional)
    torch.testing.assert_close(inside, outside)


def _compile_forward(module):
    module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    return module


def _compile_in_place(module):
    module.compile(backend="aot_eager", fullgraph=True)
    return module


@pytest.mark.parametrize(
    "compiled",
    [lambda module: torch.compile(module, backend="aot_eager", fullgraph=True), _compile_in_place, _compile_forward],
)
def test_compiled_models_keep_their_products(compiled, products, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: pytest.fail("it was asked for"))
    torch.compiler.reset()
    module, x = Calls(), torch.randn(32, 4).bfloat16()
    expected = module(x)
    module = compiled(module)
    with unemulated_linears(module):
        assert torch.equal(module(x)[0], expected[0])
    assert products == []
