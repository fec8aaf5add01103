"""SGD whose gradient noise has its own strength and no direction: the rival of every claim that noise is structured.

Works on any :class:`simulators.network.Network` without gradients of single samples: M independent minibatch gradients
tell how strong the noise is, and their mean keeps 1/M of it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    groups, p = gradients.shape[-2:]
    if groups < 2:
        raise ValueError(f"{groups} minibatches do not tell how strong the noise is: give 2 or more.")
    mean = gradients.mean(-2)
    trace = (gradients - mean.unsqueeze(-2)).square().sum((-2, -1)) / (groups - 1)
    return mean + ((1 - 1 / groups) * trace / p).sqrt().unsqueeze(-1) * normals


def run_isotropic(
    network: Network,
    y0: Tensor,
    step_size: StepSize | Tensor,
    steps: int,
    seed: int,
    minibatch: Minibatch | None = None,
    groups: int = 8,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
) -> Trajectory:
    """θ ← θ - η (:func:`isotropic_gradient` + λθ), one step per SGD step; arguments are those of ``run_svag``.

    Args:
        groups: M ≥ 2 minibatches a step; it costs M gradients.

    Raises:
        ValueError: fewer than two groups, a step size or batch that cannot be used, a bad start.
    """
    y0 = y0.unsqueeze(0) if y0.ndim == 1 else y0
    minibatch = minibatch or Minibatch()
    draws = Minibatches(seed, "isotropic", network.n, minibatch, groups, len(y0))
    noise = BrownianIncrements(seed, "isotropic", len(y0), network.p, dtype=y0.dtype, device=y0.device)
    sizes = step_sizes(step_size, 1, steps, y0)

    def update(k: int, y: Tensor) -> Tensor:
        rows = draws(k).flatten(0, 1).to(y.device)
        weights = torch.full(rows.shape, 1 / minibatch.size, dtype=y.dtype, device=y.device)
        every = y.repeat_interleave(groups, 0)
        gradients = network.weighted_gradient(every, weights, rows=rows).view(len(y), groups, -1)
        return y - sizes[k] * (isotropic_gradient(gradients, noise(k)) + network.weight_decay * y)

    return iterate(update, y0, steps, probes or {}, first_step)
