"""Counts of independent units: the fast scan equals the published loop, and what distinguishes the two counts."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering

from theory.independent_neurons import (
    cluster_order,
    independent_count,
    independent_lists,
    linkage_count,
    normalized_distance,
    vanishing,
)


def literal_count(w, same=0.1, vanished=0.1, eps=1e-8):
    """The published loop, pair by pair."""
    norms = np.linalg.norm(w, axis=1)
    w = w[~(norms / norms.max() < vanished)]
    close = []
    for i, j in combinations(range(len(w)), 2):
        squares = np.linalg.norm(w[i]) ** 2 + np.linalg.norm(w[j]) ** 2 + eps
        if 2 * np.linalg.norm(w[i] - w[j]) ** 2 / squares < same:
            close.append((i, j))
    taken, lists = [], defaultdict(list)
    for i, j in close:
        if j in taken:
            continue
        if i not in taken:
            taken.append(i)
        taken.append(j)
        lists[i].append(j)
    for i in range(len(w)):
        if i not in taken:
            lists[i].append(i)
    return len(lists)


def layer(seed, units=60, dim=9, clusters=15, spread=0.35):
    """Units around a few centres, at distances on both sides of the threshold, some of them vanishing."""
    draws = np.random.default_rng(seed)
    centres = draws.standard_normal((clusters, dim))
    w = centres[draws.integers(0, clusters, units)] + spread * draws.uniform(0, 1, (units, 1)) * draws.standard_normal(
        (units, dim)
    )
    return w * np.where(draws.random((units, 1)) < 0.2, 0.02, 1.0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_count_is_the_published_one(seed, eps):
    w = layer(seed)
    expected = literal_count(w, eps=eps)
    assert 5 < expected < 50  # neither all alike nor all different
    assert int(independent_count(torch.from_numpy(w), eps=eps)) == expected
    single = w.astype(np.float32)
    assert int(independent_count(torch.from_numpy(single), eps=eps)) == literal_count(single, eps=eps)


def on_circle(*degrees):
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1)


def test_a_chain_counts_two_and_a_triangle_one():
    # Between unit vectors d = 2(1 - cos): 0.1 lies between 17 and 19 degrees.
    assert int(independent_count(on_circle(0, 15, 30))) == 2
    assert independent_lists(on_circle(0, 15, 30)).tolist() == [0, 0, 1]
    assert int(independent_count(on_circle(0, 8, 15))) == 1
    assert int(independent_count(on_circle(0, 90, 180, 270))) == 4


def test_published_count_depends_on_the_order_of_units_and_average_linkage_does_not():
    chain = on_circle(0, 15, 30)
    counts = {int(independent_count(chain[list(order)])) for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0))}
    assert counts == {1, 2}
    for seed in range(5):
        w = torch.from_numpy(layer(seed))
        shuffled = w[torch.from_numpy(np.random.default_rng(seed).permutation(len(w)))]
        assert linkage_count(w) == linkage_count(shuffled)


@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_is_scikit_learns(seed):
    w = torch.from_numpy(layer(seed))
    kept = w[~vanishing(w)]
    peer = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=0.1)
    assert linkage_count(w) == peer.fit(normalized_distance(kept).numpy()).n_clusters_


def test_collapsed_layer_counts_its_clusters():
    centres = torch.eye(6, dtype=torch.float64)[:4]
    w = torch.cat([centres[[0, 1, 2, 3, 0, 1, 1, 1]], torch.full((2, 6), 1e-3, dtype=torch.float64)])
    assert vanishing(w).tolist() == [False] * 8 + [True] * 2
    assert int(independent_count(w)) == linkage_count(w) == 4
    assert independent_lists(w).tolist() == [0, 1, 2, 3, 0, 1, 1, 1, -1, -1]
    assert int(independent_count(torch.zeros(3, 2))) == linkage_count(torch.zeros(3, 2)) == 0


def test_leading_axes_are_a_batch():
    w = torch.from_numpy(np.stack([layer(seed) for seed in range(6)])).view(2, 3, 60, 9)
    counts = independent_count(w)
    assert counts.shape == (2, 3)
    assert counts.tolist() == [[int(independent_count(w[i, j])) for j in range(3)] for i in range(2)]


def test_distance_is_the_difference_formula():
    w = torch.from_numpy(layer(0))
    squares = w.square().sum(1)
    by_difference = 2 * torch.cdist(w, w).square() / (squares[:, None] + squares + 1e-8)
    assert torch.allclose(normalized_distance(w), by_difference, rtol=1e-9, atol=1e-12)
    assert torch.allclose(normalized_distance(w.float()), by_difference.float(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(normalized_distance(w.expand(2, -1, -1))[1], by_difference, rtol=1e-9, atol=1e-12)
    assert torch.equal(normalized_distance(torch.zeros(2, 3), eps=0.0), torch.zeros(2, 2))


def test_order_shows_clusters_as_blocks_largest_first():
    w = torch.eye(5, dtype=torch.float64)[[3, 0, 3, 1, 0, 3, 3]]
    order = cluster_order(normalized_distance(w), 3)
    assert order.tolist() == [0, 2, 5, 6, 1, 4, 3]
    assert sorted(cluster_order(torch.zeros(1, 1), 1).tolist()) == [0]


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"give \(\.\.\., units, dim\)"):
        independent_count(torch.zeros(3))
    with pytest.raises(ValueError, match="leave diverged networks out"):
        independent_count(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="loop over layers"):
        linkage_count(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="ask for 1 to 3"):
        cluster_order(torch.zeros(3, 3), 4)
    with pytest.raises(ValueError, match="cannot be ordered"):
        cluster_order(torch.zeros(3, 2), 1)
