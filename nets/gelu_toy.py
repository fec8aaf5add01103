"""Full-batch heavy-ball SGD with fresh label noise on h = a₁g(w₁x) + a₂g(w₂x), g = GELU: settings × seeds, compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import njit, prange

from nets.sampling import LabelNoiseStream
from theory.problem import Regression

BLOCK = 512
START = ((1.0, 0.6), (-0.6, -0.4))
"""Published start: input weights w, output weights a."""


def toy_sgd(
    problem: Regression, settings: Sequence[tuple[float, float]], steps: int, seeds: Sequence[int], every: int = 10,
    momentum: float = 0.9, root_seed: int = 0, start: tuple[tuple[float, float], tuple[float, float]] = START,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Weights along the runs, shape (records, settings, seeds, 4) as (w₁, w₂, a₁, a₂), and ‖w₁ - w₂‖² like them.

    m ← μm + g, θ ← θ - ηm, g the gradient of (1/2n) Σ (h(x_i) - y_i - σξ_i)², ξ fresh at every step. All settings see
    the same ξ of a seed. The squared distance is that of input and output weights together; below 1e-30 it is rounding.

    Args:
        settings: pairs (step size, σ).
        every: steps between records; the first is the start.

    Raises:
        ValueError: inputs that are not one-dimensional, no seed or setting, a step size that is not positive.
    """
    if problem.d != 1 or not len(seeds) or not len(settings) or steps < 0 or every < 1:
        raise ValueError("the toy needs one-dimensional inputs, at least one seed and setting, and a number of steps.")
    if not all(eta > 0 and sigma >= 0 for eta, sigma in settings):
        raise ValueError("step sizes have to be positive and noise >= 0: choose them so.")
    stream = LabelNoiseStream(problem.n, seeds, root_seed)
    state = np.zeros((len(settings), len(seeds), 8))
    state[..., :4] = np.ravel(start)
    x, y = problem.X[:, 0].numpy().copy(), problem.y.numpy().copy()
    size, sigma = (np.array(part, dtype=float) for part in zip(*settings, strict=True))
    weights = np.empty((steps // every + 1, len(settings), len(seeds), 4))
    for begin in range(0, max(steps, 1), BLOCK):
        noise = stream.block(min(BLOCK, steps - begin))
        _advance(state, x, y, size, sigma, momentum, noise, begin, every, weights)
    if steps % every == 0:
        weights[-1] = state[..., :4]
    distance = (weights[..., 0] - weights[..., 1]) ** 2 + (weights[..., 2] - weights[..., 3]) ** 2
    return weights, distance


@njit(parallel=True, cache=True, error_model="numpy")
def _advance(state, x, y, size, sigma, momentum, noise, first_step, every, weights):  # type: ignore[no-untyped-def]
    settings, seeds = state.shape[:2]
    n = len(x)
    for item in prange(settings * seeds):
        c, seed = item // seeds, item % seeds
        s = state[c, seed]
        g, slope, gradient = np.empty((2, n)), np.empty((2, n)), np.empty(4)
        for k in range(noise.shape[1]):
            if (first_step + k) % every == 0:
                weights[(first_step + k) // every, c, seed] = s[:4]
            gradient[:] = 0.0
            for i in range(n):
                r = -y[i] - sigma[c] * noise[seed, k, i]
                for unit in range(2):
                    z = s[unit] * x[i]
                    phi = 0.5 * math.erfc(-z * 0.7071067811865476)
                    g[unit, i] = z * phi
                    slope[unit, i] = (phi + z * 0.3989422804014327 * math.exp(-0.5 * z * z)) * x[i]
                    r += s[2 + unit] * g[unit, i]
                for unit in range(2):
                    gradient[unit] += r * s[2 + unit] * slope[unit, i] / n
                    gradient[2 + unit] += r * g[unit, i] / n
            for j in range(4):
                s[4 + j] = momentum * s[4 + j] + gradient[j]
                s[j] -= size[c] * s[4 + j]
