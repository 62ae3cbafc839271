"""Calibration by several processes of `torch.distributed`: each runs its share of the batches and of the fits.

Process r of n takes the batches r, r + n, …. Statistics are sums over batches, so those of all processes together are
those of one process that ran everything. They are summed on the process that fits the transform; what it found is sent
to all, as the bytes of a safetensors file. So every process ends with the same model.

A process that fails says so where it would have met the others, and all of them fail: none waits for what never comes,
or takes what belongs to another run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from parofx.calibration.fitting import FittedTransform
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.store import pack_fit, unpack_fits
from parofx.config import CalibrationConfig
from parofx.errors import ConfigError, DataError, one_per_line

_Item = TypeVar("_Item")


def process_count() -> int:
    """Return how many processes work together; 1 where `torch.distributed` is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return which of them this one is; process 0 shows progress and writes files."""
    return dist.get_rank() if process_count() > 1 else 0


def check_divisible(batches: int, config: CalibrationConfig) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        DataError: if there is not a batch for each.
        ConfigError: if the recipe trains, or there is a `work_dir`.
    """
    processes = process_count()
    if processes == 1:
        return
    if batches < processes:
        raise DataError(
            f"calibration must hold a batch for each process, got {batches} for {processes} processes: give more "
            f"sequences, smaller batches (batch_size is {config.batch_size}), or start fewer processes"
        )
    if config.trains:
        raise ConfigError(
            f"recipes that train run in one process, got recipe {config.recipe!r} in {processes} processes; "
            "use recipe='fast' and distill_epochs=0, or start one process"
        )
    if config.work_dir is not None:
        raise ConfigError(f"work_dir is for a run in one process, got {processes} processes; leave it out")


def share_of(items: Sequence[_Item]) -> list[_Item]:
    """Return this process's share of `items`."""
    return list(items[process_index() :: process_count()])


@contextmanager
def together() -> Iterator[None]:
    """Do a part of the work that every process does a share of; where it fails in one, it fails in all.

    Raises:
        DataError: that names the process which failed, in the others.
    """
    error = None
    try:
        yield
    except BaseException as caught:
        error = caught
    told = _tell("" if error is None else f"{type(error).__name__}: {error}") if process_count() > 1 else []
    if error is not None:
        raise error
    failed = [f"process {place}: {message}" for place, message in enumerate(told) if message]
    if failed:
        raise DataError(f"calibration stopped, it failed in\n{one_per_line(failed)}")


def check_alike(digest: str) -> None:
    """Refuse to sum what belongs to different models, options or data.

    Args:
        digest: of all that must be the same in every process.

    Raises:
        ConfigError: if it is not.
    """
    if process_count() > 1 and len(set(_tell(digest))) > 1:
        raise ConfigError(
            f"the {process_count()} processes of torch.distributed must quantize one model with the same options and "
            "data, and got different ones; call quantize alike in all of them, or before init_process_group"
        )


def _tell(message: str) -> list[str]:
    """Return what each process tells, in their order."""
    own = torch.frombuffer(bytearray(message.encode()) or bytearray(1), dtype=torch.uint8).to(_device())
    size = torch.tensor([len(message.encode())], device=_device())
    sizes = [torch.empty_like(size) for _ in range(process_count())]
    dist.all_gather(sizes, size)
    widest = max(1, *(int(one) for one in sizes))
    padded = torch.nn.functional.pad(own, (0, widest - len(own)))
    told = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(told, padded)
    return [bytes(one[: int(count)].tolist()).decode() for one, count in zip(told, sizes, strict=True)]


def fit_together(
    names: Sequence[str],
    statistics: Mapping[str, Sequence[InputStatistics]],
    fit: Callable[[str], FittedTransform],
) -> dict[str, FittedTransform]:
    """Fit transforms on the statistics of all processes, each by one process; all return all results.

    Args:
        names: the transforms, the same in every process.
        statistics: of each, this process's; afterwards the process that fits it holds the sums, others anything.
        fit: fits one of them on its statistics.
    """
    processes, here = process_count(), process_index()
    if processes == 1:
        return {name: fit(name) for name in names}
    owners = {name: index % processes for index, name in enumerate(names)}
    for name in names:
        for one in statistics[name]:
            _sum_at(owners[name], one)
    with together():
        found = {name: fit(name) for name in names if owners[name] == here}
    return {name: _sent(owners[name], name, found.get(name)) for name in names}


def _sum_at(owner: int, statistics: InputStatistics) -> None:
    """Sum statistics over all processes; `owner` holds the sum."""
    state = statistics.to_tensors()
    for name in ("count", "sums"):
        state[name] = state[name].to(_device())
        dist.reduce(state[name], owner)
    if process_index() == owner:
        statistics.replace(state)


def _sent(owner: int, name: str, fitted: FittedTransform | None) -> FittedTransform:
    """Return what the owner holds."""
    payload = torch.empty(0, dtype=torch.uint8)
    if fitted is not None:
        tensors = {key: one.cpu().contiguous() for key, one in pack_fit(name, fitted).items()}
        payload = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
    size = torch.tensor([payload.numel()], device=_device())
    dist.broadcast(size, owner)
    received: Tensor = payload.to(_device()) if fitted is not None else payload.new_empty(int(size), device=_device())
    dist.broadcast(received, owner)
    if fitted is not None:
        return fitted
    tensors = load(received.cpu().numpy().tobytes())
    return unpack_fits({key: tensor.to(_device()) for key, tensor in tensors.items()})[name]


def _device() -> torch.device:
    """Return where tensors have to be to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
