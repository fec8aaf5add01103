"""Growth rates of units and pairs: closed forms, enumeration, the SE of a subset, and runs of SGD next to a set."""

import itertools

import pytest
import torch
from torch import nn

from nets.units import hidden_layers
from simulators.network import Network
from simulators.sample_gradients import sample_gradients
from tests.test_network import CASES, draws, made
from tests.test_network import sample_gradients as by_hand
from theory.growth_rate import Dynamics, one_step_growth, pair_growth, sign_growth, unit_growth
from theory.minibatch import Minibatch

DOUBLE = torch.float64


@pytest.fixture
def block():
    """Vectors (3 units of 4 entries) and the gradients of 10 samples."""
    return draws(3, 4, seed=1), draws(10, 3, 4, seed=2)


def test_one_dimension_is_geometric_brownian_motion():
    # Gradients c_i x: d ln|x| = -(mean c) dt - ½ η var(c) dt, whatever x.
    c, x = draws(6, seed=3), torch.tensor([[0.3]], dtype=DOUBLE)
    rate = sign_growth(x, c.view(6, 1, 1) * x, Dynamics(0.1))
    assert torch.allclose(rate.drift, -c.mean())
    assert torch.allclose(rate.noise, -0.05 * c.var(correction=0))
    assert torch.allclose(rate.along, 0.1 * c.var(correction=0))
    assert torch.allclose(rate.read_as_stratonovich, -c.mean())


def test_noise_along_shrinks_and_noise_across_lengthens():
    x = torch.tensor([[2.0, 0.0]], dtype=DOUBLE)
    sign = torch.tensor([1.0, -1.0], dtype=DOUBLE).view(2, 1, 1)
    along = sign_growth(x, sign * x, Dynamics(0.1))
    across = sign_growth(x, sign * torch.tensor([[0.0, 2.0]], dtype=DOUBLE), Dynamics(0.1))
    assert along.noise.item() == pytest.approx(-0.05)
    assert across.noise.item() == pytest.approx(0.05)
    assert across.along.item() == 0


@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(2), Minibatch(2, replacement=False)])
def test_rate_is_the_small_step_limit_of_the_exact_expectation_over_minibatches(block, batch):
    x, g = block
    g = g - g.mean(0)  # ∇L = 0: what is left is noise
    take = itertools.product if batch.replacement else itertools.permutations
    every = list(take(range(10), batch.size) if not batch.replacement else take(range(10), repeat=batch.size))
    means = torch.stack([g[list(rows)].mean(0) for rows in every])
    noise = sign_growth(x, g, Dynamics(1.0, batch)).noise
    gaps = []
    for eta in (1e-2, 5e-3):
        exact = (x - eta * means).norm(dim=-1).log().mean(0) - x.norm(dim=-1).log()
        gaps.append((exact / eta**2 - noise).norm())
    assert gaps[0] < 0.05 * noise.norm()
    assert gaps[1] < 0.6 * gaps[0]  # of first order in η


def test_one_step_growth_is_the_enumeration_and_its_limit_is_the_drift(block):
    x, g = block
    exact = torch.stack([(x - 0.1 * (row + 0.5 * x)).norm(dim=-1).log() for row in g]).mean(0) - x.norm(dim=-1).log()
    assert torch.allclose(one_step_growth(x, g, 0.1, 0.5), exact / 0.1)
    drift = sign_growth(x, g, Dynamics(1e-6, weight_decay=0.5)).drift
    assert torch.allclose(one_step_growth(x, g, 1e-6, 0.5), drift, rtol=1e-4)


def test_momentum_multiplies_the_noise_and_weight_decay_is_a_drift(block):
    x, g = block
    plain, heavy = sign_growth(x, g, Dynamics(0.1)), sign_growth(x, g, Dynamics(0.1, momentum=0.9, weight_decay=0.3))
    assert torch.allclose(heavy.noise, 10 * plain.noise)
    assert torch.allclose(heavy.drift, plain.drift - 0.3)


def test_a_pair_is_the_difference_of_its_units(block):
    x, g = block
    pairs = torch.tensor([[0, 1], [2, 0]])
    rate = pair_growth(x, g, pairs, Dynamics(0.1))
    for k, (u, v) in enumerate(pairs.tolist()):
        alone = sign_growth((x[u] - x[v])[None], (g[:, u] - g[:, v])[:, None], Dynamics(0.1))
        for name in ("drift", "noise", "along", "trace"):
            assert torch.allclose(getattr(rate, name)[k], getattr(alone, name)[0])


def test_a_unit_on_its_set_has_no_rate(block):
    x, g = block
    rate = sign_growth(torch.stack([x[0], 0 * x[1], x[2]]), g, Dynamics(0.1)).value
    assert torch.isnan(rate).tolist() == [False, True, False]


def test_pairs_in_chunks_and_batches_are_the_same_numbers(block, monkeypatch):
    x, g = (torch.stack([part, 2 * part]) for part in block)
    pairs = torch.combinations(torch.arange(3))
    whole = pair_growth(x, g, pairs, Dynamics(0.1))
    monkeypatch.setattr("theory.growth_rate.CHUNK", 1)
    chunked = pair_growth(x, g, pairs, Dynamics(0.1))
    assert whole.value.shape == (2, 3)
    assert torch.equal(whole.value, chunked.value)
    assert torch.allclose(whole.value[0], whole.value[1])  # rates do not depend on scale


