"""Several processes on their shares of the data, against one process on all of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import graphs
import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import parofx
from parofx import CalibrationConfig, ParoConfig
from parofx.calibration import processes as processes_module
from parofx.calibration.store import CalibrationStore
from parofx.cli.processes import joined
from parofx.errors import ConfigError, DataError

#: One process: its place among how many, the file they meet at, its output folder.
PROCESS = """
import logging, sys, torch.distributed as dist
from pathlib import Path
from test_processes import CASES, interrupt, quantized
from safetensors.torch import save_file
place, count, meeting, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=place, world_size=count)
for name in CASES:
    save_file(quantized(name, progress=True), folder / f"{name}-{place}.safetensors")
logging.basicConfig(level="INFO")
interrupt("smooth", folder / "work", place)
save_file(quantized("smooth", work_dir=str(folder / "work")), folder / f"resumed-{place}.safetensors")
dist.destroy_process_group()
"""
FAST = CalibrationConfig(steps=3, seqlen=16, samples=6, batch_size=1, validation_samples=2, damping=(0.03, 0.1, 0.3))
TRAINED = replace(
    FAST, autocast=False, transform_epochs=2, tune_epochs=2, distill_epochs=2, transform_learning_rate=1e-3
)


def data() -> torch.Tensor:
    return torch.randint(3, len(tiny.WORDS), (6, 16), generator=torch.Generator().manual_seed(0))


def padded() -> list[dict[str, torch.Tensor]]:
    """Return batches of three sequences: two processes have unequal parts of each, and unequally many tokens.

    There are enough tokens for codes to be well determined: else rounding amplifies the order of sums.
    """
    ids = torch.randint(3, 512, (6, 64), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(64) < torch.tensor([64, 17, 33, 64, 9, 41])[:, None]).long()
    return [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(0, 3), slice(3, 6))]


def rows() -> list[torch.Tensor]:
    """Return batches of two, of three, and of one sequence, of which one process has nothing."""
    return [graphs.rows(count, 4, 64, seed=count) for count in (2, 3, 1, 2)]


#: Name → the model, how it is quantized, the data.
CASES = {
    "feedback": (tiny.model, ParoConfig(calibration=FAST), data),
    # One of the processes gets one batch more, and none of them has all held-out ones.
    "nearest": (
        tiny.model,
        ParoConfig(group_size=32, calibration=CalibrationConfig(steps=3, samples=5, batch_size=1, rounding="nearest")),
        data,
    ),
    # Of three sequences one process has two.
    "outputs": (
        partial(tiny.model, vocab_size=512),
        ParoConfig(group_size=32, krot=2, calibration=replace(FAST, gradient_samples=3)),
        padded,
    ),
    "budget": (tiny.model, ParoConfig(group_size=32, krot=2, calibration=replace(FAST, bits_budget=6.0)), data),
    "trained": (
        partial(tiny.model, vocab_size=512), ParoConfig(bits=3, group_size=32, krot=2, calibration=TRAINED), padded
    ),
    "smooth": (
        lambda: graphs.Stack(2).eval(),
        ParoConfig(
            group_size=32, krot=2,
            calibration=replace(TRAINED, weight_epochs=2, rounding="nearest", block_loss="smooth_l1", samples=8),
        ),
        rows,
    ),
}  # fmt: skip


def quantized(name: str, *, progress: bool = False, work_dir: str | None = None) -> dict[str, torch.Tensor]:
    """Quantize a case; return the linears' tensors, and what the report says of them and of training."""
    make, config, given = CASES[name]
    config = replace(config, calibration=replace(config.calibration, work_dir=work_dir))
    model = make()
    report = parofx.quantize(model, config, calibration=given(), progress=progress)
    tensors = {
        f"{name}.{key}": tensor.contiguous().clone()
        for name, module in model.named_modules()
        if isinstance(module, parofx.ParoLinear)
        for key, tensor in module.checkpoint_tensors().items()
    }
    errors = [one.relative_error for one in report.linears] + [one.loss_after for one in report.transforms]
    errors += [loss for block in report.blocks for stage in block.stages for loss in (stage.before, stage.after)]
    return tensors | {"report": torch.tensor(errors, dtype=torch.float64)}


def interrupt(name: str, folder: Path, place: int) -> None:
    """Begin a case in a work folder; it ends where the first process has written a border and the second has not."""
    with pytest.MonkeyPatch.context() as patch:
        save = CalibrationStore.save_borders

        def fail(store: CalibrationStore, index: int, borders: list) -> None:
            if (index, place) == (1, 1):
                raise OSError("no space left")
            save(store, index, borders)

        patch.setattr(CalibrationStore, "save_borders", fail)
        with pytest.raises(
            OSError if place else DataError, match="no space left" if place else "process 1: OSError: no space"
        ):
            quantized(name, work_dir=str(folder))


