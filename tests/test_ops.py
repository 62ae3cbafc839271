import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from parofx import affine, ops
from parofx.errors import ShapeError
from parofx.testing import (
    WIDE_OPERANDS,
    RotateLinearCase,
    check_int4_linear,
    check_rotate_int4_linear,
    check_rotate_int4_linear_case,
    check_rotation,
    linear_cases,
    rotate_linear_cases,
)

paro = torch.ops.parofx
WIDTHS = (4, 3, 8)
METADATA = ("test_schema", "test_faketensor")


def siblings_args(cases, *, shared):
    """Return the arguments of `rotate_int4_siblings` for linears that read the first case's `x`."""
    rotations = [case.rotation() for case in (cases[:1] if shared else cases)]
    weights = [case.weight() for case in cases]
    bias = [weight.bias for weight in weights if weight.bias is not None]
    has_bias = [weight.bias is not None for weight in weights]
    packed = [list(tensors) for tensors in zip(*(weight[:3] for weight in weights), strict=True)]
    turned = [list(tensors) for tensors in zip(*rotations, strict=True)]
    return (cases[0].x(), *turned, *packed, bias, has_bias, cases[0].group_size, *ops.stated_bits(cases[0].bits))


def three_cases(**options):
    options = {"batch": (5,), "groups": 2, "group_size": 6, "krot": 2} | options
    words_and_bias = ((1, True), (3, False), (2, True))
    return [
        RotateLinearCase(words=words, bias=bias, seed=seed, **options)
        for seed, (words, bias) in enumerate(words_and_bias)
    ]


def test_rotate_gives_the_references_answer():
    check_rotation(paro.rotate)


def test_int4_linear_gives_the_references_answer():
    check_int4_linear(paro.int4_linear, cases=linear_cases(bits=WIDTHS), tolerances=WIDE_OPERANDS)


def test_rotate_int4_linear_gives_the_references_answer():
    cases = rotate_linear_cases(bits=WIDTHS)
    check_rotate_int4_linear(paro.rotate_int4_linear, cases=cases, tolerances=WIDE_OPERANDS)


@pytest.mark.parametrize("shared", [True, False])
def test_siblings_give_the_references_answer(shared):
    """Each output, with two other siblings beside it, is the answer of the one linear."""

    def with_siblings(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size):
        count = 1 if shared else 3
        biases, has_bias = ([], [False] * 3) if bias is None else ([bias, bias], [True, False, True])
        rotation = ([pairs] * count, [theta] * count, [channel_scales] * count)
        linears = ([qweight] * 3, [qzeros] * 3, [scales] * 3)
        outputs = paro.rotate_int4_siblings(x, *rotation, *linears, biases, has_bias, group_size)
        assert torch.equal(outputs[0], outputs[2])
        return outputs[0]

    check_rotate_int4_linear(with_siblings, tolerances=WIDE_OPERANDS)


