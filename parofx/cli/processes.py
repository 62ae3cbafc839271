"""The command line under `torchrun`: several processes that calibrate together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from parofx.errors import ConfigError


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Join the processes that `torchrun` started, if it did; yield whether this one prints and writes files.

    Nothing limits how long they wait for one another: a large transform is fitted by one of them.

    Args:
        device: CUDA devices speak over NCCL, others over gloo.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield True
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} not set: start several processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
