"""Run the checks of kernels, several at a time: most of the time goes into compiling, which is one thread's work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

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
        jobs: checks at a time. If more than one, each has a process of its own: one that breaks its GPU context or dies
            fails alone.
    """
    chosen = [check.name for check in kernels.kernel_checks(device)] if names is None else list(names)
    if jobs == 1:
        yield from (run_check(name, str(device), examples) for name in chosen)
        return
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: run_apart(name, run_check, name, str(device), examples), chosen)


def run_apart(name: str, run: Callable[..., CheckResult], *args: Any) -> CheckResult:
    """Return `run(*args)`, computed in a new process; a failure of the check called `name` if that process dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, run, *args))
    process.start()
    sender.close()
    result: CheckResult | None = None
    with contextlib.suppress(EOFError):
        result = receiver.recv()
    process.join()
    return result or CheckResult(name, None, f"its process died with exit code {process.exitcode}")


def _send(sender: Connection, run: Callable[..., CheckResult], *args: Any) -> None:
    sender.send(run(*args))


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
