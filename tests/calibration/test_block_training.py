"""Block-wise training on one small block: its forward, its gradients, its stages, and what is kept of it."""

from __future__ import annotations

import dataclasses

import graphs
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import parofx
from parofx import affine, precision, rotation
from parofx.calibration.block_fitting import quantized_weights, train_block
from parofx.calibration.block_student import Student, TrainedTransform, differentiable_qparams
from parofx.calibration.block_training import BlockData, BlockTrainer, counting_outputs
from parofx.calibration.fitting import FittedTransform, fit
from parofx.calibration.progress import BlockProgress
from parofx.calibration.row_masks import RowMask
from parofx.calibration.shares import Shares, shares_of
from parofx.calibration.statistics import InputStatistics
from parofx.calibration.stream import BlockStream
from parofx.config import CalibrationConfig, ParoConfig
from parofx.pairing import make_pairs
from parofx.passes.transforms import Transform, find_transforms
from parofx.report import StageReport

G, K = 32, 64
BATCHES = 4


def skewed(*shape: int, seed: int = 0) -> Tensor:
    return graphs.rows(*shape, seed=seed) * torch.linspace(-1, 1, shape[-1]).mul(2).exp()


def settings(**options: object) -> CalibrationConfig:
    chosen = {"steps": 10, "transform_epochs": 2, "weight_epochs": 2, "tune_epochs": 3, "autocast": False}
    chosen |= {"transform_learning_rate": 0.01}
    return CalibrationConfig(**(chosen | options))


class Block:
    """A block of three linears, PREPARED, with its data and with what was fitted for each transform for itself."""

    def __init__(self, config: CalibrationConfig, *, held_out: int = 3) -> None:
        batches = [{"arg0": skewed(24, K, seed=seed)} for seed in range(BATCHES)]
        gm = parofx.capture(graphs.Stack(1).eval(), batches[0]["arg0"])
        self.gm = parofx.prepare(gm, ParoConfig(krot=3, group_size=G, calibration=config))
        stream = BlockStream(self.gm, batches)
        self.transforms = find_transforms(self.gm)
        segment = next(one for one in stream.segments if stream.transforms_of(one))
        for before in stream.segments[: stream.segments.index(segment)]:
            list(stream.run(before, lambda name, rows, _: None))
        arguments = [stream.arguments(segment, border) for border in stream.borders]
        self.module = stream.module(segment)
        found = {one.name: InputStatistics(one.linears[0].weight.shape[1], G, full=True) for one in self.transforms}
        outputs = list(stream.run(segment, lambda name, rows, _: found[name].update(rows)))
        self.statistics = {name: (one, None) for name, one in found.items()}
        targets = [counting_outputs(self.module, one, {}) for one in outputs]
        self.data = BlockData(arguments, targets, stream.masks, held_out, shares_of(gm, batches, cut=True))
        self.fits = {one.name: self.fit(one, config) for one in self.transforms}

    def fit(self, transform: Transform, config: CalibrationConfig) -> FittedTransform:
        weights = [linear.weight for linear in transform.linears]
        statistics = self.statistics[transform.name][0]
        return fit(weights, statistics, bits=[4] * len(weights), group_size=G, krot=3, config=config)

    def trained(self, *, start: bool = True) -> list[TrainedTransform]:
        return [
            TrainedTransform(
                self.fits[one.name].pairs,
                self.fits[one.name].theta if start else torch.zeros_like(self.fits[one.name].theta),
                self.fits[one.name].channel_scales if start else torch.ones_like(self.fits[one.name].channel_scales),
                {linear.name: linear.weight for linear in one.linears},
                bits={linear.name: linear.bits for linear in one.linears},
                group_size=G,
            )
            for one in self.transforms
        ]

    def train(self, config: CalibrationConfig) -> tuple[dict[str, FittedTransform], list[StageReport]]:
        stages: list[StageReport] = []
        with BlockProgress(self.transforms, enabled=False) as progress:
            arguments = (self.module, self.transforms, self.fits, self.statistics, self.data, config, stages, progress)
            found = train_block(*arguments)
        return found, stages


@pytest.fixture(scope="module")
def block() -> Block:
    return Block(settings())


