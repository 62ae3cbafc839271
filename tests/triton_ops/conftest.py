"""Where the kernels' tests run: on a GPU, or under Triton's interpreter."""

import pytest
import torch

from parofx.testing.interpreter import is_interpreting, mend_interpreter

#: Interpreted kernels cannot be compiled.
collect_ignore = ["test_aot.py"] if is_interpreting() else []

if is_interpreting():
    mend_interpreter()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if is_interpreting() else "cuda")
