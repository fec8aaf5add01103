"""The diagonal network's SDEs in the coordinates (ln a, ln b), in which Itô's correction is the whole α-decay."""

from __future__ import annotations

import torch
from torch import Tensor

from theory.diagonal import DiagonalState
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.sde import LabelCovariance, StepSize, step_size_at


def diagonal_model(theta: Tensor, X: Tensor) -> Tensor:
    """h(θ, X) = X(u∘v) with θ = (u, v) of shape (2d,); for use with :class:`theory.sde.ModelSDE`."""
    u, v = theta.chunk(2, -1)
    return X @ (u * v)


class DiagonalSDE:
    """Label-noise or exact-covariance SDE of the diagonal network, state y = (ln a, ln b) of shape (paths, 2d).

    d ln a_j = -(Xᵀr/n)_j dt + (Xᵀc)_j - ½ q_j dt,   d ln b_j = +(Xᵀr/n)_j dt - (Xᵀc)_j - ½ q_j dt,
    with q_j dt the variance of (Xᵀc)_j. Their sum, ln α_j, moves by -q_j dt: deterministic given the noise level.

    Args:
        problem: the training data.
        covariance: any of :mod:`theory.sde`'s, e.g. :class:`theory.sde.LabelNoise`.
        stratonovich: read the θ-equation as Stratonovich, which deletes -½q and with it the decay (a rival).

    Source: Pesme et al. (2021); Andriushchenko et al. (2023), SDE section.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(self, problem: Regression, covariance: LabelCovariance, stratonovich: bool = False) -> None:
        self.channels, self._n = covariance.channels(problem.n), problem.n
        self._X, self._y, self._covariance = problem.X, problem.y, covariance
        self._correction = 0.0 if stratonovich else 0.5

    def residual(self, y: Tensor) -> Tensor:
        """r = Xw - y, shape (paths, n)."""
        squares = (2 * y).exp()
        a2, b2 = squares.chunk(2, -1)
        return (a2 - b2) / 4 @ self._X.T - self._y

    def _drift(self, t: float, r: Tensor) -> Tensor:
        gradient = r @ self._X / self._n
        shrink = self._correction * self._covariance.variation(r, self._X, t)
        return torch.cat([-gradient - shrink, gradient - shrink], -1)

    def _noise(self, t: float, r: Tensor, v: Tensor) -> Tensor:
        kick = self._covariance.weights(r, v, t) @ self._X
        return torch.cat([kick, -kick], -1)

    def f(self, t: float, y: Tensor) -> Tensor:
        """The drift, shape (paths, 2d)."""
        return self._drift(t, self.residual(y))

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """G v, shape (paths, 2d)."""
        return self._noise(t, self.residual(y), v)

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, sharing the residual."""
        r = self.residual(y)
        return self._drift(t, r), self._noise(t, r, v)


class IsotropicDiagonalSDE:
    """:class:`theory.sde.IsotropicSDE` of the diagonal network in closed form, state θ = (u, v) of shape (paths, 2d).

    The gradient of sample i is r_i (x_i∘v, x_i∘u), so the power is ηκ[Σ_j (u_j² + v_j²)(1/n) Σ_i r_i² x_ij² - ‖∇L‖²].
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, problem: Regression, step_size: StepSize, minibatch: Minibatch) -> None:
        self.channels = 2 * problem.d
        self._problem, self._squares = problem, problem.X.square()
        self._step_size, self._kappa = step_size, minibatch.variance_factor(problem.n)

    def f(self, t: float, y: Tensor) -> Tensor:
        """-∇L, shape (paths, 2d)."""
        return self.f_and_g_prod(t, y, torch.zeros_like(y))[0]

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """σ v, shape (paths, 2d)."""
        return self.f_and_g_prod(t, y, v)[1]

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, sharing the residual."""
        X, n = self._problem.X, self._problem.n
        swapped = y.roll(self._problem.d, -1)  # (v, u)
        r = y.chunk(2, -1)[0] * swapped.chunk(2, -1)[0] @ X.T - self._problem.y
        mean = (r @ X / n).repeat(1, 2) * swapped
        power = (r.square() @ self._squares / n).repeat(1, 2) * swapped.square()
        trace = power.sum(1) - mean.square().sum(1)
        variance = step_size_at(self._step_size, t) * self._kappa * trace.clamp(min=0) / self.channels
        return -mean, variance.sqrt().unsqueeze(1) * v


def to_logs(state: DiagonalState) -> Tensor:
    """y = (ln|a|, ln|b|), shape (..., 2d)."""
    return torch.cat([state.log_a, state.log_b], -1)


def from_logs(y: Tensor) -> DiagonalState:
    """The network state of a simulated y of shape (..., 2d)."""
    return DiagonalState.from_logs(*y.chunk(2, -1))
