"""What parofx asks of torch's internals; an upgrade of torch should fail here first."""

import importlib

import pytest
import torch
from torch import nn

from parofx.dynamo import bind_parameters, owners, placeholders, rebind_parameters, training_modules, unbind_parameters
from parofx.passes.graph import binding


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._dynamo.output_graph", "OutputGraph"),
        ("torch._dynamo.source", "is_from_unspecialized_nn_module_source"),
        ("torch._inductor", "list_mode_options"),
        ("torch._inductor.compile_fx", "compile_fx"),
        ("torch.fx.passes.split_module", "split_module"),
        ("torch.utils.weak", "WeakIdKeyDictionary"),
        ("torch.utils._pytree", "tree_leaves"),
        ("torch._C", "_set_grad_enabled"),
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


def test_owners_are_found_in_locals_and_closures():
    model, unrelated = Inner().eval(), nn.Linear(2, 2)

    def inspect(gm, example_inputs):
        names = bind_parameters(gm, example_inputs)
        parameters = [example_inputs[index] for index in names]
        roots = owners(parameters)
        return roots, training_modules(roots, parameters)

    roots, training = seen_by_a_backend(model, torch.ones(2, 4), torch.ones(4), inspect=inspect)
    assert any(root is model for root in roots)
    assert training == []

    torch._dynamo.reset()
    model.layers["a b"].train()
    unrelated.train()

    def function(x, y):
        return model(x, y), unrelated.weight.shape[0]

    roots, training = seen_by_a_backend(function, torch.ones(2, 4), torch.ones(4), inspect=inspect)
    assert any(root is model for root in roots)
    assert not any(root is unrelated for root in roots)
    assert training == ["layers.a b"]


def test_owners_outside_of_a_compilation_are_none():
    assert owners([torch.ones(2)]) == []
