"""`parofx verify`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.table import Table

from parofx.cli.common import JsonFile, console, errors_console
from parofx.errors import ConfigError

_FAILURE_STATUS = 1


def verify(
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a CUDA device if there is one.")
    ] = "auto",
    examples: Annotated[int, typer.Option(min=1, help="Cases drawn for each kernel.")] = 50,
    kernels: Annotated[str, typer.Option("-k", help="Only kernels whose name contains this.")] = "",
    jobs: Annotated[
        int | None, typer.Option("-j", "--jobs", min=1, help="Checks at a time; by default one per core on a GPU.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check every kernel of this machine against the fp64 reference, on drawn shapes, layouts, dtypes and values.

    \b
    parofx verify --device cuda
    TRITON_INTERPRET=1 parofx verify --device cpu -k triton     # the Triton kernels without a GPU

    Prints the worst relative error of each kernel, and the smallest case that fails. Exits with 1 if one does.
    """  # noqa: D301
    import torch

    from parofx.testing.interpreter import is_interpreting, mend_interpreter
    from parofx.testing.kernels import kernel_checks
    from parofx.testing.verification_run import default_jobs, run_checks

    if is_interpreting():
        mend_interpreter()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    known = [check.name for check in kernel_checks(where)]
    names = [name for name in known if kernels in name]
    if not names:
        raise ConfigError(f"-k: no kernel of {where} has {kernels!r} in its name; there are {known}")
    table = Table("kernel", "worst relative error", "result")
    failures: dict[str, str] = {}
    errors: dict[str, float] = {}
    with errors_console.status("compiling and checking …") as status:
        for result in run_checks(where, examples, names=names, jobs=jobs or default_jobs(where)):
            if result.error is None:
                failures[result.name] = str(result.failure)
            else:
                errors[result.name] = result.error
            shown = "" if result.error is None else f"{result.error:.2e}"
            table.add_row(result.name, shown, "FAILED" if result.error is None else "passed")
            status.update(f"{table.row_count} of {len(names)} kernels checked …")
    console.print(table)
    for name, reason in failures.items():
        console.print(f"\n{name}\n{reason}", highlight=False, markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps({"errors": errors, "failures": failures}, indent=2))
    if failures:
        errors_console.print(f"{len(failures)} of {len(failures) + len(errors)} kernels failed")
        raise typer.Exit(_FAILURE_STATUS)
