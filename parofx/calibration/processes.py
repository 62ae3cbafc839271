"""Calibration by several processes of `torch.distributed`: what they tell each other, and what they sum.

Statistics, losses and gradients are sums over sequences, so those of all processes together are those of one process
that ran everything. What one of them fitted is sent to all, as the bytes of a safetensors file. So every process ends
with the same model.

A process that fails says so where it would have met the others next, and all of them fail: none waits for what never
comes, or takes what belongs to another run. For that they meet right before whatever they sum or send: what may fail,
such as making room for it, comes before.
"""

from __future__ import annotations

import json
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
from parofx.errors import ConfigError, DataError, one_per_line

_Item = TypeVar("_Item")

#: What a message begins with: of a process that goes on, and of one that failed.
_FINE, _FAILED = "=", "!"
#: Marks an error that the other processes know of.
_TOLD = "_parofx_told"
#: Elements that are summed or sent at a time.
_BUCKET = 1 << 22


def process_count() -> int:
    """Return how many processes work together; 1 where `torch.distributed` is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return which of them this one is; process 0 shows progress and writes files."""
    return dist.get_rank() if process_count() > 1 else 0


def share_of(items: Sequence[_Item]) -> list[_Item]:
    """Return this process's share of `items`."""
    return list(items[process_index() :: process_count()])


@contextmanager
def together() -> Iterator[None]:
    """Do a part of the work that every process does a share of; where it fails in one, it fails in all.

    Such parts may lie in one another.

    Raises:
        DataError: that names the process which failed, in the others.
    """
    try:
        yield
    except BaseException as error:
        if process_count() > 1 and not hasattr(error, _TOLD):
            setattr(error, _TOLD, True)
            _gather(f"{_FAILED}{type(error).__name__}: {error}")
        raise
    tell()


def tell(message: str = "") -> list[str]:
    """Return what each process tells, in their order.

    Raises:
        DataError: if one of them failed instead.
    """
    if process_count() == 1:
        return [message]
    told = _gather(_FINE + message)
    failed = [f"process {place}: {one[1:]}" for place, one in enumerate(told) if one.startswith(_FAILED)]
    if failed:
        error = DataError(f"calibration stopped, it failed in\n{one_per_line(failed)}")
        setattr(error, _TOLD, True)
        raise error
    return [one[1:] for one in told]


def check_alike(digest: str) -> None:
    """Refuse to sum what belongs to different models, options or data.

    Args:
        digest: of all that must be the same in every process.

    Raises:
        ConfigError: if it is not.
    """
    if len(set(tell(digest))) > 1:
        raise ConfigError(
            f"the {process_count()} processes of torch.distributed must quantize one model with the same options and "
            "data, and got different ones; call quantize alike in all of them, or before init_process_group"
        )


def total(own: float) -> float:
    """Return the sum of a number over all processes, the same in each."""
    return sum(map(float, tell(repr(float(own)))))


def totals(own: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Return sums over all processes of numbers by place; a process may have some of the places, with all numbers."""
    found: dict[int, list[float]] = {}
    for message in tell(json.dumps(dict(own))):
        for place, numbers in json.loads(message).items():
            known = found.get(int(place), [0.0] * len(numbers))
            found[int(place)] = [one + other for one, other in zip(known, numbers, strict=True)]
    return found


def sum_gradients(tensors: Sequence[Tensor]) -> None:
    """Sum the gradients of tensors, the same in every process, over all; a process may have none."""
    if process_count() == 1:
        return
    for tensor in tensors:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    sum_tensors([tensor.grad for tensor in tensors if tensor.grad is not None])


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Sum tensors of one dtype, in place, over all processes."""
    _exchange(tensors, dist.all_reduce)


def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Give tensors of one dtype the values that they have in the first process."""
    _exchange(tensors, lambda joined: dist.broadcast(joined, 0))


def _exchange(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run a collective on tensors, in place, many small ones at a time."""
    if process_count() == 1:
        return
    buckets: list[list[Tensor]] = []
    for tensor in tensors:
        if not buckets or sum(one.numel() for one in buckets[-1]) + tensor.numel() > _BUCKET:
            buckets.append([])
        buckets[-1].append(tensor)
    for bucket in buckets:
        joined = torch.cat([one.detach().flatten() for one in bucket]).to(_device())
        tell()
        collective(joined)
        for one, part in zip(bucket, torch.split(joined, [one.numel() for one in bucket]), strict=True):
            one.detach().copy_(part.view_as(one))


def _gather(message: str) -> list[str]:
    """Return the message of each process."""
    own = torch.frombuffer(bytearray(message.encode(errors="backslashreplace")), dtype=torch.uint8).to(_device())
    size = torch.tensor([len(own)], device=_device())
    sizes = [torch.empty_like(size) for _ in range(process_count())]
    dist.all_gather(sizes, size)
    padded = torch.nn.functional.pad(own, (0, max(map(int, sizes)) - len(own)))
    told = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(told, padded)
    return [bytes(one[: int(count)].tolist()).decode() for one, count in zip(told, sizes, strict=True)]


def fit_together(
    names: Sequence[str],
    statistics: Mapping[str, Sequence[InputStatistics | None]],
    fit: Callable[[str], FittedTransform],
) -> dict[str, FittedTransform]:
    """Fit transforms on the statistics of all processes, each by one process; all return all results.

    Args:
        names: the transforms, the same in every process.
        statistics: of each, this process's; afterwards those of all.
        fit: fits one of them on its statistics.
    """
    if process_count() > 1:
        for name in names:
            for one in filter(None, statistics[name]):
                _sum(one)
    return each_by_one(names, fit)


def each_by_one(names: Sequence[str], work: Callable[[str], FittedTransform]) -> dict[str, FittedTransform]:
    """Do the work for each name in one of the processes; all return all results."""
    processes, here = process_count(), process_index()
    owners = {name: index % processes for index, name in enumerate(names)}
    with together():
        found = {name: work(name) for name in names if owners[name] == here}
    return {name: _sent(owners[name], name, found.get(name)) for name in names} if processes > 1 else found


def _sum(statistics: InputStatistics) -> None:
    """Sum statistics over all processes."""
    state = {name: one.to(_device()) for name, one in statistics.to_tensors().items()}
    tell()
    for name in ("count", "sums"):
        dist.all_reduce(state[name])
    statistics.replace(state)


def _sent(owner: int, name: str, fitted: FittedTransform | None) -> FittedTransform:
    """Return what the owner holds."""
    payload = torch.empty(0, dtype=torch.uint8)
    if fitted is not None:
        tensors = {key: one.cpu().contiguous() for key, one in pack_fit(name, fitted).items()}
        payload = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
    size = int(tell(str(payload.numel()))[owner])
    received: Tensor = payload.to(_device()) if fitted is not None else payload.new_empty(size, device=_device())
    tell()
    dist.broadcast(received, owner)
    if fitted is not None:
        return fitted
    tensors = load(received.cpu().numpy().tobytes())
    return unpack_fits({key: tensor.to(_device()) for key, tensor in tensors.items()})[name]


def _device() -> torch.device:
    """Return where tensors have to be to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
