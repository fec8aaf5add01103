"""SVAG on any ``torch.nn.Module``: a discrete scheme that turns from SGD into its SDE, two gradients a step.

Source: Li, Malladi, Arora (2021), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from simulators.integrate import iterate
from simulators.network import Network
from simulators.network_sde import check_step_size
from theory.minibatch import Minibatch
from theory.sde import StepSize, step_size_at
from theory.streams import named_generator
from theory.trajectory import Probe, Trajectory

BLOCK = 32  # steps drawn together


class MinibatchPairs:
    """Two independent minibatches a step, as a pure function of (seed, step, path)."""

    def __init__(self, seed: int, n: int, minibatch: Minibatch, paths: int = 1) -> None:
        minibatch.variance_factor(n)  # says so when the batch cannot be drawn
        self._seed, self._n, self._minibatch, self._paths = seed, n, minibatch, paths
        self._block_index, self._block = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Indices of the samples, shape (paths, 2, B), int64, on the CPU."""
        index, offset = divmod(step, BLOCK)
        if index != self._block_index:
            generators = (named_generator(self._seed, "svag", path, block=index) for path in range(self._paths))
            self._block = torch.from_numpy(np.stack([self._draw(generator) for generator in generators]))
            self._block_index = index
        return self._block[:, offset]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        size = self._minibatch.size
        if self._minibatch.replacement or size == 1:
            return generator.integers(0, self._n, (BLOCK, 2, size))
        batches = [generator.choice(self._n, size, replace=False) for _ in range(2 * BLOCK)]
        return np.stack(batches).reshape(BLOCK, 2, size)


def svag_gradient(network: Network, theta: Tensor, pairs: Tensor, l: int) -> Tensor:  # noqa: E741
    """(1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂ + λθ in one backward pass with signed weights, shape (paths, p).

    Its mean is ∇L + λθ and its covariance l times that of one minibatch gradient. For l = 1 it is g₁ alone.

    Args:
        pairs: the samples of the two minibatches, shape (paths, 2, B).
    """
    if l < 1 or l != int(l):
        raise ValueError(f"SVAG with l = {l} is not defined: give a whole number of at least 1.")
    root, size = math.sqrt(2 * l - 1), pairs.shape[2]
    first, second = (1 + root) / (2 * size), (1 - root) / (2 * size)
    rows = pairs[:, :1] if l == 1 else pairs
    weights = torch.tensor([first] if l == 1 else [first, second], dtype=theta.dtype).repeat_interleave(size)
    weights = weights.to(theta.device).expand(len(theta), -1)
    gradient = network.weighted_gradient(theta, weights, rows=rows.flatten(1).to(theta.device))
    return gradient.add_(theta, alpha=network.weight_decay)


def run_svag(
    network: Network,
    y0: Tensor,
    step_size: StepSize,
    l: int,  # noqa: E741
    steps: int,
    seed: int,
    minibatch: Minibatch | None = None,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Stochastic variance amplified gradient: θ ← θ - (η/l)[(1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂].

    One step lasts η/l, so l of them are one SGD step; l = 1 is SGD, l → ∞ the exact-covariance SDE.

    Args:
        y0: start, shape (p,) or (paths, p); the state after ``first_step`` steps when a run is resumed.
        step_size: η, a number or a function of SDE time.
        steps: number of the last SVAG step; a resumed run does steps - first_step of them and ends bit for bit alike.
        seed: root seed of the minibatches, the only randomness.

    Raises:
        ValueError: l below 1, a step size that is not positive, a batch that cannot be drawn, a bad start.

    Source: Li, Malladi, Arora (2021), section 4.
    """
    check_step_size(step_size)
    if l < 1 or l != int(l):
        raise ValueError(f"SVAG with l = {l} is not defined: give a whole number of at least 1.")
    y0 = y0.unsqueeze(0) if y0.ndim == 1 else y0
    pairs = MinibatchPairs(seed, network.n, minibatch or Minibatch(), len(y0))
    sizes, t = [], 0.0
    for k in range(steps):
        sizes.append(step_size_at(step_size, t))
        check_step_size(sizes[-1])
        t = t + sizes[-1] / l if callable(step_size) else (k + 1) * sizes[-1] / l

    def update(k: int, y: Tensor) -> Tensor:
        return y - sizes[k] / l * svag_gradient(network, y, pairs(k), l)

    return iterate(update, y0, steps, probes or {}, first_step)
