"""Checks of a kernel against the fp64 reference, over drawn cases or on one.

An output element `y` may differ from the reference by

    rounding·|y| + operands·Σ|x||w| + computing·magnitude

where the sum runs over the products that make `y` (rotated activations times weights; nothing for a rotation alone)
and `magnitude` is what errors of the arithmetic scale with: the norm of the scaled channel group for a rotation,
which keeps norms but cancels inside them, and that norm times `Σ|w|` per group for a linear behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from parofx.ops import stated_bits
from parofx.testing import reference
from parofx.testing.cases import LinearCase, RotateLinearCase, RotationCase
from parofx.testing.reference import Array
from parofx.testing.strategies import linear_cases, rotate_linear_cases, rotation_cases

_Case = TypeVar("_Case")


@dataclass(frozen=True)
class Tolerance:
    """The three factors of the bound in the module's docstring."""

    rounding: float
    operands: float
    computing: float


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Rounding to nearest is off by half a unit in the last place; a whole one where the fp32 value sits on the border.
_ROUNDING = {dtype: torch.finfo(dtype).eps for dtype in _DTYPES}
#: fp32 arithmetic (fp64 for fp64): 8 rounds and a sum over K are a few dozen roundings, of random sign.
_COMPUTING = {
    dtype: 32 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps for dtype in _DTYPES
}
#: What computes in fp32 from end to end and rounds once, as the references of `parofx.ops` do.
WIDE_OPERANDS = {dtype: Tolerance(_ROUNDING[dtype], 0.0, _COMPUTING[dtype]) for dtype in _DTYPES}
#: What rounds activations and weights to the input's dtype for tensor cores: half a unit in the last place for each.
NARROW_OPERANDS = {dtype: Tolerance(_ROUNDING[dtype], _ROUNDING[dtype], _COMPUTING[dtype]) for dtype in _DTYPES}


