from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
import torch.nn.functional as F
from graphs import DOORS, Model
from torch import Tensor, nn

from parofx.passes import InsertTransforms
from parofx.passes.norm_power import norm_power
from parofx.passes.transforms import find_transforms

K = 64
#: Rows of a standard normal input that are averaged, and how far the mean of squares may be off.
ROWS, STATISTICAL = 4096, 0.2


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


FOUND: dict[str, Any] = {
    "layer_norm": lambda m, x: F.layer_norm(x, (K,), m.gain, m.shift),
    "layer_norm without shift": lambda m, x: F.layer_norm(x, (K,), weight=m.gain),
    "rms_norm": lambda m, x: F.rms_norm(x, (K,), m.gain),
    "llama": lambda m, x: m.gain * rms(x.float()).to(x.dtype),
    "gain behind": lambda m, x: rms(x) * m.gain,
    "gemma": lambda m, x: (rms(x.float()) * (1.0 + m.gain.float())).type_as(x),
    "division": lambda m, x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.gain,
    "power": lambda m, x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5) * m.gain,
    "reshaped": lambda m, x: F.rms_norm(x, (K,), m.gain).view(-1, 2, K).contiguous(),
    "gain on a bare norm": lambda m, x: F.layer_norm(x, (K,)) * m.gain,
}
REFUSED: dict[str, Any] = {
    "no norm": lambda m, x: x,
    "layer scale": lambda m, x: torch.tanh(x) * m.gain,
    "a gain on a sum": lambda m, x: (x + rms(x)) * m.gain,
    "an activation as gain": lambda m, x: rms(x) * torch.tanh(x),
    "a residual behind": lambda m, x: F.rms_norm(x, (K,), m.gain) + x,
    "a norm without gain": lambda m, x: F.layer_norm(x, (K,)),
    "heads": lambda m, x: (rms(x.view(-1, 2, K // 2)) * m.gain[: K // 2]).view(-1, K),
    "scalar": lambda m, x: rms(x) * 2.0,
}


def power_of(door: str, forward: Any) -> Tensor | None:
    def whole(m: Any, x: Tensor) -> Tensor:
        return m.linear(forward(m, x))

    gain, shift = nn.Parameter(0.5 + torch.rand(K)), graphs.vector(K)
    model = Model(whole, gain=gain, shift=shift, linear=graphs.linear(K, K)).eval()
    captured = graphs.enter(door, model, graphs.rows(4, K))
    InsertTransforms(graphs.config()).run(captured.gm)
    (transform,) = find_transforms(captured.gm)
    found = norm_power(transform.inputs[0])
    if found is not None:
        values = forward(model, graphs.rows(ROWS, K)).detach().reshape(-1, K)
        measured = values.square().mean(0)
        assert found.shape == (K,)
        assert found.dtype == torch.float32
        assert ((found - measured).abs() / measured.clamp(min=0.05)).max() < STATISTICAL
    return found


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FOUND)
def test_the_gain_of_a_norm_gives_the_mean_squares(door: str, form: str) -> None:
    assert power_of(door, FOUND[form]) is not None


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", REFUSED)
def test_anything_else_says_nothing(door: str, form: str) -> None:
    assert power_of(door, REFUSED[form]) is None
