"""Match a checkpoint with a model's modules, and put `ParoLinear`s where it is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from parofx import linear_tensors, packing
from parofx.checkpoint.layout import Quantized
from parofx.nn import ParoLinear


def why_not_placed(model: nn.Module, quantized: Quantized) -> list[str]:
    """Return which quantized modules do not fit the modules of that name, by class, sizes or bias."""
    problems = []
    for name, tensors in quantized.items():
        in_features, out_features = tensors["qweight"].shape[0], tensors["scales"].shape[1]
        try:
            module = model.get_submodule(name)
        except AttributeError:
            problems.append(f"{name}: quantized in the checkpoint, but the model has no such module")
            continue
        sizes = _sizes(module)
        if sizes is None:
            problems.append(f"{name}: quantized in the checkpoint, but the model has a {type(module).__name__} there")
        elif (in_features, out_features) not in sizes:
            problems.append(
                f"{name}: the checkpoint has {in_features} → {out_features} features, "
                f"the model {' or '.join(f'{k} → {n}' for k, n in sizes)}"
            )
        elif ("bias" in tensors) != (getattr(module, "bias", None) is not None):
            there, lacking = ("checkpoint", "model") if "bias" in tensors else ("model", "checkpoint")
            problems.append(f"{name}.bias: the {there} has one, the {lacking} none")
    return problems


def place(model: nn.Module, quantized: Quantized) -> None:
    """Replace the quantized modules by `ParoLinear`s on the meta device; a module shared stays shared."""
    made: dict[int, ParoLinear] = {}
    for name, tensors in quantized.items():
        module = model.get_submodule(name)
        if id(module) not in made:
            in_features, out_features = tensors["qweight"].shape[0], tensors["scales"].shape[1]
            made[id(module)] = ParoLinear(
                in_features,
                out_features,
                group_size=in_features // tensors["scales"].shape[0],
                krot=tensors["pairs"].shape[0],
                bias="bias" in tensors,
                bits=packing.packed_bits(tensors["qweight"], tensors["scales"]),
                compensation_rank=linear_tensors.compensation_rank(tensors),
                device="meta",
            ).train(module.training)
        model.set_submodule(name, made[id(module)])


def expected_tensors(model: nn.Module, quantized: Quantized) -> dict[str, Tensor]:
    """Return what the model's `state_dict` will hold once `quantized` is placed, in shape and identity."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    kept = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in quantized}
    placed = {f"{name}.{key}": t for name, tensors in quantized.items() for key, t in tensors.items()}
    return kept | placed


def why_keys_differ(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], ties: Iterable[Iterable[str]]
) -> list[str]:
    """Return missing, unexpected and misshapen keys, and integers for floats; of tied keys one suffices."""
    missing = set(expected) - set(found)
    for tied in ties:
        if any(key in found for key in tied):
            missing -= set(tied)
    return [
        *(f"{key}: missing" for key in sorted(missing)),
        *(f"{key}: unexpected" for key in sorted(set(found) - set(expected))),
        *(
            f"{key}: expected {tuple(tensor.shape)}, got {tuple(found[key].shape)}"
            for key, tensor in expected.items()
            if key in found and found[key].shape != tensor.shape
        ),
        *(
            f"{key}: expected floating-point numbers, got {found[key].dtype}"
            for key, tensor in expected.items()
            if key in found and tensor.is_floating_point() and not found[key].is_floating_point()
        ),
    ]


def ties_by_identity(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the groups of names under which a model holds the same tensor object."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _sizes(module: nn.Module) -> list[tuple[int, int]] | None:
    """Return the `(in_features, out_features)` a module may have; `None` if it is no linear."""
    if isinstance(module, (nn.Linear, ParoLinear)):
        return [(module.in_features, module.out_features)]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    # A class of its own, such as transformers' Conv1D, may hold the weight either way round.
    first, second = weight.shape
    return list(dict.fromkeys([(first, second), (second, first)]))