def one_transform(dtype: torch.dtype = torch.float32) -> TrainedTransform:
    pairs = make_pairs(K, G, 2, seed=0)
    weight = graphs.rows(8, K, seed=3)
    transform = TrainedTransform(
        pairs, 0.3 * graphs.rows(2, K // 2), torch.ones(1, K), {"w": weight}, bits={"w": 4}, group_size=G
    )
    transform.theta, transform.log_alpha = transform.theta.to(dtype), (0.2 * graphs.rows(K, seed=5)).to(dtype)
    return transform


def test_the_effective_weight_is_the_quantized_one_in_the_unrotated_space() -> None:
    transform = one_transform()
    found = transform.effective_weights()["w"]
    alpha = transform.log_alpha.exp()
    rotated = rotation.rotate(transform.weights["w"], transform.pairs, transform.theta, alpha, G)
    rounded = affine.fake_quantize(rotated, *differentiable_qparams(rotated, 4, G), 4, G)
    expected = rotation.inverse_rotate(rounded, transform.pairs, transform.theta, alpha, G)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ranges_are_those_of_the_quantizer() -> None:
    weight = graphs.rows(8, K)
    weight[0, :G] = weight[0, :G].abs() + 1  # a group of one sign
    scales, zeros = differentiable_qparams(weight, 4, G)
    expected = affine.choose_qparams(weight, 4, G)
    torch.testing.assert_close(scales, expected[0], rtol=1e-3, atol=0)
    assert (zeros.round() - expected[1]).abs().max() <= 1


@pytest.mark.parametrize("tensor", ["theta", "log_alpha"])
def test_gradients_are_those_of_finite_differences(tensor: str) -> None:
    """At 8 bit rounding is a small ripple on a smooth function, so straight-through gradients are near the slopes."""
    transform = one_transform(torch.float64)
    transform.bits = 8
    transform.weights = {"w": transform.weights["w"].double()}
    probe = graphs.rows(8, K, seed=9).double()
    value = getattr(transform, tensor).requires_grad_(True)

    def scaled_scales() -> Tensor:
        # The scales follow the range, through which all gradients of the transform flow.
        matrix = rotation.dense_form(transform.pairs, transform.theta, G)
        rotated = transform._blocks(transform.weights["w"] * transform.log_alpha.exp(), matrix)
        scales, zeros = differentiable_qparams(rotated, 8, G)
        return (scales * probe[:, : K // G]).sum() + 0.01 * (zeros * probe[:, : K // G]).sum()

    (found,) = torch.autograd.grad(scaled_scales(), value)
    direction = graphs.rows(*value.shape, seed=11).double()
    step = 1e-6
    with torch.no_grad():
        value += step * direction
        up = scaled_scales()
        value -= 2 * step * direction
        down = scaled_scales()
    assert float((found * direction).sum()) == pytest.approx(float((up - down) / (2 * step)), rel=1e-4)


def test_float_weights_give_the_float_blocks_output(block: Block) -> None:
    weights = {linear.name: linear.weight for one in block.transforms for linear in one.linears}
    for given, target in zip(block.data.arguments, block.data.targets, strict=True):
        for chosen in (weights, {}):
            (output,) = counting_outputs(block.module, Student(block.module, chosen).run(*given), {})
            torch.testing.assert_close(output, target[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["relative", "smooth_l1"])
def test_each_stage_lowers_the_loss_and_none_raises_it(block: Block, loss: str) -> None:
    config = settings(
        block_loss=loss, transform_epochs=4, transform_learning_rate=0.02, weight_epochs=6, weight_learning_rate=2e-4
    )
    trainer = BlockTrainer(block.module, block.trained(start=False), block.data, config)
    first = trainer.train_transforms()
    assert first.improved
    assert trainer.loss(trainer.present_weights()) == pytest.approx(first.after, rel=0.05)  # rounded to fp16
    second = trainer.train_weights()
    assert second.improved
    assert trainer.loss(trainer.present_weights()) == pytest.approx(second.after, rel=1e-5)
    assert "of 4" in first.kept


def test_a_stage_that_finds_nothing_keeps_its_start_and_says_so(block: Block) -> None:
    trained = block.trained()
    before = [one.theta.clone() for one in trained]
    config = settings(transform_learning_rate=9.0)
    report = BlockTrainer(block.module, trained, block.data, config).train_transforms()
    assert not report.improved
    assert report.after == report.before
    assert str(report).endswith("(epoch 0 of 2): no improvement")
    assert all(torch.equal(one.theta, theta) for one, theta in zip(trained, before, strict=True))


def test_dummy_pairs_are_never_trained() -> None:
    block = Block(settings(pairs="greedy"))
    trained = block.trained(start=False)
    for one in trained:
        one.pairs = one.pairs[:1].repeat(3, 1)  # rounds two and three repeat the pairs of the first
    BlockTrainer(block.module, trained, block.data, settings()).train_transforms()
    for one in trained:
        assert one.theta[0].any()
        assert not one.theta[1:].any()


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_a_block_ends_no_worse_than_its_parts(block: Block, rounding: str) -> None:
    found, stages = block.train(settings(rounding=rounding, weight_learning_rate=1e-3))
    assert [stage.name for stage in stages] == ["transforms", "weights", "rounding", "tune"]
    assert stages[-2].after == stages[-1].before
    trainer = BlockTrainer(block.module, [], block.data, settings())
    start, end = (trainer.loss(quantized_weights(block.transforms, fits)) for fits in (block.fits, found))
    assert end <= start
    assert stages[-2].before == pytest.approx(start)
    assert stages[-1].after == pytest.approx(end)
    for fitted in found.values():
        for scales, zeros in fitted.grids:
            assert torch.equal(scales, scales.half().float())
            assert torch.equal(zeros, zeros.round().clamp(0, 15))
        assert (fitted.theta.dtype, fitted.channel_scales.dtype) == (torch.float16, torch.float16)


def test_what_training_cannot_better_is_kept(block: Block) -> None:
    rates = {"weight_learning_rate": 1e-9, "tune_learning_rate": 9.0}
    found, stages = block.train(settings(transform_epochs=0, weight_epochs=1, rounding="nearest", **rates))
    assert [stage.kept for stage in stages[-2:]] == ["as fitted for itself", "as rounded"]
    assert not any(stage.improved for stage in stages[-2:])
    assert all(torch.equal(found[name].theta, block.fits[name].theta) for name in found)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_tuning_keeps_the_codes_and_lowers_the_loss(rounding: str) -> None:
    config = settings(
        rounding=rounding, transform_epochs=0, weight_epochs=0, tune_epochs=6, tune_learning_rate=3e-3, steps=3
    )
    block = Block(config, held_out=BATCHES)
    found, stages = block.train(config)
    assert [stage.name for stage in stages] == ["rounding", "tune"]
    assert stages[-1].improved
    trainer = BlockTrainer(block.module, [], block.data, config)
    assert trainer.loss(quantized_weights(block.transforms, found)) == pytest.approx(stages[-1].after)
    for one in block.transforms:
        before, after = block.fits[one.name], found[one.name]
        assert not torch.equal(before.grids[0][0], after.grids[0][0])
        if stages[0].kept == "as fitted for itself" and before.codes is not None:
            assert all(torch.equal(*pair) for pair in zip(before.codes, after.codes, strict=True))


def test_errors_are_against_the_float_weights() -> None:
    config = settings(weight_learning_rate=1e-3)
    block = Block(config)
    found, _ = block.train(config)
    for one in block.transforms:
        fitted = found[one.name]
        gram = block.statistics[one.name][0].gram.double()
        for index, linear in enumerate(one.linears):
            error = (quantized_weights(block.transforms, found)[linear.name] - linear.weight).double()
            weight = linear.weight.double()
            expected = ((error @ gram) * error).sum() / ((weight @ gram) * weight).sum()
            assert fitted.errors[index] == pytest.approx(float(expected), rel=1e-2)


def test_without_held_out_batches_all_are_compared_on(block: Block) -> None:
    data = dataclasses.replace(block.data, held_out=BATCHES)
    assert list(data.training()) == list(data.validation()) == list(range(BATCHES))
    assert list(block.data.validation()) == [3]


def test_rows_that_are_masked_out_do_not_count(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(24, dtype=torch.bool)
    mask[5:] = False
    for node in block.module.graph.output_node().all_input_nodes:
        monkeypatch.setitem(node.meta, "parofx_row_mask", RowMask("rows", transposed=False))
    weights = quantized_weights(block.transforms, block.fits)
    output = torch.cat([block.data.targets[0][0][:5], torch.full((19, K), 1e6)])
    (target,) = counting_outputs(block.module, output, {"rows": mask})
    assert torch.equal(target, output[:5])
    shares = Shares([{}] * BATCHES, list(range(BATCHES)), BATCHES, BATCHES)
    targets = [[one[:5] for one in targets] for targets in block.data.targets]
    data = BlockData(block.data.arguments, targets, [{"rows": mask}] * BATCHES, 0, shares)
    cut = BlockData(
        [[one[:5] if len(one) == 24 else one for one in given] for given in block.data.arguments],
        targets, [{"rows": mask[:5]}] * BATCHES, 0, shares,
    )  # fmt: skip
    losses = [BlockTrainer(block.module, [], one, settings()).loss(weights) for one in (data, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_autocast_trains_in_bf16(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether this CPU is fast at them or not.
    monkeypatch.setattr(precision, "multiplies_16_bit", lambda *_: True)
    weights = quantized_weights(block.transforms, block.fits)
    exact, fast = (
        BlockTrainer(block.module, [], block.data, settings(autocast=autocast)).loss(weights)
        for autocast in (False, True)
    )
    assert exact != fast
    assert fast == pytest.approx(exact, rel=0.2)


def test_the_graph_is_left_alone(block: Block) -> None:
    assert isinstance(block.gm, GraphModule)
    assert all(one.linears[0].grid(block.gm)[0].numel() == 0 for one in block.transforms)