def check_rotation(
    fn: Callable[..., Tensor],
    *,
    cases: SearchStrategy[RotationCase] | None = None,
    max_examples: int | None = None,
    tolerances: Mapping[torch.dtype, Tolerance] = WIDE_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check `fn(v, pairs, theta, scales, group_size)`, `ROT(v ⊙ scales)`, on drawn cases.

    Args:
        fn: the kernel.
        cases: what is drawn; narrow it to what the kernel supports with `rotation_cases(...)`.
        max_examples: cases drawn; by default what the Hypothesis profile says.
        tolerances: per input dtype.
        takes_out: pass a keyword `out`, full of NaN, that the kernel must fill and return.

    Returns:
        The largest relative error of a case, `‖got − expected‖ / ‖expected‖`.

    Raises:
        AssertionError: for the smallest failing case found, which is printed with it.
    """
    return _draw(
        rotation_cases() if cases is None else cases,
        lambda case: check_rotation_case(fn, case, tolerances=tolerances, takes_out=takes_out),
        max_examples,
    )


def check_int4_linear(
    fn: Callable[..., Tensor],
    *,
    cases: SearchStrategy[LinearCase] | None = None,
    max_examples: int | None = None,
    tolerances: Mapping[torch.dtype, Tolerance] = NARROW_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check `fn(x, qweight, qzeros, scales, bias, group_size)`, `x @ Wq + bias`; arguments as `check_rotation`'s."""
    return _draw(
        linear_cases() if cases is None else cases,
        lambda case: check_int4_linear_case(fn, case, tolerances=tolerances, takes_out=takes_out),
        max_examples,
    )


def check_rotate_int4_linear(
    fn: Callable[..., Tensor],
    *,
    cases: SearchStrategy[RotateLinearCase] | None = None,
    max_examples: int | None = None,
    tolerances: Mapping[torch.dtype, Tolerance] = NARROW_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check `fn(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size)`, both in one call.

    Arguments as `check_rotation`'s.
    """
    return _draw(
        rotate_linear_cases() if cases is None else cases,
        lambda case: check_rotate_int4_linear_case(fn, case, tolerances=tolerances, takes_out=takes_out),
        max_examples,
    )


def check_rotation_case(
    fn: Callable[..., Tensor],
    case: RotationCase,
    *,
    tolerances: Mapping[torch.dtype, Tolerance] = WIDE_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check one case of `check_rotation`."""
    args = (case.x(), *case.rotation(), case.group_size)
    got = _call(fn, args, case.in_features if takes_out else None)
    tolerance = tolerances[case.dtype]
    expected = reference.rotate(*args)
    magnitude = _group_norms(case.x(), case.rotation().scales, case)
    return _compare(case, got, expected, tolerance.rounding * abs(expected) + tolerance.computing * magnitude)


def check_int4_linear_case(
    fn: Callable[..., Tensor],
    case: LinearCase,
    *,
    tolerances: Mapping[torch.dtype, Tolerance] = NARROW_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check one case of `check_int4_linear`."""
    x, packed = case.x(), case.weight()
    args = (x, *packed, case.group_size, *stated_bits(case.bits))
    got = _call(fn, args, case.out_features if takes_out else None)
    expected = reference.int4_linear(x, *packed)
    products = abs(reference.float64(x)) @ abs(reference.dequantize(*packed[:3])) + _absolute(packed.bias)
    tolerance = tolerances[case.dtype]
    bound = tolerance.rounding * abs(expected) + (tolerance.operands + tolerance.computing) * products
    return _compare(case, got, expected, bound)


def check_rotate_int4_linear_case(
    fn: Callable[..., Tensor],
    case: RotateLinearCase,
    *,
    tolerances: Mapping[torch.dtype, Tolerance] = NARROW_OPERANDS,
    takes_out: bool = False,
) -> float:
    """Check one case of `check_rotate_int4_linear`."""
    x, rotation, packed = case.x(), case.rotation(), case.weight()
    args = (x, *rotation, *packed, case.group_size)
    got = _call(fn, (*args, *stated_bits(case.bits)), case.out_features if takes_out else None)
    expected = reference.rotate_int4_linear(*args)
    weight = abs(reference.dequantize(*packed[:3]))
    products = abs(reference.rotate(x, *rotation, case.group_size)) @ weight + _absolute(packed.bias)
    magnitude = _group_norms(x, rotation.scales, case) @ weight + _absolute(packed.bias)
    tolerance = tolerances[case.dtype]
    bound = tolerance.rounding * abs(expected) + tolerance.operands * products + tolerance.computing * magnitude
    return _compare(case, got, expected, bound)


def _draw(cases: SearchStrategy[_Case], check: Callable[[_Case], float], max_examples: int | None) -> float:
    # A first call may compile for seconds: no deadline.
    @settings(deadline=None, max_examples=max_examples or settings().max_examples)
    @given(case=cases)
    def holds(case: _Case) -> None:
        errors.append(check(case))

    errors: list[float] = []
    holds()
    return max(errors, default=0.0)


def _call(fn: Callable[..., Tensor], args: tuple[Any, ...], out_features: int | None) -> Tensor:
    """Call `fn` with poisoned outputs; check that it leaves its inputs alone and returns what it should."""
    x = args[0]
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    kwargs = {}
    if out_features is not None:
        shape = (*x.shape[:-1], out_features)
        kwargs["out"] = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    with _uninitialized_memory_is_nan():
        got = fn(*args, **kwargs)
    if kwargs and got.data_ptr() != kwargs["out"].data_ptr():
        raise AssertionError("the kernel must return the tensor it was given as out, got another one")
    for position, (arg, copy) in enumerate(zip(args, before, strict=True)):
        if isinstance(arg, Tensor) and not torch.equal(arg, copy):
            raise AssertionError(f"the kernel must not change its inputs: argument {position} differs after the call")
    if got.dtype != x.dtype or got.device != x.device:
        raise AssertionError(f"expected the input's {x.dtype} on {x.device}, got {got.dtype} on {got.device}")
    return got


@contextmanager
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """Let `torch.empty` return NaN, so that an element a kernel forgets to write cannot be right by chance."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _group_norms(x: Tensor, scales: Tensor, case: RotationCase) -> Array:
    """Return `(…, K)`: for each channel the norm of its group after the scaling, which rotations keep."""
    scaled = reference.float64(x) * reference.float64(scales).reshape(-1)
    grouped = scaled.reshape(*scaled.shape[:-1], case.groups, case.group_size)
    norms: Array = np.sqrt((grouped**2).sum(-1, keepdims=True))
    return np.broadcast_to(norms, grouped.shape).reshape(scaled.shape)


def _absolute(bias: Tensor | None) -> Array | float:
    return 0.0 if bias is None else abs(reference.float64(bias))


def _compare(case: object, got: Tensor, expected: Array, bound: Array) -> float:
    """Return `‖got − expected‖ / ‖expected‖`; raise, with the case and the worst element, outside of the bound."""
    if tuple(got.shape) != expected.shape:
        raise AssertionError(f"expected shape {expected.shape}, got {tuple(got.shape)}\n  {case}")
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    values = reference.float64(got)
    error = np.where(np.isnan(values), np.inf, abs(values - expected))
    excess = error - bound - smallest
    wrong = int((excess > 0).sum())
    if not wrong:
        norm = float(np.linalg.norm(expected))
        return float(np.linalg.norm(error)) / norm if norm else 0.0
    worst = np.unravel_index(np.argmax(excess), expected.shape)
    raise AssertionError(
        f"{wrong} of {expected.size} elements are wrong ({int(np.isnan(values).sum())} NaN); the worst is "
        f"{list(map(int, worst))}: expected {expected[worst]:.9g} ± {bound[worst]:.2g}, got {values[worst]:.9g}\n"
        f"  {case}"
    )
