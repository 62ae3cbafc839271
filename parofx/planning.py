"""`parofx.plan_quantization`: what `quantize` would do and take, without calibrating or reading a weight.

The model is captured on the meta device, where tensors have shapes and no memory. So linears, transforms, bits and the
checkpoint's bytes are those of the run itself; memory and disk are bounds, and time is an estimate.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from parofx.calibration.data import SELF_SOURCE
from parofx.calibration.data_run import joined_linears
from parofx.calibration.distillation import few_at_a_time, steps_of
from parofx.calibration.format_losses import TransformFormat, stored_bytes
from parofx.calibration.memory import TransformShape, disk_bytes, memory_terms
from parofx.calibration.probe import estimate_seconds
from parofx.calibration.processes import process_count
from parofx.calibration.sensitivity import first_sequences
from parofx.calibration.shares import check_enough, shares_of
from parofx.calibration.stream import first_held_out
from parofx.calibration.traffic import SegmentTraffic, measure_segments, size_of
from parofx.config import ParoConfig
from parofx.passes.allocate_bits import AllocateBits
from parofx.passes.insert_transforms import InsertTransforms
from parofx.passes.linears import find_embeddings
from parofx.passes.transforms import Transform, find_transforms
from parofx.pipeline import Pipeline
from parofx.precision import multiplies_16_bit
from parofx.quantization import captured, not_converted, output_heads
from parofx.report import FloatLinear, FloatReason
from parofx.unwrapping import plain_module


@dataclass(frozen=True)
class PlannedLinear:
    """One linear that will be quantized, as `LinearReport` will list it."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    krot: int
    transform: str
    block: str
    packed_bytes: int


@dataclass(frozen=True)
class QuantizationPlan:
    """What `parofx.quantize` would do and take.

    Args:
        config: of the run.
        linears: what will be quantized.
        kept_float: what will not, and why.
        transforms: how many rotations are fitted.
        blocks: how many blocks they are in.
        sequences: calibration sequences; 0 without data.
        tokens: in these.
        steps: of optimizers, on transforms and on blocks.
        memory: bytes that each part of a run takes at most, in each process; see `docs/calibration.md`.
        disk_bytes: in `work_dir`, at most.
        checkpoint_bytes: of all tensors that `save_pretrained` will write.
        device: where it would run.
        seconds: of calibration there, estimated from short measurements; choosing formats comes on top.
        budget_bytes: with a bits budget, what the quantized linears take in the smallest formats, and at most; which
            ones they get is measured in the run, and `linears` lists them as without a budget.
        processes: how many of `torch.distributed` share the work.
    """

    config: ParoConfig
    linears: tuple[PlannedLinear, ...]
    kept_float: tuple[FloatLinear, ...]
    transforms: int
    blocks: int
    sequences: int
    tokens: int
    steps: int
    memory: Mapping[str, int]
    disk_bytes: int
    checkpoint_bytes: int
    device: str
    seconds: float
    budget_bytes: tuple[int, int] | None = None
    processes: int = 1

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of tensors that the run holds at most; Python, PyTorch and the capture come on top."""
        return sum(self.memory.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, as `QuantizationReport.bits_per_weight` counts them; with a budget at most."""
        weights = sum(linear.in_features * linear.out_features for linear in self.linears)
        stored = self.budget_bytes[1] if self.budget_bytes else sum(linear.packed_bytes for linear in self.linears)
        return 8 * stored / max(weights, 1)

    def reasons(self) -> Counter[FloatReason]:
        """Count the float linears by reason."""
        return Counter(linear.reason for linear in self.kept_float)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        totals = {"peak_memory_bytes": self.peak_memory_bytes, "bits_per_weight": self.bits_per_weight}
        return asdict(self) | {"config": self.config.to_dict()} | totals


