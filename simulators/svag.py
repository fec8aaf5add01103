"""SVAG on any ``torch.nn.Module``: a discrete scheme that turns from SGD into its SDE, two gradients a step.

A step follows (1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂ with two independent minibatch gradients: l times the covariance of
one, over 1/l of the step size. With momentum μ the state is (θ, m), and l steps of

    m ← (1 - (1-μ)/l) m + g/l,   θ ← θ - (η/l) m

have the friction, the drift and the noise of one step of the heavy ball m ← μm + g, θ ← θ - ηm; l → ∞ is the
underdamped SDE η dm = (-(1-μ) m + ∇L) dt + noise, dθ = -m dt. For μ → 0 its memory is still one SGD step, so without
momentum there is no m at all and the limit is SGD's own SDE.
Source: Li, Malladi, Arora (2021), section 4; the scheme with momentum is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

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


class Minibatches:
    """So many independent minibatches a step, as a pure function of (seed, stream, step, path)."""

    def __init__(self, seed: int, stream: str, n: int, minibatch: Minibatch, each: int, paths: int = 1) -> None:
        minibatch.variance_factor(n)  # says so when the batch cannot be drawn
        self._seed, self._stream, self._n, self._minibatch, self._each = seed, stream, n, minibatch, each
        self._paths, self._block_index, self._block = paths, -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Indices of the samples, shape (paths, each, B), int64, on the CPU."""
        index, offset = divmod(step, BLOCK)
        if index != self._block_index:
            streams = (named_generator(self._seed, self._stream, path, block=index) for path in range(self._paths))
            self._block = torch.from_numpy(np.stack([self._draw(generator) for generator in streams]))
            self._block_index = index
        return self._block[:, offset]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        size = self._minibatch.size
        if self._minibatch.replacement or size == 1:
            return generator.integers(0, self._n, (BLOCK, self._each, size))
        batches = [generator.choice(self._n, size, replace=False) for _ in range(self._each * BLOCK)]
        return np.stack(batches).reshape(BLOCK, self._each, size)


class MinibatchPairs(Minibatches):
    """Two independent minibatches a step, shape (paths, 2, B)."""

    def __init__(self, seed: int, n: int, minibatch: Minibatch, paths: int = 1) -> None:
        super().__init__(seed, "svag", n, minibatch, 2, paths)


def amplitudes(l: int) -> tuple[float, float]:  # noqa: E741
    """(1+√(2l-1))/2 and (1-√(2l-1))/2: they add up to 1 and their squares to l.

    >>> amplitudes(1), amplitudes(5)
    ((1.0, 0.0), (2.0, -1.0))
    """
    if l < 1 or l != int(l):
        raise ValueError(f"SVAG with l = {l} is not defined: give a whole number of at least 1.")
    root = math.sqrt(2 * l - 1)
    return (1 + root) / 2, (1 - root) / 2


def svag_gradient(network: Network, theta: Tensor, pairs: Tensor, l: int) -> Tensor:  # noqa: E741
    """(1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂ + λθ in one backward pass with signed weights, shape (paths, p).

    Its mean is ∇L + λθ and its covariance l times that of one minibatch gradient. For l = 1 it is g₁ alone.

    Args:
        pairs: the samples of the two minibatches, shape (paths, 2, B).
    """
    paths, _, size = pairs.shape
    weights = torch.tensor(amplitudes(l), dtype=theta.dtype, device=theta.device) / size
    rows, weights = (pairs[:, :1], weights[:1]) if l == 1 else (pairs, weights)
    each = weights.repeat_interleave(size).expand(paths, -1)
    rows = rows.flatten(1).to(theta.device)
    gradient = network.weighted_gradient(theta, each, rows=rows, minibatches=len(weights))
    return gradient.add_(theta, alpha=network.weight_decay)


