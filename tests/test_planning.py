import copy
import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from graphs import Layer, Stack
from safetensors import safe_open

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration.progress import BlockProgress
from parofx.errors import CheckpointError, ConfigError, DataError
from parofx.models import load_skeleton

FAST = CalibrationConfig(steps=2, seqlen=16, samples=4, batch_size=2)


def tokens(rows: int = 4, length: int = 16) -> torch.Tensor:
    return torch.randint(3, len(tiny.WORDS), (rows, length), generator=torch.Generator().manual_seed(0))


def stored_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (not a mapping)
    return total


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (ParoConfig(calibration=FAST), {}),
        (ParoConfig(krot=2, group_size=32, modules_to_not_convert=("*.mlp.*",), calibration=FAST), {}),
        (ParoConfig(lm_head=4, calibration=FAST), {"vocab_size": 24, "tie_word_embeddings": True}),
        (ParoConfig(share_siblings=False, calibration=FAST), {"attention_bias": True, "intermediate_size": 100}),
    ],
    ids=["plain", "excluded", "tied head", "biases and a width that stays float"],
)
@pytest.mark.parametrize("with_data", [True, False])
def test_the_plan_says_what_the_run_does(tmp_path, config, options, with_data):
    model = tiny.model(**options)
    before = copy.deepcopy(model.state_dict())
    calibration = tokens() if with_data else None
    plan = parofx.plan_quantization(model, config, calibration=calibration)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    report = parofx.quantize(model, config, calibration=calibration, progress=False)
    assert [one.name for one in plan.linears] == [one.name for one in report.linears]
    for planned, one in zip(plan.linears, report.linears, strict=True):
        assert all(getattr(one, name) == value for name, value in vars(planned).items())
    assert plan.transforms == len(report.transforms)
    assert plan.blocks == len({one.block for one in report.transforms})
    assert plan.bits_per_weight == report.bits_per_weight
    assert plan.reasons() == report.reasons()
    assert {one.name for one in plan.kept_float} == {one.name for one in report.kept_float}
    assert (plan.sequences, plan.tokens) == ((4, 64) if with_data else (0, 0))
    assert plan.steps == 2 * plan.transforms
    parofx.save_pretrained(model, tmp_path / "saved")
    assert plan.checkpoint_bytes == stored_bytes(tmp_path / "saved")


def test_a_budget_bounds_what_is_stored(tmp_path):
    config = ParoConfig(group_size=32, krot=2, calibration=dataclasses.replace(FAST, bits_budget=7.0))
    model = tiny.model()
    plan = parofx.plan_quantization(model, config)
    report = parofx.quantize(model, config, progress=False)
    least, most = (
        8 * stored / sum(one.in_features * one.out_features for one in plan.linears) for stored in plan.budget_bytes
    )
    assert least < report.bits_per_weight <= plan.bits_per_weight == most <= 7.0
    parofx.save_pretrained(model, tmp_path / "saved")
    assert stored_bytes(tmp_path / "saved") <= plan.checkpoint_bytes
    small = dataclasses.replace(config, calibration=dataclasses.replace(FAST, bits_budget=1.0))
    with pytest.raises(ConfigError, match="bits_budget must be at least"):
        parofx.plan_quantization(tiny.model(), small)


