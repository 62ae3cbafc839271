"""The CPU provider: scale, rotate, int4 product and bias of linears that read one tensor, in one operator call.

Importing this module is cheap; the kernels are compiled at the first `load()` or `is_available()` and then cached.
The operators, registered by the loaded library, are

    torch.ops.parofx_cpu.rotate_linear(
        Tensor x, Tensor rotation, Tensor weight, Tensor scales, Tensor zeros, Tensor? bias,
        int bits, int group_size, int activation_mode, Tensor? down=None, Tensor? up=None) -> Tensor
    torch.ops.parofx_cpu.rotate_int4_linear(
        Tensor x, Tensor[] rotations, Tensor[] weights, Tensor[] scales, Tensor[] zeros, Tensor?[] biases,
        int group_size, int activation_mode, int bits=4, Tensor[]? down=None, Tensor[]? up=None) -> Tensor[]

with `x (..., K)` in fp32, bf16 or fp16 and any strides; one output `(..., N_i)` per linear, contiguous, of x's dtype;
`rotations` one for all linears or one for each, an empty tensor meaning none; `weights`, `scales`, `zeros` and
`rotations` as `pack_weight` (`pack_plane_weight` for 3 bits, `pack_byte_weight` for 8) and `pack_rotation` return them;
`activation_mode` 0 to multiply the activations as they are and 1 to quantize them to int8 per (row, group) after the
rotation, which not every instruction set does for 8-bit weights. The first is for one linear, the second for siblings,
whose codes have one width: lists take longer to pass than tensors. They have no gradient: that is the business of
`parofx::rotate_int4_linear`.

`down (r, K)` and `up (r, N)`, fp16, are a low-rank correction: `(x_rot · downᵀ) · up` is added, computed in fp32 from
the rotated activations before these are quantized.

What calibration does most has operators of its own, which write into what they are given and are not to be traced;
`csrc/kernels.h` has the formulas, `parofx.calibration.column_blocks` and `dense_rounds` say what the tensors are:

    torch.ops.parofx_cpu.round_columns(
        Tensor(a!) steps, Tensor(b!) changes, Tensor base, Tensor coupling, Tensor channels, Tensor scales, Tensor low,
        Tensor high, int group_size, Tensor? exact=None, Tensor? curvature=None) -> ()
    torch.ops.parofx_cpu.dense_rounds(
        Tensor(a!) after, Tensor partners, Tensor cosines, Tensor sines, Tensor? grad=None, Tensor(b!)? crossed=None)

Where activations are multiplied "as they are", one row of bf16 and any number of rows of fp16 and fp32 are held as
24-bit integers per (row, group) on the AVX512_BF16 and AMX paths: at most 2^-24 of the group's largest value is lost.
More rows of bf16 are rounded to bf16 after the rotation.

Environment: `CXX`, `PAROFX_CACHE`, and `PAROFX_CPU_ISA` = scalar | avx2 | avx512 | avx512_bf16 | amx, read at loading.
"""

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parofx.cpu_ops.build import BuildFailedError, BuildUnavailableError, build_library, find_compiler
from parofx.cpu_ops.layout import pack_codes, pack_rotation, pack_weight, unpack_rotation, unpack_weight
from parofx.cpu_ops.layout_bytes import pack_byte_codes, pack_byte_weight, unpack_byte_weight
from parofx.cpu_ops.layout_planes import pack_plane_codes, pack_plane_weight, unpack_plane_weight
from parofx.folders import cache_folder

__all__ = [
    "BuildFailedError",
    "BuildUnavailableError",
    "active_isa",
    "describe",
    "is_available",
    "load",
    "pack_byte_codes",
    "pack_byte_weight",
    "pack_codes",
    "pack_plane_codes",
    "pack_plane_weight",
    "pack_rotation",
    "pack_weight",
    "unpack_byte_weight",
    "unpack_plane_weight",
    "unpack_rotation",
    "unpack_weight",
    "why_unavailable",
]

_lock = threading.Lock()
_library: Path | None = None
_failure: Exception | None = None
_warned = False


def load() -> None:
    """Build the kernels if need be and register their operators; later calls return at once.

    Raises:
        BuildUnavailableError: without a compiler, or on an unsupported platform.
        BuildFailedError: if the compiler fails; the message holds its output.
        RuntimeError: if the library does not load, or `PAROFX_CPU_ISA` names what this machine lacks.
    """
    global _library, _failure
    with _lock:
        if _library is not None:
            return
        if _failure is not None:
            raise _without_frames(_failure)
        try:
            path = build_library()
            _register(path)
        except Exception as error:
            _failure = _without_frames(error)
            raise
        _library = path


def _without_frames(error: Exception) -> Exception:
    """Copy an exception: one that was raised holds the frames it went through, and all their tensors."""
    try:
        return copy.copy(error)
    except Exception:  # one whose arguments are not those of its constructor
        return RuntimeError(f"{type(error).__name__}: {error}")


def is_available() -> bool:
    """Return whether the kernels are ready, building them at the first call.

    Warns once if they cannot be built here.

    Raises:
        BuildFailedError: if there is a compiler and it fails.
        RuntimeError: if the library does not load, or `PAROFX_CPU_ISA` names what this machine lacks.
    """
    global _warned
    try:
        load()
    except BuildUnavailableError as error:
        with _lock:
            first, _warned = not _warned, True
        if first:
            warnings.warn(f"parofx runs without its CPU kernels: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def why_unavailable() -> str | None:
    """Return why the kernels cannot be used, or None if they can; never warns or raises."""
    try:
        load()
    except Exception as error:
        return str(error)
    return None


def active_isa() -> str:
    """Return which kernels run: "amx", "avx512_bf16", "avx512", "avx2" or "scalar".

    Raises:
        Exception: what `load` raises.
    """
    load()
    return str(torch.ops.parofx_cpu.isa())


def describe() -> dict[str, Any]:
    """Return the provider's state for a report: compiler, cache, library, ISA, threads, and why not."""
    reason = why_unavailable()
    compiler = find_compiler()
    return {
        "available": reason is None,
        "why_unavailable": reason,
        "compiler": " ".join(compiler) if compiler else None,
        "cache": str(cache_folder()),
        "library": str(_library) if _library else None,
        "isa": active_isa() if reason is None else None,
        "threads": torch.get_num_threads(),
    }


def _register(path: Path) -> None:
    if not hasattr(torch.ops.parofx_cpu, "rotate_int4_linear"):
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            raise RuntimeError(f"could not load {path}: {error}; delete the file to have it built anew") from error
        torch.library.register_fake("parofx_cpu::rotate_linear", _fake_rotate_linear)
        torch.library.register_fake("parofx_cpu::rotate_int4_linear", _fake_rotate_int4_linear)
    # Fails here, and not in a model, if PAROFX_CPU_ISA asks for too much.
    torch.ops.parofx_cpu.isa()


def _fake_rotate_linear(
    x: Tensor,
    rotation: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation_mode: int,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_rotate_int4_linear(
    x: Tensor,
    rotations: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    biases: list[Tensor | None],
    group_size: int,
    activation_mode: int,
    bits: int = 4,
    down: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
