"""The best choice of formats under a budget of bytes: a multiple-choice knapsack, solved exactly.

Each group takes one of its variants, and each member of the group one option of that variant. An option has a cost in
bytes and a loss; the sum of losses is minimised while the sum of costs stays within the budget:

    min Σ loss·x    s.t.    Σ_v y_gv = 1,    Σ_o x_gvmo = y_gv,    Σ cost·x ≤ budget,    x, y ∈ {0, 1}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parofx.errors import ConfigError

#: What losses are scaled to sum to where every member takes its worst.
_LOSS_SCALE = 1e6


@dataclass(frozen=True)
class Option:
    """What a member may be: stored bytes and predicted loss."""

    cost: int
    loss: float


#: The options of each member of a group, in one variant of it.
Variant = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Choice:
    """Of one group: the index of its variant, and in it that of each member's option."""

    variant: int
    options: tuple[int, ...]


def smallest_cost(groups: Sequence[Sequence[Variant]]) -> int:
    """Return the least that any choice costs."""
    return sum(
        min(sum(min(one.cost for one in member) for member in variant) for variant in variants) for variants in groups
    )


def largest_cost(groups: Sequence[Sequence[Variant]]) -> int:
    """Return the most that any choice costs."""
    return sum(
        max(sum(max(one.cost for one in member) for member in variant) for variant in variants) for variants in groups
    )


def choose(groups: Sequence[Sequence[Variant]], budget: int) -> list[Choice]:
    """Return the choice of least loss that costs at most `budget`; equal arguments give an equal choice.

    Raises:
        ConfigError: if every choice costs more, naming the cheapest.
    """
    if (least := smallest_cost(groups)) > budget:
        raise ConfigError(f"a budget must hold the cheapest choice: got {budget} bytes, and the cheapest takes {least}")
    if not groups:
        return []
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    keys = [
        (g, v, m, o)
        for g, variants in enumerate(groups)
        for v, variant in enumerate(variants)
        for m, member in enumerate(variant)
        for o in range(len(member))
    ]
    chosen = {
        (g, v): index for index, (g, v) in enumerate((g, v) for g, vs in enumerate(groups) for v in range(len(vs)))
    }
    options = [groups[g][v][m][o] for g, v, m, o in keys]
    members = {key: index for index, key in enumerate(dict.fromkeys(key[:3] for key in keys))}
    # Rows: one variant per group; one option per member of the variant taken; columns: y, then x.
    entries = [(g, column, 1.0) for (g, _), column in chosen.items()]
    entries += [(len(groups) + row, chosen[g, v], -1.0) for (g, v, _), row in members.items()]
    entries += [(len(groups) + members[key[:3]], len(chosen) + column, 1.0) for column, key in enumerate(keys)]
    rows, columns, values = zip(*entries, strict=True)
    shape = (len(groups) + len(members), len(chosen) + len(keys))
    sums = np.concatenate([np.ones(len(groups)), np.zeros(len(members))])
    structure = LinearConstraint(coo_array((values, (rows, columns)), shape=shape).tocsr(), sums, sums)
    losses = np.concatenate([np.zeros(len(chosen)), [one.loss for one in options]])
    extras = np.array([*_variant_extras(groups), *_option_extras(groups)], dtype=np.int64)
    slack = min(budget, largest_cost(groups)) - least
    # The solver's tolerances are absolute: neither bytes nor divergences are numbers near 1.
    worst = sum(max(one.loss for one in groups[g][v][m]) for g, v, m in members) or 1.0
    limit, unit = slack, max(1, slack)
    while True:
        found = milp(
            losses * (_LOSS_SCALE / worst),
            constraints=[structure, LinearConstraint(np.minimum(extras, 2 * unit)[None] / unit, -np.inf, limit / unit)],
            integrality=np.ones(shape[1]),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, found.message
        taken = np.round(found.x).astype(bool)
        excess = int(extras[taken].sum()) - slack
        if excess <= 0:
            break
        limit -= excess  # within the solver's tolerance, and not within ours
    result: dict[tuple[int, int], dict[int, int]] = {}
    for key, column in zip(keys, taken[len(chosen) :], strict=True):
        if column:
            result.setdefault(key[:2], {})[key[2]] = key[3]
    return [Choice(v, tuple(picked[m] for m in sorted(picked))) for (_, v), picked in sorted(result.items())]


def _variant_extras(groups: Sequence[Sequence[Variant]]) -> list[int]:
    """Return what each variant costs beyond its group's cheapest, with its cheapest options.

    Counted from the cheapest choice on, costs are of the size of what is left to spend, and the solver's tolerance is a
    small part of that: the cheapest choice itself, which costs 0, stays within any limit.
    """
    found = []
    for variants in groups:
        costs = [sum(min(one.cost for one in member) for member in variant) for variant in variants]
        found += [cost - min(costs) for cost in costs]
    return found


def _option_extras(groups: Sequence[Sequence[Variant]]) -> list[int]:
    """Return what each option costs beyond its member's cheapest."""
    return [
        one.cost - min(other.cost for other in member)
        for variants in groups
        for variant in variants
        for member in variant
        for one in member
    ]