@given(rotate_linear_cases(krots=(0, 2), bits=WIDTHS), st.booleans())
def test_siblings_are_the_linears_one_by_one(case, shared):
    other = RotateLinearCase(**(vars(case) | {"words": 2, "bias": not case.bias, "seed": case.seed + 1}))
    cases = [case, other]
    outputs = paro.rotate_int4_siblings(*siblings_args(cases, shared=shared))
    for output, linear, rotated in zip(outputs, cases, [case, case if shared else other], strict=True):
        expected = paro.rotate_int4_linear(case.x(), *rotated.rotation(), *linear.weight(), case.group_size, case.bits)
        assert torch.equal(output, expected)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (2, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_metadata(batch, layout, dtype):
    """Fake kernels give the shapes, strides and dtypes of the real ones; nothing is mutated or aliased."""
    case = RotateLinearCase(
        batch=batch, groups=3, group_size=10, krot=2, words=2, bias=True, layout=layout, dtype=dtype
    )
    x, rotation, weight = case.x(), case.rotation(), case.weight()
    grad = torch.ones((), dtype=dtype).expand(*batch, 16)
    opcheck(paro.rotate, (x, *rotation, 10), test_utils=METADATA)
    opcheck(paro.rotate_backward, (x, x, *rotation, 10), test_utils=METADATA)
    opcheck(paro.int4_linear, (x, *weight, 10), test_utils=METADATA)
    opcheck(paro.int4_linear_backward, (grad, *weight[:3]), test_utils=METADATA)
    opcheck(paro.rotate_int4_linear, (x, *rotation, *weight, 10), test_utils=METADATA)
    opcheck(paro.rotate_int4_siblings, siblings_args([case, case], shared=True), test_utils=METADATA)


@pytest.mark.parametrize("krot", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "bits"), [((0,), 8), ((5,), 4), ((2, 3), 3)])
def test_opcheck_with_autograd(batch, bias, krot, bits):
    case = RotateLinearCase(
        batch=batch, groups=2, group_size=6, krot=krot, words=2, bits=bits, bias=bias, layout="transposed"
    )
    x, (pairs, theta, scales), (*packed, bias_tensor) = case.x(), case.rotation(), case.weight()
    x, theta, scales = (tensor.detach().requires_grad_() for tensor in (x, theta, scales))
    bias_tensor = None if bias_tensor is None else bias_tensor.requires_grad_()
    opcheck(paro.rotate, (x, pairs, theta, scales, 6))
    opcheck(paro.int4_linear, (x, *packed, bias_tensor, 6, bits))
    opcheck(paro.rotate_int4_linear, (x, pairs, theta, scales, *packed, bias_tensor, 6, bits))


@pytest.mark.parametrize(("shared", "bits"), [(True, 4), (False, 4), (True, 3)])
def test_opcheck_of_siblings_with_autograd(shared, bits):
    x, *rest = siblings_args(three_cases(bits=bits), shared=shared)
    for tensors in (*rest[1:3], rest[6]):
        for tensor in tensors:
            tensor.requires_grad_()
    opcheck(paro.rotate_int4_siblings, (x.requires_grad_(), *rest))


@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_opcheck_of_fake_quantize(off, transposed):
    """Regression: the backward gave the strides of a transposed weight, its fake kernel contiguous ones."""
    w = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).t() if transposed else torch.ones(8, 12)
    scales, zeros = (torch.empty(0), torch.empty(0)) if off else affine.choose_qparams(w, 4, 4)
    inputs = [tensor.detach().requires_grad_() for tensor in (w, scales, zeros)]
    opcheck(paro.fake_quantize, (*inputs, 4, 4))
    opcheck(paro.fake_quantize_backward, (torch.ones(8, 12), w, scales, zeros, 4, 4))


def test_fake_quantize_that_is_off_is_a_copy_with_a_copied_gradient():
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = paro.fake_quantize(w, torch.empty(0), torch.empty(0), 4, 128)
    assert torch.equal(output, w)
    assert output.data_ptr() != w.data_ptr()
    output.backward(torch.full((3, 5), 2.0))
    assert (w.grad == 2).all()


