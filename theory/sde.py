"""SGD's stochastic differential equations for any model, with the noise in product form.

dθ = f(t, θ) dt + G(t, θ) dW. G has one column per sample and is never built: ``g_prod`` returns G v, which is one
vector-Jacobian product. The method names are torchsde's, so the objects here can be handed to it as they are.
Time is SDE time: one SGD step of size η lasts η. All equations are Itô.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from theory.minibatch import Minibatch
from theory.problem import Regression

StepSize = float | Callable[[float], float]
Model = Callable[[Tensor, Tensor], Tensor]


class SDE(Protocol):
    """What the simulators integrate. States have shape (paths, dim), Brownian increments (paths, channels)."""

    noise_type: str
    sde_type: str
    channels: int

    def f(self, t: float, y: Tensor) -> Tensor: ...

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor: ...

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class LabelCovariance(Protocol):
    """Noise on the labels: G v = Φᵀ c with c = ``weights(r, v, t)``, v of shape (..., ``channels(n)``)."""

    def channels(self, n: int) -> int: ...

    def weights(self, r: Tensor, v: Tensor, t: float) -> Tensor: ...

    def variation(self, r: Tensor, Z: Tensor, t: float) -> Tensor: ...


def step_size_at(step_size: StepSize, t: float) -> float:
    """η at SDE time t."""
    return step_size(t) if callable(step_size) else step_size


@dataclass(frozen=True)
class ExactCovariance:
    """The covariance of SGD's gradient noise: G = √(η κ) S, S = n^{-1/2} Φᵀ(diag(r) - r1ᵀ/n).

    κ is the minibatch's variance factor (1/B with replacement), so G Gᵀ dt over one step equals η² Cov(gradient).
    Source: Andriushchenko et al. (2023), SDE section; Li, Malladi, Arora (2021), Eq. 2.
    """

    step_size: StepSize
    minibatch: Minibatch = field(default_factory=Minibatch)

    def channels(self, n: int) -> int:
        """One a sample."""
        return n

    def scale(self, n: int, t: float) -> float:
        """ηκ/n."""
        return step_size_at(self.step_size, t) * self.minibatch.variance_factor(n) / n

    def weights(self, r: Tensor, v: Tensor, t: float) -> Tensor:
        """c = √(ηκ/n) r ∘ (v - mean v), shape (..., n)."""
        return self.scale(r.shape[-1], t) ** 0.5 * r * (v - v.mean(-1, keepdim=True))

    def variation(self, r: Tensor, Z: Tensor, t: float) -> Tensor:
        """Variance per unit time of Zᵀc for Z of shape (n, k): ηκ [mean r²z² - (mean r z)²], shape (..., k)."""
        n = r.shape[-1]
        return self.scale(n, t) * (r.square() @ Z.square() - (r @ Z).square() / n)


@dataclass(frozen=True)
class ExplicitLabelNoise:
    """SGD whose labels are perturbed afresh at every step, y_i + σξ: :class:`ExactCovariance` plus ηκσ²/n ΦᵀΦ.

    Attributes:
        sigma: σ, the standard deviation of the perturbation of each label drawn.
    """

    step_size: StepSize
    sigma: float
    minibatch: Minibatch = field(default_factory=Minibatch)

    def channels(self, n: int) -> int:
        """Two a sample: which one is drawn, and its perturbation."""
        return 2 * n

    def _drawn(self) -> ExactCovariance:
        return ExactCovariance(self.step_size, self.minibatch)

    def _perturbation(self, n: int, t: float) -> float:
        # Perturbations are fresh for every sample of a batch, with replacement or not: 1/B, not κ.
        return step_size_at(self.step_size, t) * self.sigma**2 / (self.minibatch.size * n)

    def weights(self, r: Tensor, v: Tensor, t: float) -> Tensor:
        """c = √(ηκ/n) r ∘ (v₁ - mean v₁) + √(ησ²/Bn) v₂, shape (..., n)."""
        drawn, perturbed = v.chunk(2, -1)
        return self._drawn().weights(r, drawn, t) + self._perturbation(r.shape[-1], t) ** 0.5 * perturbed

    def variation(self, r: Tensor, Z: Tensor, t: float) -> Tensor:
        """Variance per unit time of Zᵀc for Z of shape (n, k), shape (..., k)."""
        return self._drawn().variation(r, Z, t) + self._perturbation(r.shape[-1], t) * Z.square().sum(0)


@dataclass(frozen=True)
class LabelNoise:
    """Homogeneous label noise at a stabilised loss level δ: G = √(2ηδκ/n) Φᵀ.

    Attributes:
        level: δ as a number, as a function of SDE time (a number or one value per path), or ``None`` for the
            state's own loss L(θ_t).

    Source: Andriushchenko et al. (2023), SDE section.
    """

    step_size: StepSize
    level: float | Callable[[float], float | Tensor] | None = None
    minibatch: Minibatch = field(default_factory=Minibatch)

    def channels(self, n: int) -> int:
        """One a sample."""
        return n

    def scale(self, n: int, t: float) -> float:
        """ηκ/n."""
        return step_size_at(self.step_size, t) * self.minibatch.variance_factor(n) / n

    def variance(self, r: Tensor, t: float) -> Tensor:
        """s² = 2ηδκ/n per path, shape (..., 1)."""
        if self.level is None:
            level = r.square().mean(-1, keepdim=True) / 2
        else:
            level = torch.as_tensor(
                self.level(t) if callable(self.level) else self.level, dtype=r.dtype, device=r.device
            )
            level = level.expand(r.shape[:-1]).unsqueeze(-1)
        return 2 * self.scale(r.shape[-1], t) * level

    def weights(self, r: Tensor, v: Tensor, t: float) -> Tensor:
        """c = √(2ηδκ/n) v, shape (..., n)."""
        return self.variance(r, t).sqrt() * v

    def variation(self, r: Tensor, Z: Tensor, t: float) -> Tensor:
        """Variance per unit time of Zᵀc for Z of shape (n, k): s² Σ_i z_i², shape (..., k)."""
        return self.variance(r, t) * Z.square().sum(0)


class ModelSDE:
    """dθ = -(∇L + λθ) dt + Φᵀ c(r, dW) for the squared loss L = (1/2n)‖h(θ, X) - y‖² of any model h(θ, X).

    Args:
        model: h taking θ of shape (p,) and X, returning shape (n,); differentiable by ``torch.func``.
        problem: the training data.
        covariance: :class:`ExactCovariance`, :class:`LabelNoise` or :class:`ExplicitLabelNoise`.
        weight_decay: λ of θ ← θ - η(∇ℓ + λθ).
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(
        self, model: Model, problem: Regression, covariance: LabelCovariance, weight_decay: float = 0.0
    ) -> None:
        self.channels, self._n, self._weight_decay = covariance.channels(problem.n), problem.n, weight_decay
        self._model, self._X, self._y, self._covariance = model, problem.X, problem.y, covariance
        self._residual = torch.func.vmap(lambda theta: model(theta, self._X) - self._y)

        def pull_back(theta: Tensor, weights: Tensor) -> Tensor:
            return torch.func.vjp(lambda at: model(at, self._X), theta)[1](weights)[0]

        self._pull_back = torch.func.vmap(pull_back)

    def f(self, t: float, y: Tensor) -> Tensor:
        """-∇L - λθ = -Φᵀ r / n - λθ, shape (paths, p)."""
        return self._drift(y, self._residual(y))

    def _drift(self, y: Tensor, r: Tensor) -> Tensor:
        return -self._pull_back(y, r / self._n) - self._weight_decay * y

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """G v = Φᵀ c(r, v), shape (paths, p)."""
        return self._pull_back(y, self._covariance.weights(self._residual(y), v, t))

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, sharing the residual."""
        r = self._residual(y)
        return self._drift(y, r), self._pull_back(y, self._covariance.weights(r, v, t))


class IsotropicSDE:
    """The usual rival: dθ = -∇L dt + σ dW in R^p with σ² p = tr(G Gᵀ), the same power without the structure.

    The trace is that of :class:`ExactCovariance`: ηκ [mean_i r_i²‖∇h_i‖² - ‖∇L‖²].
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, model: Model, problem: Regression, step_size: StepSize, minibatch: Minibatch, p: int) -> None:
        self.channels = p
        self._step_size, self._kappa = step_size, minibatch.variance_factor(problem.n)
        X, y = problem.X, problem.y

        def sample_gradients(theta: Tensor) -> Tensor:
            r = model(theta, X) - y
            return r.unsqueeze(-1) * torch.func.jacrev(lambda at: model(at, X))(theta)

        self._sample_gradients = torch.func.vmap(sample_gradients)

    def f(self, t: float, y: Tensor) -> Tensor:
        """-∇L, shape (paths, p)."""
        return -self._sample_gradients(y).mean(1)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """σ v, shape (paths, p)."""
        return self.f_and_g_prod(t, y, v)[1]

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, sharing the per-sample gradients."""
        gradients = self._sample_gradients(y)
        mean = gradients.mean(1)
        trace = gradients.square().sum((1, 2)) / gradients.shape[1] - mean.square().sum(1)
        variance = step_size_at(self._step_size, t) * self._kappa * trace.clamp(min=0) / self.channels
        return -mean, variance.sqrt().unsqueeze(1) * v


class StratonovichForm:
    """The Stratonovich equation with the same solution as an Itô equation: f ← f - ½ Σ_k (∂g_k) g_k.

    Diagonal and scalar noise take one forward-mode derivative a step (diagonal: g_j of y_j only); general noise one a
    channel, batched. Additive noise is its own Stratonovich form.

    Raises:
        ValueError: the equation is not Itô.
    """

    sde_type = "stratonovich"

    def __init__(self, sde: SDE) -> None:
        if sde.sde_type != "ito":
            raise ValueError("the equation is already Stratonovich: integrate it as it is.")
        self.noise_type, self.channels, self._sde = sde.noise_type, sde.channels, sde

    def _correction(self, t: float, y: Tensor) -> Tensor:
        """½ Σ_k (∂g_k) g_k."""

        def along(v: Tensor) -> Tensor:
            tangent = self._sde.g_prod(t, y, v)
            return torch.func.jvp(lambda at: self._sde.g_prod(t, at, v), (y.contiguous(),), (tangent.contiguous(),))[1]

        if self.noise_type == "additive":
            return torch.zeros_like(y)
        if self.noise_type in ("diagonal", "scalar"):
            return along(y.new_ones(len(y), self.channels)) / 2
        unit = torch.eye(self.channels, dtype=y.dtype, device=y.device)
        return torch.func.vmap(lambda v: along(v.repeat(len(y), 1)))(unit).sum(0) / 2

    def f(self, t: float, y: Tensor) -> Tensor:
        """f - ½ Σ_k (∂g_k) g_k."""
        return self._sde.f(t, y) - self._correction(t, y)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """G v, unchanged."""
        return self._sde.g_prod(t, y, v)

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        f, kick = self._sde.f_and_g_prod(t, y, v)
        return f - self._correction(t, y), kick
