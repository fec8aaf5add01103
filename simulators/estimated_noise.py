"""SGD's steps with other noise of its strength: Gaussian with its covariance, or the same in every direction (a rival).

Works on any :class:`simulators.network.Network` without gradients of single samples, BatchNorm on batch statistics
included: M independent minibatch gradients tell what the noise is like, and their mean keeps 1/M of it as it is. A step
is as large as SGD's, so that with Gaussian noise this is the Euler-Maruyama scheme of SGD's SDE at dt = η: it differs
from SGD by the law of the noise alone, and from the SDE by the finite step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simulators.integrate import iterate
from simulators.network import Network
from simulators.noise import BrownianIncrements
from simulators.svag import Minibatches, step_sizes
from theory.minibatch import Minibatch
from theory.sde import StepSize
from theory.trajectory import Probe, Trajectory


def isotropic_gradient(gradients: Tensor, normals: Tensor) -> Tensor:
    """ḡ + √((1 - 1/M) s²/p) ξ of M minibatch gradients, shapes (..., M, p) and (..., p) → (..., p).

    s² = Σ_m ‖g_m - ḡ‖²/(M - 1) estimates tr C, C the covariance of one minibatch gradient, without bias; so mean and
    total variance, tr C, are those of one minibatch gradient, and (M - 1)/M of the variance is the same in every
    direction.

    Raises:
        ValueError: fewer than two gradients.
    """
    groups, p = _at_least_two(gradients)
    mean = gradients.mean(-2)
    trace = (gradients - mean.unsqueeze(-2)).square().sum((-2, -1)) / (groups - 1)
    return mean + ((1 - 1 / groups) * trace / p).sqrt().unsqueeze(-1) * normals


def gaussian_weights(normals: Tensor) -> Tensor:
    """a_m = 1/M + (ξ_m - ξ̄)/√M from normals (..., M): Σ_m a_m g_m = ḡ + Σ_m ξ_m (g_m - ḡ)/√M.

    Mean and covariance of that sum of M minibatch gradients are those of one: given the M gradients it has covariance
    (1 - 1/M) S, S = Σ_m (g_m - ḡ)(g_m - ḡ)ᵀ/(M - 1) unbiased, and ḡ has the rest, C/M. For M → ∞ the law is Gaussian.

    Raises:
        ValueError: fewer than two minibatches.
    """
    groups = _at_least_two(normals.unsqueeze(-1))[0]
    return 1 / groups + (normals - normals.mean(-1, keepdim=True)) / groups**0.5


def run_isotropic(
    network: Network, y0: Tensor, step_size: StepSize | Tensor, steps: int, seed: int,
    minibatch: Minibatch | None = None, groups: int = 8, probes: Mapping[str, Probe] | None = None, first_step: int = 0,
) -> Trajectory:  # fmt: skip
    """θ ← θ - η (:func:`isotropic_gradient` + λθ), one step per SGD step; arguments are those of ``run_svag``.

    Args:
        groups: M ≥ 2 minibatches a step; it costs M gradients.

    Raises:
        ValueError: fewer than two groups, a step size or batch that cannot be used, a bad start.
    """

    def kick(y: Tensor, rows: Tensor, normals: Tensor) -> Tensor:
        weights = torch.full((len(y) * groups, rows.shape[2]), 1 / rows.shape[2], dtype=y.dtype, device=y.device)
        every = network.weighted_gradient(y.repeat_interleave(groups, 0), weights, rows=rows.flatten(0, 1))
        return isotropic_gradient(every.view(len(y), groups, -1), normals)

    return _run(
        kick, "isotropic", network.p, network, y0, step_size, steps, seed, minibatch, groups, probes, first_step
    )


def run_gaussian(
    network: Network, y0: Tensor, step_size: StepSize | Tensor, steps: int, seed: int,
    minibatch: Minibatch | None = None, groups: int = 8, probes: Mapping[str, Probe] | None = None, first_step: int = 0,
) -> Trajectory:  # fmt: skip
    """θ ← θ - η (Σ_m a_m g_m + λθ), a = :func:`gaussian_weights`; the rest is as for :func:`run_isotropic`."""

    def kick(y: Tensor, rows: Tensor, normals: Tensor) -> Tensor:
        weights = (gaussian_weights(normals) / rows.shape[2]).repeat_interleave(rows.shape[2], 1)
        return network.weighted_gradient(y, weights, rows=rows.flatten(1), minibatches=groups)

    return _run(kick, "gaussian", groups, network, y0, step_size, steps, seed, minibatch, groups, probes, first_step)


def _run(
    kick: Callable[[Tensor, Tensor, Tensor], Tensor], stream: str, channels: int, network: Network, y0: Tensor,
    step_size: StepSize | Tensor, steps: int, seed: int, minibatch: Minibatch | None, groups: int,
    probes: Mapping[str, Probe] | None, first_step: int,
) -> Trajectory:  # fmt: skip
    """``kick``: states (paths, p), samples of their minibatches (paths, M, B) and normals ↦ the noisy gradient."""
    y0 = y0.unsqueeze(0) if y0.ndim == 1 else y0
    minibatch = minibatch or Minibatch()
    draws = Minibatches(seed, stream, network.n, minibatch, groups, len(y0))
    noise = BrownianIncrements(seed, stream, len(y0), channels, dtype=y0.dtype, device=y0.device)
    sizes = step_sizes(step_size, 1, steps, y0)

    def update(k: int, y: Tensor) -> Tensor:
        return y - sizes[k] * (kick(y, draws(k).to(y.device), noise(k)) + network.weight_decay * y)

    return iterate(update, y0, steps, probes or {}, first_step)


def _at_least_two(gradients: Tensor) -> torch.Size:
    if gradients.shape[-2] < 2:
        raise ValueError(f"{gradients.shape[-2]} minibatches do not tell how strong the noise is: give 2 or more.")
    return gradients.shape[-2:]
