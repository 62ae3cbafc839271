"""Which channels are rotated together: the construction of `pairs`.

Every construction returns int16 `(krot, K)` in the layout of `parofx.rotation`, reproducible from a seed:

- `matching`: each round is a perfect matching of the complete graph K_g and, for `krot < group_size`, no pair occurs
  in two rounds: the rounds come from a 1-factorization of K_g (the circle method of round-robin tournaments), with
  channels relabelled and rounds drawn at random per group.
- `greedy`: the paper's Algorithm A1. All pairs are shuffled once; each round scans the list and takes every pair that
  no earlier round used and whose channels are still free. Channels left over become *dummy* pairs of angle 0.
- `weighted_matching_pairs`: rounds of maximum-weight perfect matchings for given benefits, for callers who know
  which channels should meet.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from parofx.config import PairMethod
from parofx.errors import ConfigError, ShapeError


def make_pairs(in_features: int, group_size: int, krot: int, *, method: PairMethod = "matching", seed: int) -> Tensor:
    """Return `pairs (krot, in_features)`, int16.

    Raises:
        ShapeError: if `group_size` is odd or does not divide `in_features`.
        ConfigError: if the method is unknown.
    """
    if group_size < 2 or group_size % 2 or in_features % group_size:
        raise ShapeError(f"group_size must be even and divide in_features, got {group_size} and {in_features}")
    rng = np.random.default_rng(seed)
    groups = in_features // group_size
    if method == "matching":
        rounds = _one_factorization(group_size)
        grouped = np.stack([_draw_matchings(rounds, krot, rng) for _ in range(groups)], axis=1)
    elif method == "greedy":
        grouped = np.stack([_draw_greedy(group_size, krot, rng) for _ in range(groups)], axis=1)
    else:
        raise ConfigError(f"pairs must be 'matching' or 'greedy', got {method!r}")
    return torch.from_numpy(grouped.reshape(krot, in_features).astype(np.int16))


def trainable_angles(pairs: Tensor, group_size: int) -> Tensor:
    """Return bool `(krot, K/2)`: False for dummy pairs, that is pairs which an earlier round of the group holds.

    A greedy round leaves channels over only when every pair of them was used before, so a repeated pair is a dummy
    one; perfect matchings repeat none while `krot < group_size`.
    """
    krot, in_features = pairs.shape
    couples = pairs.reshape(krot, in_features // group_size, group_size // 2, 2).long().sort(-1).values
    code = couples[..., 0] * group_size + couples[..., 1]
    trainable = torch.ones(code.shape, dtype=torch.bool, device=pairs.device)
    for r in range(1, krot):
        earlier = code[:r].permute(1, 0, 2).flatten(1)
        trainable[r] = ~(code[r][..., None] == earlier[:, None, :]).any(-1)
    return trainable.reshape(krot, in_features // 2)


def weighted_matching_pairs(benefit: Tensor, krot: int) -> Tensor:
    """Return `pairs (krot, K)` whose rounds are disjoint perfect matchings of maximum total benefit.

    Args:
        benefit: symmetric `(K/g, g, g)`, the gain of rotating channels i and j of a group together.
        krot: rounds, at most `g − 1`; each round takes the best matching among the pairs not yet used.

    Raises:
        ShapeError: if the shape is wrong or no disjoint perfect matching is left.
    """
    if benefit.dim() != 3 or benefit.shape[1] != benefit.shape[2] or benefit.shape[1] % 2:
        raise ShapeError(f"benefit must be (groups, g, g) with an even g, got {tuple(benefit.shape)}")
    groups, group_size, _ = benefit.shape
    pairs = torch.empty(krot, groups, group_size, dtype=torch.int16)
    for group, weights in enumerate(benefit.double().tolist()):
        graph = nx.complete_graph(group_size)
        for i, j in graph.edges:
            graph.edges[i, j]["weight"] = weights[i][j]
        for r in range(krot):
            matching = sorted(tuple(sorted(edge)) for edge in nx.max_weight_matching(graph, maxcardinality=True))
            if 2 * len(matching) != group_size:
                raise ShapeError(f"krot must leave a perfect matching: got {krot} rounds of {group_size} channels")
            graph.remove_edges_from(matching)
            pairs[r, group] = torch.tensor(matching, dtype=torch.int16).flatten()
    return pairs.reshape(krot, groups * group_size)


def _one_factorization(group_size: int) -> np.ndarray:
    """Return `(g − 1, g)`: g − 1 perfect matchings that use every pair of K_g exactly once."""
    last = group_size - 1
    rounds = []
    for r in range(last):
        row = [last, r]
        for step in range(1, group_size // 2):
            row += [(r + step) % last, (r - step) % last]
        rounds.append(row)
    return np.array(rounds)


def _draw_matchings(rounds: np.ndarray, krot: int, rng: np.random.Generator) -> np.ndarray:
    relabel = rng.permutation(rounds.shape[1])
    order = rng.permutation(len(rounds))
    drawn: np.ndarray = relabel[rounds[np.resize(order, krot)]]
    return drawn


def _draw_greedy(group_size: int, krot: int, rng: np.random.Generator) -> np.ndarray:
    remaining = np.stack(np.triu_indices(group_size, 1), axis=1)
    remaining = rng.permutation(remaining)
    rows = np.empty((krot, group_size), dtype=np.int64)
    for r in range(krot):
        free = np.ones(group_size, dtype=bool)
        taken: list[int] = []
        kept = []
        for i, j in remaining.tolist():
            if free[i] and free[j]:
                free[i] = free[j] = False
                taken += [i, j]
            else:
                kept.append((i, j))
        remaining = np.array(kept, dtype=np.int64).reshape(-1, 2)
        rows[r] = taken + np.flatnonzero(free).tolist()
    return rows
