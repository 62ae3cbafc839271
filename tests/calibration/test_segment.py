"""Models in 16 bits on CPUs that are slow at their products: calibration multiplies in fp32 and finds the same."""

from __future__ import annotations

import pytest
import tiny
import torch

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration import precision, segment

TOKENS = torch.randint(0, tiny.VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
#: One recipe for each kind of run through segments: recorded, probed for gradients, trained in blocks, distilled.
RUNS = {
    "moments": {},
    "formats": {"bits_budget": 6.5},
    "blocks": {"transform_epochs": 1, "weight_epochs": 1, "tune_epochs": 1},
    "distilled": {"distill_epochs": 1},
}


def quantized(dtype: torch.dtype, **options: object) -> parofx.QuantizationReport:
    calibration = CalibrationConfig(
        steps=4, samples=8, seqlen=16, validation_samples=2, batch_size=2, clip_ratios=(1.0,), sweeps=1, **options
    )
    config = ParoConfig(group_size=32, krot=4, calibration=calibration)
    return parofx.quantize(tiny.model().to(dtype), config, calibration=TOKENS, progress=False)


@pytest.mark.parametrize(
    ("run", "dtype"), [*((run, torch.bfloat16) for run in RUNS), ("moments", torch.float16)], ids=str
)
def test_no_16_bit_product_is_emulated(run, dtype, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: True)
    expected = quantized(dtype, **RUNS[run])
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: False)
    seen: list[tuple[torch.dtype, bool]] = []

    def watched(x, *others):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return precision.linear(x, *others)

    monkeypatch.setattr(segment, "linear", watched)
    result = quantized(dtype, **RUNS[run])
    # Linears see what the model computes in, and nothing asks for narrower products on the way.
    assert {kind for kind, _ in seen} == {dtype}
    assert not any(narrowed for _, narrowed in seen)
    for one, other in zip(result.linears, expected.linears, strict=True):
        assert one.name == other.name
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.2)
