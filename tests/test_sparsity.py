"""Sparsity measures: the published scan entry by entry, closed forms, and a Jacobian by automatic differentiation."""

import numpy as np
import pytest
import torch

from theory.relu_network import ReluNetwork
from theory.sparsity import (
    SCREENED,
    active_fraction,
    distinct_features,
    distinct_units,
    effective_rank,
    feature_sparsity,
    jacobian_rank,
    neuron_vectors,
    nuclear_norm,
    numerical_rank,
    pattern_distance,
)


def scan(phi, threshold, normalize):
    """The published rule literally: delete one unit at a time while a remaining one correlates with it."""
    phi = phi.copy()
    with np.errstate(invalid="ignore", divide="ignore"):
        if normalize:
            phi /= np.sqrt((phi**2).sum(1, keepdims=True))
            phi[np.isnan(phi)] = 0
        kept = np.flatnonzero((phi > 0).any(0))
        correlation = np.corrcoef(phi[:, kept].T) - np.eye(len(kept))
    i = 0
    while i < len(correlation):
        if (np.abs(correlation[i]) > threshold).any():
            correlation = np.delete(np.delete(correlation, i, 0), i, 1)
            kept = np.delete(kept, i)
        else:
            i += 1
    return kept, (phi[:, kept] != 0).sum() / phi.size


def activations(generator, n, m):
    """Units of which some are scaled copies, some noisy copies, some dead and some constant."""
    base = np.maximum(generator.standard_normal((n, m // 2 + 1)), 0)
    phi = base[:, generator.integers(0, m // 2 + 1, m)] * generator.uniform(0.5, 2, m)
    phi += (generator.random(m) < 0.3) * np.maximum(generator.standard_normal((n, m)), 0) * 0.1
    phi[:, generator.random(m) < 0.2] = 0
    if generator.random() < 0.4:
        phi[:, 0] = 1.0
    return phi


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_equals_the_published_scan_to_the_entry(normalize):
    generator = np.random.default_rng(0)
    dropped = 0
    for _ in range(200):
        phi = activations(generator, generator.integers(3, 30), generator.integers(4, 40))
        if (phi > 0).any(0).sum() < 2:
            continue
        threshold = generator.choice([0.95, 0.99, 0.999])
        kept, share = scan(phi, threshold, normalize)
        assert distinct_units(torch.from_numpy(phi), threshold, normalize).nonzero()[:, 0].tolist() == kept.tolist()
        assert feature_sparsity(torch.from_numpy(phi), threshold, normalize).item() == pytest.approx(share, abs=1e-15)
        dropped += phi.shape[1] - len(kept)
    assert dropped > 500


@pytest.mark.parametrize("kind", ["copies", "near the threshold", "almost constant", "tiny", "another's head"])
def test_many_units_are_screened_without_a_difference(kind):
    generator = np.random.default_rng(1)
    phi = activations(generator, 1500, SCREENED + 44)
    if kind == "near the threshold":  # correlations from 0.949 to 0.951, closer than float32 can tell
        common = np.maximum(generator.standard_normal((1500, 1)), 0)
        phi = np.maximum(common + 0.1 * generator.standard_normal(phi.shape), 0)
        correlation = np.corrcoef(phi.T)
        threshold = float(np.median(correlation))
    elif kind == "another's head":  # on the first inputs most like a unit that it is no duplicate of
        threshold, phi = 0.5, np.maximum(generator.standard_normal(phi.shape), 0)
        for unit in range(20):
            phi[:512, unit], phi[512:, unit] = phi[:512, unit + 50], phi[512:, unit + 100]
        assert len(scan(phi, threshold, False)[0]) == phi.shape[1] - 20
    else:
        threshold = 0.95
        phi[:, 5:9] = {"copies": phi[:, 9:13], "almost constant": 1e5 + phi[:, 9:13], "tiny": 1e-30 * phi[:, 9:13]}[
            kind
        ]
    for normalize in (True, False):
        kept, _ = scan(phi, threshold, normalize)
        assert distinct_units(torch.from_numpy(phi), threshold, normalize).nonzero()[:, 0].tolist() == kept.tolist()


def test_leading_axes_are_batch_axes():
    generator = np.random.default_rng(2)
    phi = torch.from_numpy(np.stack([activations(generator, 12, 9) for _ in range(6)])).reshape(2, 3, 12, 9)
    for measure in (feature_sparsity, distinct_features, active_fraction):
        assert torch.equal(measure(phi)[1, 2], measure(phi[1, 2]))
    assert distinct_units(phi).shape == (2, 3, 9)


def test_closed_cases():
    dead = torch.zeros(4, 3)
    assert feature_sparsity(dead) == 0
    assert distinct_features(dead) == 0
    one = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    assert distinct_features(one.expand(3, 5), normalize=False) == 1  # of five copies the last stays
    assert distinct_units(one.expand(3, 5), normalize=False).tolist() == [False] * 4 + [True]
    assert feature_sparsity(one, normalize=False).item() == pytest.approx(2 / 3)
    constant = torch.full((3, 2), 0.1, dtype=torch.float64)
    assert distinct_features(constant, normalize=False) == 2  # no correlation, so neither goes
    opposite = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert distinct_features(opposite, normalize=False) == 1  # the absolute value counts: correlation is -1
    assert active_fraction(opposite) == 0.5
    assert pattern_distance(opposite, 1 - opposite) == 1


def test_ranks():
    sigma = torch.tensor([3.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    assert effective_rank(sigma).item() == pytest.approx(np.log(3))
    assert effective_rank(sigma, exponential=True).item() == pytest.approx(3)
    assert torch.equal(sigma, torch.tensor([3.0, 3.0, 3.0, 0.0], dtype=torch.float64))  # unlike the published code
    left, right = (torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0],) * 2
    matrix = left @ torch.diag(torch.tensor([1, 0.1, 2e-4, 0.5e-4, 0, 0], dtype=torch.float64)) @ right
    assert numerical_rank(matrix) == 3
    assert numerical_rank(matrix, 1e-5) == 4
    assert numerical_rank(torch.stack([matrix, 0 * matrix, matrix * torch.inf])).tolist() == [3, 0, 0]
    assert nuclear_norm(matrix).item() == pytest.approx(1.10025)


@pytest.mark.parametrize("network", [ReluNetwork((2, 5, 1)), ReluNetwork((3, 4, 6, 1), (True, False, True))])
def test_jacobian_and_its_rank(network):
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(2, 3, network.size, generator=generator, dtype=torch.float64)
    X = torch.randn(40, network.widths[0], generator=generator, dtype=torch.float64)
    by_hand = network.jacobian(theta, X)
    auto = torch.func.vmap(torch.func.vmap(torch.func.jacrev(network), (0, None)), (0, None))(theta, X)
    assert (by_hand - auto).abs().max() < 1e-12
    expected = [[np.sum(s / s[0] > 1e-4) for s in np.linalg.svd(auto[k].numpy())[1]] for k in range(2)]
    assert jacobian_rank(network, theta, X).tolist() == expected


def test_neuron_vectors():
    network = ReluNetwork((2, 2, 1))
    theta = torch.tensor([3.0, 4.0, 1.0, 0.0, -2.0, 0.5])
    assert neuron_vectors(network, theta).tolist() == [[6.0, 8.0], [0.5, 0.0]]
    deep = ReluNetwork((1, 1, 2, 1))
    assert neuron_vectors(deep, torch.tensor([2.0, 3.0, 4.0, 1.0, 1.0])).tolist() == [[10.0]]
