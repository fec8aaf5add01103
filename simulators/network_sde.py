"""SGD's SDEs on any ``torch.nn.Module`` at one backward pass a step.

S dW = n^{-1/2} Σ_i (dW_i - mean dW) ∇ℓ_i = ∇_θ [n^{-1/2} Σ_i (dW_i - mean dW) ℓ_i(θ)]: gradient noise is one backward
pass with random weights on the per-sample losses, and with -dt/n more on each weight it is drift and noise at once.
Time is SDE time: one SGD step of size η lasts η. States have shape (paths, p). All equations are Itô.
Source: Andriushchenko et al. (2023), SDE section; Li, Malladi, Arora (2021), Eq. 2 and section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from simulators.integrate import iterate
from simulators.network import SQUARED, Network
from simulators.noise import BrownianIncrements
from theory.minibatch import Minibatch
from theory.sde import StepSize, step_size_at
from theory.trajectory import Probe, Trajectory


def check_step_size(step_size: StepSize) -> None:
    """The same for a learning rate η."""
    if not callable(step_size) and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"the step size {step_size} is not usable: give a positive finite number.")


def check_samples(network: Network) -> None:
    """One sentence where losses of single samples mean nothing."""
    if network.batch_statistics:
        raise ValueError("on batch statistics a sample has no loss of its own, so the SDE has no noise: use run_svag.")


class NetworkSDE(Protocol):
    """An SDE on θ that also gives a whole Euler-Maruyama increment f h + G dW in one backward pass."""

    channels: int

    def increment(self, t: float, y: Tensor, h: float, v: Tensor) -> Tensor: ...


class ExactCovarianceSDE:
    """dθ = -(∇L + λθ) dt + √(ηκ) S dW, S Sᵀ the covariance of a per-sample gradient; any loss, W ∈ R^n.

    κ is the minibatch's variance factor. The names are torchsde's, see :class:`theory.sde.SDE`.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(self, network: Network, step_size: StepSize, minibatch: Minibatch | None = None) -> None:
        check_step_size(step_size)
        check_samples(network)
        self.channels = network.n
        self._network, self._step_size = network, step_size
        self._kappa = (minibatch or Minibatch()).variance_factor(network.n)

    def _weights(self, t: float, v: Tensor) -> Tensor:
        scale = step_size_at(self._step_size, t) * self._kappa / self.channels
        return scale**0.5 * (v - v.mean(1, keepdim=True))

    def f(self, t: float, y: Tensor) -> Tensor:
        """-(∇L + λθ), shape (paths, p)."""
        return -self._network.gradient(y)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """√(ηκ/n) Σ_i (v_i - mean v) ∇ℓ_i, shape (paths, p), for v of shape (paths, n)."""
        return self._network.weighted_gradient(y, self._weights(t, v))

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.f(t, y), self.g_prod(t, y, v)

    def increment(self, t: float, y: Tensor, h: float, v: Tensor) -> Tensor:
        """f h + G v in one backward pass: weight -h/n + √(ηκ/n)(v_i - mean v) on ℓ_i."""
        kick = self._network.weighted_gradient(y, self._weights(t, v) - h / self.channels)
        return kick.add_(y, alpha=-h * self._network.weight_decay)


class LabelNoiseSDE:
    """dθ = -(∇L + λθ) dt + √(2ηδκ/(nC)) Φᵀ dW for the squared loss; W has a channel per sample and output.

    The residuals' second moment r_i r_iᵀ is replaced by its average at loss level δ, (2δ/C) I for C outputs.

    Args:
        level: δ as a number, as a function of SDE time (a number or one value per path), or None for the state's own
            loss L(θ_t), which costs one more forward pass.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(
        self,
        network: Network,
        step_size: StepSize,
        level: float | Callable[[float], float | Tensor] | None = None,
        minibatch: Minibatch | None = None,
    ) -> None:
        check_step_size(step_size)
        check_samples(network)
        if network.loss is not SQUARED:
            raise ValueError(
                f"label noise has no meaning for the {network.loss.name} loss: use ExactCovarianceSDE or loss=SQUARED."
            )
        if isinstance(level, int | float) and not (level >= 0 and math.isfinite(level)):
            raise ValueError(f"the loss level {level} is not usable: give 0 or a positive number.")
        self.channels = network.n * network.output_dim
        self._network, self._step_size, self._level = network, step_size, level
        self._kappa = (minibatch or Minibatch()).variance_factor(network.n)

    def _cotangent(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        if self._level is None:
            delta = self._network.losses(y)
        else:
            value = self._level(t) if callable(self._level) else self._level
            delta = torch.as_tensor(value, dtype=y.dtype, device=y.device).expand(len(y))
        scale = (2 * step_size_at(self._step_size, t) * self._kappa / self.channels * delta).sqrt()
        return (scale.unsqueeze(1) * v).view(len(y), self._network.n, -1)

    def f(self, t: float, y: Tensor) -> Tensor:
        """-(∇L + λθ), shape (paths, p)."""
        return -self._network.gradient(y)

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """√(2ηδκ/(nC)) Φᵀ v, shape (paths, p), for v of shape (paths, n·C)."""
        return self._network.weighted_gradient(y, None, self._cotangent(t, y, v))

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.f(t, y), self.g_prod(t, y, v)

    def increment(self, t: float, y: Tensor, h: float, v: Tensor) -> Tensor:
        """f h + G v in one backward pass."""
        drift = torch.full((len(y), self._network.n), -h / self._network.n, dtype=y.dtype, device=y.device)
        kick = self._network.weighted_gradient(y, drift, self._cotangent(t, y, v))
        return kick.add_(y, alpha=-h * self._network.weight_decay)


def run_sde(
    sde: NetworkSDE,
    y0: Tensor,
    dt: float | Tensor,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Euler-Maruyama, θ ← θ + f dt + G √dt ξ, one backward pass a step.

    Args:
        y0: start, shape (p,) or (paths, p); the state after ``first_step`` steps when a run is resumed.
        dt: step in SDE time, a number or one value per step, shape (steps,).
        steps: number of the last step; a resumed run does steps - first_step of them and ends bit for bit alike.
        noise: increments of shape (paths, channels).
        probes: functions of the states (paths, p), see :meth:`Network.on_module` for functions of a module.

    Raises:
        ValueError: a start or increments of the wrong shape or not finite, a step that is not positive.
    """
    y0 = y0.unsqueeze(0) if y0.ndim == 1 else y0
    if noise.paths != len(y0) or noise.channels != sde.channels:
        raise ValueError(
            f"the increments have {noise.paths} paths and {noise.channels} channels: give {len(y0)} and {sde.channels}."
        )
    if isinstance(dt, Tensor) and dt.ndim and dt.shape != (steps,):
        raise ValueError(f"step sizes of shape {tuple(dt.shape)} were given for {steps} steps: give one each.")
    sizes = dt.tolist() if isinstance(dt, Tensor) and dt.ndim else [float(dt)] * max(steps, 1)
    if not all(h > 0 and math.isfinite(h) for h in sizes):
        raise ValueError("the step dt has to be positive and finite: give such a number.")
    clock = list(accumulate(sizes, initial=0.0)) if isinstance(dt, Tensor) else [k * sizes[0] for k in range(steps)]

    def update(k: int, y: Tensor) -> Tensor:
        return y + sde.increment(clock[k], y, sizes[k], noise(k).to(y) * sizes[k] ** 0.5)

    return iterate(update, y0, steps, probes or {}, first_step)
