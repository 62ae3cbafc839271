"""`parofx inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from parofx.cli.common import JsonFile, console, in_a_folder, size, write_json
from parofx.cli.quantize import REPORT_FILE
from parofx.errors import CheckpointError, one_per_line


@dataclass(frozen=True)
class Layer:
    """One quantized linear, as its tensors' headers say; `relative_error` is of the report beside the checkpoint."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    krot: int
    bytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Summary:
    """A checkpoint: its layers, and the bytes of quantized and of other tensors."""

    layers: tuple[Layer, ...]
    quantized_bytes: int
    float_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight."""
        return 8 * self.quantized_bytes / sum(layer.in_features * layer.out_features for layer in self.layers)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a PARO checkpoint.", show_default=False)],
    sort: Annotated[Literal["name", "error", "size"], typer.Option(help="Order of the layers.")] = "name",
    json_file: JsonFile = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write the report of the run that made it as an HTML page.", dir_okay=False, callback=in_a_folder
        ),
    ] = None,
) -> None:
    """List the quantized layers of a checkpoint. Reads headers only, whatever the checkpoint's size.

    \b
    parofx inspect llama-paro
    parofx inspect llama-paro --sort error --json layers.json
    parofx inspect llama-paro --page report.html
    """  # noqa: D301
    summary = summarize(checkpoint)
    layers = list(summary.layers)
    if sort == "name":
        layers.sort(key=lambda layer: _natural(layer.name))
    elif sort == "size":
        layers.sort(key=lambda layer: -layer.bytes)
    elif sort == "error":
        layers.sort(key=lambda layer: -(layer.relative_error or 0.0))
    table = Table("layer", "N × K", "bits", "group size", "krot", "relative error", "size", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for layer in layers:
        error = "–" if layer.relative_error is None else f"{layer.relative_error:.2e}"
        table.add_row(
            layer.name,
            f"{layer.out_features} × {layer.in_features}",
            str(layer.bits),
            str(layer.group_size),
            str(layer.krot),
            error,
            size(layer.bytes),
        )
    console.print(table)
    total = summary.quantized_bytes + summary.float_bytes
    console.print(
        f"{len(layers)} quantized layers, {summary.bits_per_weight:.3f} bits per weight; "
        f"{size(summary.quantized_bytes)} quantized + {size(summary.float_bytes)} float = {size(total)}",
        highlight=False,
    )
    stored = _stored_report(checkpoint)
    _print_blocks(stored.get("blocks", ()))
    if page is not None:
        if not stored:
            raise CheckpointError(f"{checkpoint} holds no {REPORT_FILE}: parofx quantize writes it beside a checkpoint")
        from parofx.report_page import save_page

        save_page(stored, page)
        console.print(f"wrote {page}", highlight=False)
    if json_file is not None:
        write_json(json_file, asdict(summary) | {"bits_per_weight": summary.bits_per_weight})


def summarize(folder: Path) -> Summary:
    """Return what the headers of a checkpoint's files say.

    Raises:
        CheckpointError: if it is no PARO checkpoint, or its tensors contradict its configuration.
    """
    from parofx import packing
    from parofx.checkpoint import files, layout

    if not folder.is_dir():
        got = "is a file" if folder.exists() else "is not there"
        raise CheckpointError(f"expected the folder of a PARO checkpoint, as parofx quantize writes it; {folder} {got}")
    quantization = files.read_json(folder / files.CONFIG_FILE).get("quantization_config") or {}
    if not quantization:
        raise CheckpointError(
            f"{folder} is not quantized, its {files.CONFIG_FILE} has no quantization_config: parofx explain {folder} "
            "tells what would be quantized, parofx quantize does it"
        )
    problems = layout.why_not_readable(quantization)
    shards = None if problems else files.open_folder(folder)
    quantized = {} if shards is None else layout.find_quantized(shards.tensors)
    problems += layout.why_not_quantized(quantized, quantization) if quantized else []
    if problems or shards is None:
        raise CheckpointError(f"{folder} is no readable PARO checkpoint:\n{one_per_line(problems)}")
    errors = _stored_errors(folder)
    layers = []
    for name, tensors in quantized.items():
        (in_features, _), (groups, out_features) = tensors["qweight"].shape, tensors["scales"].shape
        layers.append(
            Layer(
                name=name,
                out_features=out_features,
                in_features=in_features,
                bits=packing.packed_bits(tensors["qweight"], tensors["scales"]),
                group_size=in_features // groups,
                krot=tensors["pairs"].shape[0],
                bytes=sum(tensor.nbytes for tensor in tensors.values()),
                relative_error=errors.get(name),
            )
        )
    in_layers = sum(layer.bytes for layer in layers)
    return Summary(tuple(layers), in_layers, sum(tensor.nbytes for tensor in shards.tensors.values()) - in_layers)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _print_blocks(blocks: Sequence[Mapping[str, Any]]) -> None:
    """Show by which factor each stage lowered the loss of each trained block."""
    if not blocks:
        return
    names = list(dict.fromkeys(stage["name"] for block in blocks for stage in block["stages"]))
    table = Table("block", *names, "held-out loss", box=None)
    for block in blocks:
        stages = {stage["name"]: stage for stage in block["stages"]}
        changes = [
            "–" if name not in stages else f"×{stages[name]['after'] / (stages[name]['before'] or 1.0):.3f}"
            for name in names
        ]
        table.add_row(block["name"], *changes, f"{block['stages'][-1]['after']:.2e}")
    console.print(table)


def _stored_report(folder: Path) -> dict[str, Any]:
    from parofx.checkpoint import files

    report = folder / REPORT_FILE
    return files.read_json(report) if report.is_file() else {}


def _stored_errors(folder: Path) -> dict[str, float]:
    return {linear["name"]: linear["relative_error"] for linear in _stored_report(folder).get("linears", ())}
