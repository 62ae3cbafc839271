"""Whether tests that need the compiled CPU library are run, by what the machine has and not by what parofx says."""

import os
import shlex
import shutil
import sys

import pytest

from parofx import cpu_ops

_COMPILERS = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "c++"]
_HAS_COMPILER = sys.platform == "linux" and any(map(shutil.which, _COMPILERS))
if _HAS_COMPILER:
    cpu_ops.load()  # a build that fails is an error of every test file that needs it

needs_library = pytest.mark.skipif(not _HAS_COMPILER, reason="no C++ compiler, or not Linux")
#: Values of a parameter `in_cpp`.
both_ways = [False, pytest.param(True, marks=needs_library)]
