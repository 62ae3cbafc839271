"""What a PARO checkpoint must hold: its tensors, its configuration, and how the two agree.

A module is quantized if and only if `<name>.qweight` exists. Bits, group size and krot are read off the tensors; the
configuration may only repeat them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parofx import linear_tensors, packing
from parofx import nn as paro_nn
from parofx.config import PACKED_BITS
from parofx.errors import CheckpointError, ShapeError, one_per_line
from parofx.nn import ParoLinear
from parofx.ops import DEFAULT_BITS

#: `quant_method` of the published checkpoints.
QUANT_METHOD = "paroquant"
#: What the configuration lists of modules that differ from the rest, by its key.
PER_MODULE = {
    "module_bits": "bits",
    "group_sizes": "group sizes",
    "module_krots": "krots",
    "module_ranks": "ranks of corrections",
}
#: Any of these marks a module as quantized; the rest of its tensors must then be there too.
_MARKS = ("qweight", "qzeros", "channel_scales")
_FUSED_EXPERTS = tuple(
    f"{weight}_{name}" for weight in ("gate_up_weight", "down_weight") for name in paro_nn.ROTATION_NAMES
)

#: Checkpoint tensors by module name, then by tensor name.
Quantized = dict[str, dict[str, Tensor]]


def paro_linears(model: nn.Module) -> dict[str, ParoLinear]:
    """Return every `ParoLinear` by name, a shared one under each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, ParoLinear)}


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the `quantization_config` of a model's `ParoLinear`s.

    `bits`, `group_size` and `krot` are the most frequent ones; if there are others, `module_bits`, `group_sizes` and
    `module_krots` list the modules that have them. `compensation_rank` is the highest, where there are low-rank
    corrections, and `module_ranks` lists the modules whose rank is not that, or as much of it as their sizes allow. So
    what is stored in 4 bits, one group size and one krot is described as if there were nothing else.

    Raises:
        CheckpointError: if there is no `ParoLinear`, or the model is one itself.
    """
    linears = paro_linears(model)
    if not linears:
        raise CheckpointError("expected a model that holds ParoLinear modules, got none; call parofx.quantize first")
    if "" in linears:
        raise CheckpointError("a checkpoint names its linears, got a model that is itself a ParoLinear; wrap it")
    sizes = Counter(linear.group_size for linear in linears.values())
    group_size = max(sizes, key=lambda size: (sizes[size], size))
    krots = Counter(linear.krot for linear in linears.values())
    krot = max(krots, key=lambda rounds: (krots[rounds], rounds))
    widths = Counter(linear.bits for linear in linears.values())
    bits = max(widths, key=lambda width: (widths[width], width == DEFAULT_BITS, width))
    config: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "bits": bits,
        "group_size": group_size,
        "krot": krot,
        "modules_to_not_convert": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    }
    if len(sizes) > 1:
        config["group_sizes"] = {
            name: linear.group_size for name, linear in linears.items() if linear.group_size != group_size
        }
    if len(widths) > 1:
        config["module_bits"] = {name: linear.bits for name, linear in linears.items() if linear.bits != bits}
    if rank := max(linear.compensation_rank for linear in linears.values()):
        config["compensation_rank"] = rank
        ranks = {
            name: linear.compensation_rank
            for name, linear in linears.items()
            if linear.compensation_rank != min(rank, linear.in_features, linear.out_features)
        }
        config |= {"module_ranks": ranks} if ranks else {}
    if len(krots) > 1:
        config["module_krots"] = {name: linear.krot for name, linear in linears.items() if linear.krot != krot}
    return config


def exported_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's `state_dict` with every quantization tensor in memory of its own.

    Siblings share rotation tensors and packed buffers; other readers need each module's own copy.
    """
    state = model.state_dict()
    linears = paro_linears(model)
    return separated(state, [key for key in state if key.rpartition(".")[0] in linears])


