"""Orders of convergence, measured by regression on coupled paths, and the two calculi against each other."""

import math

import numpy as np
import pytest
import torch

from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from simulators.schemes import EulerMaruyama, Milstein, NinomiyaNinomiya, Platen, StochasticHeun
from theory.sde import StratonovichForm


class Linear:
    """dy = (μy + c) dt + σy dW, read as ``sde_type`` says."""

    noise_type, channels = "diagonal", 1

    def __init__(self, sde_type, mu, sigma, c=0.0):
        self.sde_type, self.mu, self.sigma, self.c = sde_type, mu, sigma, c

    def f(self, t, y):
        return self.mu * y + self.c

    def g_prod(self, t, y, v):
        return self.sigma * y * v

    def f_and_g_prod(self, t, y, v):
        return self.f(t, y), self.g_prod(t, y, v)


def fitted_order(steps, errors, standard_errors):
    """Least-squares slope of ln error on ln h, and its standard error from those of the errors."""
    x = np.log(1 / np.array(steps))
    x = x - x.mean()
    slope = (x * np.log(errors)).sum() / (x**2).sum()
    spread = math.sqrt(((x / (x**2).sum()) ** 2 * (np.array(standard_errors) / np.array(errors)) ** 2).sum())
    return slope, spread


@pytest.mark.parametrize(
    ("scheme", "order"), [(EulerMaruyama(), 0.5), (Milstein(), 1.0), (StochasticHeun(), 1.0)], ids=str
)
def test_strong_order(scheme, order):
    """E|y_h(1) - y(1)| over 20 000 paths of geometric Brownian motion on refinements of one Brownian path."""
    mu, sigma, paths, finest, steps = 0.5, 0.6, 20_000, 512, (32, 64, 128, 256, 512)
    sde = Linear(scheme.sde_type, mu, sigma)
    fine = BrownianIncrements(11, "strong", paths, 1)
    W = sum(fine(k) for k in range(finest)) / finest**0.5
    exact = (mu - (sigma**2 / 2 if scheme.sde_type == "ito" else 0) + sigma * W).exp()
    errors, spreads = [], []
    for n in steps:
        noise = BrownianIncrements(11, "strong", paths, 1, refine=finest // n)
        gap = (integrate(sde, torch.ones(paths, 1).double(), 1 / n, n, noise, scheme=scheme).final - exact).abs()
        errors.append(gap.mean().item())
        spreads.append(gap.std().item() / paths**0.5)
    slope, spread = fitted_order(steps, errors, spreads)
    assert slope == pytest.approx(order, abs=0.08)
    assert 3 * spread < 0.08  # enough paths to say so


@pytest.mark.parametrize(
    ("scheme", "order", "steps"),
    [(EulerMaruyama(), 1.0, (16, 32, 64)), (Milstein(), 1.0, (16, 32, 64)), (Platen(), 2.0, (8, 16, 32))],
    ids=str,
)
def test_weak_order(scheme, order, steps):
    """|E y_h(1)² - E y(1)²| of geometric Brownian motion, each path coupled to its exact solution."""
    mu, sigma, paths, finest = 1.0, 0.3, 100_000, max(steps)
    sde = Linear("ito", mu, sigma)
    fine = BrownianIncrements(5, "weak", paths, 1)
    W = sum(fine(k) for k in range(finest)) / finest**0.5
    exact = (mu - sigma**2 / 2 + sigma * W).exp()
    errors, spreads = [], []
    for n in steps:
        noise = BrownianIncrements(5, "weak", paths, 1, refine=finest // n)
        final = integrate(sde, torch.ones(paths, 1).double(), 1 / n, n, noise, scheme=scheme).final
        gap = final.square() - exact.square()
        errors.append(abs(gap.mean().item()))
        spreads.append(gap.std().item() / paths**0.5)
    slope, spread = fitted_order(steps, errors, spreads)
    assert slope == pytest.approx(order, abs=0.08 + 2 * spread)
    assert spread < 0.1


def test_ninomiya_ninomiya_is_of_weak_order_two():
    """E y(1) of dy = (μy + c) dt + σy∘dW, whose two vector fields do not commute: closed form (κ = μ + σ²/2).

    A step is affine in y and a polynomial in its normals, so Gauss-Hermite nodes for these give its mean to rounding.
    """
    mu, sigma, c = -1.0, 0.5, 2.0
    kappa = mu + sigma**2 / 2
    exact = math.exp(kappa) + c * (math.exp(kappa) - 1) / kappa
    sde = Linear("stratonovich", mu, sigma, c)

    def error(scheme, n):
        nodes, weights = np.polynomial.hermite_e.hermegauss(12)
        grid = np.stack(np.meshgrid(*[nodes] * scheme.normals, indexing="ij"), -1).reshape(-1, scheme.normals)
        probability = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * scheme.normals), -1), -1).ravel()
        xi, y = torch.from_numpy(grid), 1.0
        ends = [scheme.step(sde, 0.0, torch.full((len(xi), 1), at).double(), 1 / n, xi)[:, 0] for at in (0.0, 1.0)]
        shift, image = (float(torch.from_numpy(probability) @ end) for end in ends)
        for _ in range(n):
            y = shift + (image - shift) * y
        return y - exact

    steps = (64, 128)
    for scheme in (NinomiyaNinomiya(), StochasticHeun()):
        errors = [abs(error(scheme, n)) for n in steps]
        order = math.log2(errors[0] / errors[1])
        assert order == pytest.approx(2.0 if scheme.normals == 2 else 1.0, abs=0.05), scheme


