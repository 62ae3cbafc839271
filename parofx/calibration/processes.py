"""Calibration by several processes of `torch.distributed`: each runs its share of the batches and of the fits.

Process r of n takes the batches r, r + n, …. Statistics are sums over batches, so those of all processes together are
those of one process that ran everything. They are summed on the process that fits the transform; what it found is sent
to all, as the bytes of a safetensors file. So every process ends with the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from parofx.calibration.fitting import FittedTransform
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.store import pack_fit, unpack_fits
from parofx.config import CalibrationConfig
from parofx.errors import ConfigError, DataError

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
        ConfigError: if the recipe trains blocks, or there is a `work_dir`.
    """
    processes = process_count()
    if processes == 1:
        return
    if batches < processes:
        raise DataError(
            f"calibration must hold a batch for each process, got {batches} for {processes} processes: give more "
            f"sequences, a batch_size below {config.batch_size}, or start fewer processes"
        )
    if config.trains_blocks:
        raise ConfigError(
            f"recipes that train blocks run in one process, got recipe {config.recipe!r} in {processes} processes; "
            "use recipe='fast', or start one process"
        )
    if config.work_dir is not None:
        raise ConfigError(f"work_dir is for a run in one process, got {processes} processes; leave it out")


def share_of(items: Sequence[_Item]) -> list[_Item]:
    """Return this process's share of `items`."""
    return list(items[process_index() :: process_count()])


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
