"""The command line's root: its commands, and errors as messages."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from parofx.cli.common import console, errors_console
from parofx.cli.doctor import doctor
from parofx.cli.evaluate import evaluate
from parofx.cli.explain import explain
from parofx.cli.generate import generate
from parofx.cli.inspect import inspect
from parofx.cli.passes import passes
from parofx.cli.quantize import quantize
from parofx.cli.tune import tune
from parofx.cli.verify import verify
from parofx.errors import ParoError

#: Exit status of a command that ended in a `ParoError`; the same as for a wrong option.
ERROR_STATUS = 2
_PACKAGE = Path(__file__).parents[1]


class ErrorsAsMessages(TyperGroup):
    """Prints a `ParoError` as one readable message; other errors are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _as_message
                return super().invoke(ctx)
        except ParoError as error:
            if ctx.params.get("traceback"):
                raise
            errors_console.print(Text.assemble(("error: ", "bold red"), str(error)))
            raise typer.Exit(ERROR_STATUS) from error


def _as_message(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Show a warning without the line of code that gave it; of other packages' it says where that is."""
    name = "warning" if category in (UserWarning, RuntimeWarning) else category.__name__
    where = "" if Path(filename).is_relative_to(_PACKAGE) else f" ({filename}:{lineno})"
    errors_console.print(Text.assemble((f"{name}: ", "bold yellow"), str(message), (where, "dim")))


app = typer.Typer(
    name="parofx",
    cls=ErrorsAsMessages,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(importlib.metadata.version("parofx"), highlight=False)
        raise typer.Exit


@app.callback()
def root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Quantize the linear layers of a model to 4 bit in a learned, rotated coordinate system, and run it.

    \b
    parofx explain  ./llama                 # what would be quantized, and why
    parofx quantize ./llama -o llama-paro --calibration notes.txt
    parofx inspect  llama-paro              # bits, error and size of each layer
    parofx eval     llama-paro --text held_out.txt --reference ./llama
    parofx generate llama-paro -p "Why is the sky blue?"
    """  # noqa: D301  (\b is click's mark for "keep these lines")


for _command in (quantize, evaluate, generate, inspect, explain, passes, doctor, verify, tune):
    app.command("eval" if _command is evaluate else _command.__name__)(_command)


def main() -> None:
    """Run the command line; the entry point `parofx`."""
    app()
