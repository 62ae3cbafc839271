"""What surrounds the arithmetic of a call: schema, tracing, threads, memory, and arguments that are refused."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_problem import make_problem
from libraries import needs_library
from torch import Tensor

pytestmark = needs_library
#: Output widths and bits: `rotate_linear` with each number of bits, and `rotate_int4_linear`.
each_operator = pytest.mark.parametrize(
    ("out_features", "bits"),
    [((40,), 4), ((40,), 8), ((40, 32), 4), ((40, 32), 3)],
    ids=("linear", "8-bit linear", "siblings", "3-bit siblings"),
)


@each_operator
def test_opcheck(out_features: tuple[int, ...], bits: int) -> None:
    for krot, bias in ((2, torch.float16), (None, None)):
        ranks = (3,) if bias is None else ()
        problem = make_problem(128, out_features, 32, krot, separate=True, bias=bias, bits=bits, ranks=ranks)
        for x in (torch.randn(0, 128), torch.randn(128), torch.randn(5, 128).half()):
            torch.library.opcheck(*problem.call(x))
        torch.library.opcheck(*problem.call(torch.randn(2, 3, 128).bfloat16(), mode=1))


@each_operator
def test_compiles_whole_with_dynamic_rows(out_features: tuple[int, ...], bits: int) -> None:
    op, (_, *rest) = make_problem(128, out_features, 64, 2, bits=bits).call(torch.randn(1, 128))

    def model(x: Tensor) -> Tensor:
        outputs = op(x * 2, *rest)
        return torch.cat(outputs, -1).relu() if isinstance(outputs, list) else outputs.relu()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 17):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(compiled(x), model(x))


@each_operator
def test_two_python_threads_at_once(out_features: tuple[int, ...], bits: int) -> None:
    problem = make_problem(512, tuple(4 * width for width in out_features), 128, 8, bits=bits)
    calls = [problem.call(torch.randn(rows, 512)) for rows in (1, 20)]
    expected = [op(*arguments) for op, arguments in calls]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        op, arguments = calls[i]
        try:
            for _ in range(200):
                torch.testing.assert_close(op(*arguments), expected[i], rtol=1e-5, atol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@each_operator
def test_ten_thousand_calls_leak_nothing(out_features: tuple[int, ...], bits: int) -> None:
    problem = make_problem(256, out_features, 64, 2, separate=True, bias=torch.float16, bits=bits, ranks=(2,))
    op, arguments = problem.call(torch.randn(2, 256).t().contiguous().t())

    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    for _ in range(2000):
        op(*arguments)
    gc.collect()
    before = resident_kib()
    for _ in range(10_000):
        op(*arguments)
    assert resident_kib() - before < 1024


BAD_SIBLINGS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "x must be float32": lambda a: [a[0].double(), *a[1:]],
    "x must be a CPU tensor": lambda a: [torch.tensor(1.0), *a[1:]],
    "group_size must be 32, 64 or 128, got 48": lambda a: [*a[:6], 48, 0, 4],
    "group_size must divide in_features: got 128 and 192": lambda a: [torch.randn(1, 192), *a[1:6], 128, 0, 4],
    "activation_mode must be 0": lambda a: [*a[:7], 2, 4],
    "bits must be 3, 4 or 8, got 2": lambda a: [*a[:8], 2],
    r"one entry per linear.*got 2, 1, 2, 2 and 1": lambda a: [*a[:3], a[3][:1], *a[4:]],
    r"rotations\[0\] has 7 bytes": lambda a: [a[0], [torch.zeros(7, dtype=torch.uint8)], *a[2:]],
    r"rotations\[0\] must start at": lambda a: [a[0], [torch.zeros(1 + 4 * 128, dtype=torch.uint8)[1:]], *a[2:]],
    r"weights\[1\] must be a contiguous CPU tensor of Byte": lambda a: [*a[:2], [a[2][0], a[2][1].int()], *a[3:]],
    r"weights\[0\] must have shape \(40, 32\)": lambda a: [torch.randn(1, 64), [torch.empty(0).byte()], *a[2:]],
    r"scales\[0\] must have shape \(40, 2\)": lambda a: [*a[:3], [a[3][0][:8], a[3][1]], *a[4:]],
    r"zeros\[1\] must be a contiguous CPU tensor of Byte, got Byte with strides": lambda a: [
        *a[:4], [a[4][0], a[4][1].t().contiguous().t()], *a[5:]
    ],
    r"biases\[0\] must be a contiguous CPU tensor of 40 elements, got 8": lambda a: [
        *a[:5], [torch.randn(8), None], *a[6:]
    ],
    "bias must be float32": lambda a: [*a[:5], [torch.zeros(40).int(), None], *a[6:]],
}  # fmt: skip
ONE, TWO = torch.zeros(1, 128).half(), [torch.zeros(1, 128).half()] * 2
BAD_SIBLINGS |= {
    r"down and up must both be None or have one entry per linear, of 2": lambda a: [*a, TWO],
    r"have one entry per linear, of 2$": lambda a: [*a, TWO, TWO[:1]],
    r"down\[0\] must have shape \(1, 128\)": lambda a: [*a, [ONE[:, :8].contiguous()] * 2, TWO],
    r"up\[0\] must have shape \(1, 40\)": lambda a: [*a, TWO, TWO],
}
BAD_LINEAR: dict[str, Callable[[list[Any]], list[Any]]] = {
    "bits must be 3, 4 or 8, got 5": lambda a: [*a[:6], 5, 64, 0],
    r"weights\[0\] must have shape \(40, 128\)": lambda a: [*a[:6], 8, 64, 0],
    "a correction needs both down and up, got one for linear 0": lambda a: [*a, ONE],
    "down and up must be contiguous CPU tensors of Half, got Float": lambda a: [*a, ONE.float(), ONE],
    r"rotations\[0\] has 7 bytes": lambda a: [a[0], torch.zeros(7, dtype=torch.uint8), *a[2:]],
    r"zeros\[0\] must have shape \(40, 2\)": lambda a: [*a[:4], a[4][:, :1].contiguous(), *a[5:]],
}


@pytest.mark.parametrize(
    ("out_features", "message", "spoil"),
    [
        *(((40, 32), *case) for case in BAD_SIBLINGS.items()),
        *(((40,), *case) for case in BAD_LINEAR.items()),
    ],
)
def test_bad_arguments_are_refused(
    out_features: tuple[int, ...], message: str, spoil: Callable[[list[Any]], list[Any]]
) -> None:
    op, arguments = make_problem(128, out_features, 64, 2).call(torch.randn(1, 128))
    with pytest.raises(RuntimeError, match=message):
        op(*spoil(list(arguments)))
