"""One quantized checkpoint and its float model, for all tests of the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from typer.testing import CliRunner

from parofx.cli import app

#: Runs `parofx` with these arguments; a traceback is a failure.
Run = Callable[..., "Outcome"]


class Outcome(NamedTuple):
    """`printed` is standard output, `output` with standard error."""

    status: int
    output: str
    printed: str


class Files(NamedTuple):
    """`float_model` is a transformers folder, `text` a text file, `paro` the float model quantized with it."""

    float_model: Path
    text: Path
    paro: Path


@pytest.fixture(scope="session")
def run() -> Run:
    def call(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.output, result.stdout)

    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    float_model = tiny.save(folder / "float")
    text = folder / "notes.txt"
    text.write_text(tiny.TEXT * 60)
    options = ("--samples", 4, "--seqlen", 16, "--steps", 3, "--group-size", 32, "--calibration", text)
    outcome = run("quantize", float_model, "-o", folder / "paro", *options)
    assert outcome.status == 0, outcome.output
    return Files(float_model, text, folder / "paro")
