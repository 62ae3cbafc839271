"""Give OpenMP's threads the AMX tile configuration that ggml set once in each of them and believes to be there.

A process in which others compute with AMX on the same threads takes it away: ggml's next product then dies of an
illegal instruction, or computes with another's shapes. Of its own there is no function that sets it again.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct

#: Rows and bytes a row of ggml's tiles: two of its weights, two of its activations, four of sums.
_ROWS = (8, 8, 16, 16, 16, 16, 16, 16)
_BYTES = (64, 64, 32, 32, 64, 64, 64, 64)
#: `ldtilecfg [rdi]; ret`: a function of the address of 64 bytes.
_LOAD = bytes.fromhex("c4e2784907c3")


@functools.cache
def _restorer() -> tuple[ctypes._CFuncPtr, int, int, mmap.mmap]:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # Palette 1, from row 0; 16 entries each of which the last 8 are reserved.
    code[:64] = struct.pack("<BB14x8H16x8B8x", 1, 0, *_BYTES, *_ROWS)
    code[64 : 64 + len(_LOAD)] = _LOAD
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel, address + 64, address, code


def restore(threads: int) -> None:
    """Load ggml's tile configuration in each thread of a team of GNU's OpenMP: about a microsecond."""
    parallel, function, argument, _ = _restorer()
    parallel(function, argument, threads, 0)
