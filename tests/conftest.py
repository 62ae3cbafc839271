"""What every test shares: the Hypothesis profile, the threads, and the skip of GPU tests where there is no GPU."""

import os

# Waiting threads that spin make small operators many times slower on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests that run side by side share the cores, and what they start inherits its part.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, 2 // _WORKERS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
torch.set_num_threads(_THREADS)

# No deadline and no "too slow": a first call may compile, and the machine may be shared.
settings.register_profile(
    "parofx", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.register_profile("parofx-ci", settings.get_profile("parofx"), derandomize=True)
settings.load_profile("parofx-ci" if os.environ.get("CI") else "parofx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew instead of comparing")
    parser.addoption("--full-aot", action="store_true", help="compile every row of the launch tables ahead of time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Under Triton's interpreter the bodies of the kernels' GPU tests run on the CPU.
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
