"""Models in 16 bits on CPUs that are slow at their products: calibration multiplies in fp32 and finds the same."""

from __future__ import annotations

import graphs
import pytest
import torch

import parofx
from parofx import CalibrationConfig, ParoConfig, precision
from parofx.calibration import segment

#: One recipe for each kind of run through segments: recorded, probed for gradients, trained in blocks, distilled.
RUNS = {
    "moments": {},
    "formats": {"bits_budget": 6.5},
    "blocks": {"transform_epochs": 1, "weight_epochs": 1, "tune_epochs": 1},
    "distilled": {"distill_epochs": 1},
}


def quantized(dtype: torch.dtype, **options: object) -> parofx.QuantizationReport:
    calibration = CalibrationConfig(steps=4, validation_samples=2, clip_ratios=(1.0,), sweeps=1, **options)
    config = ParoConfig(group_size=32, krot=4, calibration=calibration)
    batches = [graphs.rows(2, 8, 64, seed=seed).to(dtype) for seed in range(4)]
    return parofx.quantize(graphs.Stack(2).eval().to(dtype), config, calibration=batches, progress=False)


@pytest.mark.parametrize("named", [False, True])
def test_attention_of_a_segment_is_not_emulated(named, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: False)
    graph = torch.fx.Graph()
    *inputs, mask = map(graph.placeholder, ("query", "key", "value", "mask"))
    given, options = (inputs, {"attn_mask": mask}) if named else ([*inputs, mask], {})
    graph.output(graph.call_function(precision.ATTENTION, tuple(given), options))
    values = [torch.randn(1, 2, 5, 16).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    seen = []
    true_attention = precision.ATTENTION

    def watched(*given, **options):
        seen.append([one.dtype for one in given[:3]])
        return true_attention(*given, **options)

    monkeypatch.setattr(precision, "ATTENTION", watched)
    run = segment.SegmentInterpreter(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert run.run(*values, mask).dtype == torch.bfloat16
    assert seen == [[torch.float32] * 3]


@pytest.mark.parametrize(
    ("run", "dtype"), [*((run, torch.bfloat16) for run in RUNS), *((run, torch.float16) for run in RUNS)], ids=str
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
    # Linears see what the model computes in, and nothing asks for narrower products on the way; a model in fp16 is
    # trained with bf16 ones all the same.
    trained_in_bf16 = run in ("blocks", "distilled") and dtype == torch.float16
    assert any(narrowed for _, narrowed in seen) == trained_in_bf16
    assert dtype in {kind for kind, _ in seen}
    assert trained_in_bf16 or len({kind for kind, _ in seen}) == 1
    for one, other in zip(result.blocks, expected.blocks, strict=True):
        for stage, like in zip(one.stages, other.stages, strict=True):
            assert stage.after == pytest.approx(like.after, rel=0.2)
    for one, other in zip(result.linears, expected.linears, strict=True):
        assert one.name == other.name
        assert one.relative_error == pytest.approx(other.relative_error, rel=0.2)
