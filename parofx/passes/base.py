"""What a pass is: an object that takes a graph from one stage to the next and says what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch.fx import GraphModule

from parofx.errors import PassError


class Stage(StrEnum):
    """The forms a graph goes through; each runs, prints and can be checked on its own."""

    FLOAT = "FLOAT"
    PREPARED = "PREPARED"
    CALIBRATED = "CALIBRATED"
    CONVERTED = "CONVERTED"
    LOWERED = "LOWERED"


@dataclass
class PassReport:
    """What one run of a pass did.

    `changed` counts rewrites; `matched` names what was rewritten and `skipped` what was not, each with a reason.
    """

    name: str
    changed: int = 0
    matched: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options.

    `consumes` holds the stages it takes, None for a graph that carries none. `produces` is what it makes of them; where
    that depends on the graph, it holds every possible one and `run` marks the graph itself.

    `run` mutates the graph in place, is idempotent, keeps `meta`, and never lints, recompiles, dumps or times: the
    `Pipeline` does.
    """

    name: ClassVar[str]

    @property
    def consumes(self) -> tuple[Stage | None, ...]:
        """The stages it takes; a class variable."""
        ...

    @property
    def produces(self) -> Stage | tuple[Stage, ...]:
        """The stage it makes, or every one it may make; a class variable."""
        ...

    def run(self, gm: GraphModule) -> PassReport:
        """Rewrite `gm` in place."""
        ...


_REGISTRY: dict[str, type[Pass]] = {}
_PassType = TypeVar("_PassType", bound=type[Pass])


def register(cls: _PassType) -> _PassType:
    """Enter a pass class into the catalogue (`parofx passes`)."""
    _REGISTRY[cls.name] = cls
    return cls


def registered() -> list[type[Pass]]:
    """Return the pass classes that were entered so far."""
    return list(_REGISTRY.values())


def in_stage_order(classes: Iterable[type[Pass]]) -> list[type[Pass]]:
    """Return pass classes in the order the stages run; those of equal stages stay as they are."""
    order = list(Stage)

    def position(cls: Any) -> tuple[int, int]:
        first = next(stage for stage in cls.consumes if stage is not None)
        return order.index(produced(cls)[0]), order.index(first)

    return sorted(classes, key=position)


def produced(cls: Any) -> tuple[Stage, ...]:
    """Return the stages that a pass class may make."""
    return cls.produces if isinstance(cls.produces, tuple) else (cls.produces,)


def has_stage(gm: GraphModule) -> bool:
    """Say whether a graph carries a stage."""
    return "parofx_stage" in gm.meta


def stage_of(gm: GraphModule) -> Stage:
    """Return the stage of a graph.

    Raises:
        PassError: if the graph carries none, that is, it did not come from `parofx.capture` or `normalize`.
    """
    stage = gm.meta.get("parofx_stage")
    if stage is None:
        raise PassError("the graph carries no stage: pass it through parofx.capture or the normalize pass first")
    return Stage(stage)


def set_stage(gm: GraphModule, stage: Stage) -> None:
    """Mark a graph as being of a stage."""
    gm.meta["parofx_stage"] = stage.value
