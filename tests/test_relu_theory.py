"""SDEs, balance and growth of ReLU networks: identities to rounding, two derivations of each law, statistics."""

import numpy as np
import pytest
import torch

from nets.relu import sgd
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.relu import (
    Isotropic,
    MeasuredLevel,
    ReluSDE,
    balance,
    balance_drift,
    collapse_time,
    column_norms,
    isolated_growth,
    loss_slopes,
    neuron_growth,
    neuron_norms,
)
from theory.relu_init import gaussian
from theory.relu_network import ReluNetwork
from theory.schedule import Schedule, StepClock
from theory.sde import ExactCovariance, IsotropicSDE, LabelNoise, ModelSDE

NETWORKS = [
    ReluNetwork((2, 6, 1)),
    ReluNetwork((2, 6, 1), (True, False)),
    ReluNetwork((3, 5, 4, 1), (True, True, True)),
    ReluNetwork((3, 4, 5, 3, 1), (False, True, False, True)),
]


def ids(network):
    return f"{network.widths}{'b' if any(network.biases) else ''}"


def data(network, n=7, labels=False):
    generator = np.random.default_rng(0)
    X = torch.from_numpy(generator.standard_normal((n, network.widths[0])))
    y = torch.from_numpy(generator.standard_normal(n))
    return Regression(X, y.sign() if labels else y, X, y)


def states(network, count=5, scale=0.7):
    return gaussian(network, (scale,) * network.depth, range(count))


def sample_gradients(network, problem, theta, loss):
    """Gradients of ℓ_i by automatic differentiation, shape (paths, n, p)."""

    def losses(at):
        h = network(at, problem.X)
        return (h - problem.y).square() / 2 if loss == "squared" else torch.nn.functional.softplus(-problem.y * h)

    return torch.func.vmap(torch.func.jacrev(losses))(theta)