def peak_bytes(work) -> int:
    """Return how far the CPU allocator's total rose while `work` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounding": "nearest"},
        {"transform_epochs": 1, "weight_epochs": 1, "tune_epochs": 1},
        {"distill_epochs": 1},
        {"gradient_samples": 3, "sweeps": 0},
        {"lm_head": 4},
    ],
    ids=["feedback", "nearest", "trained", "distilled", "gradients", "head"],
)
def test_memory_and_disk_are_bounds(tmp_path, options):
    head = {name: options[name] for name in options if name == "lm_head"}
    options = {name: options[name] for name in options if name not in head}
    calibration = CalibrationConfig(
        **({"steps": 2, "seqlen": 64, "samples": 8, "batch_size": 4, "work_dir": str(tmp_path / "work")} | options)
    )
    config = ParoConfig(calibration=calibration, **head)
    model = tiny.model(hidden_size=256, intermediate_size=512, **({"vocab_size": 4096} if head else {}))
    data = tokens(8, 64)
    plan = parofx.plan_quantization(model, config, calibration=data)
    peak = peak_bytes(lambda: parofx.quantize(model, config, calibration=data, progress=False))
    assert 0 < peak <= plan.peak_memory_bytes - plan.memory["model"]
    files = list((tmp_path / "work").iterdir())
    # Tensors; each file has a header besides.
    assert sum(path.stat().st_size for path in files) <= plan.disk_bytes + 8192 * len(files)
    assert plan.seconds > 0


def test_any_module_and_any_inputs():
    model = Stack(3)
    batches = [torch.randn(2, 5, 64), torch.randn(3, 7, 64), torch.randn(2, 5, 64)]
    plan = parofx.plan_quantization(model, ParoConfig(calibration=FAST), calibration=batches)
    assert (plan.transforms, plan.blocks, plan.sequences) == (6, 3, 5)  # the first two batches hold the samples
    single = parofx.plan_quantization(Layer(0), ParoConfig(calibration=FAST), example_inputs=torch.randn(2, 5, 64))
    assert (single.transforms, single.sequences) == (2, 0)
    assert single.memory["borders"] == single.memory["statistics"] == 0


@pytest.mark.parametrize(("rows", "batch_size"), [(7, 3), (13, 8), (1, 8)])
def test_distillation_makes_the_steps_that_the_plan_says(rows, batch_size, monkeypatch):
    calibration = CalibrationConfig(
        recipe="best", steps=0, sweeps=0, damping=(0.1,), clip_ratios=(1.0,), distill_epochs=1,
        batch_size=batch_size, validation_samples=4,
    )  # fmt: skip
    config, data, made = ParoConfig(group_size=32, krot=0, calibration=calibration), torch.randn(rows, 3, 64), []
    monkeypatch.setattr(BlockProgress, "stepped", lambda self: made.append(1))
    plan = parofx.plan_quantization(Stack(1).eval(), config, calibration=data)
    parofx.quantize(Stack(1).eval(), config, calibration=data, progress=False)
    assert plan.steps == len(made) > 0


def test_trained_blocks_count_their_steps():
    config = ParoConfig(
        calibration=CalibrationConfig(
            recipe="best", steps=5, seqlen=16, batch_size=2, validation_samples=2, weight_epochs=4, tune_epochs=3
        )
    )
    plan = parofx.plan_quantization(tiny.model(), config, calibration=tokens(8))
    assert plan.steps == 5 * 2 * 7 + 2 * (4 + 3) * 3 + 3 * 3
    assert plan.memory["training"] > 0
    assert plan.memory["distillation"] > 0


def test_processes_share_what_a_run_takes(monkeypatch):
    calibration = dataclasses.replace(FAST, transform_epochs=2, distill_epochs=1, work_dir="work")
    config, plans = ParoConfig(calibration=calibration), []
    for processes in (1, 2):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda count=processes: count)
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        plans.append(parofx.plan_quantization(tiny.model(), config, calibration=tokens(8)))
    one, two = plans
    assert (one.processes, two.processes) == (1, 2)
    assert one.steps == two.steps > 0
    assert one.memory["model"] == two.memory["model"]
    # Positions and masks cross a border whatever a process has of a batch.
    assert 0.5 * one.memory["borders"] <= two.memory["borders"] < 0.7 * one.memory["borders"]
    assert one.disk_bytes <= two.disk_bytes < 1.4 * one.disk_bytes
    monkeypatch.setattr(dist, "get_world_size", lambda: 9)
    with pytest.raises(DataError, match="a batch for each process, got 2 for 9"):
        parofx.plan_quantization(tiny.model(), config, calibration=tokens(4))


def test_self_needs_no_text(tmp_path):
    tiny.save(tmp_path)
    skeleton, tokenizer = load_skeleton(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    plan = parofx.plan_quantization(skeleton, ParoConfig(calibration=FAST), calibration="self", tokenizer=tokenizer)
    assert (plan.sequences, plan.tokens, len(plan.linears)) == (4, 64, 14)
    assert plan.to_dict()["peak_memory_bytes"] == plan.peak_memory_bytes


def test_what_quantize_refuses_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config must be a ParoConfig"):
        parofx.plan_quantization(tiny.model(), {"bits": 4})
    with pytest.raises(DataError, match="text needs a tokenizer"):
        parofx.plan_quantization(tiny.model(), calibration=["the sea"])


def test_a_skeleton_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="could not read the configuration of"):
        load_skeleton(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "paroquant"}}')
    with pytest.raises(CheckpointError, match="is a PARO checkpoint: expected a float model"):
        load_skeleton(tmp_path)
