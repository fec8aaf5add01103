"""SGD in one direction of curvature λ near a minimum, exactly: where it bounces, how far it strays, what that costs.

With x the coordinate along a Hessian eigenvector and ξ a minibatch gradient's noise of variance C,

    heavy ball  x⁺ = (1+μ-ηλ)x - μx⁻ - ηξ        (μ = 0: plain SGD, x⁺ = (1-ηλ)x - ηξ).

The laws are for the discrete recursion, so they hold where ηλ is not small; the SDE's are beside them. They need
E[ξ | past] = 0 and a stationary second moment: neither Gaussian noise nor one that does not depend on x (then C is its
mean over the stationary law). λ and C are tensors of one shape; steps are SGD steps.
Source: Mandt, Hoffman, Blei (2017) for the SDE; Liu, Ziyin, Ueda (2021) for the discrete covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theory.prediction import Reference

SOURCE = Reference("valleydrift", 2026, "linear SGD in an eigendirection, theory/bouncing.py")
VARIANCE_SOURCE = Reference("Liu, Ziyin, Ueda", 2021, "Noise and fluctuation of finite learning rate SGD")


@dataclass(frozen=True)
class LinearSGD:
    """Heavy-ball SGD m ← μm + g, θ ← θ - ηm on a quadratic, minibatches independent of each other.

    Raises:
        ValueError: a step size that is not positive, momentum outside [0, 1).
    """

    step_size: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step size {self.step_size} is not usable: choose a positive number.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} is not usable: choose a number in [0, 1).")

    def bounces(self, curvature: Tensor) -> Tensor:
        """Where successive x are anticorrelated, so that most steps change side: ηλ > 1 + μ."""
        return self.step_size * curvature > 1 + self.momentum

    def stable(self, curvature: Tensor) -> Tensor:
        """Where the recursion contracts: 0 < ηλ < 2(1 + μ)."""
        slip = self.step_size * curvature
        return (slip > 0) & (slip < 2 * (1 + self.momentum))

    def autocorrelation(self, curvature: Tensor, lag: int = 1) -> Tensor:
        """corr(x_k, x_{k+m}): ρ₀ = 1, ρ₁ = 1 - ηλ/(1+μ), ρ_m = (1+μ-ηλ)ρ_{m-1} - μρ_{m-2}.

        >>> LinearSGD(0.5).autocorrelation(torch.tensor(3.0), 2)  # (1 - 1.5)²
        tensor(0.2500)
        """
        last, now = self._unit(curvature), torch.ones_like(curvature)
        for _ in range(lag):
            last, now = now, self._gain(curvature) * now - self.momentum * last
        return now

    def displacement_autocorrelation(self, curvature: Tensor, lag: int = 1) -> Tensor:
        """corr(d_k, d_{k+m}) of d_k = x_{k+1} - x_k: μ - ηλ/2 at lag 1, without momentum -(ηλ/2)(1-ηλ)^{m-1} at lag m.

        In general (2ρ_m - ρ_{m+1} - ρ_{m-1})/(2(1 - ρ₁)), which obeys the recursion of ρ from lag 2 on.

        >>> LinearSGD(0.5).displacement_autocorrelation(torch.tensor([1.0, 2.0, 4.0]))
        tensor([-0.2500, -0.5000, -1.0000])
        """
        if lag == 0:
            return torch.ones_like(curvature)
        last, now = torch.ones_like(curvature), self.momentum - self.step_size * curvature / 2
        for _ in range(lag - 1):
            last, now = now, self._gain(curvature) * now - self.momentum * last
        return now

    def alternation(self, curvature: Tensor) -> Tensor:
        """Share of steps at which x changes side, for Gaussian x: arccos(ρ₁)/π; ½ at ηλ = 1 + μ, 1 at the limit."""
        return torch.arccos(self.autocorrelation(curvature).clamp(-1, 1)) / torch.pi

    def variance(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """Stationary Var x = ηC(1+μ) / (λ(1-μ)(2(1+μ) - ηλ)); without momentum ηC/(λ(2-ηλ)). NaN where unstable.

        >>> LinearSGD(0.5).variance(torch.tensor(2.0), torch.tensor(1.0))
        tensor(0.2500)
        """
        value = 2 * self._energy(curvature, noise) / curvature
        return torch.where(self.stable(curvature), value, torch.nan)

    def variance_after(self, curvature: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """Var x after k = 0, 1, … steps from one point (and one velocity): η²C Σ_{j<k} ψ_j², shape (len(steps), …).

        ψ₀ = 1, ψ_j = (1+μ-ηλ)ψ_{j-1} - μψ_{j-2} is the response to one kick; without momentum this is
        Var·(1 - (1-ηλ)^{2k}). Any λ will do: flat and descending directions diffuse.
        """
        total, rows = torch.zeros_like(curvature), []
        before, now = torch.zeros_like(curvature), torch.ones_like(curvature)
        wanted = steps.tolist()
        for _ in range(max(wanted, default=-1) + 1):
            rows.append(total)
            total = total + now.square()
            before, now = now, self._gain(curvature) * now - self.momentum * before
        return self.step_size**2 * noise * torch.stack([rows[k] for k in wanted])

    def mean_square_displacement(self, curvature: Tensor, noise: Tensor, lag: int) -> Tensor:
        """E(x_{k+m} - x_k)² = 2 Var (1 - ρ_m): saturates, alternating with m where the direction bounces."""
        return 2 * self.variance(curvature, noise) * (1 - self.autocorrelation(curvature, lag))

    def excess_loss(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """½ Σ λ Var = ½ Σ ηC(1+μ)/((1-μ)(2(1+μ) - ηλ)): mean loss above that of the mean iterate; NaN where unstable.

        Without momentum ½ η tr[C(2I - ηH)^{-1}].
        """
        at = self._energy(curvature, noise)
        inside = self.step_size * curvature < 2 * (1 + self.momentum)
        return torch.where(inside, at, torch.nan).sum(-1)

    def loss_amplification(self, curvature: Tensor, batch_size: int, outputs: int = 1) -> Tensor:
        """χ of L = L_floor/(1 - χ); χ ≥ 1 is instability in mean square (for noise that is all residual).

        For the squared loss with c outputs and residuals alike in size, C = (2L/(cB)) H, so the excess is χL with
        χ = (η/(cB)) (1+μ)/(1-μ) Σ λ/(2(1+μ) - ηλ).
        """
        return self.excess_loss(curvature, 2 * curvature / (outputs * batch_size))

    def sde_variance(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """The SDE's (Ornstein-Uhlenbeck) ηC/(2λ(1-μ)): too small by the factor 2(1+μ)/(2(1+μ) - ηλ)."""
        return self.step_size * noise / (2 * curvature * (1 - self.momentum))

    def sde_excess_loss(self, noise: Tensor) -> Tensor:
        """¼ η tr C / (1-μ)."""
        return self.step_size * noise.sum(-1) / (4 * (1 - self.momentum))

    def sde_displacement_autocorrelation(self, curvature: Tensor) -> Tensor:
        """Lag 1 of the Ornstein-Uhlenbeck process seen once an SGD step of η/(1-μ): -(1 - e^{-ηλ/(1-μ)})/2."""
        return torch.expm1(-self.step_size * curvature / (1 - self.momentum)) / 2

    def _gain(self, curvature: Tensor) -> Tensor:
        return 1 + self.momentum - self.step_size * curvature

    def _unit(self, curvature: Tensor) -> Tensor:
        """ρ_{-1} = ρ₁."""
        return 1 - self.step_size * curvature / (1 + self.momentum)

    def _energy(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """½ λ Var, finite at λ = 0."""
        eta, mu = self.step_size, self.momentum
        return eta * noise * (1 + mu) / (2 * (1 - mu) * (2 * (1 + mu) - eta * curvature))


@dataclass(frozen=True)
class ReshuffledSGD:
    """Plain SGD through a fresh random order of the data every epoch, ``batches`` steps an epoch.

    The noises of an epoch add up to nothing: cov(ξ_i, ξ_j) = C M/(M-1) (δ_ij - 1/M) for M batches, C the variance of
    one of them. Sharp directions forget within an epoch and hardly notice; for slow ones the kicks cancel. Laws depend
    on the place in the epoch and are averaged over it here.

    For epochs of many batches: where samples differ in curvature, what is left of an epoch tells on it (order 1/M), and
    what x adds to a sample's gradient differs from visit to visit and does not cancel. So C is the noise at the mean of
    x; the rest acts like that of independent minibatches.

    Raises:
        ValueError: a step size that is not positive, fewer than 2 batches.
    """

    step_size: float
    batches: int

    def __post_init__(self) -> None:
        LinearSGD(self.step_size)
        if self.batches < 2:
            raise ValueError(f"an epoch of {self.batches} batches has no order: give 2 or more.")

    def variances(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """Var x after k = 0 … M-1 steps of an epoch, shape (M, …); NaN where unstable.

        Var_k = ρ^{2k} Var_0 + η²C M/(M-1) (A_k - a_k²/M), A_k = Σ_{j<k} ρ^{2j}, a_k = Σ_{j<k} ρ^j, Var_M = Var_0.
        """
        rho = 1 - self.step_size * curvature
        M, k = self.batches, self._places(curvature)
        squares, sums = self._sums(rho.square(), k), self._sums(rho, k)
        added = self.step_size**2 * noise * M / (M - 1) * (squares - sums.square() / M)
        start = added[-1] / (1 - rho.pow(2 * M))
        return torch.where(rho.abs() < 1, rho.pow(2 * k[:-1]) * start + added[:-1], torch.nan)

    def variance(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """Var x, mean over the places in an epoch."""
        return self.variances(curvature, noise).mean(0)

    def displacement_autocorrelation(self, curvature: Tensor) -> Tensor:
        """Lag 1: Σ E[d_k d_{k+1}] / Σ E[d_k²] over the places k of an epoch.

        With E[x_k ξ_l] = ηC a_k/(M-1) for l ≥ k in the epoch: E[x_k x_{k+1}] = ρ Var_k - η E[x_k ξ_k] and
        E[x_k x_{k+2}] = ρ E[x_k x_{k+1}] - η E[x_k ξ_{k+1}], the last 0 across the end of an epoch.
        """
        eta, M = self.step_size, self.batches
        rho = 1 - eta * curvature
        var = self.variances(curvature, torch.ones_like(curvature))
        met = eta * self._sums(rho, self._places(curvature))[:-1] / (M - 1)
        once = rho * var - eta * met
        later = met.clone()
        later[-1] = 0.0
        twice = rho * once - eta * later
        following = var.roll(-1, 0)
        product = once.roll(-1, 0) - following - twice + once
        return product.sum(0) / (var + following - 2 * once).sum(0)

    def excess_loss(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """½ Σ λ Var, mean over the places in an epoch."""
        return (curvature * self.variance(curvature, noise)).sum(-1) / 2

    def _places(self, like: Tensor) -> Tensor:
        steps = torch.arange(self.batches + 1, dtype=like.dtype, device=like.device)
        return steps.view(-1, *[1] * like.ndim)

    @staticmethod
    def _sums(ratio: Tensor, k: Tensor) -> Tensor:
        """Σ_{j<k} ratio^j."""
        powers = ratio.expand(len(k) - 1, *ratio.shape).pow(k[:-1])
        return torch.cat([torch.zeros_like(powers[:1]), powers.cumsum(0)])


def gradient_descent_autocorrelation(step_size: float, curvature: Tensor) -> Tensor:
    """Σ d_k d_{k+1} / Σ d_k² of x⁺ = (1-ηλ)x, without noise: 1 - ηλ, -1 (period 2) at the edge of stability ηλ = 2.

    SGD's is -ηλ/2: the same -1 at the edge, ½ less at ηλ = 1, and opposite in sign where directions do not bounce.
    """
    return 1 - step_size * curvature


def linear_covariance(hessian: Tensor, noise: Tensor, law: LinearSGD) -> Tensor:
    """Stationary covariance Σ of θ for a Hessian and a noise covariance that need not commute, shape (p, p).

    In H's eigenbasis every pair (k, l) is solved by itself; without momentum Σ_kl = ηC_kl/(λ_k + λ_l - ηλ_kλ_l). With
    it, the 2x2 companion matrices A_k give vec Σ = (I - A_k⊗A_l)^{-1} vec(η²C_kl e₁e₁ᵀ), first entry.

    Raises:
        ValueError: a direction that is not stable.
    """
    values, vectors = torch.linalg.eigh(hessian)
    if not bool(law.stable(values).all()):
        raise ValueError(
            f"ηλ runs from {law.step_size * values[0]:.3g} to {law.step_size * values[-1]:.3g}, outside "
            f"(0, {2 * (1 + law.momentum):g}): there is no stationary state, choose a smaller step or project."
        )
    rotated = vectors.T @ noise @ vectors
    if law.momentum == 0:
        pairs = values.unsqueeze(1) + values - law.step_size * values.unsqueeze(1) * values
        return vectors @ (law.step_size * rotated / pairs) @ vectors.T
    gain, p = 1 + law.momentum - law.step_size * values, len(values)
    companion = values.new_zeros(p, 2, 2)
    companion[:, 0, 0], companion[:, 0, 1], companion[:, 1, 0] = gain, -law.momentum, 1.0
    kron = torch.einsum("kab,lcd->klacbd", companion, companion).reshape(p, p, 4, 4)
    drive = torch.zeros(p, p, 4, 1, dtype=values.dtype, device=values.device)
    drive[..., 0, 0] = law.step_size**2 * rotated
    solved = torch.linalg.solve(torch.eye(4, dtype=values.dtype, device=values.device) - kron, drive)
    return vectors @ solved[..., 0, 0] @ vectors.T
