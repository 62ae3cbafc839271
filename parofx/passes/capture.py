"""`capture`: a model as one graph of ATen operators, parameters as `get_attr` nodes (stage FLOAT)."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from parofx.errors import CaptureError
from parofx.nn import ParoLinear
from parofx.passes.guards import keep_guards
from parofx.passes.normalize import Normalize
from parofx.pipeline import Pipeline

logger = logging.getLogger("parofx")


def capture(model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> GraphModule:
    """Capture a model with `torch.export` and normalize the graph.

    Args:
        model: any module; it is captured in eval mode and left in the mode it was in.
        *example_inputs: positional inputs. One mapping stands for keyword inputs, as tokenizers return them.
        **example_kwargs: keyword inputs.

    Returns:
        A FLOAT graph that shares the model's parameters. Sizes of the inputs' dimensions are dynamic where the
        model allows.

    Raises:
        CaptureError: if the model cannot be exported, with the exporter's reason.
    """
    if len(example_inputs) == 1 and isinstance(example_inputs[0], Mapping) and not example_kwargs:
        example_kwargs, example_inputs = dict(example_inputs[0]), ()
    example_kwargs = complete_inputs(model, example_kwargs)
    gm = _export(model, *_distinct(example_inputs, example_kwargs))
    gm.meta["parofx_inputs"] = _input_names(gm, example_inputs, example_kwargs)
    return Pipeline([Normalize()]).run(gm)


def complete_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword inputs with what a calibration forward of a Transformers model needs besides.

    A cache is of no use in a single forward and would turn into graph outputs; a decoder that is given only encoder
    tokens reads the same ones, under the same mask.
    """
    return complete_named(inspect.signature(model.forward).parameters, inputs)


def complete_named(accepted: Container[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `complete_inputs` does for a model, or a captured graph, that accepts these names."""
    completed = dict(inputs)
    if "use_cache" in accepted:
        completed.setdefault("use_cache", False)
    if "decoder_input_ids" in accepted and "input_ids" in completed and "decoder_inputs_embeds" not in completed:
        given = "decoder_input_ids" in completed
        completed.setdefault("decoder_input_ids", completed["input_ids"])
        if not given and "decoder_attention_mask" in accepted and "attention_mask" in completed:
            completed.setdefault("decoder_attention_mask", completed["attention_mask"])
    return completed


def _distinct(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with tensors that occur twice copied: the exporter would give both the same sizes for good."""
    seen: set[int] = set()

    def distinct(value: object) -> object:
        if not isinstance(value, Tensor) or id(value) not in seen:
            seen.add(id(value))
            return value
        return value.clone()

    return pytree.tree_map(distinct, args), pytree.tree_map(distinct, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if isinstance(module, ParoLinear):
            # The exporter runs the model on tensors that hold nothing: what the graph is to read packed must be by now.
            module.pack_()
    model.eval()
    try:
        with torch.no_grad(), _explicit_signature(model, kwargs):
            program = _program(model, args, kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    gm = program.module(check_guards=False)
    keep_guards(gm, getattr(program.module(), "_guards_fn", None))
    return gm


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        shapes = _dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as dynamic_error:
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} could not be captured as one graph by torch.export: {error}\n"
                "Check that the model runs on these inputs. If it does, torch.compile(model, backend='paro') may take "
                "it, which captures more models and needs no export"
            ) from dynamic_error
        reason = next(iter(str(dynamic_error).strip().splitlines()), type(dynamic_error).__name__)
        logger.warning(
            "%s is captured for the sizes of its example inputs alone: with dynamic sizes, torch.export says: %s",
            type(model).__name__,
            reason,
        )
        return program


@contextmanager
def _explicit_signature(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let a `forward(…, **kwargs)` name what it is given, while a model is exported.

    The exporter takes dynamic shapes by parameter, and counts what goes into `**kwargs` twice.
    """
    signature = inspect.signature(model.forward)
    named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    extra = [name for name in kwargs if name not in {one.name for one in named}]
    if not extra or len(named) == len(signature.parameters):
        yield
        return
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    parameters = [*named, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)]
    explicit.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    model.forward = explicit
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def _dynamic_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes: dict[str, Any] = pytree.tree_map(_dynamic_sizes, dict(bound))
    return shapes


def _dynamic_sizes(value: object) -> dict[int, Any] | None:
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None


def _input_names(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    return len(args), tuple(kwargs)
