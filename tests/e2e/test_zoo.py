"""Every stage of every architecture against the one before and against an independent fp64 forward."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fp64 import cast, reference_model, relative_error, run
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, ZooModel

import parofx
from parofx import CalibrationConfig, ParoConfig, ParoLinear, QuantizationReport
from parofx.passes import census, stage_of
from parofx.passes.capture import complete_inputs
from parofx.passes.transforms import find_transforms

pytestmark = pytest.mark.e2e

#: PREPARED against FLOAT: the rotation and its inverse are fp32, a few roundings a layer.
REWRITE = 1e-5
#: fp32 stages against each other and against fp64.
FP32 = 1e-4
#: Stages in bf16, which has 8 bits.
BF16 = 1e-2
#: Where the float model in bf16 is that far from fp64 itself: Gemma 3 scales its embeddings and norms by large numbers.
BF16_OF = {"gemma3": 1.5e-2}
#: Tokens so near a tie of their router that bf16 may send them to another expert; the rest must agree as everywhere.
REROUTED = {"mixtral": 1}

CONFIG = ParoConfig(calibration=CalibrationConfig(steps=3))


@dataclass
class Case:
    name: str
    spec: ZooModel
    model: nn.Module
    quantized: nn.Module
    report: QuantizationReport
    inputs: dict[str, Any]


@pytest.fixture(scope="module", params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    spec = ZOO[request.param]
    model = spec.build()
    inputs = complete_inputs(model, spec.inputs())
    quantized = copy.deepcopy(model)
    report = parofx.quantize(quantized, CONFIG, calibration=[spec.inputs()], progress=False)
    return Case(request.param, spec, model, quantized, report, inputs)


def test_report_counts(case):
    assert len(case.report.linears) == case.spec.quantized
    assert len(case.report.transforms) == case.spec.transforms
    assert {reason.name: count for reason, count in case.report.reasons().items()} == case.spec.kept
    assert {linear.group_size for linear in case.report.linears} == {case.spec.group_size}
    assert [record["pass"] for record in case.report.passes] == [
        "insert_transforms",
        "allocate_bits",
        "calibrate",
        "convert",
    ]


def test_every_linear_is_quantized_or_listed(case):
    kept = {one.name for one in case.report.kept_float}
    # A tied weight is one unit, listed under one of its names.
    kept_weights = {id(_weight(case.model, name)) for name in kept}
    quantized = set()
    for name, module in case.model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            replaced = isinstance(case.quantized.get_submodule(name), ParoLinear)
            assert replaced != (id(module.weight) in kept_weights), name
            quantized |= {name} if replaced else set()
    assert quantized == {linear.name for linear in case.report.linears}
    stacks = {name for name, parameter in case.model.named_parameters() if parameter.dim() == 3 and "expert" in name}
    assert stacks <= kept


def test_transforms_are_the_linears_that_read_one_tensor(case):
    """What shares a transform is found from the tensors that eager execution hands to each module."""
    block = {linear.name: linear.block for linear in case.report.linears}
    readers, alive = defaultdict(list), []

    def note(name: str, x: Tensor) -> None:
        alive.append(x)  # else its address could come again
        readers[block[name], x.data_ptr(), x.shape, x.stride()].append(name)

    hooks = [
        case.model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: note(name, args[0]))
        for name in block
    ]
    run(case.model, case.inputs)
    for hook in hooks:
        hook.remove()
    sets = {frozenset(names) for names in readers.values()}
    assert sets == {frozenset(transform.members) for transform in case.report.transforms}


def test_eager_is_the_fp64_forward(case):
    expected = run(reference_model(case.model, case.quantized), cast(case.inputs, torch.float64))
    assert relative_error(run(case.quantized, case.inputs), expected) < FP32
    assert relative_error(run(case.model, case.inputs), expected) > 10 * FP32, "the comparison would prove nothing"


def test_stages_keep_the_output(case):
    config = CONFIG
    gm = parofx.capture(case.model, case.inputs)
    expected = run(case.model, case.inputs)
    assert stage_of(gm) == "FLOAT"
    assert relative_error(run(gm, case.inputs), expected) < REWRITE

    parofx.prepare(gm, config)
    _randomize(gm)
    prepared = census(gm)
    assert stage_of(gm) == "PREPARED"
    assert relative_error(run(gm, case.inputs), expected) < REWRITE

    parofx.calibrate(gm, [case.inputs], config)
    assert stage_of(gm) == "CALIBRATED"
    assert census(gm) == prepared
    calibrated = run(gm, case.inputs)
    # The same data, options and seed: what `quantize` made.
    reference = run(reference_model(case.model, case.quantized), cast(case.inputs, torch.float64))
    assert relative_error(calibrated, reference) < FP32

    parofx.convert(gm)
    assert stage_of(gm) == "CONVERTED"
    converted = run(gm, case.inputs)
    assert relative_error(converted, calibrated) < FP32
    assert census(gm)["parofx.int4_linear.default"] >= case.spec.quantized
    assert not any("fake_quantize" in name for name in census(gm))

    parofx.lower(gm)
    assert stage_of(gm) == "LOWERED"
    lowered = run(gm, case.inputs)
    assert relative_error(lowered, converted) < FP32
    assert relative_error(lowered, reference) < FP32
    assert not any(name.startswith("parofx.") and "siblings" not in name for name in census(gm))


def test_bfloat16_lowers_from_the_quantized_model(case):
    dtype = torch.bfloat16
    inputs, wide = cast(case.inputs, dtype), cast(cast(case.inputs, dtype), torch.float64)
    tolerance = BF16_OF.get(case.name, BF16)
    reference = run(reference_model(case.model, case.quantized, dtype), wide)
    quantized = copy.deepcopy(case.quantized).to(dtype)

    def error(found: Tensor, expected: Tensor) -> float:
        found, expected = found.flatten(0, -2), expected.flatten(0, -2)
        by_token = (found.double() - expected.double()).norm(dim=-1)
        counted = by_token.argsort()[: len(by_token) - REROUTED.get(case.name, 0)]
        return relative_error(found[counted], expected[counted])

    assert error(run(quantized, inputs), reference) < tolerance

    gm = parofx.capture(quantized, inputs)
    assert stage_of(gm) == "CONVERTED"
    converted = run(gm, inputs)
    assert error(converted, reference) < tolerance
    parofx.lower(gm)
    lowered = run(gm, inputs)
    assert error(lowered, reference) < tolerance
    assert error(lowered, converted) < tolerance


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """Return the weight that a report's name stands for: a module's or, of a stack of experts, its own."""
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    return found if isinstance(found, nn.Parameter) else found.weight


def _randomize(gm: torch.fx.GraphModule) -> None:
    generator = torch.Generator().manual_seed(7)
    for transform in find_transforms(gm):
        pairs, theta, channel_scales = transform.parameters(gm)
        random_scales = 0.5 + torch.rand(channel_scales.shape, generator=generator)
        transform.set_parameters(gm, pairs, torch.randn(theta.shape, generator=generator), random_scales)
