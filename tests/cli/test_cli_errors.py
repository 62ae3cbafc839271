"""Mistakes end in one readable message and status 2; options are the configuration's, and unknown ones are refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import Files, Run

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected the options as a JSON object"),
        ("[1]", "expected a JSON object"),
        ('{"calibration": 1}', "with an object for 'calibration'"),
        ('{"rounds": 1}', r"unknown ParoConfig options \['rounds'\]"),
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


def test_a_float_folder_is_no_checkpoint_to_inspect(files: Files) -> None:
    with pytest.raises(CheckpointError, match="is no readable PARO checkpoint"):
        summarize(files.float_model)


@pytest.mark.parametrize("command", [("eval", "--text", "a.txt"), ("generate", "-p", "a")])
def test_text_needs_a_tokenizer(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no tokenizer"):
        run("--traceback", command[0], tmp_path, *command[1:])


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
