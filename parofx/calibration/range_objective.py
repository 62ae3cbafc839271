"""The range objective: fit a rotation and channel scales so that rounding costs least.

Rounding with step `s` has the expected squared error `s²/12` per weight, whatever the weight. With channel scales α,
`H = E[x xᵀ]` and the step `s_{g,n} = (max − min)/(2^bits − 1)` of group g of output channel n, after scaling and
rotation, the expected squared error of the output is

    L(θ, α) = Σ_g S_g·T_g / 12,    S_g = Σ_n s²_{g,n},    T_g = tr_g(D⁻¹ H D⁻¹) = Σ_{k∈g} E[x_k²]/α_k²,    D = diag(α).

A rotation keeps a trace, so θ has to shrink ranges only; α trades ranges against activation energy. Nothing but the
diagonal of H is needed: no model forward, no straight-through rounding. Each group has its own angles and scales and
appears in one summand, so the groups are independent problems solved side by side: `Σ_g log L_g` is minimised, whose
gradient does not depend on the scale of weights or activations, and every group keeps the better of its two states.

That is for rounding to nearest; for rounding with error feedback another `T_g` stands in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parofx.affine import quant_max
from parofx.calibration.activation_energy import ActivationEnergy, DiagonalEnergy
from parofx.calibration.dense_rounds import DenseRounds
from parofx.calibration.guess_power import guess_power
from parofx.config import CalibrationConfig
from parofx.errors import DataError, ShapeError
from parofx.pairing import make_pairs, trainable_angles
from parofx.precision import product_precision

#: Bound of |log2 α|, with a margin to fp16's normal numbers, 2^-14 to 2^15.
LARGEST_LOG2_ALPHA = 13.0
#: α's free factor per group is 1 where the root mean square of the steps then lies in here, else it moves them in:
#: steps are stored in fp16, and single rows have smaller and larger ones.
STEP_RANGE = (2.0**-11, 2.0**9)

#: Steps for which a costly gradient of the energy serves: it changes slowly.
_ENERGY_STEPS = 2
#: Elements of a rotated weight held at a time when the loss of all rows is computed.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TransformFit:
    """A fitted transform, in the checkpoint's dtypes, and what it is expected to cost.

    Attributes:
        pairs: int16 `(krot, K)`.
        theta: fp16 `(krot, K/2)`, radians.
        channel_scales: fp16 `(1, K)`, 1/α.
        loss_before: expected squared output error over expected squared output, without rotation and scales.
        loss_after: the same with these tensors, on all output channels; never above `loss_before`.
        improved: whether any group got better than its start.
    """

    pairs: Tensor
    theta: Tensor
    channel_scales: Tensor
    loss_before: float
    loss_after: float
    improved: bool


@product_precision("exact")
def fit_transform(
    weights: Sequence[Tensor],
    power: Tensor | None,
    *,
    bits: int,
    group_size: int,
    krot: int,
    config: CalibrationConfig,
    seed: int,
    energy: ActivationEnergy | None = None,
) -> TransformFit:
    """Fit one transform for linears that share it.

    Args:
        weights: matrices `(N_i, K)` of the siblings, any floating dtype; fitting runs on their device.
        power: `E[x²]` per input channel, `(K,)`; None takes `guess_power`.
        bits: width of a weight.
        group_size: channels per group.
        krot: rotation rounds; with 0 only scales are fitted.
        config: `steps`, `learning_rate`, `rows` and `pairs` are used.
        seed: of pairs and sampled rows.
        energy: what a step costs, on the weights' device; None is that of rounding to nearest, with `power`.

    Raises:
        ShapeError: if the weights or `power` do not fit together.
        DataError: if a weight or `power` is not finite, or `power` is negative.
    """
    weight, peak = _joined_rows(weights)
    in_features = weight.shape[1]
    pairs = make_pairs(in_features, group_size, krot, method=config.pairs, seed=seed).to(weight.device)
    power = guess_power(weight) if power is None else _checked_power(power, in_features).to(weight.device)
    energy = energy or DiagonalEnergy(power, group_size)
    objective = RangeObjective(weight, energy, pairs, bits=bits, group_size=group_size)
    start = weight.new_zeros(krot, in_features // 2), weight.new_zeros(in_features)
    fitted = _minimise(objective, *start, config, seed) if config.steps else start
    theta_0, scales_0 = _rounded(objective, *start, peak)
    theta_1, scales_1 = _rounded(objective, *fitted, peak)
    before = objective.losses(theta_0.float(), scales_0.float().log().neg())
    after = objective.losses(theta_1.float(), scales_1.float().log().neg())
    better = after < before
    theta = torch.where(better.repeat_interleave(group_size // 2), theta_1, theta_0)
    scales = torch.where(better.repeat_interleave(group_size), scales_1, scales_0)
    output = _output_energy(weight, energy.power)
    return TransformFit(
        pairs=pairs,
        theta=theta,
        channel_scales=scales[None],
        loss_before=before.sum().item() / output,
        loss_after=torch.minimum(before, after).sum().item() / output,
        improved=bool(better.any()),
    )


class RangeObjective:
    """The objective for fixed weights, activation power and pairs.

    Args:
        weight: fp32 `(N, K)`, of magnitude about 1.
        energy: what a step costs.
        pairs: int16 `(krot, K)`.
        bits: width of a weight.
        group_size: channels per group.
    """

    def __init__(self, weight: Tensor, energy: ActivationEnergy, pairs: Tensor, *, bits: int, group_size: int) -> None:
        self.weight = weight
        self.group_size = group_size
        self.trainable = trainable_angles(pairs, group_size)
        self.rounds = DenseRounds(pairs, group_size)
        self.quant_max = quant_max(bits)
        # As large as the sampled rows, and kept between steps: fresh pages would cost more than the arithmetic.
        self._buffers = (weight.new_empty(0), weight.new_empty(0))
        self._energy = energy
        self._of_energy: tuple[Tensor | None, Tensor] | None = None

    def gradients(
        self, theta: Tensor, log_alpha: Tensor, rows: slice, *, lagging: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `Σ_g log L_g` on some output channels: `(krot, K/2)` for θ and `(K,)` for log α.

        `lagging` takes those of `log T_g` from the last call, if they are costly.
        """
        alpha = log_alpha.exp().view(-1, 1, self.group_size)
        matrices = self.rounds.forward(theta)
        scaled = matrices * alpha  # [groups, out, in]
        columns = self._columns(self.weight[rows])
        shape = (*scaled.shape[:2], columns.shape[2])
        if self._buffers[0].shape != shape:
            self._buffers = (scaled.new_empty(shape), scaled.new_empty(shape))
        rotated = torch.bmm(scaled, columns, out=self._buffers[0])  # [groups, out, rows]
        high, low = _extremes(rotated)
        span = high - low
        slope = 2 * span / span.square().sum(2, keepdim=True).clamp(min=1e-30)
        # d log S_g / d rotated is non-zero at the extremes of each row only.
        at_extremes = torch.eq(rotated, high, out=self._buffers[1]).sub_(rotated.eq_(low)).mul_(slope)
        grad_scaled = torch.bmm(at_extremes, columns.transpose(1, 2))
        if self._of_energy is None or not (lagging and self._energy.is_costly):
            self._of_energy = self._energy.gradients(matrices, alpha)
        from_energy, of_energy = self._of_energy
        grad_log_alpha = (grad_scaled * scaled).sum(1) + of_energy
        grad = grad_scaled * alpha
        if from_energy is not None:
            grad += from_energy
        return self.rounds.backward(grad) * self.trainable, grad_log_alpha.view(-1)

    def losses(self, theta: Tensor, log_alpha: Tensor) -> Tensor:
        """Return `L_g (K/g,)` in fp64 on all output channels."""
        squared_steps = self.squared_steps(theta, log_alpha)
        alpha = log_alpha.exp().view(-1, 1, self.group_size)
        return squared_steps * self._energy.totals(self.rounds.forward(theta), alpha) / 12

    def squared_steps(self, theta: Tensor, log_alpha: Tensor) -> Tensor:
        """Return `S_g (K/g,)` in fp64 on all output channels."""
        scaled = self.rounds.forward(theta) * log_alpha.exp().view(-1, 1, self.group_size)
        total = torch.zeros(len(scaled), dtype=torch.float64, device=scaled.device)
        step = max(1, _CHUNK_ELEMENTS // self.weight.shape[1])
        for first in range(0, len(self.weight), step):
            high, low = _extremes(torch.bmm(scaled, self._columns(self.weight[first : first + step])))
            total += (high - low).square().sum((1, 2))
        return total / self.quant_max**2

    def _columns(self, rows: Tensor) -> Tensor:
        """View weight rows `(R, K)` as `(K/g, g, R)`."""
        return rows.view(len(rows), -1, self.group_size).permute(1, 2, 0)


def _output_energy(weight: Tensor, power: Tensor) -> float:
    """Return `Σ_n E[y_n²]` of uncorrelated inputs, `Σ_{n,k} w²_{n,k} E[x_k²]`; 1 if it is 0."""
    squares = weight.square().sum(0).double().view_as(power)
    return (squares * power).sum().item() or 1.0


def _extremes(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of each row's range `(groups, 1, rows)`; the quantizer's range holds zero."""
    return rotated.amax(1, keepdim=True).clamp_(min=0), rotated.amin(1, keepdim=True).clamp_(max=0)


def _minimise(
    objective: RangeObjective, theta: Tensor, log_alpha: Tensor, config: CalibrationConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the state after `config.steps` of AdamW over equal slices of the shuffled output channels."""
    count = len(objective.weight)
    slices = math.ceil(count / config.rows)
    size = count // slices
    if slices > 1:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        objective.weight = objective.weight[order.to(objective.weight.device)]
    theta, log_alpha = theta.clone(), log_alpha.clone()
    optimizer = torch.optim.AdamW(
        [theta, log_alpha], lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
    )
    for step in range(config.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * (0.05 + 0.95 * cosine)
        rows = slice(step % slices * size, (step % slices + 1) * size)
        lagging = step % _ENERGY_STEPS > 0
        theta.grad, log_alpha.grad = objective.gradients(theta, log_alpha, rows, lagging=lagging)
        optimizer.step()
    return theta, log_alpha


def _rounded(objective: RangeObjective, theta: Tensor, log_alpha: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """Return `theta` and `1/α (K,)` in fp16; `peak` times the objective's weights are the real ones."""
    theta = theta.half()
    grouped = log_alpha.view(-1, objective.group_size)
    grouped = grouped - grouped.mean(1, keepdim=True)
    squared = objective.squared_steps(theta.float(), grouped.flatten()) / len(objective.weight)
    step = squared.sqrt() * peak
    low, high = STEP_RANGE
    gauge = torch.where(step > 0, step.clamp(low, high).log() - step.log(), 0.0).float()
    bound = LARGEST_LOG2_ALPHA * math.log(2)
    grouped = (grouped + gauge[:, None]).clamp(-bound, bound)
    return theta, grouped.flatten().neg().exp().half()


def _joined_rows(weights: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return the rows of all weights in fp32, divided by the largest magnitude, and that magnitude."""
    shapes = [tuple(weight.shape) for weight in weights]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] or 0 in shape for shape in shapes):
        raise ShapeError(f"siblings' weights must be matrices (N_i, K) of one K, got {shapes or 'none'}")
    joined = torch.cat([weight.detach().float() for weight in weights])
    peak = joined.abs().amax().item()
    if not math.isfinite(peak):
        raise DataError("weights must be finite, got NaN or infinity; check the checkpoint they came from")
    if peak == 0:
        return joined, 1.0
    return joined / peak, peak


def _checked_power(power: Tensor, in_features: int) -> Tensor:
    """Return the power in fp32 with a largest entry of 1."""
    if tuple(power.shape) != (in_features,):
        raise ShapeError(f"power must be ({in_features},) to fit the weights, got {tuple(power.shape)}")
    peak = power.abs().amax().item()
    if not math.isfinite(peak) or bool((power < 0).any()):
        raise DataError("power must be finite and not negative; check the calibration inputs for NaN and infinity")
    return power.float() if peak == 0 else (power.double() / peak).float()