def plan_quantization(
    model: nn.Module,
    config: ParoConfig | None = None,
    *,
    calibration: object = None,
    tokenizer: Any | None = None,
    example_inputs: object = None,
    device: torch.device | str | None = None,
) -> QuantizationPlan:
    """Say what `quantize` with the same arguments would do and take.

    Text is read and tokenized, because its length counts; `"self"` writes none.

    Args:
        model: as for `quantize`; on the meta device it needs no weights. It stays as it is.
        config: as for `quantize`; so are `calibration`, `tokenizer` and `example_inputs`.
        calibration: see there.
        tokenizer: see there.
        example_inputs: see there.
        device: where the run will be and its speed is measured; by default where the model is, else the CPU.

    Raises:
        ConfigError: if an option is wrong, or the model is quantized already.
        DataError: if the calibration data is empty or malformed.
        CaptureError: if the model cannot be captured.
    """
    config, model = config or ParoConfig(), plain_module(model)
    parameter = next(model.parameters(), torch.empty(0))
    device = torch.device(device or ("cpu" if parameter.is_meta else parameter.device))
    skeleton = _on_meta(model)
    if isinstance(calibration, str) and calibration == SELF_SOURCE:
        calibration = torch.zeros(config.calibration.samples, config.calibration.seqlen, dtype=torch.int64)
    gm, batches = captured(
        skeleton, config, calibration=calibration, tokenizer=tokenizer, example_inputs=_to_meta(example_inputs)
    )
    prepare = InsertTransforms(config, output_heads=output_heads(skeleton), replace_modules=True)
    Pipeline([prepare]).run(gm)
    transforms = find_transforms(gm)
    budgeted = config.calibration.bits_budget is not None and transforms
    budget_bytes = AllocateBits(config).byte_range(gm) if budgeted else None
    linears = tuple(linear for transform in transforms for linear in _planned(gm, transform, config))
    with_data = batches is not None and config.calibration.recipe != "data-free"
    segments: tuple[SegmentTraffic, ...] = ()
    if with_data:
        shares = shares_of(gm, batches or (), cut=config.calibration.trains_blocks)
        check_enough(shares, config.calibration)
        segments = measure_segments(gm, shares.pieces)
    distilled: tuple[SegmentTraffic, ...] = ()
    distill_steps = 0
    if with_data and config.calibration.distill_epochs and transforms:
        parts = few_at_a_time(gm, batches or (), config.calibration)
        distilled = measure_segments(gm, shares_of(gm, parts, cut=True).pieces, whole=True)
        distill_steps = config.calibration.distill_epochs * len(steps_of(parts, config.calibration))
    probed: tuple[SegmentTraffic, ...] = ()
    if with_data and config.calibration.joins_outputs and transforms:
        sequences = first_sequences(gm, batches or (), config.calibration.gradient_samples)
        probed = measure_segments(gm, [max(sequences, key=_tokens)], whole=True)
    shapes = [_shape(gm, transform) for transform in transforms]
    packed_bytes = uniform_bytes = sum(linear.packed_bytes for linear in linears)
    if budget_bytes is not None:
        packed_bytes = budget_bytes[1]
    blocks = len({transform.block for transform in transforms})
    return QuantizationPlan(
        config=config,
        linears=linears,
        kept_float=(
            *gm.meta["parofx_kept_float"],
            *not_converted(skeleton, gm, [linear.name for linear in linears]),
        ),
        transforms=len(transforms),
        blocks=blocks,
        sequences=sum(map(_sequences, batches or ())),
        tokens=sum(map(_tokens, batches or ())),
        steps=config.calibration.steps * len(transforms) + _block_steps(config, batches or (), blocks) + distill_steps,
        memory=memory_terms(
            config,
            shapes,
            segments,
            model_bytes=size_of([*skeleton.parameters(), *skeleton.buffers()]),
            packed_bytes=packed_bytes,
            itemsize=parameter.element_size(),
            distilled=distilled,
            probed=probed,
            joined=[shape for shape, one in zip(shapes, transforms, strict=True) if joined_linears(one)],
            widened=_widened_bytes(gm, shapes, parameter.dtype, device),
        ),
        disk_bytes=disk_bytes(config, shapes, segments, process_count()),
        checkpoint_bytes=_checkpoint_bytes(skeleton, linears) + packed_bytes - uniform_bytes,
        device=str(device),
        seconds=estimate_seconds(
            config.calibration,
            shapes,
            segments,
            bits=config.bits,
            dtype=parameter.dtype,
            device=device,
            distilled=distilled,
            probed=probed,
            processes=process_count(),
        ),
        budget_bytes=budget_bytes,
        processes=process_count(),
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have no memory; those that are one stay one."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(one): _to_meta(one) for one in tensors if not one.is_meta}
    return copy.deepcopy(model, memo)


def _to_meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
    return torch.utils._pytree.tree_map_only(Tensor, lambda one: one.detach().to("meta"), value)


def _planned(gm: GraphModule, transform: Transform, config: ParoConfig) -> list[PlannedLinear]:
    krot, rank, found = transform.krot(gm), config.calibration.compensation_rank, []
    for linear in transform.linears:
        out_features, in_features = linear.weight.shape
        form = TransformFormat(transform.group_size, krot)
        stored = stored_bytes(in_features, out_features, form, linear.bits, bias=linear.has_bias, rank=rank)
        sizes = (in_features, out_features, linear.bits, transform.group_size, krot)
        found.append(PlannedLinear(linear.name, *sizes, transform.name, transform.block, stored))
    return found


def _shape(gm: GraphModule, transform: Transform) -> TransformShape:
    rows = sum(linear.weight.shape[0] for linear in transform.linears)
    sizes = (transform.linears[0].weight.shape[1], rows, transform.group_size, transform.krot(gm))
    return TransformShape(transform.name, transform.block, *sizes)


def _widened_bytes(gm: GraphModule, shapes: Sequence[TransformShape], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of a block's weights, or of a head's, in fp32 where a CPU would emulate 16-bit products."""
    if dtype not in (torch.bfloat16, torch.float16) or multiplies_16_bit(device.type, dtype):
        return 0
    blocks = Counter[str]()
    for shape in shapes:
        blocks[shape.block] += shape.weights
    return 4 * max([*blocks.values(), *(table.numel() for table in find_embeddings(gm))], default=0)


def _checkpoint_bytes(model: nn.Module, linears: Sequence[PlannedLinear]) -> int:
    """Return the bytes of a checkpoint's tensors: tied float ones once, quantized ones for each name of a module."""
    packed = {id(model.get_submodule(linear.name)): linear.packed_bytes for linear in linears}
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = {name for name, module in modules.items() if id(module) in packed}
    floats: dict[int, int] = {
        id(tensor): tensor.nbytes
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in quantized
    }
    return sum(floats.values()) + sum(packed[id(modules[name])] for name in quantized)


def _sequences(batch: Mapping[str, Any]) -> int:
    return max((len(one) for one in batch.values() if isinstance(one, Tensor) and one.dim()), default=1)


def _tokens(batch: Mapping[str, Any]) -> int:
    """Return the most elements of an input that holds whole numbers; without one, the sequences."""
    integers = [one for one in batch.values() if isinstance(one, Tensor) and not one.is_floating_point()]
    return max((one.numel() for one in integers), default=_sequences(batch))


def _block_steps(config: ParoConfig, batches: Sequence[Mapping[str, Any]], blocks: int) -> int:
    calibration = config.calibration
    epochs = calibration.transform_epochs + calibration.weight_epochs + calibration.tune_epochs
    if calibration.recipe == "data-free" or not batches:
        return 0
    return blocks * epochs * first_held_out(batches, calibration.validation_samples)