def separated(state: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Return `state` with the tensors `keys` contiguous and alone in their memory, copied where they were not."""
    seen: set[int] = set()
    alone = {}
    for key in keys:
        tensor = state[key].contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        alone[key] = tensor
    return state | alone


def find_quantized(tensors: Mapping[str, Tensor]) -> Quantized:
    """Group the tensors of quantized modules by module.

    Raises:
        CheckpointError: if there is none, or there are fused experts, which are not supported.
    """
    fused = sorted(key for key in tensors if key.endswith(_FUSED_EXPERTS))
    if fused:
        raise CheckpointError(
            f"fused mixture-of-experts weights are not supported; the checkpoint holds:\n{one_per_line(fused)}"
        )
    split = [(*key.rpartition("."), tensor) for key, tensor in tensors.items()]
    quantized: Quantized = {prefix: {} for prefix, _, name, _ in split if name in _MARKS}
    for prefix, _, name, tensor in split:
        if prefix in quantized:
            quantized[prefix][name] = tensor
    if not quantized or "" in quantized:
        raise CheckpointError("expected a PARO checkpoint, got none whose tensors are named '<module>.qweight'")
    return quantized


def why_not_readable(config: object) -> list[str]:
    """Return what keeps a `quantization_config` from being read."""
    if not isinstance(config, Mapping):
        return [
            f"config.json must hold a 'quantization_config' object, got {config!r}; "
            "of a float model parofx.quantize and parofx.save_pretrained make a checkpoint"
        ]
    if config.get("quant_method") != QUANT_METHOD:
        return [f"quant_method must be {QUANT_METHOD!r}, got {config.get('quant_method')!r}"]
    if config.get("bits", DEFAULT_BITS) not in PACKED_BITS:
        return [f"bits must be one of {PACKED_BITS}, got {config['bits']!r}"]
    rank = config.get("compensation_rank", 0)
    if not isinstance(rank, int) or rank < 0:
        return [f"compensation_rank must be an integer of at least 0, got {rank!r}"]
    return [
        f"{key} must map module names to {what}, got {config[key]!r}"
        for key, what in PER_MODULE.items()
        if not isinstance(config.get(key, {}), Mapping)
    ]


def why_not_quantized(quantized: Quantized, config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the modules' tensors, against one another and against the configuration."""
    problems = []
    listed: dict[str, Mapping[str, Any]] = {key: config.get(key) or {} for key in PER_MODULE}
    for key, modules in listed.items():
        problems += [f"{name}: in {key}, but not quantized" for name in sorted(set(modules) - set(quantized))]
    for name, tensors in quantized.items():
        try:
            paro_nn.check_tensors(tensors, name)
        except ShapeError as error:
            problems.append(_naming(name, error))
            continue
        highest = config.get("compensation_rank")
        rank = None if highest is None else min(highest, tensors["qweight"].shape[0], tensors["scales"].shape[1])
        stated = {
            "bits": listed["module_bits"].get(name, config.get("bits")),
            "group_size": listed["group_sizes"].get(name, config.get("group_size")),
            "krot": listed["module_krots"].get(name, config.get("krot")),
            "compensation_rank": listed["module_ranks"].get(name, rank),
        }
        found = {
            "bits": packing.packed_bits(tensors["qweight"], tensors["scales"]),
            "group_size": tensors["qweight"].shape[0] // tensors["scales"].shape[0],
            "krot": tensors["pairs"].shape[0],
            "compensation_rank": linear_tensors.compensation_rank(tensors),
        }
        problems += [
            f"{name}: quantization_config says {key} {stated[key]}, the tensors say {found[key]}"
            for key in found
            if stated[key] not in (None, found[key])
        ]
    return problems


def why_not_valid(quantized: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return which loaded values cannot be; see `linear_tensors.why_not_valid`."""
    problems = []
    for name, tensors in quantized.items():
        group_size = tensors["qweight"].shape[0] // tensors["scales"].shape[0]
        problems += linear_tensors.why_not_valid(tensors, group_size, name)
    return problems


def share_rotations(linears: Iterable[ParoLinear]) -> None:
    """Let linears whose rotation tensors hold equal bytes hold the same tensor objects, as siblings did when saved."""
    first: dict[tuple[object, ...], Tensor] = {}
    for linear in linears:
        for name in paro_nn.ROTATION_NAMES:
            tensor: Tensor = getattr(linear, name)
            if tensor.is_meta:
                continue
            content = hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).digest()
            key = (name, tensor.dtype, tuple(tensor.shape), tensor.device, content)
            setattr(linear, name, first.setdefault(key, tensor))


def pack(linears: Iterable[ParoLinear]) -> None:
    """Bring linears into the layout of their device's kernels before they are first used.

    Their first forward would do it as well. But compiled graphs look at the buffers a module has: layers that share
    one graph do so from the first call on only if they hold the same.
    """
    for linear in linears:
        linear.pack_()


def _naming(name: str, error: ShapeError) -> str:
    text = str(error)
    return text if text.startswith(name) else f"{name}: {text}"