@pytest.mark.parametrize("network", NETWORKS, ids=ids)
@pytest.mark.parametrize("covariance", [LabelNoise(0.3, 0.2), LabelNoise(0.3), ExactCovariance(0.3)])
def test_relu_sde_is_the_model_sde(network, covariance):
    problem, theta = data(network), states(network)
    v = torch.from_numpy(np.random.default_rng(1).standard_normal((5, problem.n)))
    own, general = ReluSDE(network, problem, covariance), ModelSDE(network, problem, covariance)
    torch.testing.assert_close(own.f(0.0, theta), general.f(0.0, theta), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own.g_prod(0.0, theta, v), general.g_prod(0.0, theta, v), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("network", NETWORKS, ids=ids)
def test_isotropic_noise_has_the_power_of_what_it_rivals(network):
    problem, theta = data(network), states(network)
    v = torch.ones(5, network.size, dtype=torch.float64)
    general = IsotropicSDE(network, problem, 0.3, Minibatch(2), network.size)
    own = ReluSDE(network, problem, Isotropic(0.3, minibatch=Minibatch(2)))
    torch.testing.assert_close(own.g_prod(0.0, theta, v), general.g_prod(0.0, theta, v))
    at_level = ReluSDE(network, problem, Isotropic(0.3, 0.2)).g_prod(0.0, theta, v).square().sum(-1)
    label = ReluSDE(network, problem, LabelNoise(0.3, 0.2))
    unit = torch.eye(problem.n, dtype=torch.float64)
    trace = sum(label.g_prod(0.0, theta, e.expand(5, -1)).square().sum(-1) for e in unit)
    torch.testing.assert_close(at_level, trace)


@pytest.mark.parametrize("network", NETWORKS, ids=ids)
def test_logistic_sde_is_that_of_its_sample_gradients(network):
    problem, theta = data(network, labels=True), states(network)
    gradients = sample_gradients(network, problem, theta, "logistic")
    sde = ReluSDE(network, problem, ExactCovariance(0.3), "logistic")
    torch.testing.assert_close(sde.f(0.0, theta), -gradients.mean(1))
    unit = torch.eye(problem.n, dtype=torch.float64)
    G = torch.stack([sde.g_prod(0.0, theta, e.expand(5, -1)) for e in unit], 1)
    centred = gradients - gradients.mean(1, keepdim=True)
    expected = 0.3 * centred.transpose(1, 2) @ centred / problem.n
    torch.testing.assert_close(G.transpose(1, 2) @ G, expected)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("network", NETWORKS, ids=ids)
def test_a_step_of_sgd_moves_the_balance_by_the_square_of_its_gradient(network, loss):
    problem, theta, eta = data(network, labels=loss == "logistic"), states(network), 0.2
    index = np.arange(5)[:, None, None] % problem.n
    index = np.concatenate([index, (index + 3) % problem.n], 2)  # minibatches of two
    after = sgd(network, problem, theta, [Schedule(eta)], 1, seeds=range(5), indices=index, loss=loss).final[0]
    gradient = (theta - after) / eta
    for layer in range(1, network.depth):
        moved = balance(network, after, layer) - balance(network, theta, layer)
        torch.testing.assert_close(moved, eta**2 * balance(network, gradient, layer), rtol=0, atol=1e-13)
        assert moved.abs().max() > 1e-4  # gradient flow would not move it


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("network", NETWORKS, ids=ids)
def test_balance_drift_is_itos(network, loss):
    """dβ = 2⟨θ, dθ⟩_B + tr_B(G Gᵀ)dt, and neither drift nor noise enters the first term."""
    problem, theta, eta = data(network, labels=loss == "logistic"), states(network), 0.3
    unit = torch.eye(problem.n, dtype=torch.float64)
    for covariance, level in (
        (ExactCovariance(eta), None),
        (LabelNoise(eta, 0.4), torch.full((5,), 0.4, dtype=torch.float64)),
    ):
        sde = ReluSDE(network, problem, covariance, loss)
        columns = torch.stack([sde.g_prod(0.0, theta, e.expand(5, -1)) for e in unit], 1)  # (5, n, p)
        for layer in range(1, network.depth):
            expected = eta * balance_drift(network, problem, theta, layer, level, loss)
            torch.testing.assert_close(balance(network, columns, layer).sum(1), expected, rtol=1e-10, atol=1e-12)
            for direction in (sde.f(0.0, theta).unsqueeze(1), columns):
                here = theta.unsqueeze(1)
                crossed = balance(network, here + direction, layer) - balance(network, here - direction, layer)
                torch.testing.assert_close(crossed, torch.zeros_like(crossed), rtol=0, atol=1e-12)


def test_balance_is_conserved_without_noise_and_drifts_with_it():
    network = ReluNetwork((2, 6, 1), (True, False))
    problem, theta = data(network), states(network, 64)
    h, steps, level = 1e-3, 400, 0.3
    sde = ReluSDE(network, problem, LabelNoise(0.2, level))
    run = integrate(sde, theta, h, steps, BrownianIncrements(0, "balance", 64, problem.n))
    still = integrate(ReluSDE(network, problem, LabelNoise(0.2, 0.0)), theta, h, steps,
                      BrownianIncrements(0, "balance", 64, problem.n))  # fmt: skip
    start = balance(network, theta).sum(-1)
    effect = balance(network, run.final).sum(-1) - start
    quiet = balance(network, still.final).sum(-1) - start
    levels = torch.full((64,), level, dtype=torch.float64)
    first, last = (balance_drift(network, problem, at, 1, levels).sum(-1) for at in (theta, run.final))
    law = 0.2 * h * steps * (first + last) / 2
    assert quiet.abs().max() < 0.05 * effect.abs().mean()  # what is left is Euler's, of order h
    gap = effect - quiet - law
    assert gap.mean().abs() < 4 * gap.std() / 8 + 0.03 * law.mean().abs()
    assert law.mean().abs() > 10 * gap.std() / 8


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("network", NETWORKS, ids=ids)
def test_neuron_growth_is_itos_from_sample_gradients(network, loss):
    problem, theta = data(network, labels=loss == "logistic"), states(network)
    gradients = sample_gradients(network, problem, theta, loss)
    for layer in range(1, network.depth):
        where = network.unit_parameters(layer)
        own, g = theta[:, where], gradients[:, :, where]  # (5, units, m), (5, n, units, m)
        rho2, mean = own.square().sum(-1), g.mean(1)
        centred = g - mean.unsqueeze(1)
        trace, along = centred.square().sum(-1).mean(1), (centred * own.unsqueeze(1)).sum(-1).square().mean(1)
        pull, noise = neuron_growth(network, problem, theta, layer, loss=loss)
        torch.testing.assert_close(pull, -(own * mean).sum(-1) / rho2)
        torch.testing.assert_close(noise, (trace - 2 * along / rho2) / (2 * rho2))


def test_neuron_growth_at_a_level_is_that_of_noisy_labels():
    """Residuals that are ±√(2δ) at every sample, averaged over signs, make the exact covariance that of the level."""
    network, level = ReluNetwork((2, 6, 1)), 0.3
    base = data(network)
    theta = states(network, 1)
    h = network(theta, base.X)[0]
    total = torch.zeros(1, 6, dtype=torch.float64)
    for code in range(2**base.n):
        signs = torch.tensor([1.0 if code >> i & 1 else -1.0 for i in range(base.n)], dtype=torch.float64)
        problem = Regression(base.X, h - signs * (2 * level) ** 0.5, base.X, base.y)
        noise = neuron_growth(network, problem, theta)[1]
        total += noise / 2**base.n
    at_level = neuron_growth(network, base, theta, level=torch.tensor([level]).double())[1]
    torch.testing.assert_close(total, at_level * (1 - 1 / base.n))  # the rank-one term takes its share 1/n


def test_an_isolated_unit_grows_as_predicted():
    network = ReluNetwork((2, 1, 1))
    angles = torch.arange(9).double() * 0.7
    X = torch.stack([angles.cos(), angles.sin()], 1)
    w, a, level, eta, h, paths = torch.tensor([0.9, -0.4]).double(), torch.tensor(0.8).double(), 0.05, 0.4, 0.01, 4000
    theta = torch.cat([w, a.unsqueeze(0)]).expand(paths, -1)
    y = network(theta[:1], X)[0]  # no residual, so no pull
    problem = Regression(X, y, X, y)
    noise = BrownianIncrements(0, "isolated", paths, 9)
    final = integrate(ReluSDE(network, problem, LabelNoise(eta, level)), theta, h, 1, noise).final
    grown = (neuron_norms(network, final) / neuron_norms(network, theta)).log()[:, 0]
    rate = eta * isolated_growth(X, w, a, level)
    pull, law = neuron_growth(network, problem, theta[:1], level=torch.tensor([level]).double())
    torch.testing.assert_close(rate, eta * law[0, 0])
    assert pull.abs().max() < 1e-15
    kick = torch.func.vmap(torch.func.jacrev(lambda at: network(at, X)))(theta[:1])[0]  # control variate: first order
    linear = (noise(0) * (2 * eta * level * h / 9) ** 0.5) @ kick @ theta[0] / theta[0].square().sum()
    rest = grown - linear
    assert (rest.mean() / h - rate).abs() < 4 * rest.std() / paths**0.5 / h + 0.05 * rate.abs()
    assert rate.abs() > 8 * rest.std() / paths**0.5 / h


def test_an_aligned_balanced_unit_shrinks_and_one_across_grows():
    w, a = torch.tensor([1.0, 0.0]).double(), torch.tensor(1.0).double()
    along, across = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.2, 1.0]]).double()
    assert isolated_growth(along, w, a, 1.0) < 0 < isolated_growth(across, w, a, 1.0)
    torch.testing.assert_close(isolated_growth(along, w, a, 1.0), torch.tensor(-1.0).double())
    # c² = ‖x‖²/3 is where a balanced unit neither grows nor shrinks.
    edge = torch.tensor([[1.0, 2**0.5]], dtype=torch.float64)
    assert isolated_growth(edge, w, a, 1.0).abs() < 1e-15