def test_fake_quantize_is_the_quantizers():
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scales, zeros = (tensor.requires_grad_() for tensor in affine.choose_qparams(w.detach(), 3, 8))
    output = paro.fake_quantize(w, scales, zeros, 3, 8)
    assert torch.equal(output, affine.fake_quantize(w.detach(), scales.detach(), zeros.detach(), 3, 8))
    output.sum().backward()
    ones = torch.ones_like(w)
    expected = affine.fake_quantize_backward(ones, w.detach(), scales.detach(), zeros.detach(), 3, 8)
    for leaf, grad in zip((w, scales, zeros), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def double_leaves(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("batch", [(3,), (2, 2), ()])
def test_gradcheck_of_rotate_and_linears(batch):
    case = RotateLinearCase(batch=batch, groups=2, group_size=4, krot=2, words=1, bias=True, dtype=torch.float64)
    (pairs, theta, channel_scales), (*packed, bias) = case.rotation(), case.weight()
    x, theta, channel_scales, bias = double_leaves(case.x(), theta, channel_scales, bias)
    packed[2] = packed[2].double()
    check = torch.autograd.gradcheck
    assert check(lambda x, t, s: paro.rotate(x, pairs, t, s, 4), (x, theta, channel_scales))
    assert check(lambda x, b: paro.int4_linear(x, *packed, b, 4), (x, bias))
    assert check(
        lambda x, t, s, b: paro.rotate_int4_linear(x, pairs, t, s, *packed, b, 4), (x, theta, channel_scales, bias)
    )


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck_of_siblings(shared):
    cases = three_cases(batch=(3,), group_size=4, dtype=torch.float64)
    x, pairs, theta, channel_scales, *packed, bias, has_bias, group_size = siblings_args(cases, shared=shared)
    leaves = double_leaves(x, *theta, *channel_scales, *bias)
    count = len(pairs)

    def outputs(x, *rest):
        theta, channel_scales, bias = list(rest[:count]), list(rest[count : 2 * count]), list(rest[2 * count :])
        return tuple(paro.rotate_int4_siblings(x, pairs, theta, channel_scales, *packed, bias, has_bias, group_size))

    assert torch.autograd.gradcheck(outputs, leaves)


def test_siblings_with_an_unused_output_have_gradients():
    x, *rest = siblings_args(three_cases(), shared=False)
    x.requires_grad_()
    outputs = paro.rotate_int4_siblings(x, *rest)
    outputs[1].sum().backward()
    alone = x.detach().requires_grad_()
    linear = [tensors[1] for tensors in rest[:6]]
    paro.rotate_int4_linear(alone, *linear, None, 6).sum().backward()
    torch.testing.assert_close(x.grad, alone.grad)


def test_gradients_have_the_dtypes_of_their_inputs():
    case = RotateLinearCase(batch=(3,), groups=1, group_size=6, krot=2, words=1, bias=True, dtype=torch.bfloat16)
    (pairs, theta, channel_scales), (*packed, bias) = case.rotation(), case.weight()
    leaves = [tensor.detach().requires_grad_() for tensor in (case.x(), theta, channel_scales, bias)]
    paro.rotate_int4_linear(leaves[0], pairs, *leaves[1:3], *packed, leaves[3], 6).sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, *[torch.float16] * 3]
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


class EveryOperator(torch.nn.Module):
    """All semantic operators of a linear in one graph: what the compilers are given below."""

    def __init__(self, *, bias):
        super().__init__()
        case = RotateLinearCase(batch=(1,), groups=2, group_size=6, krot=2, words=2, bias=bias)
        self.pairs, self.theta, self.channel_scales = map(torch.nn.Buffer, case.rotation())
        self.qweight, self.qzeros, self.scales = map(torch.nn.Buffer, case.weight()[:3])
        self.bias = torch.nn.Buffer(case.weight().bias) if bias else None

    def forward(self, x):
        rotation, packed = (self.pairs, self.theta, self.channel_scales), (self.qweight, self.qzeros, self.scales)
        rotated = paro.rotate(x, *rotation, 6)
        in_two = paro.int4_linear(rotated, *packed, self.bias, 6)
        in_one = paro.rotate_int4_linear(x, *rotation, *packed, self.bias, 6)
        bias, has_bias = ([], [False, False]) if self.bias is None else ([self.bias], [True, False])
        rotations, linears = ([tensor] for tensor in rotation), ([tensor, tensor] for tensor in packed)
        return [in_two, in_one, *paro.rotate_int4_siblings(x, *rotations, *linears, bias, has_bias, 6)]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("bias", [True, False])
def test_compile_fullgraph_with_dynamic_tokens(bias):
    """One graph for 2 tokens and more, forward and backward, and the eager answer."""
    module = EveryOperator(bias=bias)
    compilations = []

    def backend(gm, example_inputs):
        compilations.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 17, 5):
        x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
        y = x.detach().requires_grad_()
        torch.testing.assert_close(compiled(x), module(y))
        sum(output.sum() for output in compiled(x)).backward()
        sum(output.sum() for output in module(y)).backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert len(compilations) == 1
    for tokens in (0, 1):
        torch.testing.assert_close(compiled(torch.ones(tokens, 12)), module(torch.ones(tokens, 12)))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_with_inductor():
    module = EveryOperator(bias=True)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


