"""Command-line options made from the fields of the configuration dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from parofx.calibration.recipes import RECIPES
from parofx.config import CalibrationConfig, ParoConfig
from parofx.errors import ConfigError

#: The field of `ParoConfig` that holds the other dataclass; its own fields become options instead.
_NESTED = "calibration"


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**options` by one option per field of `ParoConfig` and `CalibrationConfig`.

    Help texts are the fields' descriptions in the class docstrings. The command gets only what the user gave, so that
    a configuration file can fill in the rest (`build_config`).
    """
    return _with_options(command, [*_options(ParoConfig, "Quantization"), *_options(CalibrationConfig, "Calibration")])


def quantization_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's `**options` by one option per field of `ParoConfig`; as `config_options` for the rest."""
    return _with_options(command, _options(ParoConfig, "Quantization"))


def _with_options(command: Callable[..., None], generated: list[inspect.Parameter]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [item.name for item in own]

    def wrapper(**values: Any) -> None:
        given = {name: values.pop(name) for name in list(values) if name not in names}
        command(**values, **{name: value for name, value in given.items() if value not in (None, [])})

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    parameters = [*own, *generated]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {item.name: item.annotation for item in parameters}
    return wrapper


def build_config(file: Path | None, given: Mapping[str, Any]) -> ParoConfig:
    """Return the configuration of a JSON file (`ParoConfig.to_dict`'s form), overridden by the options given.

    Raises:
        ConfigError: if the file is no JSON object, or an option is unknown or has a wrong value.
    """
    base: dict[str, Any] = {}
    if file is not None:
        try:
            base = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as a JSON object of options: {error}") from error
        if not isinstance(base, dict) or not isinstance(base.get(_NESTED, {}), dict):
            raise ConfigError(f"{file}: expected a JSON object, with an object for {_NESTED!r}")
    try:
        return _config(base, given)
    except ConfigError as error:
        if file is None:
            raise
        _config({}, given)  # what is wrong without the file is not the file's
        raise ConfigError(f"{file}: {error}") from error


def _config(base: Mapping[str, Any], given: Mapping[str, Any]) -> ParoConfig:
    nested = {item.name for item in dataclasses.fields(CalibrationConfig)}
    calibration = base.get(_NESTED, {}) | {name: value for name, value in given.items() if name in nested}
    outer = {**base, **{name: value for name, value in given.items() if name not in nested}, _NESTED: calibration}
    if str(outer.get("lm_head", "")).isdigit():
        outer["lm_head"] = int(outer["lm_head"])
    return ParoConfig.from_dict(outer)


def _options(cls: type, panel: str) -> list[inspect.Parameter]:
    hints, helps = typing.get_type_hints(cls), _descriptions(cls)
    parameters = []
    for item in dataclasses.fields(cls):
        if item.name == _NESTED:
            continue
        default = _shown(item.default)
        if cls is CalibrationConfig and item.name in RECIPES["fast"]:
            default = f"by recipe, fast: {_shown(RECIPES['fast'][item.name])}"
        option = typer.Option(help=helps[item.name], rich_help_panel=panel, show_default=default or False)
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_option_type(hints[item.name]), option],
            )
        )
    return parameters


def _option_type(hint: Any) -> Any:
    """Return the option's type: a tuple is an option given several times, everything may be left out."""
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]] | None  # type: ignore[misc]
    if typing.get_origin(hint) is typing.Literal:
        # The command line knows strings only; `build_config` reads numbers among them.
        return typing.Literal[tuple(map(str, typing.get_args(hint)))] | None
    return hint | None


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(str(value) for value in default)
    return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _descriptions(cls: type) -> dict[str, str]:
    """Return the texts of a docstring's `Args:`, by name."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    texts = {name: re.sub(r"`+", "", " ".join(body.split())) for name, body in entries}
    return {name: text[:1].upper() + text[1:] for name, text in texts.items()}
