"""Run the checks of kernels, several at a time: most of the time goes into compiling, which is one thread's work."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from parofx.testing import kernels
from parofx.testing.interpreter import is_interpreting, mend_interpreter

#: Each process holds a context on the GPU, a few hundred MiB.
_MOST_JOBS = 16


@dataclass(frozen=True)
class CheckResult:
    """What became of one check: the worst relative error, or why it failed."""

    name: str
    error: float | None
    failure: str | None = None


def default_jobs(device: torch.device) -> int:
    """Return how many checks to run at a time: one per core where kernels are compiled, on a CPU one."""
    return min(_MOST_JOBS, os.cpu_count() or 1) if device.type == "cuda" else 1


def run_checks(
    device: torch.device, examples: int, *, names: Sequence[str] | None = None, jobs: int = 1
) -> Iterator[CheckResult]:
    """Yield the results of a device's checks, in order.

    Args:
        device: whose kernels.
        examples: cases drawn for each kernel.
        names: of the checks; None for all.
        jobs: checks at a time, each in a process of its own if more than one.
    """
    chosen = [check.name for check in kernels.kernel_checks(device)] if names is None else list(names)
    if jobs == 1:
        yield from (run_check(name, str(device), examples) for name in chosen)
        return
    with ProcessPoolExecutor(min(jobs, len(chosen) or 1), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_check, chosen, [str(device)] * len(chosen), [examples] * len(chosen))


def run_check(name: str, device: str, examples: int) -> CheckResult:
    """Run the check of a name."""
    if is_interpreting():
        mend_interpreter()
    (check,) = (check for check in kernels.kernel_checks(torch.device(device)) if check.name == name)
    try:
        return CheckResult(name, check.run(examples))
    except Exception as error:
        # A kernel that cannot be compiled or launched fails as one that computes something else.
        return CheckResult(name, None, f"{type(error).__name__}: {error}")
