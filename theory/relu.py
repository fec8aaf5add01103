"""ReLU networks under SGD's noise: their SDEs, the balance law of adjacent layers, and the growth of each unit.

θ is laid out as in :class:`theory.relu_network.ReluNetwork`; leading axes are batch axes (schedules, seeds, times). A
unit's weights are those into it, its bias included, and those out of it. h is homogeneous of degree one in either, so
⟨θ_in, ∇_in h⟩ = ⟨θ_out, ∇_out h⟩ for every unit of every hidden layer: all laws here follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from theory.minibatch import Minibatch
from theory.prediction import AVPF, Reference
from theory.problem import Regression
from theory.relu_network import ReluNetwork
from theory.schedule import interval_of, intervals_of, sde_time
from theory.sde import ExactCovariance, LabelNoise, StepSize, step_size_at

LossName = Literal["squared", "logistic"]
BALANCE_LAW = Reference(AVPF, 2023, "SDE of ReLU networks, Itô on ‖w_j‖² - a_j²")
GROWTH_LAW = Reference("Chen, Kunin, Yamamura, Ganguli", 2023, "Itô on ln‖θ_j‖")


def loss_slopes(h: Tensor, y: Tensor, loss: LossName = "squared") -> Tensor:
    """∂ℓ_i/∂h_i, shape (..., n): the residual h - y of ½(h - y)², or -y/(1 + e^{yh}) of ln(1 + e^{-yh}), y = ±1."""
    return h - y if loss == "squared" else -y * torch.sigmoid(-y * h)


@dataclass(frozen=True)
class Isotropic:
    """Noise that is the same in every parameter, σ² p = tr(G Gᵀ): the rival without structure.

    Attributes:
        level: ``None`` for the power of :class:`~theory.sde.ExactCovariance` at the state, or δ for that of
            :class:`~theory.sde.LabelNoise` at level δ.
    """

    step_size: StepSize
    level: float | Callable[[float], float | Tensor] | None = None
    minibatch: Minibatch = field(default_factory=Minibatch)

    def scale(self, n: int, t: float) -> float:
        """ηκ/n."""
        return step_size_at(self.step_size, t) * self.minibatch.variance_factor(n) / n


class MeasuredLevel:
    """δ as a function of SDE time: a recorded loss of each path, held until the next record.

    Args:
        steps: ascending SGD steps of the records, the first 0, shape (T,).
        values: the loss recorded, shape (T, paths).
        step_sizes: η of every SGD step.

    Raises:
        ValueError: records that do not start at 0 or do not fit, a level that is negative or not finite.
    """

    def __init__(self, steps: Tensor, values: Tensor, step_sizes: Tensor) -> None:
        if not len(steps) or int(steps[0]) != 0 or values.ndim != 2 or len(values) != len(steps):
            raise ValueError(
                f"records at {len(steps)} steps with values of shape {tuple(values.shape)} are no level: give the "
                "loss from step 0 on, shape (records, paths)."
            )
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ValueError("a level is negative or not finite: leave out the runs that diverged.")
        self._values, self._starts = values, sde_time(step_sizes.double())[steps].tolist()

    def __call__(self, t: float) -> Tensor:
        """δ(t), shape (paths,)."""
        return self._values[interval_of(self._starts, t)]

    def at(self, times: Sequence[float]) -> Tensor:
        """δ at several times, shape (times, paths)."""
        return self._values[intervals_of(self._starts, times)]


class ReluSDE:
    """dθ = -∇L dt + Φᵀ c(ℓ', dW): a ReLU network of any depth, squared or logistic loss, in product form.

    For the squared loss this is :class:`theory.sde.ModelSDE` with the gradients written out. For the logistic one the
    slopes ℓ' take the residuals' place, so "label noise at level δ" is noise of variance mean ℓ'² = 2δ on the outputs.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(
        self,
        network: ReluNetwork,
        problem: Regression,
        covariance: LabelNoise | ExactCovariance | Isotropic,
        loss: LossName = "squared",
    ) -> None:
        if problem.d != network.widths[0]:
            raise ValueError(f"the network takes {network.widths[0]} inputs, the problem has {problem.d}: change one.")
        if loss == "logistic" and not (problem.y.abs() == 1).all():
            raise ValueError("the logistic loss needs labels -1 and 1: code the classes so.")
        self._network, self._problem, self._covariance, self._loss = network, problem, covariance, loss
        self.channels = network.size if isinstance(covariance, Isotropic) else covariance.channels(problem.n)

    def f(self, t: float, y: Tensor) -> Tensor:
        """-∇L = -Φᵀℓ'/n, shape (paths, p)."""
        return self.f_and_g_prod(t, y, y.new_zeros(len(y), self.channels))[0]

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """G v, shape (paths, p)."""
        return self.f_and_g_prod(t, y, v)[1]

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both, sharing the Jacobian."""
        problem, covariance = self._problem, self._covariance
        slopes = loss_slopes(self._network(y, problem.X), problem.y, self._loss)
        jacobian = self._network.jacobian(y, problem.X)
        drift = -_pull_back(jacobian, slopes) / problem.n
        if isinstance(covariance, Isotropic):
            return drift, self._deviation(covariance, t, jacobian, slopes, drift).unsqueeze(-1) * v
        return drift, _pull_back(jacobian, covariance.weights(slopes, v, t))

    def _deviation(self, noise: Isotropic, t: float, jacobian: Tensor, slopes: Tensor, drift: Tensor) -> Tensor:
        """σ of isotropic noise, shape (paths,)."""
        n, powers = self._problem.n, jacobian.square().sum(-1)
        if noise.level is None:
            trace = (slopes.square() * powers).sum(-1) - n * drift.square().sum(-1)
        else:
            level = noise.level(t) if callable(noise.level) else noise.level
            trace = 2 * torch.as_tensor(level, dtype=slopes.dtype) * powers.sum(-1)
        return (noise.scale(n, t) * trace.clamp(min=0) / self.channels).sqrt()


def _pull_back(jacobian: Tensor, weights: Tensor) -> Tensor:
    """Φᵀ c, shape (..., p)."""
    return (weights.unsqueeze(-2) @ jacobian).squeeze(-2)


def balance(network: ReluNetwork, vector: Tensor, layer: int = 1) -> Tensor:
    """B(v)_j = ‖v_in,j‖² - ‖v_out,j‖² of each unit of a hidden layer, shape (..., units).

    Of θ it is the balance β that gradient flow conserves; of a gradient g, what a step changes: θ ← θ - ηg moves β by
    η² B(g) exactly, whatever the loss, the batch and the depth.
    """
    parts = vector[..., network.unit_parameters(layer)].square()
    into = parts.shape[-1] - network.widths[layer + 1]
    return parts[..., :into].sum(-1) - parts[..., into:].sum(-1)


def balance_drift(
    network: ReluNetwork, problem: Regression, theta: Tensor, layer: int = 1, level: Tensor | None = None,
    loss: LossName = "squared",
) -> Tensor:  # fmt: skip
    """dβ/dt divided by ηκ under the SDE, shape (..., units); the noise has no other effect on β.

    Exact covariance: mean_i ℓ'_i² B(∇h_i) - B(∇L). At level δ (shape (...)): 2δ mean_i B(∇h_i).
    """
    rows = network.jacobian(theta, problem.X)
    brackets = balance(network, rows, layer)  # (..., n, units)
    if level is not None:
        return 2 * level.unsqueeze(-1) * brackets.mean(-2)
    slopes = loss_slopes(network(theta, problem.X), problem.y, loss)
    gradient = _pull_back(rows, slopes) / problem.n
    return (slopes.square().unsqueeze(-1) * brackets).mean(-2) - balance(network, gradient, layer)


def neuron_norms(network: ReluNetwork, theta: Tensor, layer: int = 1) -> Tensor:
    """‖θ_j‖ of all weights into and out of each unit, shape (..., units)."""
    return torch.linalg.vector_norm(theta[..., network.unit_parameters(layer)], dim=-1)


def neuron_growth(
    network: ReluNetwork, problem: Regression, theta: Tensor, layer: int = 1, level: Tensor | None = None,
    loss: LossName = "squared",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d ln‖θ_j‖/dt = pull + ηκ · noise, its two parts on average, shape (..., units) each.

    With s_ij = ⟨θ_in,j, ∇_in,j h_i⟩ (a unit's own share of the output in two layers) and ρ = ‖θ_j‖:
    pull = -2 mean_i(ℓ'_i s_ij)/ρ², noise = ½[tr C_jj - 8 Var_i(ℓ'_i s_ij)/ρ²]/ρ², C_jj the covariance of one sample's
    gradient in θ_j; at level δ means of ℓ'² f are 2δ mean f and the rank-one terms are dropped. Negative and
    persistent: the unit is being collapsed.

    Source: Chen et al. (2023), Itô on ln‖θ_j‖; ⟨θ_j, ∇_j h⟩ = 2s by homogeneity.
    """
    where = network.unit_parameters(layer)
    rows = network.jacobian(theta, problem.X)[..., where]  # (..., n, units, weights)
    own = theta[..., where].unsqueeze(-3)
    into = where.shape[1] - network.widths[layer + 1]
    share, square = (rows * own)[..., :into].sum(-1), rows.square().sum(-1)
    rho2 = own.square().sum((-3, -1))
    slopes = loss_slopes(network(theta, problem.X), problem.y, loss).unsqueeze(-1)
    pull = -2 * (slopes * share).mean(-2) / rho2
    if level is not None:
        two_delta = 2 * level.unsqueeze(-1)
        trace, spread = two_delta * square.mean(-2), two_delta * share.square().mean(-2)
    else:
        mean_gradient = (slopes.unsqueeze(-1) * rows).mean(-3).square().sum(-1)
        trace = (slopes.square() * square).mean(-2) - mean_gradient
        spread = (slopes * share).square().mean(-2) - (slopes * share).mean(-2).square()
    return pull, (trace - 8 * spread / rho2) / (2 * rho2)


