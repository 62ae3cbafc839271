"""Keeping freed memory for the next tensor of its size.

The C library of Linux (glibc) gives blocks of 32 MiB and more back to the system when they are freed. The next tensor
of that size then waits for fresh pages, which takes longer than most arithmetic on it: a conversion of 8 million
elements to fp32 took 22 ms so, and 3 ms in pages at hand. PyTorch has no such store of its own on CPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator

# Of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
#: Bytes of a block from which on it is mapped for itself, and of free memory at the heap's end that is given back: −1
#: for none.
_KEPT = (1 << 30, -1)
#: To which glibc raises both by itself, as it has long done in a process that runs models.
_USUAL = (32 << 20, 64 << 20)
#: Variables by which users make this choice themselves.
_CHOSEN_BY = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

_lock = threading.Lock()
_users = 0
_is_keeping = False


@contextlib.contextmanager
def keeping_pages() -> Iterator[None]:
    """Keep freed memory as long as the context lasts, and give it back behind it; without glibc 2.35 do nothing.

    Contexts may be nested, and overlap in several threads. Thresholds that users set by environment variables stay.
    """
    global _users, _is_keeping
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _is_keeping = _set(library, _KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _is_keeping:
                _set(library, _USUAL)
                library.malloc_trim(0)
                _is_keeping = False


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if any(os.environ.get(name) for name in _CHOSEN_BY):
        return None
    try:
        library = ctypes.CDLL(None)
        _ = library.mallopt, library.malloc_trim, library.gnu_get_libc_version
    except (OSError, AttributeError, TypeError):  # another system's, which may not even open itself
        return None
    return library


def _set(library: ctypes.CDLL, thresholds: tuple[int, int]) -> bool:
    """Set both thresholds, or none; return whether."""
    mapped, trimmed = thresholds
    # Before 2.35 glibc refuses more than 32 MiB; alone, the other would end its own choice of both.
    return bool(library.mallopt(_M_MMAP_THRESHOLD, mapped) and library.mallopt(_M_TRIM_THRESHOLD, trimmed))
