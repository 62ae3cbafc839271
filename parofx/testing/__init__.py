"""Properties to point at your own kernels: drawn cases, fp64 references, stated tolerances.

Needs Hypothesis (`pip install hypothesis`, or `pip install 'parofx[dev]'`). A kernel with the signature of one of
`torch.ops.parofx`'s operators is checked in one call:

    import torch
    from parofx.testing import check_rotate_int4_linear, rotate_linear_cases

    def test_my_kernel():
        cases = rotate_linear_cases(group_sizes=(128,), dtypes=(torch.float16, torch.bfloat16), device="cuda")
        check_rotate_int4_linear(my_kernel, cases=cases)

`my_kernel(x, pairs, theta, channel_scales, qweight, qzeros, scales, bias, group_size)` is called with empty batches,
single and odd numbers of tokens, non-contiguous inputs and rotation tensors in every dtype the contract allows.
A failure prints the smallest case found as a constructor call, so that it can be kept as a regression test:

    case = RotateLinearCase(batch=(3,), groups=1, group_size=128, krot=1, words=1, dtype=torch.float16)
    check_rotate_int4_linear_case(my_kernel, case)

| module | holds |
|-|-|
| `cases` | what is drawn: plain values that print, and build their tensors from a seed |
| `strategies` | Hypothesis strategies for the cases |
| `reference` | the operators in NumPy fp64, scalar pair by scalar pair, sharing no code with the product |
| `properties` | the checks and their tolerances |
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "parofx.testing needs Hypothesis, which is not installed: pip install hypothesis, or 'parofx[dev]'"
    ) from error

from parofx.testing.cases import LinearCase, PackedWeight, RotateLinearCase, Rotation, RotationCase
from parofx.testing.properties import (
    NARROW_OPERANDS,
    WIDE_OPERANDS,
    Tolerance,
    check_int4_linear,
    check_int4_linear_case,
    check_rotate_int4_linear,
    check_rotate_int4_linear_case,
    check_rotation,
    check_rotation_case,
)
from parofx.testing.strategies import batches, linear_cases, rotate_linear_cases, rotation_cases

__all__ = [
    "NARROW_OPERANDS",
    "WIDE_OPERANDS",
    "LinearCase",
    "PackedWeight",
    "RotateLinearCase",
    "Rotation",
    "RotationCase",
    "Tolerance",
    "batches",
    "check_int4_linear",
    "check_int4_linear_case",
    "check_rotate_int4_linear",
    "check_rotate_int4_linear_case",
    "check_rotation",
    "check_rotation_case",
    "linear_cases",
    "rotate_linear_cases",
    "rotation_cases",
]
