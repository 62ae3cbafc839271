"""What parofx asks of Dynamo's internals, in one place: an upgrade of torch fails here first.

Dynamo hands a backend torch-level calls with parameters as placeholders. `bind_parameters` tells which placeholders are
parameters of which module; `owners` finds the modules that are being compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.source import is_from_unspecialized_nn_module_source
from torch._guards import TracingContext
from torch.fx import GraphModule, Node

from parofx.passes.graph import bind, plain_path, unbind


def placeholders(gm: GraphModule) -> list[Node]:
    """Return the graph's inputs, in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def bind_parameters(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Bind every input that is a parameter or buffer of a module to its name and tensor.

    Returns:
        Position of the input → its dotted name.
    """
    bound: dict[int, str] = {}
    for index, (node, value) in enumerate(zip(placeholders(gm), example_inputs, strict=True)):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        if isinstance(value, Tensor) and source is not None and is_from_unspecialized_nn_module_source(source):
            bound[index] = plain_path(_source_name(source))
            bind(node, bound[index], value)
    return bound


def rebind_parameters(gm: GraphModule, names: Mapping[int, str], inputs: Sequence[Any]) -> None:
    """Bind inputs again, to the tensors of a later call."""
    nodes = placeholders(gm)
    for index, name in names.items():
        bind(nodes[index], name, inputs[index])


def unbind_parameters(nodes: Iterable[Node]) -> None:
    """Forget the tensors behind inputs."""
    for node in nodes:
        unbind(node)


def owners(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Return the outermost modules the code being compiled can see that hold one of its parameters."""
    wanted = {id(parameter) for parameter in parameters}
    seen = {id(module): module for module in _modules_in_frame()}
    return [
        module
        for module in seen.values()
        if any(id(tensor) in wanted for tensor in (*module.parameters(), *module.buffers()))
    ]


def training_modules(roots: Sequence[nn.Module], parameters: Sequence[Tensor]) -> list[str]:
    """Return the names of modules in training mode that own one of the parameters being compiled."""
    wanted = {id(parameter) for parameter in parameters}
    names: dict[int, str] = {}
    for root in roots:
        for name, module in root.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if module.training and any(id(tensor) in wanted for tensor in own):
                names.setdefault(id(module), name or type(module).__name__)
    return list(names.values())


def static_fakes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return fake tensors of fixed sizes for inputs that Dynamo does not know.

    Left to AOTAutograd, their sizes would become symbols without a source where shapes are dynamic.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(tensors)
    return [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _modules_in_frame() -> Iterator[nn.Module]:
    """Yield the modules that the code being compiled can see: its locals, closure and module-level names."""
    frame = sys._getframe()
    while frame is not None:
        graph = frame.f_locals.get("self")
        if isinstance(graph, OutputGraph):
            translator = graph.root_tx
            cells = [getattr(cell, "cell_contents", None) for cell in (getattr(translator, "closure", None) or ())]
            seen = [*translator.f_locals.values(), *cells, *translator.f_globals.values()]
            yield from (value for value in seen if isinstance(value, nn.Module))
            return
        frame = frame.f_back  # type: ignore[assignment]


def _source_name(source: Any) -> str:
    name = source.name
    return str(name() if callable(name) else name)
