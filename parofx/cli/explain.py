"""`parofx explain`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.table import Table

from parofx.cli.common import (
    Device,
    Dtype,
    JsonFile,
    Offline,
    Revision,
    Source,
    TrustRemoteCode,
    console,
    load,
    write_json,
)


def explain(
    model: Source,
    grep: Annotated[str | None, typer.Option(help="Show only rows whose name contains this.")] = None,
    json_file: JsonFile = None,
    revision: Revision = None,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tell what would be quantized, shared, merged and skipped, and why. Changes nothing.

    \b
    parofx explain ./llama
    parofx explain org/model --grep lm_head
    """  # noqa: D301
    loaded = load(
        model, revision=revision, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    import parofx
    from parofx.models import example_inputs

    rows = parofx.explain(loaded.model, example_inputs(loaded.model)).rows
    table = Table("name", "action", "reason", box=None)
    for row in rows:
        if grep is None or grep in row.name:
            table.add_row(row.name, row.action, row.reason)
    console.print(table)
    actions = Counter(row.action for row in rows)
    console.print(", ".join(f"{count} {action}" for action, count in actions.items()), highlight=False)
    if json_file is not None:
        write_json(json_file, [row._asdict() for row in rows])