def isolated_growth(X: Tensor, w: Tensor, a: Tensor, level: float) -> Tensor:
    """d ln‖(w, a)‖/dt over ηκ of a ReLU unit that no residual pulls on, under label noise at level δ, shape (...).

    δ mean_i 1[⟨w, x_i⟩ > 0] {u c_i² + (1-u)‖x_i‖² - 8u(1-u) c_i²}, c_i = ⟨ŵ, x_i⟩, u = ‖w‖²/ρ². A balanced unit
    (u = ½) shrinks where 3c_i² > ‖x_i‖² on average over its active samples, so within 54.7° of what it sees.

    Args:
        w: weights in, shape (..., d) (append 1 to the inputs for a bias); a: weight out, shape (...).
    """
    size = torch.linalg.vector_norm(w, dim=-1)
    c = (w / size.unsqueeze(-1)) @ X.T
    u = (size.square() / (size.square() + a.square())).unsqueeze(-1)
    rate = u * c.square() + (1 - u) * X.square().sum(-1) - 8 * u * (1 - u) * c.square()
    return level * ((c > 0) * rate).mean(-1)


def collapse_time(rate: Tensor, ratio: float = 10.0) -> Tensor:
    """SDE time in which a unit that grows at ``rate`` < 0 shrinks by ``ratio``; infinite where it does not shrink.

    >>> collapse_time(torch.tensor([-0.5, 0.2]), ratio=10.0)
    tensor([4.6052,    inf])
    """
    return torch.where(rate < 0, torch.log(torch.tensor(ratio)) / -rate, torch.inf)


def column_norms(network: ReluNetwork, theta: Tensor, X: Tensor) -> Tensor:
    """‖Φ_k‖/√n, the norm of each column of the Jacobian, shape (..., p): what label noise is conjectured to shrink.

    Source: Andriushchenko et al. (2023), conjecture on the SDE: noise shrinks columns of Φ, the loss keeps those
    needed.
    """
    return network.jacobian(theta, X).square().mean(-2).sqrt()