class TwoChannels:
    """General noise whose columns do not commute: G = [(y₂, 0), (0, y₁)]."""

    noise_type, sde_type, channels = "general", "ito", 2

    def f(self, t, y):
        return -y

    def g_prod(self, t, y, v):
        return 0.5 * torch.stack([y[:, 1] * v[:, 0], y[:, 0] * v[:, 1]], 1)

    def f_and_g_prod(self, t, y, v):
        return self.f(t, y), self.g_prod(t, y, v)


def test_stratonovich_form_has_the_same_law():
    """Euler on the Itô equation and Heun on its Stratonovich form: same means, and different ones unconverted."""
    n = 40_000
    y0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64).expand(n, -1)
    ito = integrate(TwoChannels(), y0, 1 / 128, 128, BrownianIncrements(3, "w", n, 2)).final
    form = StratonovichForm(TwoChannels())
    converted = integrate(form, y0, 1 / 128, 128, BrownianIncrements(3, "w", n, 2)).final
    for power in (1, 2):
        a, b = ito**power, converted**power
        assert ((a - b).mean(0).abs() < 4 * (a - b).std(0) / n**0.5 + 0.003).all()

    gbm = Linear("ito", 0.1, 0.8)
    drift = StratonovichForm(gbm).f(0.0, y0[:4, :1])
    assert torch.allclose(drift, (0.1 - 0.32) * y0[:4, :1])  # the known difference ½ g g'
    wrong = integrate(Linear("stratonovich", 0.1, 0.8), y0[:, :1], 1 / 64, 64, BrownianIncrements(1, "w", n, 1))
    right = integrate(StratonovichForm(gbm), y0[:, :1], 1 / 64, 64, BrownianIncrements(1, "w", n, 1))
    assert right.final.mean().item() == pytest.approx(math.exp(0.1), abs=4 * right.final.std().item() / n**0.5)
    assert wrong.final.mean().item() == pytest.approx(math.exp(0.1 + 0.32), abs=0.02)


def test_schemes_that_do_not_fit_are_refused_with_a_sentence():
    y0 = torch.ones(3, 2).double()
    noise = BrownianIncrements(0, "w", 3, 2)
    with pytest.raises(ValueError, match=r"Milstein takes diagonal, scalar, additive noise .* choose EulerMaruyama"):
        integrate(TwoChannels(), y0, 0.1, 3, noise, scheme=Milstein())
    with pytest.raises(ValueError, match=r"StochasticHeun is for stratonovich equations and this one is ito"):
        integrate(TwoChannels(), y0, 0.1, 3, noise, scheme=StochasticHeun())
    with pytest.raises(ValueError, match="needs 4 normals"):
        integrate(StratonovichForm(TwoChannels()), y0, 0.1, 3, noise, scheme=NinomiyaNinomiya())
