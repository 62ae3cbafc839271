"""What parofx asks of Dynamo's internals, in one place: an upgrade of torch fails here first.

Dynamo hands a backend torch-level calls with parameters as placeholders. `bind_parameters` tells which placeholders are
parameters, by which name; `owners` follows the way Dynamo came by each and finds the modules on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import is_from_unspecialized_nn_module_source
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import ChainedSource, Source, TracingContext
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


class Owner(NamedTuple):
    """A module on the way to a parameter: the one that holds it, or one that leads there."""

    name: str
    module: nn.Module
    source: Source


def owners(gm: GraphModule, names: Mapping[int, str]) -> dict[int, tuple[Owner, ...]]:
    """Return the modules that lead to each bound input, the one that holds it first.

    They are found wherever Dynamo came from: `self.models[0].head` leads through an object and a list.

    Args:
        gm: Dynamo's graph, while it is being compiled.
        names: position → dotted name, of `bind_parameters`.
    """
    output = InstructionTranslator.current_tx().output
    scopes = {"L": output.local_scope, "G": output.global_scope}
    values: dict[Source, Any] = {}
    nodes = placeholders(gm)
    found: dict[int, tuple[Owner, ...]] = {}
    for index in names:
        source: Source = nodes[index].meta["grapharg"].source
        ways: dict[int, Owner] = {}
        while isinstance(source, ChainedSource):
            source = source.base
            try:
                module = source.get_value(scopes, {}, values)
            except Exception:
                continue  # a source that Dynamo made up while tracing stands for nothing in the frame
            if isinstance(module, nn.Module):
                # The innermost of several sources of one module is the one that is marked as a module's.
                ways.setdefault(id(module), Owner(plain_path(_source_name(source)), module, source))
        found[index] = tuple(ways.values())
    return found


def guard_attribute(owner: Owner, name: str) -> None:
    """Let Dynamo compile anew where a module differs from this one in having an attribute."""
    install_guard(owner.source.make_guard(partial(GuardBuilder.HASATTR, attr=name)))


def static_fakes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return fake tensors of fixed sizes for inputs that Dynamo does not know.

    Left to AOTAutograd, their sizes would become symbols without a source where shapes are dynamic.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return list(tensors)
    return [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _source_name(source: Any) -> str:
    name = source.name
    return str(name() if callable(name) else name)