def test_collapse_time_is_when_a_shrinking_unit_has_lost_the_factor():
    times = collapse_time(torch.tensor([-0.5, 0.0, 0.1], dtype=torch.float64), 10.0)
    assert times[0] == pytest.approx(np.log(10) / 0.5)
    assert torch.isinf(times[1:]).all()


def test_column_norms_are_those_of_the_jacobian():
    network = ReluNetwork((3, 5, 4, 1), (True, True, True))
    problem, theta = data(network), states(network)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda at: network(at, problem.X)))(theta)
    torch.testing.assert_close(column_norms(network, theta, problem.X), jacobian.norm(dim=1) / problem.n**0.5)


def test_slopes_are_derivatives_of_the_losses():
    h, y = torch.linspace(-3, 3, 7).double().requires_grad_(), torch.tensor([1.0, -1, 1, -1, 1, -1, 1]).double()
    for loss, value in (("squared", (h - y).square() / 2), ("logistic", torch.nn.functional.softplus(-y * h))):
        (expected,) = torch.autograd.grad(value.sum(), h)
        torch.testing.assert_close(loss_slopes(h.detach(), y, loss), expected)


def test_a_measured_level_is_held_until_the_next_record():
    eta = Schedule(0.3, ((0.5, 3.0),)).step_sizes(20)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).double()
    level, clock, t = MeasuredLevel(torch.tensor([0, 7, 13]), values, eta), StepClock(eta), 0.0
    for k in range(20):
        expected = values[0 if k < 7 else 1 if k < 13 else 2]
        for part in (0.0, 0.5):  # two substeps
            torch.testing.assert_close(level(t + part * float(eta[k])), expected)
            assert clock(t + part * float(eta[k])) == float(eta[k])
        t += float(eta[k])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MeasuredLevel(torch.tensor([1]), torch.ones(1, 2), torch.ones(5)), "from step 0 on"),
        (lambda: MeasuredLevel(torch.tensor([0]), -torch.ones(1, 2), torch.ones(5)), "leave out the runs"),
        (lambda: ReluSDE(NETWORKS[0], data(NETWORKS[2]), LabelNoise(0.1)), "change one"),
        (lambda: ReluSDE(NETWORKS[0], data(NETWORKS[0]), LabelNoise(0.1), "logistic"), "code the classes so"),
    ],
)
def test_bad_input_is_told_what_to_do(make, says):
    with pytest.raises(ValueError, match=says):
        make()