@pytest.mark.parametrize("bias", [True, False])
def test_export_with_dynamic_tokens(bias):
    module = EveryOperator(bias=bias)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch, 1: tokens},), strict=False)
    names = {node.target for node in exported.graph.nodes if node.op == "call_function"}
    assert {paro.rotate.default, paro.rotate_int4_linear.default, paro.rotate_int4_siblings.default} <= names
    for shape in ((2, 5), (1, 1), (3, 17), (1, 0)):
        y = torch.randn(*shape, 12, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(exported.module()(y), module(y))


@pytest.mark.parametrize("op", ["rotate", "int4_linear", "rotate_int4_linear", "rotate_int4_siblings"])
def test_nothing_is_computed_on_meta_tensors(op):
    case = three_cases()[0]
    args = {
        "rotate": (case.x(), *case.rotation(), 6),
        "int4_linear": (case.x(), *case.weight(), 6),
        "rotate_int4_linear": (case.x(), *case.rotation(), *case.weight(), 6),
        "rotate_int4_siblings": siblings_args([case], shared=True),
    }[op]
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args)
    output = getattr(paro, op)(*args)
    output = output[0] if isinstance(output, list) else output
    assert (output.device.type, output.shape) == ("meta", (5, 12 if op == "rotate" else 8))


def changed(position, tensor, args):
    return (*args[:position], tensor, *args[position + 1 :])


def corrected(case, rank):
    """Return `(down, up)` for a case."""
    random = torch.Generator().manual_seed(case.seed)
    return tuple(torch.randn(rank, size, generator=random).half() for size in (case.in_features, case.out_features))


@given(rotate_linear_cases(krots=(0, 2), bits=WIDTHS, dtypes=(torch.float64,)), st.integers(0, 5))
def test_a_correction_is_a_thin_product_on_top(case, rank):
    """Of the rotated input; siblings have each their own."""
    x, rotation, weight, (down, up) = case.x(), case.rotation(), case.weight(), corrected(case, rank)
    trailing = (case.group_size, case.bits)
    rotated = paro.rotate(x, *rotation, case.group_size)
    added = rotated @ down.double().t() @ up.double()
    expected = paro.rotate_int4_linear(x, *rotation, *weight, *trailing) + added
    close = {"rtol": 1e-9, "atol": 1e-9 * float(1 + added.abs().max()) if added.numel() else 0.0}
    torch.testing.assert_close(paro.rotate_int4_linear(x, *rotation, *weight, *trailing, down, up), expected, **close)
    torch.testing.assert_close(paro.int4_linear(rotated, *weight, *trailing, down, up), expected, **close)
    args = siblings_args([case, case], shared=True)[:10]
    outputs = paro.rotate_int4_siblings(*args, case.bits, [down, 2 * down], [up, up])
    torch.testing.assert_close(outputs[0], expected, **close)
    torch.testing.assert_close(outputs[1], expected + added, **close)


