"""`parofx.quantize`: capture, fit and pack a model, and put the result back into its module tree."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from parofx import integrations, kept_float, linear_tensors
from parofx.calibration.data import batches as read_batches
from parofx.calibration.processes import together
from parofx.config import CalibrationConfig, ParoConfig
from parofx.errors import CaptureError, ConfigError, one_per_line
from parofx.nn import ParoLinear
from parofx.passes.allocate_bits import AllocateBits
from parofx.passes.calibrate import Calibrate, block_reports_of, reports_of
from parofx.passes.capture import capture, complete_inputs
from parofx.passes.convert import Convert
from parofx.passes.graph import INT4_LINEAR, binding, correction_of, get_attribute, nodes_calling
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.linears import matches
from parofx.pipeline import Pipeline
from parofx.report import FloatLinear, FloatReason, LinearReport, QuantizationReport
from parofx.unwrapping import plain_module

logger = logging.getLogger(__name__)

#: A linear with a larger relative error than this is as good as gone.
_LOST = 0.5
#: Bits per weight from which on quantization saves nothing.
_BITS_OF_FLOATS = 16
#: What `register_forward_hook` and `register_forward_pre_hook` write to.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@torch.inference_mode(False)  # formats are chosen, and blocks trained, by gradients
def quantize(
    model: nn.Module,
    config: ParoConfig | None = None,
    *,
    calibration: object = None,
    tokenizer: Any | None = None,
    example_inputs: object = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model's linear layers, to 4 bit if `config` says nothing else, in place.

    The model is captured as a graph; what becomes of each linear is decided there and not by names. Modules are
    replaced after everything is computed: on an error or Ctrl-C the model is as before.

    Where `torch.distributed` is initialized, all its processes must call this alike: they share the calibration data,
    and each ends with the same model.

    Args:
        model: any module; a Transformers model also gets its quantization config, so that `save_pretrained` works.
            Of a compiled module the one behind it is quantized, and compiles anew.
        config: what is quantized and how; `ParoConfig()` by default.
        calibration: None (weights alone), a source (a file, a folder, a `datasets` id or `"self"`), an iterable of
            strings or conversations (needs `tokenizer`), or an iterable of model inputs.
        tokenizer: for text.
        example_inputs: inputs to capture the model with: a tensor, a tuple or a mapping; by default the largest
            calibration batch, or for Transformers models what their configuration describes.
        progress: show a progress bar on stderr.

    Returns:
        What was quantized, with which error, and what stays float and why. Where nothing was, a warning says so and
        the model's configuration stays as it is.

    Raises:
        ConfigError: if an option is wrong, or the model is none, is quantized already or has no weights.
        DataError: if the calibration data or a weight is not finite, empty or malformed.
        CaptureError: if the model cannot be captured.
    """
    start = time.perf_counter()
    config, model = config or ParoConfig(), plain_module(model)
    _check_weights_exist(model)
    # A process that fails to read the data, or to pack what was fitted, lets the others fail too.
    with contextlib.nullcontext() if calibration is None else together():
        gm, batches = captured(
            model, config, calibration=calibration, tokenizer=tokenizer, example_inputs=example_inputs
        )
        pipeline = Pipeline(
            [
                InsertTransforms(config, output_heads=output_heads(model), replace_modules=True),
                AllocateBits(config, batches),
                Calibrate(config, batches, progress),
                Convert(),
            ]
        )
        pipeline.run(gm)
    modules = _modules(gm)
    kept = (*gm.meta["parofx_kept_float"], *not_converted(model, gm, modules))
    report = QuantizationReport(
        config=config,
        linears=tuple(_linear_report(gm, name, module) for name, module in modules.items()),
        transforms=reports_of(gm),
        kept_float=kept,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=_peak_memory_bytes(),
        passes=pipeline.records(),
        blocks=block_reports_of(gm),
    )
    if modules:
        for module in modules.values():
            module.pack_()
        _write_back(model, modules)
    _warn(report)
    return report


