"""Give OpenMP's threads the AMX tiles that ggml configures once in each of them and believes to be there.

Where others compute with AMX on the same threads, they are gone: ggml's next product then dies of an illegal
instruction, or computes with shapes that are not its own. It has no function that configures them again.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from typing import Any

#: Rows and bytes a row of ggml's tiles: two of weights, two of activations, four of sums.
_ROWS = (8, 8, 16, 16, 16, 16, 16, 16)
_BYTES = (64, 64, 32, 32, 64, 64, 64, 64)
#: What `ldtilecfg` reads: palette 1 from row 0, then 16 entries of each, of which the last 8 are reserved.
CONFIGURATION = struct.pack("<BB14x8H16x8B8x", 1, 0, *_BYTES, *_ROWS)
#: Functions of the address of 64 bytes.
_LDTILECFG = bytes.fromhex("c4e2784907c3")  # ldtilecfg [rdi]; ret
_STTILECFG = bytes.fromhex("c4e2794907c3")  # sttilecfg [rdi]; ret
_CODE = _LDTILECFG + _STTILECFG


@functools.cache
def _memory() -> tuple[mmap.mmap, int]:
    """Return a page that holds the configuration, 64 bytes to write to, and the functions; and its address."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[:64] = CONFIGURATION
    page[128 : 128 + len(_CODE)] = _CODE
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


@functools.cache
def _parallel() -> Any:
    function = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def restore(threads: int) -> None:
    """Load ggml's tile configuration in each thread of a team of GNU's OpenMP, which takes a few microseconds."""
    _, address = _memory()
    _parallel()(address + 128, address, threads, 0)


def current() -> bytes:
    """Return the calling thread's tile configuration."""
    page, address = _memory()
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address + 128 + len(_LDTILECFG))(address + 64)
    return page[64:128]
