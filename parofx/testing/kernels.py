"""Every kernel of a device, each with the check that it has to pass: what `parofx verify` runs.

The Triton kernels come once per row of the architecture's launch table, with the tokens that the row is for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from parofx.config import PACKED_BITS
from parofx.testing.interpreter import is_interpreting
from parofx.testing.properties import (
    NARROW_OPERANDS,
    WIDE_OPERANDS,
    Tolerance,
    check_int4_linear,
    check_rotate_int4_linear,
    check_rotation,
)
from parofx.testing.strategies import TOKENS, batches, linear_cases, rotate_linear_cases, rotation_cases

#: Sizes at which tiles of tokens change or overflow, for kernels that take any number.
MANY_TOKENS = (1, 0, 2, 7, 16, 17, 33, 64, 65, 130)
_KERNEL_GROUP_SIZES = (128, 64, 32)
_HALF_DTYPES = (torch.float16, torch.bfloat16)
#: Activations and matrices are rounded to x's dtype; `Σ|x||d|` is at most the group's norm, which a rotation keeps.
DENSE_ROTATION = {
    dtype: Tolerance(WIDE_OPERANDS[dtype].rounding, 0.0, torch.finfo(dtype).eps) for dtype in _HALF_DTYPES
}


@dataclass(frozen=True)
class KernelCheck:
    """One kernel and what it must hold.

    Args:
        name: for the report.
        run: draws this many cases, and returns the worst relative error or raises AssertionError.
    """

    name: str
    run: Callable[[int], float]


def kernel_checks(device: torch.device) -> list[KernelCheck]:
    """Return the checks of every kernel that serves a device.

    For a CPU these are the operators' references and the C++ kernels, and under Triton's interpreter its kernels too.
    """
    checks = []
    if device.type == "cpu":
        checks += list(_cpu_checks())
    if device.type == "cuda" or is_interpreting():
        checks += list(_triton_checks(device))
    return checks


def _cpu_checks() -> Iterator[KernelCheck]:
    from parofx import cpu_ops, ops

    yield _check("reference rotate", check_rotation, ops.rotate, rotation_cases(), WIDE_OPERANDS)
    yield _check(
        "reference int4_linear", check_int4_linear, ops.int4_linear, linear_cases(bits=PACKED_BITS), NARROW_OPERANDS
    )
    fused = rotate_linear_cases(bits=PACKED_BITS)
    yield _check(
        "reference rotate_int4_linear", check_rotate_int4_linear, ops.rotate_int4_linear, fused, NARROW_OPERANDS
    )
    if cpu_ops.is_available():
        cases = rotate_linear_cases(
            bits=PACKED_BITS,
            group_sizes=_KERNEL_GROUP_SIZES,
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
        )
        name = f"cpu rotate_int4_linear ({cpu_ops.active_isa()})"
        yield _check(name, check_rotate_int4_linear, _cpu_kernel, cases, NARROW_OPERANDS)


def _cpu_kernel(
    x: Tensor,
    pairs: Tensor,
    theta: Tensor,
    channel_scales: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    bits: int = 4,
) -> Tensor:
    from parofx import cpu_ops
    from parofx.cpu_ops.layouts import PACK

    rotation = cpu_ops.pack_rotation(pairs, theta, channel_scales, group_size)
    packed = ([part] for part in PACK[bits](qweight, qzeros, scales, group_size))
    out = torch.ops.parofx_cpu.rotate_int4_linear(x, [rotation], *packed, [bias], group_size, 0, bits)
    result: Tensor = out[0]
    return result


def _triton_checks(device: torch.device) -> Iterator[KernelCheck]:
    from parofx.triton_ops import verification
    from parofx.triton_ops.cost_model import KERNEL_TILES
    from parofx.triton_ops.launch import uses_ptx
    from parofx.triton_ops.tiles import DequantizeTiles, FusedTiles, LinearTiles, RotateTiles

    ptx = uses_ptx(device)
    for row in _rows(device):
        tiles = KERNEL_TILES[row.kernel](**row.tiles)
        most = "any number of" if row.max_tokens is None else f"up to {row.max_tokens}"
        name = f"triton {row.kernel}, {most} tokens, {' '.join(f'{key}={value}' for key, value in row.tiles.items())}"
        narrowed: dict[str, Any] = {
            "device": str(device),
            "group_sizes": _KERNEL_GROUP_SIZES,
            "dtypes": _HALF_DTYPES,
            "batch": _batches(row.max_tokens),
        }
        if isinstance(tiles, RotateTiles):
            yield _check(name, check_rotation, verification.rotate(tiles), rotation_cases(**narrowed), WIDE_OPERANDS)
        elif isinstance(tiles, LinearTiles):
            cases = linear_cases(max_words=40, **narrowed)
            for split_k in (1, 3) if tiles.split_k == 0 else (tiles.split_k,):
                some = LinearTiles(**{**row.tiles, "split_k": split_k})
                for portable in (False, True) if ptx else (True,):
                    kernel = verification.int4_linear(some, ptx=not portable)
                    label = f"{name} split_k={split_k}{' portable' if portable else ''}"
                    yield _check(label, check_int4_linear, kernel, cases, NARROW_OPERANDS)
        elif isinstance(tiles, DequantizeTiles):
            for portable in (False, True) if ptx else (True,):
                kernel = verification.int4_linear(tiles, ptx=not portable)
                cases = linear_cases(max_words=40, **narrowed)
                label = f"{name}{' portable' if portable else ''}"
                yield _check(label, check_int4_linear, kernel, cases, NARROW_OPERANDS)
        elif isinstance(tiles, FusedTiles):
            fused = rotate_linear_cases(max_words=40, **narrowed)
            for siblings in (1, 3):
                kernel = verification.rotate_int4_linear(tiles, ptx=ptx, siblings=siblings, which=siblings // 2)
                yield _check(f"{name} siblings={siblings}", check_rotate_int4_linear, kernel, fused, NARROW_OPERANDS)
        else:
            dense = rotation_cases(**narrowed)
            yield _check(name, check_rotation, verification.rotate_dense(tiles), dense, DENSE_ROTATION)


def _rows(device: torch.device) -> list[Any]:
    """Return the launch table of a GPU, or for the interpreter those of all, but for what it does not look at."""
    from parofx.triton_ops.architectures import ARCHITECTURES, architecture_of
    from parofx.triton_ops.cost_model import launch_table

    if device.type != "cpu":
        return list(launch_table(architecture_of(device)))
    rows: dict[tuple[Any, ...], Any] = {}
    for arch in ARCHITECTURES:
        for row in launch_table(arch):
            seen = {key: value for key, value in row.tiles.items() if key not in ("num_warps", "num_stages")}
            rows.setdefault((row.kernel, row.max_tokens, *seen.items()), row)
    return list(rows.values())


def _batches(max_tokens: int | None) -> SearchStrategy[tuple[int, ...]]:
    if max_tokens is None:
        return batches(MANY_TOKENS)
    tokens = sorted({*(count for count in TOKENS if count <= max_tokens), max_tokens - 1, max_tokens})
    return batches(tokens).filter(lambda batch: math.prod(batch) <= max_tokens)


def _check(
    name: str,
    check: Callable[..., float],
    kernel: Callable[..., Tensor],
    cases: SearchStrategy[Any],
    tolerances: Mapping[torch.dtype, Tolerance],
) -> KernelCheck:
    run = functools.partial(_run, check, kernel, cases, tolerances)
    return KernelCheck(name, run)


def _run(
    check: Callable[..., float],
    kernel: Callable[..., Tensor],
    cases: SearchStrategy[Any],
    tolerances: Mapping[torch.dtype, Tolerance],
    examples: int,
) -> float:
    return check(kernel, cases=cases, max_examples=examples, tolerances=tolerances)
