"""Whether tests that need the compiled CPU library are run: wherever it loads, or could be compiled."""

import os
import shlex
import shutil
import sys

import pytest

from parofx import cpu_ops

_COMPILERS = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "c++"]


def _has_library() -> bool:
    """Load it; a failure is an error of every test file that needs it, unless the machine cannot build one."""
    try:
        cpu_ops.load()
    except cpu_ops.BuildUnavailableError:
        if sys.platform == "linux" and any(map(shutil.which, _COMPILERS)):
            raise
        return False
    return True


needs_library = pytest.mark.skipif(not _has_library(), reason="no C++ compiler, or not Linux")
#: Values of a parameter `in_cpp`.
both_ways = [False, pytest.param(True, marks=needs_library)]
