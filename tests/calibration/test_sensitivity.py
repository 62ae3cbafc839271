from __future__ import annotations

import functools
from typing import Any

import graphs
import pytest
import tiny
import torch
from torch import nn
from torch.fx import GraphModule

import parofx
from parofx import ParoConfig
from parofx.calibration.sensitivity import Sensitivities, first_sequences, measure_sensitivities
from parofx.passes.linears import find_embeddings
from parofx.passes.transforms import find_transforms

G = 32


def prepared(model: nn.Module, *inputs: Any, **named: Any) -> GraphModule:
    return parofx.prepare(parofx.capture(model.eval(), *inputs, **named), ParoConfig(group_size=G))


def measured(gm: GraphModule, batches: list[dict[str, Any]], *, seed: int = 0) -> Sensitivities:
    vocabularies = frozenset(len(table) for table in find_embeddings(gm))
    sizes = {one.name: G for one in find_transforms(gm)}
    return measure_sensitivities(gm, batches, vocabularies, group_sizes=sizes, seed=seed)


def tokens(rows: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(ids: torch.Tensor, **others: Any) -> dict[str, Any]:
    return {"input_ids": ids, "use_cache": False, **others}


@functools.cache
def llama() -> tuple[nn.Module, GraphModule]:
    """Return a tiny language model whose logits are neither flat nor sure, and its graph."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model, prepared(model, input_ids=tokens(2))


def divergence(model: nn.Module, ids: torch.Tensor, name: str, change: torch.Tensor) -> float:
    """Return the mean KL divergence that a change of one weight makes."""
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        weight += change
        after = model(ids).logits.double().log_softmax(-1)
        weight -= change
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_it_predicts_what_small_errors_do_to_the_output():
    model, gm = llama()
    ids = tokens(32)
    found = measured(gm, [batch(ids)])
    names = [linear.name for one in find_transforms(gm) for linear in one.linears]
    assert sorted(found.linears) == sorted(names)
    ratios = []
    for index, name in enumerate(names):
        weight = model.get_submodule(name).weight
        change = 0.02 * float(weight.detach().std()) * graphs.rows(*weight.shape, seed=index)
        one = found.linears[name]
        inside = change.view(len(change), -1, G)
        errors = torch.einsum("ngi,gij,ngj->n", inside, one.moments.block_gram, inside)
        predicted = 0.5 * float((one.channels * errors).sum())
        ratios.append(divergence(model, ids, name, change) / predicted)
    # Errors that are random are told to within the noise of one drawn token per row.
    assert min(ratios) > 0.4
    assert max(ratios) < 2.5


def test_a_linear_that_the_output_does_not_mind_has_no_weight():
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heard, self.silent = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.heard(x) + 0 * self.silent(x)

    gm = prepared(Deaf(), graphs.rows(8, 64))
    found = measured(gm, [{"arg0": graphs.rows(8, 64)}])
    assert float(found.linears["silent"].moments.power.sum()) == 0
    assert torch.equal(found.linears["silent"].channels, torch.ones(64, dtype=torch.float64))
    assert float(found.linears["heard"].moments.power.sum()) > 0
    assert found.power("heard").shape == (64,)
    assert found.power("unknown") is None


def test_an_output_without_a_gradient_tells_nothing():
    gm = prepared(graphs.Model(lambda m, x: m.inner(x).argmax(-1), inner=nn.Linear(64, 64)), graphs.rows(8, 64))
    assert not measured(gm, [{"arg0": graphs.rows(8, 64)}]).linears


def test_rows_that_are_masked_out_do_not_count():
    ids, mask = tokens(2), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 5:] = 0
    gm = prepared(tiny.model(num_hidden_layers=1), input_ids=ids, attention_mask=mask)
    found = measured(gm, [batch(ids, attention_mask=mask)])
    assert {one.moments.count for one in found.linears.values()} == {17}
    # Nor do predictions behind them.
    ids[1, 5:] = 3
    again = measured(gm, [batch(ids, attention_mask=mask)])
    for name, one in found.linears.items():
        torch.testing.assert_close(again.linears[name].moments.power, one.moments.power, rtol=1e-4, atol=1e-12)


def test_equal_seeds_give_equal_sensitivities():
    _, gm = llama()
    name = "model.layers.0.mlp.down_proj"
    first, again, other = (measured(gm, [batch(tokens(2))], seed=seed).linears[name] for seed in (0, 0, 1))
    assert torch.equal(first.moments.power, again.moments.power)
    assert torch.equal(first.channels, again.channels)
    assert not torch.equal(first.moments.power, other.moments.power)


def test_sequences_are_taken_one_by_one_where_the_graph_serves_one():
    _, gm = llama()
    batches = [batch(tokens(3, seed=seed)) for seed in range(3)]
    found = first_sequences(gm, batches, 4)
    assert [tuple(one["input_ids"].shape) for one in found] == [(1, 12)] * 4
    assert torch.equal(found[3]["input_ids"], batches[1]["input_ids"][:1])
    fixed = prepared(
        graphs.Model(lambda m, x: m.inner(x) if x.shape[0] > 2 else x, inner=nn.Linear(64, 64)), graphs.rows(3, 64)
    )
    whole = [{"arg0": graphs.rows(3, 64, seed=seed)} for seed in range(3)]
    assert first_sequences(fixed, whole, 4) == whole[:2]


@pytest.mark.parametrize("count", [1, 100])
def test_there_may_be_fewer_sequences_than_asked_for(count):
    _, gm = llama()
    assert len(first_sequences(gm, [batch(tokens(2))], count)) == min(count, 2)
