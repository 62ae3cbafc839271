"""`parofx tune`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from parofx.cli.common import console, errors_console
from parofx.errors import ConfigError

_TOKENS = (1, 4, 16, 64)


def tune(
    shapes: Annotated[
        list[str], typer.Argument(metavar="KxN …", help="Layers, in_features x out_features: 4096x6144.")
    ],
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-m", help="Upper ends of token ranges; by default 1, 4, 16, 64.")
    ] = None,
    device: Annotated[str, typer.Option(help="A CUDA device.")] = "cuda",
) -> None:
    """Time the int4 kernels' launch parameters on this GPU and keep the fastest for these layers.

    \b
    parofx tune 4096x6144 4096x28672 14336x4096

    Results go to the user's cache folder (or PAROFX_CACHE), and are used from then on.
    """  # noqa: D301
    layers = [_parse(shape) for shape in shapes]
    import torch

    from parofx.triton_ops.tuning import Shape, tune_device

    todo = [Shape(count, *layer) for layer in layers for count in sorted(tokens or _TOKENS)]
    with errors_console.status(f"timing {len(todo)} shapes …"):
        file = tune_device(todo, torch.device(device))
    console.print(f"wrote {file}", highlight=False, soft_wrap=True)


def _parse(shape: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", shape)
    if match is None:
        raise ConfigError(f"a layer must be written KxN, as 4096x6144, got {shape!r}")
    sizes = int(match[1]), int(match[2])
    if sizes[0] % 128 or sizes[1] % 8 or 0 in sizes:
        raise ConfigError(f"a layer's K must be a multiple of 128 and N of 8, got {shape!r}")
    return sizes
