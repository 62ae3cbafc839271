"""The `torch.compile` backend `"paro"`.

    fast = torch.compile(model, backend="paro", options={...})

A graph that holds `ParoLinear`s is lowered. A float graph is first prepared, fitted on weights alone, and converted;
one log line says so. What is left goes to Inductor. Passes run before AOTAutograd, where the real tensors are at hand.

Packed tensors that a provider made from others are computed once, shared between graphs, and checked at every call: if
a parameter was changed or replaced, they are made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from parofx import kept_float
from parofx.compiled_graph import CompiledGraph, copy_graph
from parofx.config import ACTIVATIONS, Activations, CalibrationConfig, ParoConfig
from parofx.dynamo import Owner, bind_parameters, guard_attribute, owners, placeholders
from parofx.errors import ConfigError, LoweringError
from parofx.passes.base import Stage, stage_of
from parofx.passes.calibrate import Calibrate
from parofx.passes.convert import Convert
from parofx.passes.fuse_producers import FuseProducers
from parofx.passes.graph import STAYS_FLOAT, binding
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower
from parofx.passes.merge_siblings import MergeSiblings
from parofx.passes.normalize import Normalize
from parofx.passes.transforms import find_transforms
from parofx.pipeline import Pipeline
from parofx.report import FloatReason
from parofx.training import training_calls, training_modules

logger = logging.getLogger("parofx")

_CONFIG_OPTIONS = (
    "bits", "group_size", "krot", "modules_to_not_convert", "share_siblings", "lm_head", "mixed_group_size", "steps",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class BackendOptions:
    """What `options={...}` may hold: fields of `ParoConfig` for float models, and what steers the lowering."""

    config: ParoConfig = field(default_factory=ParoConfig)
    provider: str | None = None
    activations: Activations = "float"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """Read `torch.compile`'s `options` and `mode`.

        Raises:
            ConfigError: for an unknown option, listing the accepted ones, or a wrong value.
        """
        given = dict(options or {})
        accepted = (*_CONFIG_OPTIONS, "provider", "activations", "inductor")
        unknown = sorted(set(given) - set(accepted))
        if unknown:
            raise ConfigError(f"unknown options {unknown} for backend 'paro'; accepted are {list(accepted)}")
        modes = list_mode_options()
        if mode is not None and mode not in modes:
            raise ConfigError(f"mode must be one of {sorted(modes)} for backend 'paro', got {mode!r}")
        patches, provider = given.pop("inductor", {}), given.pop("provider", None)
        if not isinstance(patches, Mapping):
            raise ConfigError(f"inductor must be a mapping of Inductor's options for backend 'paro', got {patches!r}")
        if provider is not None and not isinstance(provider, str):
            raise ConfigError(f"provider must be a provider's name for backend 'paro', got {provider!r}")
        inductor = {**(modes[mode] if mode else {}), **patches}
        activations = given.pop("activations", "float")
        if activations not in ACTIVATIONS:
            raise ConfigError(f"activations must be one of {ACTIVATIONS} for backend 'paro', got {activations!r}")
        fitting = {name: given.pop(name) for name in ("steps", "seed") if name in given}
        calibration = CalibrationConfig(recipe="data-free", **fitting)
        return cls(ParoConfig(**given, calibration=calibration), provider, activations, inductor)


def paro(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    In eval mode with grad enabled the graph runs without recording gradients, so that a later `backward` raises; where
    an input other than a parameter requires one, the differentiable reference runs instead of kernels.

    Raises:
        ConfigError: for unknown options.
        LoweringError: if a module is in training mode, or an operator has no lowering.
    """
    settings = BackendOptions.from_options(options, mode)
    names = bind_parameters(gm, example_inputs)
    ways = owners(gm, names)
    _refuse_training(gm, ways.values())
    modules = {index: [owner.module for owner in way] for index, way in ways.items()}
    _keep_float(gm, ways, kept_float.float_reasons({index: example_inputs[index] for index in names}, modules))
    differentiable = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad
        for index, value in enumerate(example_inputs)
        if index not in names
    )
    lower = partial(
        _lower,
        config=settings.config,
        activations=settings.activations,
        provider="reference" if differentiable else settings.provider,
        embeddings=kept_float.embedding_tables({id(way[-1]): way[-1] for way in modules.values() if way}.values()),
    )
    # Dynamo reads its own graph again after this: the passes rewrite a copy.
    lowered = lower(copy_graph(gm))
    if lowered is None:
        return compile_fx(gm, list(example_inputs), config_patches=dict(settings.inductor))  # type: ignore[return-value]
    return CompiledGraph(
        lowered,
        copy_graph(gm),
        names,
        example_inputs,
        lower=lower,
        differentiable=differentiable,
        inductor=settings.inductor,
    )


def _refuse_training(gm: GraphModule, ways: Iterable[tuple[Owner, ...]]) -> None:
    training = {"modules": training_modules(ways), "calls": training_calls(gm)}
    for what, names in training.items():
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            raise LoweringError(
                f"backend 'paro' compiles for inference, and these {what} are in training mode: {shown}; "
                "call model.eval() first"
            )


def _keep_float(gm: GraphModule, ways: Mapping[int, tuple[Owner, ...]], reasons: Mapping[int, FloatReason]) -> None:
    """Note which inputs stay float: a graph break may put them into a graph that does not show why."""
    nodes = placeholders(gm)
    for index, way in ways.items():
        bound = binding(nodes[index])
        if index in reasons:
            nodes[index].meta[STAYS_FLOAT] = reasons[index]
        if way and bound is not None and bound.tensor.dim() == 2:
            guard_attribute(way[0], kept_float.MARK)


def _lower(
    gm: GraphModule,
    *,
    config: ParoConfig,
    provider: str | None,
    activations: Activations,
    embeddings: tuple[Tensor, ...],
) -> GraphModule | None:
    """Run the passes on a Dynamo graph whose parameters are bound; None if it holds nothing to lower."""
    # Fits and packed tensors are the same under autocast.
    with torch.no_grad(), torch._C._DisableAutocast():
        Pipeline([Normalize()]).run(gm)
        if stage_of(gm) is Stage.FLOAT:
            insert = Pipeline([InsertTransforms(config, embeddings=embeddings)])
            insert.run(gm)
            if not insert.reports[0].matched:
                return None
            _announce(gm)
            Pipeline([Calibrate(config, reuse=True), Convert(reuse=True)]).run(gm)
        fuse = FuseProducers(provider=provider, activations=activations)
        return Pipeline([MergeSiblings(), fuse, Lower(provider=provider, activations=activations)]).run(gm)


#: Float weights the user was told of: prefill, decode and refreshed graphs do not say it again.
_announced: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _announce(gm: GraphModule) -> None:
    weights = [linear.parameter for transform in find_transforms(gm) for linear in transform.linears]
    fresh = [weight for weight in weights if weight not in _announced]
    if fresh:
        _announced.update(dict.fromkeys(fresh))
        logger.warning(
            "paro: the model is float; fitting %d linears on their weights alone. "
            "parofx.quantize(model, calibration=...) before compiling is more accurate",
            len(fresh),
        )
