"""The optimizer of block-wise training and of distillation: AdamW with a cosine schedule, the best epoch kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parofx.calibration.processes import sum_gradients, take_from_first, together

#: Steps of the optimizer: (tensors, learning rate) groups.
Groups = Sequence[tuple[Sequence[Tensor], float]]


@dataclass(frozen=True)
class Descent:
    """What training gave: the loss on held-out data before it and at the best epoch, 0 for the start."""

    before: float
    after: float
    epoch: int


def descend(
    groups: Groups,
    backward: Callable[[int], None],
    judge: Callable[[], float],
    *,
    batches: int,
    epochs: int,
    seed: int,
    angles: Iterable[tuple[Tensor, Tensor]],
    decay: float,
    finished: Callable[[int, float, float], None] | None = None,
) -> Descent:
    """Train the tensors of `groups` in place; they end in the best state found, which may be the one they began in.

    Several processes make the same steps, by the sums of their gradients.

    Args:
        groups: what is trained, and how fast.
        backward: adds the gradients of a batch, by its index; of several processes each its own part of them.
        judge: returns the loss on held-out data as things are, the same in every process.
        batches: how many there are.
        epochs: passes over them; the rate falls to a twentieth.
        seed: of their order.
        angles: tensors of angles, and which of them are of real pairs.
        decay: of weights.
        finished: told the epoch, the loss before the first, and the loss behind it.
    """
    groups = [([one for one in group if one.numel()], rate) for group, rate in groups]
    tensors = [tensor for group, _ in groups for tensor in group]
    before = best = judge()
    kept, best_epoch = [tensor.detach().clone() for tensor in tensors], 0
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in groups], betas=(0.9, 0.95), eps=1e-10, weight_decay=decay
    )
    order = torch.Generator().manual_seed(seed)
    steps = max(1, epochs * batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    masks = list(angles)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(batches, generator=order).tolist():
            optimizer.zero_grad()
            with together(), torch.enable_grad():
                backward(batch)
            sum_gradients(tensors)
            for theta, trainable in masks:
                if theta.grad is not None:
                    theta.grad.mul_(trainable)
            optimizer.step()
            schedule.step()
        now = judge()
        if now < best:
            best, best_epoch = now, epoch
            kept = [tensor.detach().clone() for tensor in tensors]
        if finished is not None:
            finished(epoch, before, now)
    with torch.no_grad():
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
    take_from_first(tensors)
    return Descent(before, best, best_epoch)
