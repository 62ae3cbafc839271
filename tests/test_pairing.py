import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parofx import pairing
from parofx.errors import ConfigError, ShapeError
from parofx.rotation import check_pairs

methods = st.sampled_from(("matching", "greedy"))
group_sizes = st.sampled_from((2, 4, 6, 10, 14, 32, 128))
seeds = st.integers(0, 2**32)


def couples(pairs, group_size):
    """Return `{(round, group): [(i, j), ...]}` with i < j."""
    grouped = pairs.reshape(len(pairs), pairs.shape[1] // group_size, group_size // 2, 2).sort(-1).values.tolist()
    return {(r, g): [tuple(pair) for pair in slots] for r, row in enumerate(grouped) for g, slots in enumerate(row)}


@given(methods, group_sizes, st.integers(1, 3), st.integers(0, 12), seeds)
def test_each_round_is_a_perfect_matching(method, group_size, groups, krot, seed):
    pairs = pairing.make_pairs(groups * group_size, group_size, krot, method=method, seed=seed)
    assert (pairs.dtype, pairs.shape) == (torch.int16, (krot, groups * group_size))
    check_pairs(pairs, group_size)
    complete = nx.complete_graph(group_size)
    for edges in couples(pairs, group_size).values():
        assert nx.is_perfect_matching(complete, set(edges))


@given(group_sizes, st.integers(1, 3), st.integers(1, 12), seeds)
def test_matching_repeats_no_pair_and_has_no_dummies(group_size, groups, krot, seed):
    krot = min(krot, group_size - 1)
    pairs = pairing.make_pairs(groups * group_size, group_size, krot, method="matching", seed=seed)
    rounds = couples(pairs, group_size)
    for group in range(groups):
        used = [pair for r in range(krot) for pair in rounds[r, group]]
        assert len(set(used)) == len(used)
    assert pairing.trainable_angles(pairs, group_size).all()


@pytest.mark.parametrize("group_size", [2, 4, 6, 8, 10, 32])
def test_all_rounds_of_matching_use_every_pair_once(group_size):
    pairs = pairing.make_pairs(group_size, group_size, group_size - 1, method="matching", seed=3)
    used = sorted(pair for edges in couples(pairs, group_size).values() for pair in edges)
    assert used == sorted(nx.complete_graph(group_size).edges)


def test_more_rounds_than_matchings_repeat_and_are_not_trained():
    pairs = pairing.make_pairs(4, 4, 5, method="matching", seed=0)
    assert pairing.trainable_angles(pairs, 4).tolist() == [[True, True]] * 3 + [[False, False]] * 2


@given(st.sampled_from((4, 6, 8, 10)), st.integers(1, 12), seeds)
def test_greedy_trains_a_pair_once_and_dummies_are_what_is_left_over(group_size, krot, seed):
    pairs = pairing.make_pairs(2 * group_size, group_size, krot, method="greedy", seed=seed)
    trainable = pairing.trainable_angles(pairs, group_size).reshape(krot, 2, -1)
    rounds = couples(pairs, group_size)
    for group in range(2):
        used: set[tuple[int, int]] = set()
        for r in range(krot):
            real = [pair for pair, trained in zip(rounds[r, group], trainable[r, group], strict=True) if trained]
            left_over = set(range(group_size)) - {channel for pair in real for channel in pair}
            assert used.isdisjoint(real)
            # Maximal: no unused pair of left-over channels could have been taken.
            assert all((i, j) in used for i in left_over for j in left_over if i < j)
            used.update(real)


def test_greedy_meets_dummies():
    """Some seed leaves a round of K_6 short before its five matchings are used up; a fourth of K_4 has nothing left."""
    drawn = [pairing.make_pairs(6, 6, 5, method="greedy", seed=seed) for seed in range(40)]
    assert any(not pairing.trainable_angles(pairs, 6).all() for pairs in drawn)
    fourth = pairing.trainable_angles(pairing.make_pairs(4, 4, 4, method="greedy", seed=0), 4)[3]
    assert not fourth.any()


@given(methods, seeds)
def test_reproducible_from_a_seed(method, seed):
    first = pairing.make_pairs(64, 32, 8, method=method, seed=seed)
    assert torch.equal(first, pairing.make_pairs(64, 32, 8, method=method, seed=seed))


@pytest.mark.parametrize("method", ["matching", "greedy"])
def test_seeds_and_groups_draw_different_pairs(method):
    first = pairing.make_pairs(256, 128, 8, method=method, seed=0)
    assert not torch.equal(first, pairing.make_pairs(256, 128, 8, method=method, seed=1))
    assert not torch.equal(first[:, :128], first[:, 128:])


def test_drawing_leaves_global_random_state_alone():
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    pairing.make_pairs(64, 32, 8, method="greedy", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_channels_meet_every_other_equally_often():
    """Over seeds, channel 0 meets each of its 7 possible partners about 40 times in 280."""
    rounds = [pairing.make_pairs(8, 8, 1, method="matching", seed=seed) for seed in range(280)]
    partners = [max(pair) for pairs in rounds for pair in couples(pairs, 8)[0, 0] if 0 in pair]
    counts = np.bincount(partners, minlength=8)[1:]
    assert counts.min() > 15
    assert counts.max() < 80


def total_benefit(pairs, benefit):
    group_size = benefit.shape[1]
    return sum(
        float(benefit[group, i, j]) for (_, group), edges in couples(pairs, group_size).items() for i, j in edges
    )


def symmetric(groups, group_size, seed):
    noise = torch.rand(groups, group_size, group_size, generator=torch.Generator().manual_seed(seed))
    return noise + noise.mT


@given(st.sampled_from((2, 4, 6, 10, 16)), st.integers(1, 2), st.integers(1, 3), st.integers(0, 1000))
def test_weighted_rounds_are_disjoint_perfect_matchings(group_size, groups, krot, seed):
    krot = min(krot, group_size - 1)
    pairs = pairing.weighted_matching_pairs(symmetric(groups, group_size, seed), krot)
    assert (pairs.dtype, pairs.shape) == (torch.int16, (krot, groups * group_size))
    check_pairs(pairs, group_size)
    assert pairing.trainable_angles(pairs, group_size).all()


@given(st.sampled_from((2, 4, 6, 8)), st.integers(0, 1000))
def test_first_weighted_round_is_the_best_of_all_matchings(group_size, seed):
    benefit = symmetric(2, group_size, seed)
    best = sum(best_matching(tuple(range(group_size)), weights.tolist()) for weights in benefit)
    assert total_benefit(pairing.weighted_matching_pairs(benefit, 1), benefit) == pytest.approx(best, rel=1e-6)


def best_matching(channels, weights):
    """Return the largest benefit of a perfect matching of `channels`, by trying all of them."""
    if not channels:
        return 0.0
    first, *rest = channels
    return max(weights[first][other] + best_matching(tuple(c for c in rest if c != other), weights) for other in rest)


def test_weighted_matching_beats_random_in_total():
    benefit = symmetric(2, 32, 0)
    best = total_benefit(pairing.weighted_matching_pairs(benefit, 8), benefit)
    drawn = [total_benefit(pairing.make_pairs(64, 32, 8, method="matching", seed=s), benefit) for s in range(20)]
    assert best > 1.2 * max(drawn)


def test_negative_benefits_still_match_every_channel():
    pairs = pairing.weighted_matching_pairs(-symmetric(1, 8, 0), 3)
    check_pairs(pairs, 8)


def test_weighted_matching_without_rounds():
    assert pairing.weighted_matching_pairs(symmetric(2, 4, 0), 0).shape == (0, 8)


def test_weighted_matching_refuses_exhausted_graphs():
    """K_{3,3}'s three matchings first, then two triangles are left, which have no perfect matching."""
    benefit = torch.zeros(1, 6, 6)
    benefit[:, :3, 3:] = benefit[:, 3:, :3] = 1.0
    assert pairing.weighted_matching_pairs(benefit, 3).shape == (3, 6)
    with pytest.raises(ShapeError, match="krot must leave a perfect matching: got 4 rounds of 6 channels"):
        pairing.weighted_matching_pairs(benefit, 4)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 6), (1, 5, 5)])
def test_weighted_matching_refuses_shapes(shape):
    with pytest.raises(ShapeError, match=r"benefit must be \(groups, g, g\) with an even g, got"):
        pairing.weighted_matching_pairs(torch.zeros(shape), 1)


@pytest.mark.parametrize(("in_features", "group_size"), [(9, 3), (8, 0), (10, 4)])
def test_make_pairs_refuses_sizes(in_features, group_size):
    with pytest.raises(ShapeError, match=f"group_size must be even and divide in_features, got {group_size} and"):
        pairing.make_pairs(in_features, group_size, 1, seed=0)


def test_make_pairs_refuses_methods():
    with pytest.raises(ConfigError, match="pairs must be 'matching' or 'greedy', got 'random'"):
        pairing.make_pairs(8, 4, 1, method="random", seed=0)