def start(code: str, *arguments: object) -> subprocess.Popen:
    here = Path(__file__).parent
    paths = [here.parents[1], here.parent, here]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_find_what_one_does(tmp_path):
    processes = [start(PROCESS, place, 2, tmp_path / "meeting", tmp_path) for place in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "calibrate" in outputs[0]
    assert "calibrate" not in outputs[1].split("INFO:")[0], "only the first process shows progress"
    for name in CASES:
        expected = quantized(name)
        first, second = (load_file(tmp_path / f"{name}-{place}.safetensors") for place in range(2))
        assert first.keys() == second.keys() == expected.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        for key, tensor in expected.items():
            if tensor.is_floating_point():
                # Sums in another order may move a value to the neighbouring fp16 number.
                torch.testing.assert_close(first[key], tensor, rtol=2e-3, atol=2e-3)
            else:
                assert int((first[key] != tensor).sum()) <= 0.01 * tensor.numel(), key
        # Losses of training among them; sums of rounded rows are the same but for their order.
        torch.testing.assert_close(first["report"], expected["report"], rtol=1e-3, atol=0.0)
    for place, output in enumerate(outputs):
        resumed, smooth = (load_file(tmp_path / f"{name}-{place}.safetensors") for name in ("resumed", "smooth"))
        assert all(torch.equal(resumed[key], smooth[key]) for key in smooth), "goes on to the same bits"
        assert "resuming calibration after 1 of" in output
    assert {path.name for path in (tmp_path / "work").glob("border*")} == {
        f"border-001-{place}.safetensors" for place in range(2)
    }


#: As PROCESS: with what only one process fails in, with two different models, and with neither.
FAILING = """
import sys, torch, torch.distributed as dist, parofx, pytest
from datetime import timedelta
from parofx.calibration import processes
from parofx.calibration.statistics import InputStatistics
from test_processes import FAST
place, count, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=place, world_size=count, timeout=timedelta(seconds=60)
)
class Square(torch.nn.Module):
    def forward(self, x):
        return x * x
def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(128, 64), Square(), torch.nn.Linear(64, 64)).eval()
def quantize(data, seed=0):
    config = parofx.ParoConfig(calibration=FAST)
    return parofx.quantize(model(seed), config, calibration=data, progress=False).linears[0].relative_error
fine = torch.randn(6, 4, 128, generator=torch.Generator().manual_seed(0))
large = fine.clone()
large[3, 0] = 1e30  # finite, but not its square
def unread():
    yield fine[:1]
    raise OSError("no such text")
def exhausted(*arguments, **options):
    raise MemoryError("no room")
def unpacked():
    with pytest.MonkeyPatch.context() as patch:
        if place == 1:
            patch.setattr(parofx.packing, "pack_linear", exhausted)
        quantize(list(fine.split(1)))
def exchanged(collective, *arguments):
    with processes.together():
        collective(*arguments)
# Each fails where one process makes ready what is then sent or summed.
statistics = InputStatistics(32, 32)
if place == 1:
    statistics.to_tensors = exhausted
gradients = [torch.ones(2), torch.ones(2, device="meta" if place == 1 else "cpu")]
for name, work in {
    "large": lambda: quantize(list(large.split(1))),
    "models": lambda: quantize(list(fine.split(1)), place),
    "text": lambda: quantize(unread() if place == 1 else list(fine.split(1))),
    "packed": unpacked,
    "sums": lambda: exchanged(processes.fit_together, ["one"], {"one": [statistics]}, exhausted),
    "fits": lambda: exchanged(processes.each_by_one, ["one"], lambda name: object()),
    "gradients": lambda: exchanged(processes.sum_tensors, gradients),
    "fine": lambda: quantize(list(fine.split(1))),
}.items():
    try:
        print(name, work())
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()))
dist.destroy_process_group()
"""
#: The cases of FAILING in which one process fails: which, and how.
FAILURES = {
    "large": (1, "DataError: the input of"), "text": (1, "OSError: no such text"),
    "packed": (1, "MemoryError: no room"), "sums": (1, "MemoryError: no room"),
    "fits": (0, "AttributeError: "), "gradients": (1, "RuntimeError: "),
}  # fmt: skip


def test_where_one_fails_all_fail_and_go_on_together(tmp_path):
    processes = [start(FAILING, place, 2, tmp_path / "meeting") for place in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    told = [dict(line.split(" ", 1) for line in output.splitlines() if " " in line) for output in outputs]
    for name, (victim, what) in FAILURES.items():
        assert told[victim][name].startswith(what.replace(":", "", 1)), name
        stopped = f"DataError calibration stopped, it failed in - process {victim}: {what}"
        assert told[1 - victim][name].startswith(stopped), name
    for one in told:
        assert "must quantize one model with the same options" in one["models"]
    assert told[0]["fine"] == told[1]["fine"]
    assert 0 < float(told[0]["fine"]) < 0.1


def test_a_failure_is_told_whatever_its_message_holds(monkeypatch):
    monkeypatch.setattr(processes_module, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(dist, "all_gather", lambda found, own: found[0].copy_(own))
    # As names of files do that are no UTF-8.
    assert processes_module._gather("!OSError: \udcff") == ["!OSError: \\udcff"]


def test_a_world_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 but RANK, .* start several processes with torchrun"),
        joined("cpu"),
    ):
        pass


@pytest.fixture
def claimed(monkeypatch):
    """Say that there are two processes; nothing is sent, the other says the same."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(processes_module, "_gather", lambda message: [message, message])


def test_each_process_needs_a_batch(claimed):
    config = ParoConfig(calibration=CalibrationConfig(samples=6, batch_size=6))
    with pytest.raises(DataError, match=r"a batch for each process, got 1 for 2 processes: .* smaller batches"):
        parofx.quantize(tiny.model(), config, calibration=data(), progress=False)


def test_the_command_under_torchrun_writes_once(tmp_path):
    tiny.save(tmp_path / "float")
    (tmp_path / "notes.txt").write_text(tiny.TEXT * 60)
    code = "import runpy, sys; sys.argv[0] = 'torchrun'; runpy.run_module('torch.distributed.run', run_name='__main__')"
    options = ["--samples", 4, "--batch-size", 1, "--seqlen", 16, "--steps", 1, "--calibration", tmp_path / "notes.txt"]
    launch = ["--standalone", "--nproc-per-node", 2, "-m", "parofx", "quantize"]
    process = start(code, *launch, tmp_path / "float", "-o", tmp_path / "paro", *options)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert output.count("quantized 14 linears") == 1
    assert json.loads((tmp_path / "paro" / "config.json").read_text())["quantization_config"]["krot"] == 8
