"""`parofx quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from parofx.cli.common import (
    Device,
    Dtype,
    Offline,
    Revision,
    Source,
    TrustRemoteCode,
    check_sources,
    console,
    errors_console,
    find_device,
    load,
    require_tokenizer,
)
from parofx.cli.options import build_config, config_options
from parofx.cli.output import check_output
from parofx.cli.plan import print_plan
from parofx.cli.processes import joined

#: What `inspect` reads the layers' errors from.
REPORT_FILE = "parofx_report.json"


@config_options
def quantize(
    model: Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint.", show_default=False)],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text to fit on: a .txt, .jsonl or .parquet file, a folder, a dataset (wikitext:wikitext-2-raw-v1), "
            "or 'self' for text the model writes. May be given several times. Without it the weights alone are used.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with options; those given here win.", dir_okay=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what this would do and take, and do nothing; weights are not read.")
    ] = False,
    revision: Revision = None,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    **options: Any,
) -> None:
    """Quantize a model's linear layers to 4 bit and save it as a PARO checkpoint.

    \b
    parofx quantize ./llama -o llama-paro   # data-free: from the weights alone
    parofx quantize ./llama -o llama-paro --calibration notes.txt   # better
    parofx quantize ./llama -o llama-paro --calibration notes.txt --dry-run
    parofx quantize model.gguf -o out --calibration a.jsonl --calibration b/
    parofx quantize org/model -o out --calibration wikitext:wikitext-2-raw-v1
    parofx quantize ./llama -o out --group-size 64 --krot 4
    parofx quantize ./llama -o out --modules-to-not-convert 'model.layers.0.*'

    Under torchrun several processes share the calibration data: torchrun --nproc-per-node 2 -m parofx quantize …
    With --work-dir a killed run goes on at the block it was in, when the same command is given again.
    """  # noqa: D301
    chosen = build_config(config, options)
    # Said before the work, not after it.
    work_dir = chosen.calibration.work_dir
    read = [model, *(calibration or ()), *([] if work_dir is None else [work_dir])]
    check_output(output, overwrite=overwrite, read=read)
    check_sources(source for source in calibration or () if source != "self")
    loaded = load(
        model,
        revision=revision,
        offline=offline,
        dtype=dtype,
        device="meta" if dry_run else device,
        trust_remote_code=trust_remote_code,
    )
    if calibration:
        require_tokenizer(loaded, model, "calibration")
    import parofx

    if dry_run:
        with joined(find_device(device)) as writes, errors_console.status("planning …"):
            plan = parofx.plan_quantization(
                loaded.model,
                chosen,
                calibration=_calibration(calibration),
                tokenizer=loaded.tokenizer,
                device=find_device(device),
            )
        if writes:
            print_plan(plan)
        return
    with joined(find_device(device)) as writes:
        try:
            report = parofx.quantize(
                loaded.model, chosen, calibration=_calibration(calibration), tokenizer=loaded.tokenizer, progress=True
            )
        except KeyboardInterrupt:
            kept = f"what is finished lies in {work_dir}; give the same command again to go on"
            errors_console.print(kept if work_dir else "nothing was kept; with --work-dir a stopped run can go on")
            raise
    if not writes:
        return
    with errors_console.status(f"saving to {output} …"):
        parofx.save_pretrained(loaded.model, output, tokenizer=loaded.tokenizer, overwrite=overwrite)
        report.save(output / REPORT_FILE)
    console.print(str(report), highlight=False)
    if report.kept_float:
        table = Table("kept float", "reason", "layers", box=None, header_style="bold")
        for reason, count in report.reasons().items():
            names = [linear.name for linear in report.kept_float if linear.reason is reason]
            table.add_row(names[0] + (", …" if count > 1 else ""), str(reason), str(count))
        console.print(table)
    console.print(f"saved to {output}; look at it with: parofx inspect {output}", highlight=False)


def _calibration(sources: list[str] | None) -> Any:
    """Return the `calibration` argument: a single source by its name, several as documents of each in turn."""
    if not sources:
        return None
    if len(sources) == 1:
        return sources[0]
    from parofx.calibration.sources import interleave, load_texts

    return interleave(load_texts(source) for source in sources)
