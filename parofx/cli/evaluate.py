"""`parofx eval`."""

from __future__ import annotations

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
from parofx.errors import DataError


def evaluate(
    model: Source,
    text: Annotated[
        str, typer.Option(help="Held-out text: a file, a folder or a dataset, as for quantize.", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The float model, for KL divergence and top-1 agreement.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many windows; all text without it.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows per forward; chosen by memory without it.")
    ] = None,
    compile: Annotated[
        bool, typer.Option(help="Compile the model with torch.compile(backend='paro'): pays off on long texts.")
    ] = False,
    json_file: JsonFile = None,
    revision: Revision = None,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure perplexity on a text and, against the float model, KL divergence and top-1 agreement.

    \b
    parofx eval llama-paro --text held_out.txt
    parofx eval llama-paro --text held_out.txt --reference ./llama --windows 100
    parofx eval llama-paro --text wikitext:wikitext-2-raw-v1:test --compile --json out.json
    """  # noqa: D301
    loaded = load(
        model, revision=revision, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if loaded.tokenizer is None:
        raise DataError(f"{model} has no tokenizer: evaluation reads text")
    other = None
    if reference is not None:
        other = load(
            reference, revision=None, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        ).model

    import torch

    from parofx import evaluation
    from parofx.calibration.data import load_texts, pack_tokens

    tokens = pack_tokens(load_texts(text, split="test"), loaded.tokenizer, seqlen=seqlen)[:windows]
    measured: Any = torch.compile(loaded.model, backend="paro") if compile else loaded.model
    result = evaluation.evaluate(measured, tokens, reference=other, batch_size=batch_size, progress=True)

    table = Table(box=None, show_header=False)
    table.add_row("tokens", f"{result.tokens} in {result.windows} windows of {seqlen}")
    table.add_row("perplexity", _with_error(result.perplexity, result.perplexity_error))
    if result.kl_mean is not None and result.top1_agreement is not None:
        table.add_row("perplexity of the reference", f"{result.reference_perplexity:.4f}")
        table.add_row("KL divergence (nats)", _with_error(result.kl_mean, result.kl_error))
        table.add_row("KL, 99th percentile", f"{result.kl_p99:.4f}")
        table.add_row("top-1 agreement", f"{result.top1_agreement:.2%}")
    table.add_row("seconds", f"{result.seconds:.1f}")
    console.print(table)
    if json_file is not None:
        write_json(json_file, {"model": model, "reference": reference, "text": text} | result.to_dict())


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
