"""Run Triton kernels on the CPU, right for bfloat16 and for inline assembly.

Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported, so in a process of its own) computes with
bfloat16's bits as if they were integers, and refuses inline assembly. `mend_interpreter()` puts both right: bfloat16
goes through fp32 and is rounded to nearest even after every operation, and the few PTX instructions that the kernels
of parofx use are evaluated as their text says, two 16-bit elements to a register.

    TRITON_INTERPRET=1 python -c "from parofx.testing.interpreter import mend_interpreter; mend_interpreter(); ..."

What it cannot see: illegal tile sizes, register and shared-memory limits, races.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]

_INSTRUCTION = re.compile(r"^\s*([a-z0-9_.]+)\s+(.*);$")


def is_interpreting() -> bool:
    """Say whether Triton was told to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def mend_interpreter() -> None:
    """Patch Triton's interpreter; a second call changes nothing.

    Raises:
        RuntimeError: if this process does not interpret.
    """
    if not is_interpreting():
        raise RuntimeError("Triton does not interpret in this process: set TRITON_INTERPRET=1 before it is imported")
    from triton.runtime.interpreter import InterpreterBuilder

    if not getattr(InterpreterBuilder, "mended_by_parofx", False):
        _mend(InterpreterBuilder)
        InterpreterBuilder.mended_by_parofx = True


def widen_bfloat16(bits: Bits) -> NDArray[np.float32]:
    """Return bfloat16 bits (uint16) as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: Bits) -> NDArray[np.uint16]:
    """Return fp32 values as bfloat16 bits (uint16), rounded to nearest even."""
    single = np.asarray(values, dtype=np.float32)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def evaluate_ptx(assembly: str, inputs: Sequence[Bits], outputs: int) -> list[Bits]:
    """Evaluate straight-line PTX on 32-bit registers.

    Args:
        assembly: with the outputs as `$0 …` and the inputs after them.
        inputs: uint32 arrays of one shape.
        outputs: their number.

    Raises:
        NotImplementedError: naming an instruction that is not known here.
    """
    registers: dict[str, Bits] = {f"${outputs + index}": value for index, value in enumerate(inputs)}

    def read(operand: str) -> Bits:
        return registers[operand] if operand in registers else np.uint32(int(operand, 0))  # type: ignore[return-value]

    for line in assembly.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None or match[1].startswith(".") or match[1].startswith("prefetch"):
            continue
        name, (target, *sources) = match[1], match[2].replace(" ", "").split(",")
        if name not in _PTX:
            raise NotImplementedError(f"PTX instruction {name!r} is not one of {sorted(_PTX)}")
        registers[target] = _PTX[name](*map(read, sources))
    return [registers[f"${index}"] for index in range(outputs)]


def _lop3(a: Bits, b: Bits, c: Bits, table: Bits) -> Bits:
    """Any bitwise function of three operands, given by its truth table."""
    result = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _halves(operation: Callable[..., Bits]) -> Callable[..., Bits]:
    """Apply an operation on uint16 arrays to both halves of registers."""

    def on_registers(*registers: Bits) -> Bits:
        low = operation(*((register & 0xFFFF).astype(np.uint16) for register in registers))
        high = operation(*((register >> 16).astype(np.uint16) for register in registers))
        return high.astype(np.uint32) << 16 | low.astype(np.uint32)

    return on_registers


def _fma_fp16(a: Bits, b: Bits, c: Bits) -> Bits:
    a, b, c = (bits.view(np.float16).astype(np.float64) for bits in (a, b, c))
    return (a * b + c).astype(np.float16).view(np.uint16)


def _fma_bf16(a: Bits, b: Bits, c: Bits) -> Bits:
    a, b, c = (widen_bfloat16(bits).astype(np.float64) for bits in (a, b, c))
    return round_to_bfloat16(a * b + c)


_PTX: dict[str, Callable[..., Bits]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, count: a >> count,
    "lop3.b32": _lop3,
    "sub.f16x2": _halves(lambda a, b: (a.view(np.float16) - b.view(np.float16)).view(np.uint16)),
    "fma.rn.f16x2": _halves(_fma_fp16),
    "fma.rn.bf16x2": _halves(_fma_bf16),
}


class _Results:
    """What the builder expects of a call with several results."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def get_result(self, index: int) -> Any:
        return self._results[index]


def _mend(builder: Any) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    dot, cast, unary, binary = builder.create_dot, builder.cast_impl, builder.unary_op, builder.binary_op

    def is_bfloat16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def wide(handle: Any) -> Any:
        return TensorHandle(widen_bfloat16(handle.data), tl.float32) if is_bfloat16(handle) else handle

    def narrow(handle: Any) -> Any:
        if handle.data.dtype == np.bool_:
            return handle
        return TensorHandle(round_to_bfloat16(handle.data), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return dot(self, wide(a), wide(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == dst_type.scalar:
            return src
        if dst_type.scalar == tl.bfloat16:
            return narrow(TensorHandle(src.data.astype(np.float32), tl.float32))
        return cast(self, wide(src), dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, src, dst_type)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return narrow(unary(self, wide(arg), op)) if is_bfloat16(arg) else unary(self, arg, op)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if is_bfloat16(lhs) and is_bfloat16(rhs):
            return narrow(binary(self, wide(lhs), wide(rhs), op))
        return binary(self, lhs, rhs, op)

    def create_inline_asm(
        self: Any, assembly: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        outputs = constraints.count("=")
        shape = values[0].data.shape
        values = [np.broadcast_to(value.data, shape).reshape(-1) for value in values]
        if pack == 2:
            values = [value.view(np.uint32) for value in values]
        registers = evaluate_ptx(assembly, values, outputs)
        arrays = [np.broadcast_to(register, values[0].shape).astype(np.uint32) for register in registers]
        handles = [
            TensorHandle(array.view(_get_np_dtype(type_)).reshape(shape), type_.scalar)
            for array, type_ in zip(arrays, types, strict=True)
        ]
        return _Results(handles)

    for method in (create_dot, cast_impl, create_fp_to_fp, unary_op, binary_op, create_inline_asm):
        setattr(builder, method.__name__, method)
