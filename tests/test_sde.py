"""The SDEs: product form against explicit matrices, coordinates against each other."""

import pytest
import torch

from theory.diagonal import DiagonalState
from theory.diagonal_sde import DiagonalSDE, IsotropicDiagonalSDE, diagonal_model, from_logs, to_logs
from theory.minibatch import Minibatch
from theory.sde import ExactCovariance, IsotropicSDE, LabelNoise, ModelSDE


@pytest.fixture
def theta(small):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2 * small.d, generator=generator, dtype=torch.float64)


def jacobian(theta, problem):
    return torch.func.jacrev(diagonal_model)(theta, problem.X)


def as_matrix(sde, theta):
    """G, column by column."""
    columns = [
        sde.g_prod(0.0, theta, torch.eye(sde.channels, dtype=theta.dtype)[k].expand(len(theta), -1))
        for k in range(sde.channels)
    ]
    return torch.stack(columns, -1)


def gradient_covariance(theta, problem):
    """Covariance of one per-sample gradient, from the n gradients themselves."""
    gradients = (diagonal_model(theta, problem.X) - problem.y).unsqueeze(1) * jacobian(theta, problem)
    centred = gradients - gradients.mean(0)
    return centred.T @ centred / problem.n


@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(3), Minibatch(3, replacement=False)])
def test_exact_covariance_is_the_covariance_of_the_minibatch_gradient(small, theta, batch):
    G = as_matrix(ModelSDE(diagonal_model, small, ExactCovariance(0.2, batch)), theta)
    for path in range(len(theta)):
        expected = 0.2 * batch.variance_factor(small.n) * gradient_covariance(theta[path], small)
        assert torch.allclose(G[path] @ G[path].T, expected, rtol=1e-11, atol=1e-12)


def test_variance_factor_without_replacement_by_enumeration(small, theta):
    from itertools import combinations

    r = diagonal_model(theta[0], small.X) - small.y
    gradients = r.unsqueeze(1) * jacobian(theta[0], small)
    batches = torch.stack([gradients[list(rows)].mean(0) for rows in combinations(range(small.n), 3)])
    centred = batches - batches.mean(0)
    factor = Minibatch(3, replacement=False).variance_factor(small.n)
    assert torch.allclose(centred.T @ centred / len(batches), factor * gradient_covariance(theta[0], small), rtol=1e-10)


def test_label_noise_at_a_level(small, theta):
    G = as_matrix(ModelSDE(diagonal_model, small, LabelNoise(0.2, 0.5, Minibatch(2))), theta)
    for path in range(len(theta)):
        Phi = jacobian(theta[path], small)
        assert torch.allclose(G[path] @ G[path].T, 2 * 0.2 * 0.5 / (2 * small.n) * Phi.T @ Phi, rtol=1e-12)


def test_label_noise_with_own_loss_and_per_path_levels(small, theta):
    own = as_matrix(ModelSDE(diagonal_model, small, LabelNoise(0.2)), theta)
    levels = torch.stack([(diagonal_model(t, small.X) - small.y).square().mean() / 2 for t in theta])
    given = as_matrix(ModelSDE(diagonal_model, small, LabelNoise(0.2, lambda t: levels)), theta)
    assert torch.allclose(own, given, rtol=1e-13)


def test_drift_is_minus_the_gradient(small, theta):
    sde = ModelSDE(diagonal_model, small, ExactCovariance(0.1))
    free = theta.clone().requires_grad_()
    loss = sum((diagonal_model(t, small.X) - small.y).square().mean() / 2 for t in free)
    (gradient,) = torch.autograd.grad(loss, free)
    assert torch.allclose(sde.f(0.0, theta), -gradient, rtol=1e-12)
    drift, kick = sde.f_and_g_prod(0.0, theta, torch.ones(3, small.n, dtype=torch.float64))
    assert torch.equal(drift, sde.f(0.0, theta))
    assert kick.abs().max() < 1e-14  # equal weights on all samples: the exact covariance has no such direction


