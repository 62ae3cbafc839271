"""What parofx asks of torch's internals; an upgrade of torch should fail here first."""

import importlib

import pytest
import torch
from torch import nn

from parofx.dynamo import (
    bind_parameters,
    guard_attribute,
    owners,
    placeholders,
    rebind_parameters,
    unbind_parameters,
)
from parofx.passes.graph import binding


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._dynamo.guards", "GuardBuilder"),
        ("torch._dynamo.guards", "install_guard"),
        ("torch._dynamo.symbolic_convert", "InstructionTranslator"),
        ("torch._guards", "ChainedSource"),
        ("torch._dynamo.source", "is_from_unspecialized_nn_module_source"),
        ("torch._library.custom_ops", "CustomOpDef"),
        ("torch._inductor", "list_mode_options"),
        ("torch._inductor.compile_fx", "compile_fx"),
        ("torch.fx.passes.split_module", "split_module"),
        ("torch.utils.weak", "WeakIdKeyDictionary"),
        ("torch.utils._pytree", "tree_leaves"),
        ("torch._C", "_set_grad_enabled"),
        ("torch._C", "_DisableAutocast"),
    ],
)
def test_private_names_exist(module, name):
    assert callable(getattr(importlib.import_module(module), name))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a b": nn.Linear(4, 4, bias=False)})
        self.w = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x, y):
        return self.layers["a b"](x) * self.w + self.offset + y


def seen_by_a_backend(function, *args, inspect):
    """Compile with a backend that runs the graph as it is; return what `inspect(gm, inputs)` says of it."""
    answers = []

    def backend(gm, example_inputs):
        answers.append(inspect(gm, example_inputs))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    assert len(answers) == 1
    return answers[0]


def test_parameters_and_buffers_are_bound_to_their_names():
    model = Inner().eval()

    def inspect(gm, example_inputs):
        names = bind_parameters(gm, example_inputs)
        bound = {binding(node).fqn: binding(node).tensor for node in placeholders(gm) if binding(node)}
        assert list(bound) == list(names.values())
        return bound

    bound = seen_by_a_backend(model, torch.ones(2, 4), torch.ones(4), inspect=inspect)
    assert set(bound) == {"layers.a b.weight", "w", "offset"}, "the inputs x and y are no parameters"
    assert bound["layers.a b.weight"] is model.layers["a b"].weight
    assert bound["w"] is model.w
    assert bound["offset"] is model.offset


def test_binding_to_later_tensors_and_forgetting_them():
    model, other = Inner().eval(), Inner().eval()

    def inspect(gm, example_inputs):
        names = bind_parameters(gm, example_inputs)
        later = [dict(other.named_parameters()).get(names.get(index)) for index in range(len(example_inputs))]
        rebind_parameters(gm, {index: name for index, name in names.items() if name == "w"}, later)
        rebound = next(binding(node).tensor for node in placeholders(gm) if binding(node) and binding(node).fqn == "w")
        unbind_parameters(placeholders(gm))
        return rebound, [binding(node) for node in placeholders(gm)]

    rebound, left = seen_by_a_backend(model, torch.ones(2, 4), torch.ones(4), inspect=inspect)
    assert rebound is other.w
    assert left == [None] * 5


class Holder:
    """Not a module, as a pipeline or a trainer is not."""

    def __init__(self, model):
        self.models = {"first": [model]}

    def run(self, x, y):
        return self.models["first"][0](x, y)


MODELS = [Inner().eval()]


def _in_closure(model):
    return lambda x, y: model(x, y)


def _in_list_of_closure(model):
    models = [model]

    def run(x, y):
        for one in models:
            x = one(x, y)
        return x

    return run


def _in_global_list(model):
    MODELS[:] = [model]
    return lambda x, y: MODELS[0](x, y)


WAYS = {
    "itself": lambda model: model,
    "object": lambda model: Holder(model).run,
    "closure": _in_closure,
    "list": _in_list_of_closure,
    "global list": _in_global_list,
    "default": lambda model: lambda x, y, model=model: model(x, y),
    "method": lambda model: model.forward,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_owners_are_found_wherever_dynamo_came_from(way):
    model = Inner().eval()

    def inspect(gm, example_inputs):
        names = bind_parameters(gm, example_inputs)
        found = owners(gm, names)
        assert found.keys() == names.keys()
        return {names[index].rpartition(".")[2]: found[index] for index in names}

    found = seen_by_a_backend(way(model), torch.ones(2, 4), torch.ones(4), inspect=inspect)
    assert [link.module for link in found["weight"]] == [model.layers["a b"], model.layers, model]
    assert [link.module for link in found["w"]] == [link.module for link in found["offset"]] == [model]
    assert found["weight"][0].name.endswith("layers.a b")


def test_a_guarded_attribute_tells_modules_apart():
    compiled = []

    def backend(gm, example_inputs):
        names = bind_parameters(gm, example_inputs)
        for way in owners(gm, names).values():
            guard_attribute(way[0], "special")
        compiled.append(gm)
        return gm.forward

    plain, other, special = (nn.Linear(4, 4) for _ in range(3))
    special.special = True
    for module in (plain, other, plain, special, special, other):
        torch.compile(module, backend=backend)(torch.ones(2, 4))
    assert len(compiled) == 2