def run_svag(
    network: Network,
    y0: Tensor,
    step_size: StepSize | Tensor,
    l: int,  # noqa: E741
    steps: int,
    seed: int,
    minibatch: Minibatch | None = None,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
    momentum: float = 0.0,
) -> Trajectory:
    """Stochastic variance amplified gradient: θ ← θ - (η/l)[(1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂].

    One step lasts η/l, so l of them are one SGD step; l = 1 is SGD, l → ∞ the exact-covariance SDE.

    Args:
        y0: start, shape (p,) or (paths, p); the state after ``first_step`` steps when a run is resumed. With momentum
            also (paths, 2p), θ followed by m; m = 0 otherwise.
        step_size: η, a number, a function of SDE time, or the step sizes of the SGD steps, shape (K,) or (paths, K).
        steps: number of the last SVAG step; a resumed run does steps - first_step of them and ends bit for bit alike.
        seed: root seed of the minibatches, the only randomness.
        probes: functions of θ, shape (paths, p).
        momentum: μ of the heavy ball; the final state is then (θ, m), shape (paths, 2p).

    Raises:
        ValueError: l below 1, a step size that is not positive, too few of them, a batch that cannot be drawn, momentum
            outside [0, 1), a bad start.

    Source: Li, Malladi, Arora (2021), section 4.
    """
    amplitudes(l)  # says so when l is not usable
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not usable: choose a number in [0, 1).")
    y0 = y0.unsqueeze(0) if y0.ndim == 1 else y0
    pairs, p = MinibatchPairs(seed, network.n, minibatch or Minibatch(), len(y0)), network.p
    sizes = step_sizes(step_size, l, steps, y0)

    def plain(k: int, y: Tensor) -> Tensor:
        return y - sizes[k] / l * svag_gradient(network, y, pairs(k), l)

    def heavy(k: int, y: Tensor) -> Tensor:
        theta, mass = y[:, :p], y[:, p:]
        mass = (1 - (1 - momentum) / l) * mass + svag_gradient(network, theta, pairs(k), l) / l
        return torch.cat([theta - sizes[k] / l * mass, mass], 1)

    if not momentum:
        return iterate(plain, y0, steps, probes or {}, first_step)
    y0 = torch.cat([y0, torch.zeros_like(y0)], 1) if y0.shape[1] == p else y0

    def of_theta(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: function(y[:, :p])

    seen = {name: replace(probe, function=of_theta(probe.function)) for name, probe in (probes or {}).items()}
    return iterate(heavy, y0, steps, seen, first_step)


def step_sizes(step_size: StepSize | Tensor, l: int, steps: int, y0: Tensor) -> Sequence[float | Tensor]:  # noqa: E741
    """η of every SVAG step, of which l make an SGD step: a number, or one per path, shape (paths, 1).

    Raises:
        ValueError: step sizes that are not positive and finite, or too few of them.
    """
    if isinstance(step_size, Tensor):
        fits = step_size.ndim == 1 or (step_size.ndim == 2 and len(step_size) == len(y0))
        if not fits or step_size.shape[-1] * l < steps:
            raise ValueError(
                f"step sizes of shape {tuple(step_size.shape)} do not last for {steps} steps of {len(y0)} paths, "
                f"{l} to an SGD step: give (K,) or (paths, K), K SGD steps."
            )
        if not ((step_size > 0) & torch.isfinite(step_size)).all():
            raise ValueError("the step sizes have to be positive and finite: give such numbers.")
        if step_size.ndim == 1:
            return step_size.double().repeat_interleave(l).tolist()
        return step_size.to(y0).T.unsqueeze(-1).repeat_interleave(l, 0).unbind()
    check_step_size(step_size)
    sizes, t = list[float](), 0.0
    for k in range(steps):
        sizes.append(step_size_at(step_size, t))
        check_step_size(sizes[-1])
        t = t + sizes[-1] / l if callable(step_size) else (k + 1) * sizes[-1] / l
    return sizes