def test_isotropic_noise_has_the_same_power(small, theta):
    exact = as_matrix(ModelSDE(diagonal_model, small, ExactCovariance(0.2)), theta)
    rival = as_matrix(IsotropicSDE(diagonal_model, small, 0.2, Minibatch(), 2 * small.d), theta)
    assert torch.allclose(exact.square().sum((1, 2)), rival.square().sum((1, 2)), rtol=1e-12)
    assert torch.allclose(rival[0], rival[0, 0, 0] * torch.eye(2 * small.d, dtype=torch.float64))


def test_isotropic_noise_in_closed_form(small, theta):
    general = IsotropicSDE(diagonal_model, small, lambda t: 0.2 + t, Minibatch(2), 2 * small.d)
    closed = IsotropicDiagonalSDE(small, lambda t: 0.2 + t, Minibatch(2))
    v = torch.randn(len(theta), 2 * small.d, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for one, other in zip(closed.f_and_g_prod(0.3, theta, v), general.f_and_g_prod(0.3, theta, v), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    assert torch.equal(closed.f(0.3, theta), closed.f_and_g_prod(0.3, theta, v)[0])
    assert torch.equal(closed.g_prod(0.3, theta, v), closed.f_and_g_prod(0.3, theta, v)[1])
    assert closed.channels == general.channels


@pytest.mark.parametrize("covariance", [ExactCovariance(0.2), LabelNoise(0.2), LabelNoise(0.2, 0.3)])
def test_log_coordinates_are_itos_transform_of_the_weights(small, covariance):
    generator = torch.Generator().manual_seed(2)
    log_a, log_b = torch.randn(2, 4, small.d, generator=generator, dtype=torch.float64) / 2
    state = DiagonalState.from_logs(log_a, log_b)
    y, theta = to_logs(state), torch.cat([state.u, state.v], -1)
    logs, weights = DiagonalSDE(small, covariance), ModelSDE(diagonal_model, small, covariance)
    v = torch.randn(4, small.n, generator=generator, dtype=torch.float64)
    du, dv = weights.g_prod(0.0, theta, v).chunk(2, -1)
    noise = torch.cat([(du + dv) / log_a.exp(), (du - dv) / log_b.exp()], -1)
    assert torch.allclose(logs.g_prod(0.0, y, v), noise, rtol=1e-10, atol=1e-12)
    Gu, Gv = as_matrix(weights, theta).chunk(2, 1)
    fu, fv = weights.f(0.0, theta).chunk(2, -1)
    ito_a = (fu + fv) / log_a.exp() - (Gu + Gv).square().sum(2) / (2 * (2 * log_a).exp())
    ito_b = (fu - fv) / log_b.exp() - (Gu - Gv).square().sum(2) / (2 * (2 * log_b).exp())
    assert torch.allclose(logs.f(0.0, y), torch.cat([ito_a, ito_b], -1), rtol=1e-9, atol=1e-12)
    other = DiagonalSDE(small, covariance, stratonovich=True)
    assert torch.allclose(sum(other.f(0.0, y).chunk(2, -1)), torch.zeros(4, small.d, dtype=torch.float64), atol=1e-13)
    assert (sum(logs.f(0.0, y).chunk(2, -1)) < 0).all()  # α decays


def test_state_keeps_numbers_beyond_the_float_range():
    log_a = torch.tensor([0.3, -900.0, 50.0, -50.0], dtype=torch.float64)
    state = DiagonalState.from_logs(log_a, -2 * log_a.abs())
    assert torch.allclose(state.log_a, log_a, rtol=1e-14, atol=0)
    assert torch.allclose(state.log_alpha, log_a - 2 * log_a.abs(), rtol=1e-14, atol=0)
    assert torch.allclose(state.z, (log_a + 2 * log_a.abs()) / 2, rtol=1e-14)
    assert torch.isfinite(state.w).all()
    u, v = torch.tensor([0.4, -0.2]), torch.tensor([0.1, 0.7])
    state = DiagonalState.from_uv(u, v)
    assert torch.allclose(state.w, u * v)
    assert torch.allclose(state.log_alpha, (u**2 - v**2).abs().log(), atol=1e-6)
    assert torch.allclose(from_logs(to_logs(state)).w, u.abs() * v.abs() * torch.sign(state.z), atol=1e-6)
