from __future__ import annotations

import pytest
import tiny
import torch

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.evaluation import evaluate


@pytest.mark.parametrize("seqlen", [16, 17])
def test_windows_longer_than_the_model_was_made_for_are_told(seqlen, caplog):
    model = tiny.model(max_position_embeddings=16)
    config = ParoConfig(
        group_size=32, calibration=CalibrationConfig(steps=1, seqlen=seqlen, samples=2, clip_ratios=(1.0,))
    )
    parofx.quantize(model, config, calibration=["a text of some words " * 20], tokenizer=tiny.tokenizer())
    evaluate(model, torch.randint(3, 10, (1, seqlen)))
    told = [record.getMessage() for record in caplog.records if "max_position_embeddings" in record.getMessage()]
    assert len(told) == (2 if seqlen > 16 else 0)
