"""Explicit label noise, momentum and weight decay: the SDEs against the real SGD they stand for."""

import math

import numpy as np
import pytest
import torch

from nets.diagonal import initial_state
from nets.diagonal import sgd as diagonal_sgd
from nets.sgd import sgd
from nets.update import Update
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from theory.diagonal_sde import DiagonalSDE, diagonal_model, to_logs
from theory.minibatch import Minibatch
from theory.problem import gaussian_sparse
from theory.schedule import Schedule, effective_step_size
from theory.sde import ExactCovariance, ExplicitLabelNoise, ModelSDE
from theory.trajectory import Probe


def test_explicit_label_noise_covariance_by_enumeration(small):
    """G Gᵀ = η/B times the covariance of one gradient with label y + σξ, ξ = ±1 (variance 1)."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(1, 2 * small.d, generator=generator, dtype=torch.float64)
    sde = ModelSDE(diagonal_model, small, ExplicitLabelNoise(0.2, 0.7, Minibatch(3)))
    G = torch.stack([sde.g_prod(0.0, theta, torch.eye(16).double()[k : k + 1])[0] for k in range(16)], 1)
    r = diagonal_model(theta[0], small.X) - small.y
    Phi = torch.func.jacrev(diagonal_model)(theta[0], small.X)
    gradients = torch.cat([(r + 0.7 * sign).unsqueeze(1) * Phi for sign in (-1, 1)])
    centred = gradients - gradients.mean(0)
    assert torch.allclose(G @ G.T, 0.2 / 3 * centred.T @ centred / 16, rtol=1e-11, atol=1e-13)


def test_explicit_label_noise_decays_alpha_at_zero_loss():
    """With σ > 0 the decay goes on at the predicted rate -ησ²m_j/… after the labels are fitted."""
    problem = gaussian_sparse(10, 30, 3)
    start, eta, sigma, steps, seeds = initial_state(problem, 0.4), 0.02, 0.3, 1500, 64
    real = diagonal_sgd(
        problem, start, [Schedule(eta)], steps, seeds=range(seeds), update=Update(label_noise=sigma)
    )  # fmt: skip
    measured = (real.final.log_alpha - start.log_alpha).mean(-1)[0]
    sde = DiagonalSDE(problem, ExplicitLabelNoise(eta, sigma))
    y0 = to_logs(start).repeat(seeds, 1)
    run = integrate(sde, y0, eta, steps, BrownianIncrements(0, "explicit", seeds, 20))
    simulated = (run.final - y0).sum(-1) / problem.d
    error = 4 * math.hypot(measured.std() / seeds**0.5, simulated.std() / seeds**0.5)
    assert abs(measured.mean() - simulated.mean()) < error + 0.03 * abs(measured.mean())
    floor = eta**2 * sigma**2 * problem.mean_square.mean() * steps  # the noise of σ alone
    assert abs(measured.mean()) > floor
    quiet = integrate(DiagonalSDE(problem, ExactCovariance(eta)), y0, eta, steps, BrownianIncrements(0, "q", seeds, 10))
    assert abs((quiet.final - y0).sum(-1).mean() / problem.d) < 0.7 * abs(measured.mean())  # without σ: rejected


@pytest.mark.slow
def test_momentum_acts_as_its_effective_step_size():
    """Once the labels are fitted, label noise decays ln|u² - v²| at the rate of plain SGD with η/(1-μ).

    (In the fitting transient heavy-ball SGD shrinks α by a further deterministic term, which no step size mimics.)
    """
    problem = gaussian_sparse(10, 30, 3)
    momentum, eta, sigma, steps, seeds = 0.9, 0.001, 0.5, 4000, 48
    theta0 = torch.cat([torch.full((30,), 0.5), torch.zeros(30)]).double()
    plain_eta = effective_step_size(eta, momentum)
    assert plain_eta == pytest.approx(0.01)

    def log_alpha(theta):
        u, v = theta.chunk(2, -1)
        return (u**2 - v**2).abs().log().mean(-1)

    probes = {"ln alpha": Probe(log_alpha, torch.tensor([steps // 2, steps]))}
    common = {"seeds": range(seeds), "label_noise": sigma, "probes": probes}
    heavy = sgd(diagonal_model, problem, theta0, [Schedule(eta)], steps, momentum=momentum, **common)
    plain = sgd(diagonal_model, problem, theta0, [Schedule(plain_eta)], steps, root_seed=1, **common)
    sde = DiagonalSDE(problem, ExplicitLabelNoise(plain_eta, sigma))
    y0 = to_logs(initial_state(problem, 0.5)).repeat(seeds, 1)
    to_alpha = Probe(lambda y: y.sum(-1) / 30, probes["ln alpha"].at)
    simulated = integrate(sde, y0, plain_eta, steps, BrownianIncrements(3, "m", seeds, 20), {"ln alpha": to_alpha})
    change = [run["ln alpha"].values.reshape(2, seeds).diff(dim=0)[0] for run in (heavy, plain, simulated)]
    for other in change[1:]:
        error = 4 * math.hypot(change[0].std() / seeds**0.5, other.std() / seeds**0.5)
        assert abs(change[0].mean() - other.mean()) < error + 0.03 * abs(other.mean())
        assert abs(other.mean() / 10 - change[0].mean()) > error + 0.03 * abs(other.mean())  # ignoring momentum
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        effective_step_size(0.1, 1.0)


def test_weight_decay_enters_the_drift(small):
    theta = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2 * small.d)))
    plain, decayed = (ModelSDE(diagonal_model, small, ExactCovariance(0.1), weight_decay=w) for w in (0.0, 0.3))
    assert torch.allclose(decayed.f(0.0, theta), plain.f(0.0, theta) - 0.3 * theta, rtol=1e-13)
    step = sgd(diagonal_model, small, theta[0], [Schedule(0.1)], 1, seeds=[0], weight_decay=0.3,
               indices=np.arange(small.n)[None, None]).final[0, 0]  # fmt: skip
    assert torch.allclose(step, theta[0] + 0.1 * decayed.f(0.0, theta)[0], rtol=1e-12)
