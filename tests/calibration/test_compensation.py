from __future__ import annotations

import dataclasses

import graphs
import pytest
import torch
from test_fitting import G, inputs, statistics, weights

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration.compensation import fit_corrections, low_rank
from parofx.calibration.feedback import RoundedWeight
from parofx.calibration.fitting import fit, rotate_weight
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.store import pack_fit, unpack_fits
from parofx.errors import ConfigError

BITS = [4, 3]


def config(rank: int = 4, **options) -> CalibrationConfig:
    return CalibrationConfig(**({"steps": 10, "clip_ratios": (1.0, 0.9), "compensation_rank": rank} | options))


def corrected(observed: InputStatistics | None, rank: int = 4, **options):
    plain = fit(weights(), observed, bits=BITS, group_size=G, krot=2, config=config(rank, **options))
    return plain, fit_corrections(plain, weights(), observed, None, bits=BITS, config=config(rank, **options))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_is_the_best_of_its_rank(rank):
    """The error that is left is that of the singular values left out (Eckart and Young), in the inputs' metric."""
    error = graphs.rows(24, 16)
    gram = torch.cov(graphs.rows(16, 64, seed=1)) + 0.1 * torch.eye(16)
    factor = torch.linalg.cholesky(gram)
    up, down = low_rank(error, factor, rank, seed=0)
    assert (up.dtype, down.dtype, up.shape, down.shape) == (torch.float16, torch.float16, (24, rank), (rank, 16))
    left = (error - up.float() @ down.float()) @ factor
    values = torch.linalg.svdvals(error @ factor)
    assert float(left.square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=5e-3)


def test_a_rank_above_the_shape_gives_everything_back():
    error = 1e-3 * graphs.rows(6, 16)
    up, down = low_rank(error, torch.eye(16), 40, seed=0)
    assert (up.shape, down.shape) == ((6, 6), (6, 16))
    torch.testing.assert_close(up.float() @ down.float(), error, rtol=0, atol=1e-5)


def test_without_an_error_there_is_nothing_to_correct():
    up, down = low_rank(torch.zeros(6, 16), torch.eye(16), 2, seed=0)
    assert torch.equal(up.float() @ down.float(), torch.zeros(6, 16))
    assert up.isfinite().all()
    assert down.isfinite().all()


@pytest.mark.parametrize(
    "observed", [None, statistics(), statistics(full=True)], ids=["weights alone", "nearest", "feedback"]
)
def test_errors_fall_and_are_those_of_the_outputs(observed):
    plain, result = corrected(observed)
    assert result.uncorrected_errors == plain.errors
    assert result.nearest_errors == plain.nearest_errors
    assert sum(result.errors) < 0.9 * sum(plain.errors)
    x = inputs() if observed is not None and observed.full else None
    parts = (result.pairs, result.theta, result.channel_scales)
    for index, weight in enumerate(weights()):
        up, down = (half.float() for half in result.corrections[index])
        found = RoundedWeight(result.codes[index], *result.grids[index]).dequantized() + up @ down
        error = found - rotate_weight(weight, *parts, G)
        if x is None and observed is None:
            expected = float(error.square().sum() / rotate_weight(weight, *parts, G).square().sum())
            assert result.errors[index] == pytest.approx(expected, rel=1e-3)
        elif x is not None:
            rotated = parofx.ops.rotate(x, parts[0], parts[1].float(), parts[2].float(), G)
            expected = float((rotated @ error.t()).square().sum() / (x @ weight.t()).square().sum())
            assert result.errors[index] == pytest.approx(expected, rel=0.03)


def test_a_higher_rank_leaves_less():
    errors = [sum(corrected(statistics(full=True), rank)[1].errors) for rank in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)


def test_it_survives_being_stored():
    for observed in (None, statistics(full=True)):
        _, result = corrected(observed)
        restored = unpack_fits(pack_fit("name", result))["name"]
        assert restored.errors == result.errors
        assert restored.uncorrected_errors == result.uncorrected_errors
        assert restored.nearest_errors == result.nearest_errors
        assert restored.damping == result.damping
        for found, expected in zip(restored.corrections, result.corrections, strict=True):
            assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, restored.codes, result.codes))


@pytest.mark.parametrize("with_data", [True, False])
def test_a_quantized_model_has_corrections(tmp_path, with_data):
    model = graphs.Stack(2).eval()
    x = graphs.rows(64, 64)
    expected = model(x).detach()
    options = ParoConfig(group_size=64, krot=2, calibration=config(4))
    plan = parofx.plan_quantization(model, options, example_inputs=x)
    plain = graphs.Stack(2).eval()
    plain.load_state_dict(model.state_dict())
    calibration = [x] if with_data else None
    without = dataclasses.replace(options, calibration=config(0))
    parofx.quantize(plain, without, calibration=calibration, example_inputs=x, progress=False)
    report = parofx.quantize(model, options, calibration=calibration, example_inputs=x, progress=False)
    assert all(one.uncorrected_error > one.relative_error for one in report.linears)
    assert report.bits_per_weight == plan.bits_per_weight
    assert all(module.compensation_rank == 4 for module in model.modules() if isinstance(module, parofx.ParoLinear))
    with torch.no_grad():
        errors = [float((one(x) - expected).square().sum()) for one in (model, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_recipes_that_train_are_refused():
    with pytest.raises(ConfigError, match="compensation_rank must be 0 in a recipe that trains, got 4"):
        CalibrationConfig(recipe="best", compensation_rank=4)
