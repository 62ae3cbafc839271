import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parofx.calibration.knapsack import Option, choose, smallest_cost
from parofx.errors import ConfigError

options = st.builds(Option, st.integers(1, 50), st.floats(0, 1, allow_nan=False, width=32))
members = st.lists(options, min_size=1, max_size=3)
#: Every variant of a group has the group's members.
groups = st.lists(
    st.integers(1, 2).flatmap(lambda n: st.lists(st.lists(members, min_size=n, max_size=n), min_size=1, max_size=2)),
    min_size=1,
    max_size=3,
)


def all_choices(problem):
    """Return `(cost, loss)` of every choice."""
    per_group = [
        [
            (sum(one.cost for one in taken), sum(one.loss for one in taken))
            for variant in variants
            for taken in itertools.product(*variant)
        ]
        for variants in problem
    ]
    return [tuple(map(sum, zip(*parts, strict=True))) for parts in itertools.product(*per_group)]


def value(problem, chosen):
    taken = [
        variants[choice.variant][member][option]
        for variants, choice in zip(problem, chosen, strict=True)
        for member, option in enumerate(choice.options)
    ]
    assert [len(variants[0]) for variants in problem] == [len(choice.options) for choice in chosen]
    return sum(one.cost for one in taken), sum(one.loss for one in taken)


@given(groups, st.floats(0, 1))
def test_the_choice_is_the_best_of_all_within_the_budget(problem, where):
    every = all_choices(problem)
    least, most = min(cost for cost, _ in every), max(cost for cost, _ in every)
    assert smallest_cost(problem) == least
    budget = least + int(where * (most - least))
    cost, loss = value(problem, choose(problem, budget))
    assert cost <= budget
    assert loss == pytest.approx(min(other for cost, other in every if cost <= budget), abs=1e-6)
    assert choose(problem, budget) == choose(problem, budget)


@pytest.mark.parametrize("slack", [0, 1, 5])
def test_bytes_count_one_by_one_among_large_layers(slack):
    large = 500_000_000  # a head of an 8B model: a byte of it is below the solver's tolerance
    problem = [[[[Option(large, 1.0), Option(large + 1, 0.5), Option(large + 6, 0.0)]]] for _ in range(3)]
    cost, loss = value(problem, choose(problem, 3 * large + slack))
    assert cost <= 3 * large + slack
    assert loss == 3 - 0.5 * min(slack, 3)


@given(groups, st.integers(0, 100), st.integers(0, 100))
def test_more_bytes_never_lose_more(problem, first, second):
    least = smallest_cost(problem)
    small, large = sorted((least + first, least + second))
    assert value(problem, choose(problem, large))[1] <= value(problem, choose(problem, small))[1] + 1e-6


def test_a_budget_is_met_to_the_byte():
    """Byte counts of real models are far above the solver's tolerance of a millionth."""
    large = 10**7
    problem = [[[[Option(large, 1.0), Option(2 * large + 1, 0.0)]]] for _ in range(4)]
    assert value(problem, choose(problem, 6 * large + 2)) == (6 * large + 2, 2.0)
    assert value(problem, choose(problem, 6 * large + 1)) == (5 * large + 1, 3.0)


def test_too_small_a_budget_names_the_smallest():
    with pytest.raises(ConfigError, match="got 11 bytes, and the cheapest takes 12"):
        choose([[[[Option(12, 0.0)]]]], 11)
    assert choose([], 0) == []