@pytest.mark.parametrize("bits", [4, 3])
def test_opcheck_and_gradcheck_with_a_correction(bits):
    case = RotateLinearCase(
        batch=(3,), groups=2, group_size=4, krot=2, words=1, bits=bits, bias=True, dtype=torch.float64
    )
    x, (pairs, theta, scales), weight, halves = case.x(), case.rotation(), case.weight(), corrected(case, 3)
    x = x.requires_grad_()
    opcheck(paro.int4_linear, (x, *weight, 4, bits, *halves))
    opcheck(paro.rotate_int4_linear, (x, pairs, theta, scales, *weight, 4, bits, *halves))
    args = siblings_args([case, case], shared=False)[1:10]
    lists = [[half, half] for half in halves]
    opcheck(paro.rotate_int4_siblings, (x, *args, bits, *lists))
    for fn in (
        lambda x: paro.int4_linear(x, *weight, 4, bits, *halves),
        lambda x: paro.rotate_int4_linear(x, pairs, theta, scales, *weight, 4, bits, *halves),
        lambda x: tuple(paro.rotate_int4_siblings(x, *args, bits, *lists)),
    ):
        assert torch.autograd.gradcheck(fn, x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_corrections_that_do_not_fit_are_refused(device):
    case = RotateLinearCase(batch=(5,), groups=2, group_size=6, krot=1, words=1)
    down, up = corrected(case, 2)
    x, weight = case.x(), case.weight()[:3]
    for halves, found in (
        ((down, None), r"\(2, 12\) and None"),
        ((down, up[:1]), r"\(2, 12\) and \(1, 8\)"),
        ((down[:, :3], up), r"\(2, 3\) and \(2, 8\)"),
    ):
        args = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(device), (x, *weight, None, 6, 4, *halves)
        )
        with pytest.raises(ShapeError, match=rf"down must be \(r, 12\) and up \(r, 8\), got {found}"):
            paro.int4_linear(*args)
    args = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), (*siblings_args([case, case], shared=True), 4)
    )
    with pytest.raises(ShapeError, match=r"down and up must both be None or lists of 2, got lengths \[1, 2\]"):
        paro.rotate_int4_siblings(*args, [down.to(device)], [up.to(device)] * 2)


def test_linears_refuse_codes_of_another_width():
    case = RotateLinearCase(batch=(5,), groups=2, group_size=6, krot=1, words=2, bits=8)
    message = r"must hold codes of 4 bits, got \(12, 2\) and \(2, 8\): 8 bits"
    for device in ("cpu", "meta"):
        x, rotation, weight = (
            torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor, device=device: tensor.to(device), one)
            for one in (case.x(), case.rotation(), case.weight())
        )
        with pytest.raises(ShapeError, match=message):
            paro.int4_linear(x, *weight, 6)
        with pytest.raises(ShapeError, match=message):
            paro.rotate_int4_linear(x, *rotation, *weight, 6)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (
            0,
            (5, 8),
            r"x \(…, K\), qweight .* and scales \(K/6, N\) must agree, got \(5, 8\), \(12, 1\) and \(2, 8\)",
        ),
        (1, (12,), "qweight, qzeros and scales must be matrices"),
        (1, (6, 1), r"must agree, got \(5, 12\), \(6, 1\) and \(2, 8\)"),
        (1, (12, 2), r"qweight \(K, bits·N/32\), qzeros .* must agree"),
        (2, (3, 1), r"qweight \(K, bits·N/32\), qzeros .* must agree"),
        (3, (2, 16), r"qweight \(K, bits·N/32\), qzeros .* must agree"),
        (4, (7,), r"bias must be \(8,\), got \(7,\)"),
    ],
)
def test_int4_linear_refuses_bad_shapes(position, shape, message, device):
    """The fake kernel refuses what the real one does: an error at compile time, not a wrong graph."""
    case = three_cases()[0]
    args = changed(position, torch.zeros(shape, dtype=torch.int32), (case.x(), *case.weight(), 6))
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    with pytest.raises(ShapeError, match=message):
        paro.int4_linear(*args)