def test_standard_error_is_the_spread_over_random_parts_of_the_samples():
    x, g = draws(3, 4, seed=1), draws(200, 3, 4, seed=2) + 0.3 * draws(200, 1, 1, seed=4)
    whole = sign_growth(x, g, Dynamics(0.5))
    assert whole.standard_error.max() == 0
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2000):
        rows = torch.randperm(200, generator=generator)[:50]
        parts.append(sign_growth(x, g[rows], Dynamics(0.5, samples=200)))
    values, errors = (torch.stack([getattr(p, name) for p in parts]) for name in ("value", "standard_error"))
    assert torch.allclose(errors.mean(0), values.std(0), rtol=0.08)  # 2000 parts: 1.6 % each, and 50 samples' bias
    assert ((values.mean(0) - whole.value).abs() < 4 * values.std(0) / 2000**0.5).all()  # unbiased


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_sample_gradients_are_those_of_backward(build):
    network = build()
    thetas = network.theta + 0.1 * draws(2, network.p, seed=5)
    found = sample_gradients(network, thetas)
    for theta, gradients in zip(thetas, found, strict=True):
        assert torch.allclose(gradients, by_hand(network, theta), rtol=1e-10, atol=1e-13)
    rows = torch.tensor([3, 0])
    assert torch.allclose(sample_gradients(network, thetas, rows), found[:, rows])


@pytest.mark.parametrize(("kind", "activation"), [("sign", nn.Tanh), ("sign", nn.ReLU), ("pair", nn.GELU)])
def test_a_step_next_to_a_set_grows_by_the_rate_up_to_second_order(kind, activation):
    """The mean over samples of a real step's ln‖x‖, less the square of the mean gradient, which no SDE has."""
    module = made(lambda: nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 1)))
    network, index = Network(module, draws(9, 3, seed=7), draws(9, 1, seed=8)), hidden_layers(module)["0"].index(module)
    theta, offset = network.theta.clone(), 1e-6 * draws(index.shape[1], seed=9)
    theta[index[0]] = offset if kind == "sign" else theta[index[1]] + offset
    gradients = sample_gradients(network, theta[None])[0]

    def across(state):
        return state[..., index[0]] - (0 if kind == "sign" else state[..., index[1]])

    def gaps(eta):
        vectors, g, dynamics = theta[index], gradients[:, index], Dynamics(eta)
        if kind == "sign":
            rate = sign_growth(vectors[:1], g[:, :1], dynamics)
        else:
            rate = pair_growth(vectors, g, torch.tensor([[0, 1]]), dynamics)
        x, mean = across(theta), across(gradients).mean(0)
        realised = (across(theta - eta * gradients).norm(dim=-1).log().mean() - x.norm().log()) / eta
        square = eta / 2 * (mean @ mean - 2 * (x @ mean) ** 2 / (x @ x)) / (x @ x)
        return [
            float(abs(realised - square - rival)) for rival in (rate.value, rate.drift, rate.drift + rate.noise / 2)
        ]

    large, small = gaps(4e-3), gaps(2e-3)
    assert small[0] < 0.3 * large[0]  # second order: a quarter
    assert all(s > 0.4 * g for s, g in zip(small[1:], large[1:], strict=True))  # rivals: first order, a half


def test_bad_arguments(block):
    x, g = block
    with pytest.raises(ValueError, match="do not fit"):
        sign_growth(x, g[0], Dynamics(0.1))
    with pytest.raises(ValueError, match="give no covariance"):
        sign_growth(x, g[:1], Dynamics(0.1))
    with pytest.raises(ValueError, match="give no covariance"):
        sign_growth(x, g, Dynamics(0.1, samples=5))
    with pytest.raises(ValueError, match="unit numbers"):
        pair_growth(x, g, torch.tensor([0, 1]), Dynamics(0.1))
    network = CASES["tanh, squared"]()
    with pytest.raises(ValueError, match="states of shape"):
        sample_gradients(network, network.theta)


def test_units_of_any_sizes_in_whole_states_grow_as_their_gathered_entries():
    theta, gradients = draws(2, 11, seed=8), draws(2, 6, 11, seed=9)
    units = [torch.tensor([0, 3, 4]), torch.tensor([4, 10]), torch.tensor([7, 2, 9, 5])]  # 4 belongs to two
    dynamics = Dynamics(0.2, Minibatch(1), weight_decay=0.1, samples=50)
    found = unit_growth(theta, gradients, units, dynamics)
    for column, at in enumerate(units):
        alone = sign_growth(theta[:, at].unsqueeze(1), gradients[..., at].unsqueeze(2), dynamics)
        for term in ("drift", "noise", "along", "trace", "standard_error"):
            torch.testing.assert_close(getattr(found, term)[:, column], getattr(alone, term)[:, 0], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="do not fit"):
        unit_growth(theta, gradients[..., 1:], units, dynamics)
    with pytest.raises(ValueError, match="do not fit"):
        unit_growth(theta, gradients, [], dynamics)
