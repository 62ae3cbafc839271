"""`parofx passes`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.table import Table

from parofx.cli.common import console
from parofx.errors import ConfigError


def passes(
    name: Annotated[str | None, typer.Argument(help="Show all about this pass.", show_default=False)] = None,
) -> None:
    """List the passes: the stages a graph goes through, and what each pass does.

    \b
    parofx passes
    parofx passes convert
    """  # noqa: D301
    import parofx.passes

    registry = {cls.name: cls for cls in parofx.passes.registry()}
    if name is None:
        table = Table("pass", "stages", "what it does", box=None)
        for cls in registry.values():
            table.add_row(cls.name, _stages(cls), _documentation(cls).partition("\n")[0])
        console.print(table)
        return
    if name not in registry:
        raise ConfigError(f"no pass is called {name!r}; there are {sorted(registry)}")
    cls = registry[name]
    console.print(f"{cls.name}: {_stages(cls)}\n\n{_documentation(cls)}", markup=False, highlight=False)
    for option in dataclasses.fields(cls):  # type: ignore[arg-type]  # every pass is a dataclass
        default = "" if option.default is dataclasses.MISSING else f" = {option.default!r}"
        console.print(f"  {option.name}: {option.type}{default}", markup=False, highlight=False)


def _stages(cls: Any) -> str:
    from parofx.passes.base import produced

    return f"{' | '.join(stage or 'no stage' for stage in cls.consumes)} → {' | '.join(produced(cls))}"


def _documentation(cls: Any) -> str:
    return inspect.getdoc(cls) or ""