def captured(
    model: nn.Module, config: ParoConfig, *, calibration: object, tokenizer: Any, example_inputs: object
) -> tuple[GraphModule, list[dict[str, Any]] | None]:
    """Check what `quantize` was given; return the model's graph (stage FLOAT) and the calibration batches."""
    if not isinstance(config, ParoConfig):
        raise ConfigError(f"config must be a ParoConfig, got {type(config).__name__}; {_remedy(config)}")
    quantized = [name for name, module in model.named_modules() if isinstance(module, ParoLinear)]
    if quantized:
        raise ConfigError(
            f"the model is quantized already ({len(quantized)} ParoLinear modules, such as {quantized[0]!r}); quantize "
            "the float model it was made from (parofx.dequantize gives float modules, not what was rounded off)"
        )
    check_patterns(model, config)
    _warn_of_an_unused_objective(config.calibration)
    if config.calibration.gradient_samples and not (calibration is not None and config.calibration.joins_outputs):
        logger.warning(
            "gradient_samples=%d is not used: rows take over errors of other rows where weights are rounded with error "
            "feedback on calibration data, blocks are not trained, and compensation_rank is 0",
            config.calibration.gradient_samples,
        )
    if calibration is None:
        _warn_of_training_without_data(config.calibration)
    batches = None if calibration is None else _batches(model, config, calibration, tokenizer)
    inputs = _example_inputs(model, example_inputs, batches)
    if batches is not None and isinstance(inputs, tuple):
        inputs = _named(model, inputs)  # as the batches are
    return (capture(model, *inputs) if isinstance(inputs, tuple) else capture(model, inputs)), batches


def _remedy(config: object) -> str:
    if isinstance(config, CalibrationConfig):
        return "put it in one: ParoConfig(calibration=...)"
    if isinstance(config, Mapping):
        return "build it with ParoConfig.from_dict(...)"
    return "build it with ParoConfig(...); calibration data is given as calibration=..."


def _check_weights_exist(model: nn.Module) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if names:
        raise ConfigError(
            f"parameters on the meta device hold nothing to quantize; load the model's weights, or ask "
            f"parofx.plan_quantization, which needs none:\n{one_per_line(names, limit=3)}"
        )


def check_patterns(model: nn.Module, config: ParoConfig) -> None:
    """Refuse an exclusion that excludes nothing, before the work rather than after it."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for pattern in config.modules_to_not_convert:
        if not any(matches(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            raise ConfigError(
                f"modules_to_not_convert: {pattern!r} matches no module of {type(model).__name__}"
                + (f"; the closest names are {', '.join(close)}" if close else "")
            )


def _warn_of_training_without_data(config: CalibrationConfig) -> None:
    stages = ("transform_epochs", "weight_epochs", "tune_epochs", "distill_epochs")
    wanted = [f"{name}={getattr(config, name)}" for name in stages if getattr(config, name)]
    if wanted and config.recipe != "data-free":
        logger.warning(
            "recipe %r trains on calibration data (%s), and none was given: weights alone decide; pass calibration=...",
            config.recipe,
            ", ".join(wanted),
        )


def _warn_of_an_unused_objective(config: CalibrationConfig) -> None:
    if config.objective == "ldl" and config.rounding == "nearest":
        logger.warning(
            "objective='ldl' is what error feedback leaves, and rounding='nearest' has none: transforms are fitted by "
            "objective='range'; pass that, or rounding='feedback'"
        )


def _warn(report: QuantizationReport) -> None:
    """Say what is legal and still hardly meant."""
    if not report.linears:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.reasons().items())
        logger.warning(
            "nothing was quantized, and the model is as it was: %s",
            f"kept float: {reasons}" if reasons else "no linears",
        )
    lost = [linear.name for linear in report.linears if not linear.relative_error < _LOST]
    if lost:
        logger.warning(
            "so few bits lose more than half of what these linears compute; their weights may be too small for scales "
            "in fp16. Leave them float with modules_to_not_convert, or rescale them:\n%s",
            one_per_line(lost),
        )
    if report.linears and report.bits_per_weight >= _BITS_OF_FLOATS:
        logger.warning(
            "the quantized linears take %.1f bits per weight, scales, rotations and corrections included, which is no "
            "less than 16-bit floats do: they have few output channels, or compensation_rank=%d is more than they need",
            report.bits_per_weight,
            report.config.calibration.compensation_rank,
        )


def _batches(model: nn.Module, config: ParoConfig, calibration: object, tokenizer: Any) -> list[dict[str, Any]]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    read = read_batches(calibration, model, config.calibration, tokenizer=tokenizer)
    return [_move(complete_inputs(model, batch.inputs), device) for batch in read]


def _move(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return inputs on a device, as tensors that autograd may save."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in moved.items()
    }


def _example_inputs(
    model: nn.Module, given: object, batches: Sequence[Mapping[str, Any]] | None
) -> tuple[Any, ...] | Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if isinstance(given, Tensor):
        return (given,)
    if given is not None:
        if not isinstance(given, Iterable):
            raise ConfigError(f"example_inputs must be a tensor, a tuple or a mapping, got {type(given).__name__}")
        return tuple(given)
    if batches:
        # The largest batch: sizes of one would be taken for constants.
        return max(batches, key=lambda batch: sum(v.numel() for v in batch.values() if isinstance(v, Tensor)))
    if integrations.is_transformers_model(model):
        from parofx.models import example_inputs

        return example_inputs(model)
    raise CaptureError(
        f"{type(model).__name__} needs example_inputs to be captured: pass quantize(model, example_inputs=(x,))"
    )


def _named(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*inputs).arguments)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__}.forward does not take the example_inputs: {error}") from error


def output_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the module that a model's `get_output_embeddings()` gives, if it has one."""
    head = kept_float.output_head(model)
    return () if head is None else tuple(name for name, module in model.named_modules() if module is head)


