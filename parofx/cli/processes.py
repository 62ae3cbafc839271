"""The command line under `torchrun`: several processes that calibrate together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Join the processes that `torchrun` started, if it did; yield whether this one prints and writes files.

    Args:
        device: CUDA devices speak over NCCL, others over gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
