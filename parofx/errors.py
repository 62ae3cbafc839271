"""The exceptions parofx raises. Every message says what was expected, what came, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class ParoError(Exception):
    """Base class of every error parofx raises on purpose."""


class ConfigError(ParoError, ValueError):
    """An option has a wrong value, or does not exist."""


class ShapeError(ParoError, ValueError):
    """A tensor has a wrong shape or dtype for the operation."""


class DataError(ParoError, ValueError):
    """Calibration or evaluation data is empty, malformed or not finite."""


class CaptureError(ParoError, RuntimeError):
    """A model could not be captured as one graph."""


class PassError(ParoError, RuntimeError):
    """A pass was given a graph of the wrong stage, or broke an invariant."""


class LoweringError(ParoError, RuntimeError):
    """A graph could not be lowered for its target."""


class CheckpointError(ParoError, ValueError):
    """A checkpoint is incomplete, contradictory or not in the PARO format."""


def one_per_line(problems: Iterable[str], *, limit: int = 20) -> str:
    """Return the problems as an indented list, cut after `limit` lines with a count of the rest."""
    lines = list(problems)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  - … and {len(lines) - limit} more")
    return "\n".join(shown)