def test_group_size_must_be_the_tensors():
    case = three_cases()[0]
    with pytest.raises(ShapeError, match=r"scales \(K/4, N\) must agree"):
        paro.int4_linear(case.x(), *case.weight(), 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rotations_of_the_wrong_shape_are_refused(device):
    case = RotateLinearCase(**(vars(three_cases()[0]) | {"groups": 1}))
    wide = three_cases()[0]
    rotate_args = (wide.x(), *case.rotation(), 6)
    linear_args = (wide.x(), *case.rotation(), *wide.weight(), 6)
    for op, args in ((paro.rotate, rotate_args), (paro.rotate_int4_linear, linear_args)):
        args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
        with pytest.raises(ShapeError, match=r"pairs must be an integer tensor \(krot, 12\), got torch.int16 \(2, 6\)"):
            op(*args)


SIBLINGS_COUNTS = "siblings need one rotation, or one each"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda args: changed(1, args[1] * 2, args), SIBLINGS_COUNTS + r": got lists of \[2, 1, 1\]"),
        (lambda args: changed(4, [], args), SIBLINGS_COUNTS + r".* for \[0, 3, 3\]"),
        (lambda args: changed(5, args[5][:2], args), SIBLINGS_COUNTS + r".* for \[3, 2, 3\]"),
        (lambda args: changed(8, [True], args), r"has_bias must name 2 of 3 linears, got \[True\]"),
        (lambda args: changed(8, [True] * 3, args), r"has_bias must name 2 of 3 linears, got \[True, True, True\]"),
        (lambda args: changed(0, args[0][:, :6], args), "pairs must be an integer tensor"),
        (lambda args: changed(4, [args[4][0]] * 3, args), r"qweight \(K, bits·N/32\), qzeros .* must agree"),
        (lambda args: changed(7, args[7][::-1], args), r"bias must be \(8,\), got \(16,\)"),
        (lambda args: changed(9, 4, args), r"scales \(K/4, N\) must agree"),
    ],
)
def test_siblings_refuse_contradictions(change, message, device):
    """Regression: shapes of siblings were not checked, nor lists of different lengths."""
    args = change(siblings_args(three_cases(), shared=True))
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), args)
    with pytest.raises(ShapeError, match=message):
        paro.rotate_int4_siblings(*args)


def test_spread_bias():
    one, two = torch.zeros(8), torch.ones(8)
    assert ops.spread_bias([one, two], [False, True, True]) == [None, one, two]


def test_pinned_cases():
    """Calls that once were, or nearly were, wrong: single channels pair, no rounds, large angles in 16 bit."""
    for case in (
        RotateLinearCase(batch=(), groups=1, group_size=2, krot=0, words=1),
        RotateLinearCase(batch=(1,), groups=3, group_size=2, krot=8, words=1, angles="large", dtype=torch.bfloat16),
        RotateLinearCase(batch=(2, 0), groups=1, group_size=128, krot=8, words=3, bias=True, dtype=torch.float16),
    ):
        check_rotate_int4_linear_case(paro.rotate_int4_linear, case, tolerances=WIDE_OPERANDS)


def test_integer_activations_are_refused_rather_than_truncated():
    packed = (torch.zeros(32, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8).half())
    with pytest.raises(ShapeError, match=r"x must be a floating tensor, got torch\.int64"):
        torch.ops.parofx.int4_linear(torch.ones(2, 32, dtype=torch.int64), *packed, None, 32)
    rotation = (torch.arange(32).to(torch.int16)[None], torch.zeros(1, 16), torch.ones(32))
    with pytest.raises(ShapeError, match=r"v must be a floating tensor, got torch\.int64"):
        torch.ops.parofx.rotate(torch.ones(2, 32, dtype=torch.int64), *rotation, 32)


def producer_cases(count, **options):
    return [
        RotateLinearCase(batch=(2, 3), groups=2, group_size=6, krot=2, words=2, seed=seed, **options)
        for seed in range(count)
    ]


