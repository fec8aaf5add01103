"""A ReLU network's SGD as one compiled loop, several runs side by side in each instruction (CPU, float64).

Parameters of LANES runs lie next to each other, so every operation on a weight is one over runs, whatever the widths;
threads share the groups of runs. A run's numbers are the same to the bit however many run beside it. The readable
twin is :class:`nets.relu_torch.LiteralEngine`; the two agree to rounding on equal draws.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import get_num_threads, njit, prange
from torch import Tensor

from theory.problem import Regression
from theory.relu_network import ReluNetwork

VECTOR = 8
CACHED = 4096  # parameters × lanes that stay in the fastest cache
OVERFLOW = 1e100


class CompiledEngine:
    """Advances a flat batch of runs; run k takes schedule k // seeds and the draws of seed k % seeds."""

    def __init__(
        self, network: ReluNetwork, problem: Regression, theta: Tensor, logistic: bool, averaging: float
    ) -> None:
        self._X, self._y = np.ascontiguousarray(problem.X.numpy()), problem.y.numpy()
        self._shapes = np.array(network.shapes, dtype=np.int64)
        self._logistic, self._averaging, self._runs = logistic, averaging, len(theta)
        self._lanes = _lanes(len(theta), network.size)
        groups = -(-len(theta) // self._lanes)
        self._theta = np.zeros((groups, network.size, self._lanes))  # idle lanes hold zeros
        _scatter(theta.numpy(), self._theta)
        self._average = self._theta.copy() if averaging else np.empty((0, 0, 0))
        self._bad = np.full((groups, self._lanes), -1, dtype=np.int64)

    def advance(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, shift_scale: np.ndarray, first_step: int
    ) -> None:
        """Take the steps of one block, arguments as in :meth:`nets.relu_torch.LiteralEngine.advance`."""
        _advance(
            self._theta, self._average, self._bad, self._runs, self._shapes, self._X, self._y, index, shift, eta,
            shift_scale, self._logistic, self._averaging, first_step,
        )  # fmt: skip

    def state(self) -> Tensor:
        """The current θ, shape (runs, p), or its running average when one is kept."""
        held = self._average if self._averaging else self._theta
        return torch.from_numpy(held.transpose(0, 2, 1).reshape(-1, held.shape[1])[: self._runs].copy())

    @property
    def bad(self) -> Tensor:
        return torch.from_numpy(self._bad.reshape(-1)[: self._runs].copy())


def _lanes(runs: int, size: int) -> int:
    """Runs side by side: enough to fill instructions, few enough to stay in cache and to give each thread a group."""
    fitting = max(CACHED // size, 1)
    sharing = -(-runs // get_num_threads())
    return VECTOR * max(1, min(-(-sharing // VECTOR), fitting // VECTOR, 4))


def _scatter(theta: np.ndarray, held: np.ndarray) -> None:
    lanes = held.shape[2]
    for group in range(len(held)):
        part = theta[group * lanes : (group + 1) * lanes]
        held[group, :, : len(part)] = part.T


@njit(parallel=True, cache=True)
def _advance(theta, average, bad, runs, shapes, X, y, index, shift, eta, shift_scale, logistic, averaging, first_step):  # type: ignore[no-untyped-def]
    groups, size, lanes = theta.shape
    seeds, steps, batch = index.shape
    n, d = X.shape
    depth = len(shapes)
    units = 0
    for level in range(depth):
        units += shapes[level, 0]
    for group in prange(groups):
        t, gradient = theta[group], np.empty((size, lanes))
        z, delta = np.empty((d + units, lanes)), np.empty((d + units, lanes))  # inputs first, then layer by layer
        target, r, step_size = np.empty(lanes), np.empty(lanes), np.empty(lanes)
        for k in range(steps):
            gradient[:] = 0.0
            for m in range(batch):
                for lane in range(lanes):
                    run = min(group * lanes + lane, runs - 1)
                    i = index[run % seeds, k, m]
                    for c in range(d):
                        z[c, lane] = X[i, c]
                    target[lane] = y[i]
                    if len(shift) > 0:
                        target[lane] += shift_scale[run // seeds, k] * shift[run % seeds, k, m]
                _forward(t, z, shapes, d)
                output = z[d + units - 1]
                for lane in range(lanes):
                    if logistic:
                        r[lane] = -target[lane] / (1.0 + np.exp(target[lane] * output[lane]))
                        level_of_overflow = output[lane]
                    else:
                        r[lane] = output[lane] - target[lane]
                        level_of_overflow = r[lane]
                    if not abs(level_of_overflow) < OVERFLOW:
                        r[lane] = 0.0
                        if bad[group, lane] < 0:
                            bad[group, lane] = first_step + k
                _backward(t, z, delta, gradient, r, shapes, d)
            for lane in range(lanes):
                run = min(group * lanes + lane, runs - 1)
                step_size[lane] = eta[run // seeds, k] / batch if bad[group, lane] < 0 else 0.0
            for p in range(size):
                for lane in range(lanes):
                    t[p, lane] -= step_size[lane] * gradient[p, lane]
            if averaging > 0.0:
                a = average[group]
                for p in range(size):
                    for lane in range(lanes):
                        if bad[group, lane] < 0:
                            a[p, lane] = averaging * a[p, lane] + (1 - averaging) * t[p, lane]


@njit(cache=True)
def _forward(t, z, shapes, d):  # type: ignore[no-untyped-def]
    """Activations of every layer below the inputs that lie in z[:d]; the last row is the output."""
    lanes = z.shape[1]
    at, below, here = 0, 0, d
    for level in range(len(shapes)):
        rows, columns, biased = shapes[level]
        for j in range(rows):
            out = z[here + j]
            if biased:
                bias = t[at + rows * columns + j]
                for lane in range(lanes):
                    out[lane] = bias[lane]
            else:
                for lane in range(lanes):
                    out[lane] = 0.0
            for c in range(columns):
                weight, inner = t[at + j * columns + c], z[below + c]
                for lane in range(lanes):
                    out[lane] += weight[lane] * inner[lane]
            if level < len(shapes) - 1:
                for lane in range(lanes):
                    out[lane] = out[lane] if out[lane] > 0.0 else 0.0
        at += rows * columns + (rows if biased else 0)
        below = here
        here += rows


@njit(cache=True)
def _backward(t, z, delta, gradient, r, shapes, d):  # type: ignore[no-untyped-def]
    """Adds r ∇h to the gradient; delta holds r ∂h/∂z of every unit."""
    lanes = z.shape[1]
    at, here = t.shape[0], z.shape[0]
    for level in range(len(shapes) - 1, -1, -1):
        rows, columns, biased = shapes[level]
        at -= rows * columns + (rows if biased else 0)
        here -= rows
        below = here - columns
        if level == len(shapes) - 1:
            for lane in range(lanes):
                delta[here, lane] = r[lane]
        if level > 0:
            for c in range(columns):
                inner, into = z[below + c], delta[below + c]
                for lane in range(lanes):
                    into[lane] = 0.0
                for j in range(rows):
                    weight, outer = t[at + j * columns + c], delta[here + j]
                    for lane in range(lanes):
                        into[lane] += weight[lane] * outer[lane]
                for lane in range(lanes):
                    into[lane] = into[lane] if inner[lane] > 0.0 else 0.0
        for j in range(rows):
            outer = delta[here + j]
            for c in range(columns):
                inner, into = z[below + c], gradient[at + j * columns + c]
                for lane in range(lanes):
                    into[lane] += outer[lane] * inner[lane]
            if biased:
                into = gradient[at + rows * columns + j]
                for lane in range(lanes):
                    into[lane] += outer[lane]
