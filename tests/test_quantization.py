import copy
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from fp64 import cast, reference_model, relative_error, run
from graphs import Stack, rows
from torch import nn
from torch.nn.functional import linear

import parofx
from parofx import CalibrationConfig, FloatReason, ParoConfig, affine
from parofx.errors import CaptureError, ConfigError, DataError
from parofx.passes.calibrate import Calibrate
from parofx.passes.convert import Convert

FAST = CalibrationConfig(steps=2, seqlen=16, samples=4, batch_size=2)
CONFIG = ParoConfig(calibration=FAST)
#: Takes every row that a test gives.
ALL_ROWS = ParoConfig(calibration=CalibrationConfig(steps=2))


class Net(nn.Module):
    """Two siblings, a linear behind them, and one that no input reaches."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.left = nn.Linear(width, 128)
        self.right = nn.Linear(width, 128, bias=False)
        self.down = nn.Linear(128, 32)
        self.unused = nn.Linear(width, width)

    def forward(self, x):
        return self.down(torch.relu(self.left(x)) * self.right(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for weight in (model.left.weight, model.right.weight, model.down.weight):
            weight *= torch.randn(weight.shape[1]).exp()  # outlier channels, which a transform can even out
    return model


def inputs(rows: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def quantize(model: nn.Module, config: ParoConfig = CONFIG, **options) -> parofx.QuantizationReport:
    return parofx.quantize(model, config, progress=False, **options)


def tokens(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, len(tiny.WORDS), (rows, length), generator=torch.Generator().manual_seed(seed))


def same(model: nn.Module, other: nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- atomic ---------------------------------------------------------------------------------------------------------


def raise_at_call(monkeypatch, owner, name: str, nth: int, error: BaseException) -> None:
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def mark_quantized_owner():
    import parofx.integrations.transformers as integration

    return integration


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (lambda: Calibrate, "fit", 3),
        (lambda: Convert, "run", 1),
        (lambda: nn.Module, "set_submodule", 1),
        (lambda: nn.Module, "set_submodule", 9),
        (mark_quantized_owner, "mark_quantized", 1),
    ],
    ids=["third fit", "convert", "first write", "ninth write", "config"],
)
def test_a_failed_run_leaves_the_model_as_it_was(monkeypatch, owner, name, nth, error):
    model = tiny.model()
    model.train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model)
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    raise_at_call(monkeypatch, owner(), name, nth, error)
    with pytest.raises(type(error)):
        quantize(model, calibration=tokens())
    assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
    assert same(model, before)
    assert getattr(model.config, "quantization_config", None) is None


# --- what is fitted -------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = net()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        quantize(model, ParoConfig(calibration=CalibrationConfig(steps=2, seed=seed)), calibration=[inputs()])
        assert torch.equal(torch.get_rng_state(), state)
        results.append(model)
    assert same(results[0], results[1])
    assert not torch.equal(results[0].left.pairs, results[2].left.pairs)


def test_data_free_learns_rotations_that_lower_the_error():
    model = net()
    report = quantize(
        (quantized := copy.deepcopy(model)),
        ParoConfig(calibration=CalibrationConfig(steps=40)),
        example_inputs=inputs(),
    )
    assert report.config.calibration.steps == 40
    assert all(transform.angle_rms > 0.01 for transform in report.transforms)
    assert all(transform.loss_after < transform.loss_before for transform in report.transforms)
    for one in report.linears:
        weight = model.get_submodule(one.name).weight.detach()
        nearest = affine.fake_quantize(weight, *affine.choose_qparams(weight, 4, one.group_size), 4, one.group_size)
        error = relative_error(quantized.get_submodule(one.name).dequantized_weight(), weight)
        assert error < 0.9 * relative_error(nearest, weight), one.name


def test_recipe_data_free_ignores_data():
    with_data, without = net(), net()
    config = ParoConfig(calibration=CalibrationConfig(steps=2, recipe="data-free"))
    quantize(with_data, config, calibration=[inputs()])
    quantize(without, config, example_inputs=inputs())
    assert same(with_data, without)


def test_texts_need_a_tokenizer_and_are_used():
    texts = [tiny.TEXT * 20, "why ? " * 60]
    model, other = tiny.model(), tiny.model()
    report = quantize(model, calibration=texts, tokenizer=tiny.tokenizer())
    assert len(report.linears) == 14
    quantize(other)  # data-free: Transformers models describe their own inputs
    assert not same(model, other)
    with pytest.raises(DataError, match="needs a tokenizer"):
        quantize(tiny.model(), calibration=texts)


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data,
        lambda data: [data[:2], data[2:]],
        lambda data: [{"input_ids": data[:2]}, {"input_ids": data[2:]}],
        lambda data: [(data[:2],), (data[2:],)],
        lambda data: (batch for batch in data.split(2)),
    ],
    ids=["tensor", "tensors", "mappings", "tuples", "generator"],
)
def test_the_form_of_batches_changes_nothing(make, quantized_on_tensors):
    model = tiny.model()
    quantize(model, calibration=make(tokens()))
    assert same(model, quantized_on_tensors)


@pytest.fixture(scope="module")
def quantized_on_tensors():
    model = tiny.model()
    quantize(model, calibration=tokens())
    return model


def test_rows_masked_out_do_not_count():
    mask = torch.ones(4, 16, dtype=torch.int64)
    mask[1, 10:] = mask[2, 4:] = 0
    results = []
    for seed in (1, 2):
        # Right padding with two kinds of garbage: causal attention keeps it away from the rows that count.
        padded = torch.where(mask.bool(), tokens(), tokens(seed=seed))
        model = tiny.model()
        quantize(model, calibration=[{"input_ids": padded, "attention_mask": mask}])
        results.append(model)
    assert same(*results)
    unmasked = tiny.model()
    quantize(unmasked, calibration=[{"input_ids": padded, "attention_mask": torch.ones_like(mask)}])
    assert not same(unmasked, results[0])


def test_batches_of_other_sizes_than_the_example():
    model, whole = net(), net()
    quantize(model, ALL_ROWS, calibration=[inputs()[:5], inputs()[5:6], inputs()[6:]])
    quantize(whole, ALL_ROWS, calibration=[inputs()])
    # The same rows in other batches: the sums differ in rounding only.
    assert relative_error(run(model, {"x": inputs()}), run(whole, {"x": inputs()})) < 0.05


# --- what is refused ------------------------------------------------------------------------------------------------


def test_quantizing_twice_is_an_error():
    model = net()
    quantize(model, example_inputs=inputs())
    before = copy.deepcopy(model)
    with pytest.raises(
        ConfigError,
        match=r"quantized already \(\d+ ParoLinear modules, such as '\w+'\); quantize the float model it was made from",
    ):
        quantize(model, example_inputs=inputs())
    assert same(model, before)


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"bits": 4}, r"got dict; build it with ParoConfig\.from_dict"),
        (FAST, r"got CalibrationConfig; put it in one: ParoConfig\(calibration="),
        (["a text"], r"got list; build it with ParoConfig\(\.\.\.\); calibration data is given as calibration="),
    ],
)
def test_config_must_be_one(config, remedy):
    with pytest.raises(ConfigError, match=f"config must be a ParoConfig, {remedy}"):
        parofx.quantize(net(), config)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)meta device hold nothing to quantize; load .*- left\.weight.*4 more"):
        quantize(net().to("meta"), example_inputs=inputs().to("meta"))


def test_calibration_that_is_not_finite_is_named():
    bad = inputs()
    bad[3, 5] = torch.nan
    with pytest.raises(DataError, match="calibration sample 11: x holds NaN or infinite values"):
        quantize(net(), ALL_ROWS, calibration=[inputs(), bad])


def test_activations_that_are_not_finite_are_named():
    model = net()
    model.left.weight.data[0, 0] = 1e38
    with pytest.raises(DataError, match="the input of down: rows must be finite"):
        quantize(model, calibration=[1e3 * inputs()])


def test_a_dtype_that_cannot_be_computed_with_is_named():
    model = tiny.model().to(torch.float8_e4m3fn)
    with pytest.raises(
        DataError, match=r"(?s)the weight of .*q_proj must be one of torch\.float16.*got torch\.float8_"
    ):
        quantize(model)


def test_a_weight_that_is_not_finite_is_named():
    model = net()
    model.down.weight.data[1, 1] = torch.inf
    with pytest.raises(DataError, match=r"the weight of down must be finite, got NaN or infinity; repair the model"):
        quantize(model, example_inputs=inputs())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": inputs()}, {"y": inputs()}], r"missing \['x'\], unexpected \['y'\]"),
        ([], "calibration holds no item"),
        (5, "calibration must be None, a source"),
    ],
    ids=["other inputs", "empty", "a number"],
)
def test_malformed_calibration(batches, message):
    with pytest.raises(DataError, match=message):
        quantize(net(), ALL_ROWS, calibration=batches)


def test_a_model_that_cannot_be_exported_names_the_remedy():
    class Branches(Net):
        def forward(self, x):
            return self.down(self.left(x)) if x.sum().item() > 0 else x

    with pytest.raises(
        CaptureError, match=r"(?s)Branches could not be captured.*torch\.compile\(model, backend='paro'"
    ):
        quantize(Branches().eval(), example_inputs=inputs())


def test_example_inputs_are_needed_and_checked():
    with pytest.raises(CaptureError, match=r"Net needs example_inputs to be captured: pass quantize\(model, example_i"):
        quantize(net())
    with pytest.raises(ConfigError, match="example_inputs must be a tensor, a tuple or a mapping, got int"):
        quantize(net(), example_inputs=3)
    with pytest.raises(CaptureError, match=r"Net\.forward does not take the example_inputs"):
        quantize(net(), example_inputs=(inputs(), inputs()), calibration=[inputs()])


# --- what becomes of the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
@pytest.mark.parametrize("calibration", [None, [inputs()]], ids=["data-free", "data"])
def test_a_plain_module_with_example_inputs(form, calibration):
    model = net()
    quantized = copy.deepcopy(model)
    report = quantize(quantized, example_inputs=form(inputs()), calibration=calibration)
    assert {one.name for one in report.linears} == {"left", "right", "down"}
    assert [transform.members for transform in report.transforms] == [("left", "right"), ("down",)]
    assert [(one.name, one.reason) for one in report.kept_float] == [("unused", FloatReason.NOT_REACHED)]
    assert isinstance(quantized.unused, nn.Linear)
    reference = reference_model(model, quantized)
    assert relative_error(run(quantized, {"x": inputs()}), run(reference, {"x": inputs().double()})) < 1e-5
    # Siblings hold one set of rotation tensors.
    assert quantized.left.theta is quantized.right.theta
    assert quantized.left.pairs is quantized.right.pairs


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("left",), {"left"}),
        (("*ight", "down"), {"right", "down"}),
    ],
)
def test_modules_to_not_convert(patterns, kept):
    model = net()
    report = quantize(model, ParoConfig(modules_to_not_convert=patterns, calibration=FAST), example_inputs=inputs())
    excluded = {one.name for one in report.kept_float if one.reason is FloatReason.EXCLUDED}
    assert excluded == kept
    assert {name for name in ("left", "right", "down") if isinstance(model.get_submodule(name), nn.Linear)} == kept


def test_modules_to_not_convert_by_path():
    config = ParoConfig(modules_to_not_convert=("model.layers.0.*", "down_proj"), calibration=FAST)
    report = quantize(tiny.model(), config)
    assert len(report.linears) == 6
    assert report.reasons() == {FloatReason.EXCLUDED: 8, FloatReason.OUTPUT_HEAD: 1}


def test_mixed_group_size_and_separate_transforms():
    model = net()
    config = ParoConfig(mixed_group_size=True, share_siblings=False, calibration=FAST)
    report = quantize(model, config, example_inputs=inputs())
    assert {one.name: one.group_size for one in report.linears} == {"left": 64, "right": 64, "down": 128}
    assert model.down.group_size == 128
    assert len(report.transforms) == 3
    assert model.left.theta is not model.right.theta


def test_modes_of_all_modules_are_kept():
    model = net()
    model.train()
    model.right.eval()
    quantize(model, example_inputs=inputs())
    assert model.training
    assert model.left.training
    assert not model.right.training


@pytest.mark.parametrize("options", [{"bits_budget": 8.0}, {"tune_epochs": 1}, {"distill_epochs": 1}], ids=str)
def test_what_is_trained_leaves_no_gradients_on_the_model(options):
    model = Stack(2).eval()
    parameters = dict(model.named_parameters())
    data = [rows(2, 3, 64, seed=seed) for seed in range(2)]
    calibration = CalibrationConfig(steps=0, sweeps=0, clip_ratios=(1.0,), damping=(0.1,), **options)
    quantize(model, ParoConfig(group_size=32, krot=1, calibration=calibration), calibration=data)
    assert [name for name, one in parameters.items() if one.grad is not None or not one.requires_grad] == []


def test_hooks_go_on_working():
    model, seen = net(), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.left.register_forward_pre_hook(lambda *_: seen.append("before left"))
    handle = model.down.register_forward_hook(
        lambda module, args, kwargs, output: seen.append("down"), with_kwargs=True
    )
    quantize(model, example_inputs=inputs())
    seen.clear()
    run(model, {"x": inputs()})
    assert seen == ["before left", "down", "model"]
    handle.remove()
    seen.clear()
    run(model, {"x": inputs()})
    assert seen == ["before left", "model"]


def test_a_linear_that_its_hook_or_its_class_changes_stays_float():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[1].register_forward_hook(lambda module, args, output: 3 * output)
    quantized = copy.deepcopy(model)
    report = quantize(quantized, example_inputs=inputs())
    assert {one.name: one.reason for one in report.kept_float} == {
        "0": FloatReason.FUNCTIONAL,
        "1": FloatReason.FUNCTIONAL,
    }
    assert relative_error(quantized(inputs()), model(inputs())) < 0.2


def test_computed_functional_and_tied_weights_are_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.computed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
            self.functional = nn.Linear(64, 64)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.plain = nn.Linear(64, 64)

        def forward(self, x):
            x = linear(self.computed(x), self.functional.weight + 1)
            return self.plain(self.second(self.first(x)))

    report = quantize(Odd().eval(), example_inputs=inputs())
    assert [one.name for one in report.linears] == ["plain"]
    reasons = {one.name: one.reason for one in report.kept_float}
    assert len(reasons) == len(report.kept_float) == 3, "the tied weight is one unit"
    assert reasons["computed"] is reasons["functional"] is FloatReason.FUNCTIONAL
    assert FloatReason.NOT_REACHED not in report.reasons()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_may_be_in_any_grad_mode(context):
    model, other = net(), net()
    with context():
        quantize(model, calibration=[inputs()])
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)
    quantize(other, calibration=[inputs()])
    assert same(model, other)
    model(inputs())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_eager_in_every_precision(dtype, tolerance, when):
    model = tiny.model()
    given = cast(model.dummy_inputs | {"input_ids": tokens()}, dtype)
    quantized = copy.deepcopy(model)
    if when == "before":
        quantized.to(dtype)
    report = quantize(quantized, calibration=tokens())
    quantized.to(dtype)
    output = run(quantized, given)
    assert output.dtype == dtype
    assert {buffer.dtype for name, buffer in quantized.named_buffers() if name.endswith("theta")} == {torch.float16}
    assert len(report.linears) == 14
    assert relative_error(output, run(reference_model(model, quantized, dtype), given)) < tolerance


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_agrees_with_a_hand_computation(tmp_path):
    model = net()
    report = quantize(model, example_inputs=inputs())
    # One group size for K = 64 and K = 128. Codes 4 bit; per group and output a scale (16) and a zero (4); a rotation
    # of 8 rounds: an angle (16) per pair and an index (16) per channel; a scale (16) per channel; fp16 bias.
    bits = 0
    for n, k, bias in ((128, 64, True), (128, 64, False), (32, 128, True)):
        bits += 4 * n * k + 20 * n * (k // 64) + 8 * (16 * k // 2 + 16 * k) + 16 * k + 16 * n * bias
    weights = 2 * 128 * 64 + 32 * 128
    assert report.bits_per_weight == pytest.approx(bits / weights)
    assert sum(one.packed_bytes for one in report.linears) * 8 == bits
    assert str(report).startswith(f"quantized 3 linears with 2 transforms, {bits / weights:.3f} bits per weight, in ")
    assert str(report).endswith("kept float: 1 the example inputs never reach it")
    assert report.peak_memory_bytes > 1e7
    assert 0 < report.seconds < 600
    assert all(0 < one.relative_error < 0.1 for one in report.linears)

    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_blocks_are_named():
    report = quantize(tiny.model(), calibration=tokens())
    assert {one.block for one in report.linears} == {"model.layers.0", "model.layers.1"}
    assert {len(one.members) for one in report.transforms} == {1, 2, 3}


def test_progress_goes_to_stderr(capfd):
    parofx.quantize(net(), CONFIG, example_inputs=inputs(), progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    quantize(net(), example_inputs=inputs())
    assert capfd.readouterr() == ("", "")


# --- killed and resumed ---------------------------------------------------------------------------------------------

LAYERS = 4


def calibrate_in(work_dir: Path | None) -> nn.Module:
    torch.set_num_threads(1)
    model = tiny.model(num_hidden_layers=LAYERS)
    calibration = CalibrationConfig(steps=100, batch_size=2, work_dir=work_dir and str(work_dir))
    quantize(model, ParoConfig(calibration=calibration), calibration=tokens())
    return model


@pytest.fixture
def fits(monkeypatch):
    """Count the transforms that are fitted."""
    counted, original = [], Calibrate.fit
    monkeypatch.setattr(Calibrate, "fit", lambda *args: counted.append(args[2].name) or original(*args))
    return counted


def test_a_killed_run_goes_on_at_the_block_it_was_in(tmp_path, fits, caplog):
    script = "import sys, pathlib, test_quantization as t; t.calibrate_in(pathlib.Path(sys.argv[1]))"
    threads = torch.get_num_threads()
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "segment-001.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finished = len(list(tmp_path.glob("segment-*.safetensors")))
    # The first segment holds what is before the blocks; the last one, the head, is never run.
    assert 2 <= finished < LAYERS + 1

    try:
        with caplog.at_level("INFO", logger="parofx"):
            resumed = calibrate_in(tmp_path)
        log = next(record.getMessage() for record in caplog.records if "resuming" in record.getMessage())
        after = int(log.removeprefix("resuming calibration after ").removesuffix(f" of {LAYERS + 2} segments"))
        # Killed between a segment and its border, a run does that segment again.
        assert finished - 1 <= after <= finished
        assert len(fits) == 4 * (LAYERS + 1 - after)
        assert not any(name.startswith(f"model.layers.{layer}.") for layer in range(after - 1) for name in fits)
        fits.clear()
        whole = calibrate_in(None)
    finally:
        torch.set_num_threads(threads)
    assert len(fits) == 4 * LAYERS
    assert same(resumed, whole)


def test_a_finished_run_is_not_repeated_and_another_one_starts_over(tmp_path, fits):
    def run_with(**options) -> tuple[nn.Module, int]:
        fits.clear()
        model = net()
        calibration = CalibrationConfig(**({"steps": 1, "work_dir": str(tmp_path / "work")} | options))
        quantize(model, ParoConfig(calibration=calibration), calibration=[inputs()])
        return model, len(fits)

    first, count = run_with()
    assert count == 2
    again, count = run_with()
    assert count == 0
    assert same(first, again)
    assert run_with(resume=False)[1] == 2
    assert run_with(seed=1)[1] == 2, "other options: nothing on disk fits"
    assert run_with()[1] == 2, "the run in between has replaced it"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    config = ParoConfig(calibration=CalibrationConfig(steps=1, work_dir=str(tmp_path)))
    with pytest.raises(DataError, match=r"has other files and no run\.json"):
        quantize(net(), config, calibration=[inputs()])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import tiny, torch, parofx
from parofx import CalibrationConfig, ParoConfig

torch.set_num_threads(2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def config(): return ParoConfig(calibration=CalibrationConfig(steps=2, batch_size=2))
data = torch.randint(3, 17, (16, 128), generator=torch.Generator().manual_seed(0))
# Everything that is loaded on first use is loaded before the measurement.
parofx.quantize(tiny.model(), config(), calibration=data[:2, :16], progress=False)
before = peak()
model = tiny.model(hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8)
size = sum(p.numel() * 4 for p in model.parameters())
report = parofx.quantize(model, config(), calibration=data, progress=False)
print(size, peak() - before, report.peak_memory_bytes - before)
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="ru_maxrss is in other units there")
def test_peak_memory_is_bounded():
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    size, peak, reported = map(int, result.stdout.split())
    assert size > 4 * 25e6
    # Activations at a border: input and output of a block, for all samples.
    activations = 2 * 16 * 128 * 512 * 4
    # Second moments of the widest input, fp64: gathered, held out, rotated, damped and factored.
    moments = 12 * 8 * 1536**2
    assert peak < 3 * size + activations + moments
    assert reported <= peak


# --- warnings -------------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(Calibrate, "run", lambda *args: pytest.fail("the work has begun"))
    with pytest.raises(ConfigError, match=r"'rihgt\.\*' matches no module of Net; the closest names are right"):
        quantize(net(), replace(CONFIG, modules_to_not_convert=("left", "rihgt.*")), example_inputs=inputs())


def test_weights_that_the_grid_cannot_hold_are_told(caplog):
    model = net()
    with torch.no_grad():
        model.left.weight.mul_(1e-20)
    report = quantize(model, example_inputs=inputs())
    assert next(linear for linear in report.linears if linear.name == "left").relative_error == pytest.approx(1)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("so few bits lose more than half of what these linears compute")
    assert message.endswith("- left")


@pytest.mark.parametrize("make", [net, lambda: tiny.model(num_hidden_layers=1)], ids=["module", "transformers"])
def test_a_model_in_which_nothing_qualifies_is_left_as_it_is(make, caplog):
    model = make()
    before = list(model.named_modules())
    options = {} if hasattr(model, "config") else {"example_inputs": inputs()}
    report = quantize(model, replace(CONFIG, modules_to_not_convert=("*",)), **options)
    assert report.linears == ()
    assert set(report.reasons()) <= {FloatReason.EXCLUDED, FloatReason.NOT_REACHED}
    assert list(model.named_modules()) == before
    assert not hasattr(getattr(model, "config", None), "quantization_config")
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    count = report.reasons()[FloatReason.EXCLUDED]
    assert message.startswith(
        f"nothing was quantized, and the model is as it was: kept float: {count} excluded by modules_to_not_convert"
    )


@pytest.mark.parametrize(("recipe", "told"), [("best", "distill_epochs=3"), ("data-free", None), ("fast", None)])
def test_stages_that_train_without_data_are_told(caplog, recipe, told):
    parofx.plan_quantization(net(), ParoConfig(calibration=CalibrationConfig(recipe=recipe)), example_inputs=inputs())
    messages = [message for message in caplog.messages if "weights alone decide" in message]
    assert bool(messages) == (told is not None)
    assert told is None or told in messages[0]


@pytest.mark.parametrize(("options", "told"), [({}, False), ({"objective": "ldl"}, True)])
def test_an_objective_that_the_rounding_has_no_use_for_is_told(caplog, options, told):
    config = ParoConfig(calibration=CalibrationConfig(rounding="nearest", **options))
    parofx.plan_quantization(net(), config, example_inputs=inputs())
    assert any("transforms are fitted by objective='range'" in message for message in caplog.messages) == told


def test_a_model_without_linears_has_nothing_to_quantize(caplog):
    assert quantize(nn.Sequential(nn.ReLU()), example_inputs=inputs()).kept_float == ()
    assert caplog.messages[-1] == "nothing was quantized, and the model is as it was: no linears"


def test_corrections_that_take_as_much_as_floats_are_told(caplog):
    quantize(
        net(), replace(CONFIG, calibration=replace(CONFIG.calibration, compensation_rank=64)), example_inputs=inputs()
    )
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "bits per weight" in message
    assert "compensation_rank=64 is more than they need" in message