@pytest.mark.parametrize("rotations", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("residual", [True, False])
def test_rmsnorm_rotate_is_the_norm_and_then_the_rotations(rotations, offset, residual):
    cases = producer_cases(rotations, dtype=torch.float64)
    x, other, weight = cases[0].x(), torch.randn(2, 3, 12).double(), torch.randn(12).double()
    turned = [list(tensors) for tensors in zip(*(case.rotation() for case in cases), strict=True)]
    args = (x, other if residual else None, weight, offset, 1e-5, *turned, 6)
    *rotated, total = paro.rmsnorm_rotate(*args) if residual else [*paro.rmsnorm_rotate(*args), x]
    assert torch.equal(total, x + other if residual else x)
    normed = torch.nn.functional.rms_norm(total, (12,), weight + offset, 1e-5)
    for one, case in zip(rotated, cases, strict=True):
        assert torch.allclose(one, paro.rotate(normed, *case.rotation(), 6), rtol=1e-12, atol=1e-12)
    opcheck(paro.rmsnorm_rotate, args)


def test_silu_mul_rotate_is_the_product_and_then_the_rotation():
    (case,) = producer_cases(1, dtype=torch.float64)
    gate, up = case.x(), torch.randn(2, 3, 12).double()
    turned = [[tensor] for tensor in case.rotation()]
    (rotated,) = paro.silu_mul_rotate(gate, up, *turned, 6)
    expected = paro.rotate(torch.nn.functional.silu(gate) * up, *case.rotation(), 6)
    assert torch.allclose(rotated, expected, rtol=1e-12, atol=1e-12)
    opcheck(paro.silu_mul_rotate, (gate, up, *turned, 6))


@pytest.mark.parametrize("inputs", [1, 2])
def test_int4_siblings_are_the_linears_one_by_one(inputs):
    cases = producer_cases(2, bias=True)
    x = [case.x() for case in cases[:inputs]]
    packed = [list(tensors) for tensors in zip(*(case.weight() for case in cases), strict=True)]
    args = (x, *packed[:3], packed[3][1:], [False, True], 6)
    first, second = paro.int4_siblings(*args)
    assert torch.equal(first, paro.int4_linear(x[0], *cases[0].weight()[:3], None, 6))
    assert torch.equal(second, paro.int4_linear(x[-1], *cases[1].weight(), 6))
    opcheck(paro.int4_siblings, args)


def test_tensors_of_producers_that_do_not_fit_are_refused():
    case = producer_cases(1)[0]
    x, turned = case.x(), [[tensor] for tensor in case.rotation()]
    with pytest.raises(ShapeError, match=r"residual must be torch.float32 \(2, 3, 12\) as the first input"):
        paro.rmsnorm_rotate(x, x[0], None, 0.0, 1e-5, *turned, 6)
    with pytest.raises(ShapeError, match=r"weight must be \(12,\), got \(6,\)"):
        paro.rmsnorm_rotate(x, None, torch.ones(6), 0.0, 1e-5, *turned, 6)
    with pytest.raises(ShapeError, match=r"lists of one length above 0, got \[0, 0, 0\]"):
        paro.silu_mul_rotate(x, x, [], [], [], 6)
    with pytest.raises(ShapeError, match=r"the first input must be a floating tensor, got torch\.int64"):
        paro.silu_mul_rotate(x.long(), x.long(), *turned, 6)
    with pytest.raises(ShapeError, match="siblings need one input, or one each"):
        paro.int4_siblings([x], [], [], [], [], [], 6)


AUTOCAST_CASE = RotateLinearCase(batch=(3,), groups=2, group_size=6, krot=3, words=2, bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_casts_the_activation_alone(dtype):
    case = AUTOCAST_CASE
    x = case.x().to(dtype)
    rotation, weight = case.rotation(), case.weight()
    wanted = torch.float64 if dtype == torch.float64 else torch.bfloat16
    calls = {
        paro.int4_linear: (*weight, case.group_size),
        paro.rotate_int4_linear: (*rotation, *weight, case.group_size),
        paro.rotate_int4_siblings: siblings_args([case, case], shared=True)[1:],
    }
    for op, args in calls.items():
        expected = op(x.to(wanted), *args)
        with torch.autocast("cpu", torch.bfloat16):
            found = op(x, *args)
            opcheck(op, (x, *args), test_utils=METADATA)
        found, expected = (one if isinstance(one, list) else [one] for one in (found, expected))
        assert {one.dtype for one in found} == {wanted}
        assert all(map(torch.equal, found, expected))


def test_autocast_keeps_the_gradient():
    x = AUTOCAST_CASE.x().float().requires_grad_()
    args = (*AUTOCAST_CASE.rotation(), *AUTOCAST_CASE.weight(), 6)
    with torch.autocast("cpu", torch.bfloat16):
        result = paro.rotate_int4_linear(x, *args)
    (grad,) = torch.autograd.grad(result.float().sum(), x)
    (expected,) = torch.autograd.grad(paro.rotate_int4_linear(x, *args).sum(), x)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2)
