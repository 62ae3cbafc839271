"""`parofx explain`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

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
from parofx.cli.options import build_config, quantization_options


@quantization_options
def explain(
    model: Source,
    grep: Annotated[str | None, typer.Option(help="Show only rows whose name contains this.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with options; those given here win.", dir_okay=False)
    ] = None,
    json_file: JsonFile = None,
    revision: Revision = None,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    **options: Any,
) -> None:
    """Tell what would be quantized, shared, merged and skipped, and why. Changes nothing.

    Of a PARO checkpoint: what is quantized, merged and lowered; these options change nothing there.

    \b
    parofx explain ./llama
    parofx explain org/model --grep lm_head
    parofx explain ./llama --group-size 64 --modules-to-not-convert 'model.layers.0.*'
    """  # noqa: D301
    chosen = build_config(config, options)
    loaded = load(
        model, revision=revision, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    import parofx

    rows = parofx.explain(loaded.model, config=chosen).rows
    shown = [row for row in rows if grep is None or grep in row.name]
    table = Table("name", "action", "reason", box=None)
    for row in shown:
        table.add_row(row.name, row.action, row.reason)
    if shown or not rows:
        console.print(table)
    else:
        console.print(f"no name of {len(rows)} linears contains {grep!r}", markup=False, highlight=False)
    actions = Counter(row.action for row in rows)
    console.print(", ".join(f"{count} {action}" for action, count in actions.items()), highlight=False)
    if json_file is not None:
        write_json(json_file, [row._asdict() for row in rows])
