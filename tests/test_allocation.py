import os
import platform
import subprocess
import sys

import pytest

from parofx import allocation
from parofx.allocation import keeping_pages

#: By what the machine has: a `keeping_pages` that keeps nothing must fail.
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35)
    or any(os.environ.get(name) for name in allocation._CHOSEN_BY),
    reason="needs glibc 2.35, and no thresholds set from outside",
)

#: Prints the MiB of freed memory that the process holds: before, inside after a block was freed, behind, and after
#: another block was freed there.
PROGRAM = """
import ctypes
from parofx.allocation import keeping_pages

class MemoryUse(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
library.mallinfo2.restype = MemoryUse
held = lambda: library.mallinfo2().free >> 20
free_a_block = lambda: library.free(library.malloc(ctypes.c_size_t(256 << 20)))
found = [held()]
with keeping_pages():
    with keeping_pages():
        pass
    free_a_block()
    found.append(held())
found.append(held())
free_a_block()
print(*found, held())
"""


@needs_glibc
def test_freed_blocks_are_kept_inside_and_given_back_behind():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, inside, behind, after = map(int, done.stdout.split())
    assert inside - before >= 250
    assert max(behind, after) - before < 100


@needs_glibc
def test_an_error_inside_ends_it():
    with pytest.raises(KeyError), keeping_pages():
        raise KeyError
    assert allocation._users == 0


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_thresholds_from_outside_stay(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    allocation._glibc.cache_clear()
    try:
        with keeping_pages():
            assert allocation._users == 0
    finally:
        allocation._glibc.cache_clear()


class OldGlibc:
    """A C library that refuses thresholds above 32 MiB."""

    def __init__(self) -> None:
        self.set: list[tuple[int, int]] = []
        self.trimmed = 0

    def mallopt(self, name: int, value: int) -> int:
        if name == allocation._M_MMAP_THRESHOLD and value > 32 << 20:
            return 0
        self.set.append((name, value))
        return 1

    def malloc_trim(self, _: int) -> None:
        self.trimmed += 1


def test_nothing_is_set_or_given_back_where_the_library_refuses(monkeypatch):
    library = OldGlibc()
    monkeypatch.setattr(allocation, "_glibc", lambda: library)
    with keeping_pages():
        assert not allocation._is_keeping
    assert (library.set, library.trimmed) == ([], 0)
