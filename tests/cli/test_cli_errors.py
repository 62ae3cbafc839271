"""Mistakes end in one readable message and status 2; options are the configuration's, and unknown ones are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
from conftest import Files, Run

import parofx
from parofx.cli.inspect import summarize
from parofx.cli.options import build_config
from parofx.config import CalibrationConfig, ParoConfig
from parofx.errors import CheckpointError, ConfigError, DataError

COMMANDS = ("quantize", "eval", "generate", "inspect", "explain", "passes", "doctor")


def test_an_error_is_one_message(run: Run) -> None:
    status, output, _ = run("explain", "./missing")
    assert status == 2
    assert output.startswith("error: no model there: missing")
    assert "Traceback" not in output


def test_a_traceback_can_be_asked_for(run: Run) -> None:
    with pytest.raises(CheckpointError, match="no model there"):
        run("--traceback", "explain", "./missing")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(run: Run, command: str) -> None:
    status, output, _ = run(command, "--help")
    assert status == 0
    assert f" parofx {command} " in output + " "


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_options_are_refused(run: Run, command: str) -> None:
    status, output, _ = run(command, "--no-such-option")
    assert status == 2
    assert "No such option" in output


def test_every_field_of_the_configuration_is_an_option(run: Run) -> None:
    output = run("quantize", "--help").output.replace("…", "")
    names = [item.name for cls in (ParoConfig, CalibrationConfig) for item in dataclasses.fields(cls)]
    for name in names:
        assert f"--{name.replace('_', '-')}"[:16] in output, name


def test_help_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys; from parofx.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_version_is_printed(run: Run) -> None:
    import parofx

    assert run("--version").output.strip() == parofx.__version__


def test_a_wrong_value_is_explained(files: Files, run: Run, tmp_path: Path) -> None:
    status, output, _ = run("quantize", files.float_model, "-o", tmp_path / "out", "--group-size", 48)
    assert status == 2
    assert "group_size must be one of (128, 64, 32), got 48" in output


def test_wrong_data_is_said_before_the_model_is_loaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for source, expected in (("missing.txt", "no such file"), ("empty.jsonl", "holds no document")):
        # There is no such model either.
        status, output, _ = run("quantize", "./missing", "-o", tmp_path / "out", "--calibration", tmp_path / source)
        assert status == 2
        assert expected in " ".join(output.split())


def test_what_a_run_reads_is_never_replaced_by_what_it_writes(run: Run, tmp_path: Path) -> None:
    model, text, work = tmp_path / "all" / "model", tmp_path / "all" / "a.txt", tmp_path / "work"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    text.write_text("a")
    work.mkdir()
    link = tmp_path / "link"
    link.symlink_to(model)
    for output, read in (
        (model, model),
        (link, model),
        (tmp_path / "all", model),
        (tmp_path / "all", text),
        (work, work),
    ):
        options = ("--overwrite", "--calibration", text, "--work-dir", work)
        status, printed, _ = run("quantize", "./missing" if read == text else model, "-o", output, *options)
        message = f"the output would replace {read}, which this run reads: got -o {output}; choose another folder"
        assert status == 2
        assert "".join(message.split()) in "".join(printed.split())
        assert (model / "config.json").read_text() == "{}"


def test_an_output_that_cannot_be_written_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    wrong = {"file": "expected a folder to write to", "file/out": "Not a directory", "x" * 300: "File name too long"}
    for name, message in wrong.items():
        # There is no such model either.
        status, output, _ = run("quantize", "./missing", "-o", tmp_path / name, "--overwrite")
        assert status == 2
        assert message in " ".join(output.split())
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "kept")]


def test_eval_wants_something_to_measure(files: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, output, _ = run("eval", files.paro)
    assert status == 2
    assert "give --text, --task or both" in output
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, output, _ = run("eval", files.paro, "--task", "sea")
    assert status == 2
    assert "pip install 'parofx[eval]'" in output


def test_given_options_come_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"krot": 2, "group_size": 64, "calibration": {"steps": 5, "seed": 3}}))
    config = build_config(file, {"krot": 4, "steps": 7})
    assert config == ParoConfig(krot=4, group_size=64, calibration=CalibrationConfig(steps=7, seed=3))
    assert build_config(None, {}) == ParoConfig()
    file.write_text(json.dumps({"bits": 2, "lm_head": "8"}))  # of no use alone
    assert build_config(file, {"bits": 4}) == ParoConfig(lm_head=8)
    with pytest.raises(ConfigError, match=r"config\.json: invalid ParoConfig"):
        build_config(file, {"krot": 4})
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"^invalid ParoConfig"):
        build_config(file, {"krot": -1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json cannot be read as a JSON object of options"),
        ("[1]", "expected a JSON object"),
        ('{"calibration": 1}', "with an object for 'calibration'"),
        (
            '{"group_sise": 1}',
            r"config\.json: unknown ParoConfig options \['group_sise'\]; for 'group_sise' perhaps 'group_s",
        ),
        ('{"calibration": {"steps": -1}}', r"config\.json: invalid CalibrationConfig"),
        ('{"steps": 3}', r"config\.json: unknown .*; 'steps' belongs to 'calibration'"),
    ],
)
def test_a_wrong_configuration_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_config(tmp_path / "config.json", {})


def test_an_unknown_pass_is_refused(run: Run) -> None:
    status, output, _ = run("passes", "optimise")
    assert status == 2
    assert "no pass is called 'optimise'" in output


def test_what_is_no_checkpoint_to_inspect_is_said(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not quantized, .*parofx explain"):
        summarize(files.float_model)
    with pytest.raises(CheckpointError, match=r"expected the folder .*missing is not there"):
        summarize(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"config\.json is a file"):
        summarize(files.float_model / "config.json")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match="is no readable PARO checkpoint"):
        summarize(tmp_path)


@pytest.mark.parametrize("command", ["eval --text", "generate -p", "quantize -o {out} --calibration"])
def test_text_needs_a_tokenizer(run: Run, tmp_path: Path, command: str) -> None:
    folder, text = tmp_path / "model", tmp_path / "a.txt"
    tiny.model().save_pretrained(folder)
    text.write_text("ships")
    name, *options = command.format(out=tmp_path / "out").split()
    with pytest.raises(DataError, match="has no tokenizer"):
        run("--traceback", name, folder, *options, text)


def test_a_text_without_a_document_is_named_before_the_model_is_read(run: Run, tmp_path: Path) -> None:
    for text in ("", '{"text": ""}\n{"text": " "}'):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"empty\.jsonl holds no document"):
            run("--traceback", "eval", tmp_path / "no model", "--text", tmp_path / "empty.jsonl")


def test_a_tokenizer_that_is_broken_is_told_from_none(
    run: Run, files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in files.float_model.iterdir():
        (tmp_path / file.name).write_bytes(b"{" if file.name == "tokenizer.json" else file.read_bytes())
    with pytest.raises(DataError, match="no tokenizer that can be loaded"):
        run("--traceback", "generate", tmp_path, "-p", "ships")
    assert [record for record in caplog.records if record.levelname == "WARNING" and "tokenizer" in record.message]


@pytest.mark.parametrize("command", ["eval {missing} --text wikitext2", "quantize {missing} -o {out} --calibration c4"])
def test_no_network_is_asked_when_told_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    datasets = pytest.importorskip("datasets")
    seen = []

    def load_dataset(*_: object, **__: object) -> None:
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise ConnectionError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back behind the test
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = command.format(missing=tmp_path / "missing", out=tmp_path / "out").split()
    status, _, _ = run(*options, "--offline")
    assert status == 2
    assert seen == ["1"]


def test_an_evaluation_has_no_text_of_its_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ValueError("no such name")))
    with pytest.raises(DataError, match="'self' is no file or folder"):
        run("--traceback", "eval", tmp_path / "no model", "--text", "self")


def test_a_truncated_file_of_a_float_model_is_named(run: Run, files: Files, tmp_path: Path) -> None:
    for file in files.float_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    status, output, _ = run("explain", tmp_path)
    assert status == 2
    assert "model.safetensorsistruncatedornotasafetensorsfile" in "".join(output.split())


def test_a_pattern_that_matches_nothing_is_refused(run: Run, files: Files) -> None:
    with pytest.raises(ConfigError, match="'nomatch' matches no module"):
        run("--traceback", "explain", files.float_model, "--modules-to-not-convert", "nomatch")


def test_a_filter_that_matches_nothing_says_so(run: Run, files: Files) -> None:
    for pattern in ("nomatch", "[attn]", "[/x]"):
        status, output, _ = run("explain", files.float_model, "--grep", pattern)
        assert status == 0
        assert f"linears contains '{pattern}'" in output


def test_a_warning_is_a_message(run: Run, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        for origin in (__file__, parofx.__file__):
            warnings.warn_explicit("little text", UserWarning, origin, 7)
        raise ConfigError("that is all")

    monkeypatch.setattr("parofx.cli.explain.load", load)
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        output = run("explain", files.float_model).output
    expected = f"warning: little text ({__file__}:7) warning: little text error: that is all"
    assert "".join(output.split()) == "".join(expected.split())
    assert warnings.showwarning is shown


def test_help_tells_what_the_default_recipe_does(run: Run) -> None:
    shown = " ".join(run("quantize", "--help").output.replace("│", " ").split())
    assert "Sequences used. [default: (by recipe, fast: 64)]" in shown


def test_a_chat_needs_a_template(files: Files, run: Run, tmp_path: Path) -> None:
    for file in files.float_model.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(DataError, match="--chat needs a chat template"):
        run("--traceback", "generate", tmp_path, "-p", "ships", "--chat", "--no-compile")


@pytest.mark.parametrize("option", ["--json", "--page"])
def test_a_result_that_could_not_be_written_stops_before_the_work(
    run: Run, files: Files, tmp_path: Path, option: str
) -> None:
    status, output, _ = run("inspect", files.paro, option, tmp_path / "missing" / "x.json")
    assert status == 2
    assert "there is no folder" in output


def test_an_empty_prompt_is_refused(run: Run, files: Files) -> None:
    status, output, _ = run("generate", files.paro, "-p", "", "--no-chat", "--no-compile")
    assert status == 2
    assert "the prompt '' holds no token" in output


def test_a_device_that_is_not_there_is_refused_before_loading(
    run: Run, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("parofx.models.load_model", lambda *args, **options: pytest.fail("loading has begun"))
    status, output, _ = run("explain", files.float_model, "--device", "cuda")
    assert status == 2
    assert "finds no CUDA device; use --device cpu" in output.replace("\n", " ")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parofx", "passes", "--help"], capture_output=True, text=True, check=True
    )
    assert "parofx passes" in done.stdout