def _modules(gm: GraphModule) -> dict[str, ParoLinear]:
    """Return the modules a CONVERTED graph stands for, by name; siblings hold one set of rotation tensors."""
    modules: dict[str, ParoLinear] = {}
    for node in nodes_calling(gm.graph, INT4_LINEAR):
        rotated, qweight, qzeros, scales, bias, *_ = node.args
        name = str(qweight.target).removesuffix(".qweight")  # type: ignore[union-attr]
        if name in modules:
            continue
        sources = {
            "qweight": qweight,
            "qzeros": qzeros,
            "scales": scales,
            **dict(zip(("pairs", "theta", "channel_scales"), rotated.args[1:4], strict=True)),  # type: ignore[union-attr]
        }
        if bias is not None:
            sources["bias"] = bias
        sources |= zip(linear_tensors.COMPENSATION_NAMES, correction_of(node) or (), strict=False)
        tensors = {key: get_attribute(gm, str(source.target)) for key, source in sources.items()}
        modules[name] = ParoLinear.from_tensors(tensors)
    return modules


def _linear_report(gm: GraphModule, name: str, module: ParoLinear) -> LinearReport:
    transform = next(one for one in reports_of(gm) if name in one.members)
    return LinearReport(
        name=name,
        in_features=module.in_features,
        out_features=module.out_features,
        bits=module.bits,
        group_size=module.group_size,
        krot=module.krot,
        transform=transform.name,
        block=transform.block,
        relative_error=gm.meta["parofx_relative_errors"][name],
        packed_bytes=module.packed_bytes(),
        nearest_error=gm.meta["parofx_nearest_errors"].get(name),
        predicted_loss=gm.meta.get("parofx_predicted_losses", {}).get(name),
        uncorrected_error=gm.meta["parofx_uncorrected_errors"].get(name),
    )


def not_converted(model: nn.Module, gm: GraphModule, names: Iterable[str]) -> list[FloatLinear]:
    """List linears of the module tree that no pass decided on: `nn.Linear` and the classes of those it quantized.

    `names` are those of the quantized ones.
    """
    quantized = set(names)
    linears: tuple[type[nn.Module], ...] = (nn.Linear, *(type(model.get_submodule(name)) for name in quantized))
    in_graph = {id(bound.tensor) for node in gm.graph.nodes if (bound := binding(node)) is not None}
    decided = {one.name for one in gm.meta["parofx_kept_float"]}
    # Tied weights are one unit, listed under one of its names.
    known = {id(model.get_submodule(name)._parameters.get("weight")) for name in quantized}
    known |= {id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if _owner(name) & decided}
    found = []
    for name, module in model.named_modules():
        if name in quantized | decided or not isinstance(module, linears):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            found.append(FloatLinear(name, FloatReason.FUNCTIONAL, "its weight is computed from other tensors"))
        elif id(weight) not in known:
            read = id(weight) in in_graph
            found.append(FloatLinear(name, FloatReason.FUNCTIONAL if read else FloatReason.NOT_REACHED))
    return found


def _owner(parameter: str) -> set[str]:
    """Return the names a report may have for the linear of a parameter: its module, or itself."""
    return {parameter, parameter.rpartition(".")[0]}


def _write_back(model: nn.Module, modules: Mapping[str, ParoLinear]) -> None:
    """Put the quantized modules in the place of the float ones, under every name these have; all or nothing."""
    replaced = {id(model.get_submodule(name)): module for name, module in modules.items()}
    every_name = dict(model.named_modules(remove_duplicate=False))
    originals = {name: module for name, module in every_name.items() if id(module) in replaced}
    try:
        for name, original in originals.items():
            module = replaced[id(original)].train(original.training)
            for hooks in _HOOKS:
                # The dictionary itself, so that a handle still removes its hook.
                setattr(module, hooks, getattr(original, hooks))
            model.set_submodule(name, module)
        if integrations.is_transformers_model(model):
            from parofx.integrations.transformers import mark_quantized

            mark_quantized(model)
    except BaseException:
        for name, original in originals.items():
            model.set_submodule(name, original)
        raise
    kept_float.mark(model)


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
