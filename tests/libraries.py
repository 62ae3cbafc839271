"""Whether tests that need the compiled CPU library are run: where it cannot be built, never where its build fails."""

import pytest

from parofx import cpu_ops


def _can_be_built() -> bool:
    try:
        cpu_ops.load()
    except cpu_ops.BuildUnavailableError:
        return False
    except Exception:
        return True  # the tests fail, and say so
    return True


needs_library = pytest.mark.skipif(not _can_be_built(), reason="the CPU library cannot be built here")
#: Values of a parameter `in_cpp`.
both_ways = [False, pytest.param(True, marks=needs_library)]
