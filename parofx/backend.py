"""The `torch.compile` backend `"paro"`.

    fast = torch.compile(model, backend="paro", options={...})

A graph that holds `ParoLinear`s is lowered. A float graph is first prepared, fitted on weights alone, and converted;
one log line says so. What is left goes to Inductor. Passes run before AOTAutograd, where the real tensors are at hand.

Packed tensors that a provider made from others are computed once, shared between graphs, and checked at every call: if
a parameter was changed or replaced, they are made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import Graph, GraphModule, Node

from parofx.config import CalibrationConfig, ParoConfig
from parofx.dynamo import bind_parameters, placeholders, rebind_parameters, training_modules
from parofx.errors import ConfigError, LoweringError
from parofx.passes.base import Stage, stage_of
from parofx.passes.calibrate import Calibrate
from parofx.passes.convert import Convert
from parofx.passes.derived import State, unchanged
from parofx.passes.graph import binding, get_attribute
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.lower import Lower
from parofx.passes.merge_siblings import MergeSiblings
from parofx.passes.normalize import Normalize
from parofx.pipeline import Pipeline

logger = logging.getLogger("parofx")

_CONFIG_OPTIONS = (
    "bits", "group_size", "krot", "modules_to_not_convert", "share_siblings", "mixed_group_size", "steps", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class BackendOptions:
    """What `options={...}` may hold: fields of `ParoConfig` for float models, `provider`, Inductor's own options."""

    config: ParoConfig = field(default_factory=ParoConfig)
    provider: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """Read `torch.compile`'s `options` and `mode`.

        Raises:
            ConfigError: for an unknown option, listing the accepted ones, or a wrong value.
        """
        given = dict(options or {})
        accepted = (*_CONFIG_OPTIONS, "provider", "inductor")
        unknown = sorted(set(given) - set(accepted))
        if unknown:
            raise ConfigError(f"unknown options {unknown} for backend 'paro'; accepted are {list(accepted)}")
        inductor = dict(list_mode_options(mode)) if mode else {}
        inductor |= given.pop("inductor", {})
        provider = given.pop("provider", None)
        fitting = {name: given.pop(name) for name in ("steps", "seed") if name in given}
        calibration = CalibrationConfig(recipe="data-free", **fitting)
        return cls(ParoConfig(**given, calibration=calibration), provider, inductor)


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
    training = training_modules([example_inputs[index] for index in names])
    if training:
        shown = ", ".join(training[:3]) + (" …" if len(training) > 3 else "")
        raise LoweringError(
            f"backend 'paro' compiles for inference, and these modules are in training mode: {shown}; "
            "call model.eval() first"
        )
    differentiable = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad
        for index, value in enumerate(example_inputs)
        if index not in names
    )
    source = _copy(gm)
    # Dynamo reads its own graph again after this: the passes rewrite a copy, and a refresh needs another.
    lowered = _lower(_copy(gm), settings, differentiable)
    if lowered is None:
        return compile_fx(gm, list(example_inputs), config_patches=dict(settings.inductor))  # type: ignore[return-value]
    return _CompiledGraph(lowered, source, names, example_inputs, settings, differentiable)


def _lower(gm: GraphModule, settings: BackendOptions, differentiable: bool) -> GraphModule | None:
    """Run the passes on a Dynamo graph whose parameters are bound; None if it holds nothing to quantize."""
    with torch.no_grad():
        Normalize().run(gm)
        if stage_of(gm) is Stage.FLOAT:
            insert = Pipeline([InsertTransforms(settings.config)])
            insert.run(gm)
            found = len(insert.reports[0].matched)
            if not found:
                return None
            logger.warning(
                "paro: the model is float; fitting %d linears on their weights alone. "
                "parofx.quantize(model, calibration=...) before compiling is more accurate",
                found,
            )
            Pipeline([Calibrate(settings.config, reuse=True), Convert(reuse=True)]).run(gm)
        provider = "reference" if differentiable else settings.provider
        return Pipeline([MergeSiblings(), Lower(provider=provider)]).run(gm)


class _CompiledGraph:
    """An Inductor-compiled graph and the packed tensors it reads besides its inputs."""

    def __init__(
        self,
        lowered: GraphModule,
        source: GraphModule,
        names: dict[int, str],
        example_inputs: Sequence[Any],
        settings: BackendOptions,
        differentiable: bool,
    ) -> None:
        self._source = source
        self._names = names
        self._settings = settings
        self._differentiable = differentiable
        nodes = placeholders(lowered)
        # What packed tensors were made from: inputs nothing else may read any more.
        made_from = lowered.meta.get("parofx_made_from", set())
        self._watched = [index for index, node in enumerate(nodes) if node in made_from]
        self._states = tuple(State.of(example_inputs[index]) for index in self._watched)
        self._kept = [index for index, node in enumerate(nodes) if node.users]
        self._constants = _lift_constants(lowered)
        for node in nodes:
            if not node.users:
                lowered.graph.erase_node(node)
        lowered.recompile()
        if hasattr(lowered, "_param_name_to_source"):
            # It describes Dynamo's inputs, of which some are gone and some are ours.
            del lowered._param_name_to_source
        inputs = [*(example_inputs[index] for index in self._kept), *self._constants.values()]
        with torch.set_grad_enabled(differentiable):
            self._run = compile_fx(lowered, inputs, config_patches=dict(settings.inductor))

    def __call__(self, *args: Any) -> Any:
        if not unchanged(self._states, [args[index] for index in self._watched]):
            self._refresh(args)
        kept = [args[index] for index in self._kept]
        with torch.set_grad_enabled(self._differentiable):
            return self._run(*kept, *self._constants.values())  # type: ignore[operator]

    def _refresh(self, args: Sequence[Any]) -> None:
        logger.warning("paro: parameters changed since the graph was compiled; packing them anew")
        gm = _copy(self._source)
        rebind_parameters(gm, self._names, args)
        lowered = _lower(gm, self._settings, self._differentiable)
        assert lowered is not None
        fresh = {name: get_attribute(lowered, name) for name in self._constants}
        self._constants = fresh
        self._states = tuple(State.of(args[index]) for index in self._watched)


def _lift_constants(gm: GraphModule) -> dict[str, Tensor]:
    """Turn `get_attr` tensors into inputs behind the graph's own, and return them in order."""
    constants: dict[str, Tensor] = {}
    lifted: dict[int, Node] = {}
    last = (placeholders(gm) or [None])[-1]
    for node in [node for node in gm.graph.nodes if node.op == "get_attr"]:
        bound = binding(node)
        if bound is None:
            continue
        known = lifted.get(id(bound.tensor))
        if known is None:
            with (
                gm.graph.inserting_after(last)
                if last is not None
                else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
            ):
                known = gm.graph.placeholder("packed_" + str(node.target).replace(".", "_"))
            known.meta["val"] = bound.tensor
            last = lifted[id(bound.tensor)] = known
            constants[str(node.target)] = bound.tensor
        node.replace_all_uses_with(known)
        gm.graph.erase_node(node)
    return constants


def _copy(gm: GraphModule) -> GraphModule:
    """Copy a graph and its module's attributes, sharing tensors."""
    graph = Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return GraphModule(gm, graph)
