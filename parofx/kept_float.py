"""Which weights of a model stay float, told from its modules: what `quantize` left float, and the output head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from parofx.nn import ParoLinear
from parofx.report import FloatReason

#: Attribute of modules that hold float matrices in a quantized model. It goes along where a module is copied or moved.
MARK = "_parofx_left_float"


def mark(model: nn.Module) -> None:
    """Mark the modules of a quantized model whose matrices were left float."""
    for module in model.modules():
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            setattr(module, MARK, True)


def unmark(model: nn.Module) -> None:
    """Undo `mark`, for a model that is not quantized any more."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)


def output_head(module: nn.Module) -> nn.Module | None:
    """Return what `get_output_embeddings()` names, or None where a module has no such method or no head."""
    get = getattr(module, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    return head if isinstance(head, nn.Module) else None


def embedding_tables(modules: Iterable[nn.Module]) -> tuple[Tensor, ...]:
    """Return stand-ins, on the meta device, for the embedding tables by whose shape a head is known.

    None if a module names its head itself, or says that it has none.
    """
    modules = list(modules)
    if any(hasattr(module, "get_output_embeddings") for module in modules):
        return ()
    tables = [one.weight for module in modules for one in module.modules() if isinstance(one, nn.Embedding)]
    return tuple({table.shape: table.detach().to("meta") for table in tables}.values())


def float_reasons(weights: Mapping[int, Tensor], modules: Mapping[int, Sequence[nn.Module]]) -> dict[int, FloatReason]:
    """Return why weights stay float, for those that do.

    Args:
        weights: parameters by some key.
        modules: the modules that lead to each, the one that holds it first.
    """
    every = {id(module): module for way in modules.values() for module in way}
    quantized = {key for key, module in every.items() if any(isinstance(one, ParoLinear) for one in module.modules())}
    heads = [head for module in every.values() if (head := output_head(module)) is not None]
    head_weights = {id(parameter) for head in heads for parameter in head.parameters(recurse=False)}
    reasons: dict[int, FloatReason] = {}
    for key, way in modules.items():
        if any(hasattr(module, MARK) for module in way[:1]) or any(id(module) in quantized for module in way):
            reasons[key] = FloatReason.LEFT_FLOAT
        elif id(weights[key]) in head_weights:
            reasons[key] = FloatReason.OUTPUT_HEAD
    return reasons
