"""`parofx eval`."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    check_sources,
    console,
    load,
    require_tokenizer,
    write_json,
)
from parofx.errors import ConfigError

if TYPE_CHECKING:
    from parofx.models import LoadedModel


def evaluate(
    model: Source,
    text: Annotated[
        str | None,
        typer.Option(help="Held-out text: a file, a folder or a dataset, as for quantize.", show_default=False),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-eval; may be repeated. Needs `parofx\\[eval]`.", show_default=False),
    ] = None,
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
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task; all without it.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a task's prompt; what the task says without it.")
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder with task files of your own; may be repeated.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
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
    """Measure a model: on a text, against the float model, and on tasks.

    A text gives perplexity and, with a reference, KL divergence and top-1 agreement. Tasks are those of
    lm-evaluation-harness; with a reference they are run on both models.

    \b
    parofx eval llama-paro --text held_out.txt
    parofx eval llama-paro --text held_out.txt --reference ./llama --windows 100
    parofx eval llama-paro --text wikitext:wikitext-2-raw-v1:test --compile --json out.json
    parofx eval llama-paro --task arc_easy --task gsm8k --limit 200 --reference ./llama
    """  # noqa: D301
    if text is None and not task:
        raise ConfigError("there is nothing to measure: give --text, --task or both")
    if task and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--task needs lm-evaluation-harness: pip install 'parofx[eval]'")
    if task:
        from parofx.integrations.lm_eval import find_tasks

        find_tasks(task, include_path or ())  # before the work, not after it
    if text is not None:
        check_sources([text], split="test")
    loaded = load(
        model, revision=revision, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    require_tokenizer(loaded, model, "evaluation")
    other = None
    if reference is not None:
        other = load(
            reference, revision=None, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        ).model

    measured: dict[str, Any] = {"model": model, "reference": reference, "text": text}
    if text is not None:
        measured |= _on_text(text, loaded, other, windows, seqlen, batch_size, compile)
        _write(json_file, measured)  # what comes may fail
    if task:
        options = {"include": include_path or (), "limit": limit, "fewshot": fewshot, "batch_size": batch_size or 8}
        measured["tasks"] = _on_tasks(task, loaded, other, options, compile)
        _write(json_file, measured)


def _write(path: Path | None, measured: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, measured)


def _on_text(
    text: str, loaded: LoadedModel, other: Any, windows: int | None, seqlen: int, batch_size: int | None, compile: bool
) -> dict[str, Any]:
    """Print what the text says about the model; return it."""
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
    found = result.to_dict()
    if other is not None:
        with evaluation.reference_head(loaded.model, other) as quantized:
            if quantized:
                rest = evaluation.evaluate(measured, tokens, reference=other, batch_size=batch_size, progress=True)
                found["kl_mean_float_head"] = rest.kl_mean
                without = _with_error(rest.kl_mean, rest.kl_error)
                console.print(f"KL with a float output head {without}: the rest is the head's", highlight=False)
    return found


def _on_tasks(
    tasks: list[str], loaded: LoadedModel, other: Any, options: dict[str, Any], compile: bool
) -> list[dict[str, Any]]:
    """Print the scores of the model and of the reference, if there is one; return the model's, with both."""
    from parofx.integrations.lm_eval import run_tasks

    scores = run_tasks(loaded.model, loaded.tokenizer, tasks, compile=compile, **options)
    floats = run_tasks(other, loaded.tokenizer, tasks, **options) if other is not None else ()
    expected = {(score.task, score.metric): score for score in floats}
    table = Table(box=None)
    for heading in ("task", "metric", "samples", "score", *(("reference",) if floats else ())):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    rows = []
    for score in scores:
        reference = expected.get((score.task, score.metric))
        cells = [score.task, score.metric, str(score.samples or ""), _with_error(score.value, score.error)]
        if floats:
            cells.append("" if reference is None else _with_error(reference.value, reference.error))
        table.add_row(*cells)
        rows.append(asdict(score) | {"reference": None if reference is None else reference.value})
    console.print(table)
    return rows


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
