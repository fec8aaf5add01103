"""A ReLU network's SGD as one compiled loop, several runs side by side in each instruction (CPU, float64).

Parameters of up to 32 runs lie next to each other, so every operation on a weight is one over runs at any width;
threads share the groups of runs. A run's numbers are the same to the bit however many run beside it. The readable
twin is :class:`nets.relu_torch.LiteralEngine`; the two agree to rounding on equal draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numba import get_num_threads, njit, prange, set_num_threads
from torch import Tensor

from theory.problem import Regression
from theory.relu_network import ReluNetwork

VECTOR, MOST_VECTORS = 8, 4  # runs per group: multiples of 8, up to 32, beyond which nothing is gained
SAMPLES = 64  # per pass of an evaluation
GRAIN = 500_000  # multiplications for which it pays to wake another thread
OVERFLOW = 1e100


class CompiledEngine:
    """Advances a flat batch of runs; run k takes schedule k // seeds and the draws of seed k % seeds."""

    def __init__(
        self, network: ReluNetwork, problem: Regression, theta: Tensor, logistic: bool, averaging: float
    ) -> None:
        self._X, self._y = _plain(problem.X.numpy()), _plain(problem.y.numpy())
        self._shapes = np.array(network.shapes, dtype=np.int64)
        self._logistic, self._averaging, self._runs = logistic, averaging, len(theta)
        self._lanes = _lanes(len(theta))
        groups = -(-len(theta) // self._lanes)
        self._theta = np.zeros((groups, network.size, self._lanes))  # idle lanes hold zeros
        _scatter(theta.numpy(), self._theta)
        self._average = self._theta.copy() if averaging else np.empty((0, 0, 0))
        self._bad = np.full((groups, self._lanes), -1, dtype=np.int64)

    def advance(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, shift_scale: np.ndarray, first_step: int
    ) -> None:
        """Take the steps of one block, arguments as in :meth:`nets.relu_torch.LiteralEngine.advance`."""
        with _threads_for(3 * self._theta.size * index.shape[1] * index.shape[2]):
            _advance(
                self._theta, self._average, self._bad, self._runs, self._shapes, self._X, self._y, _plain(index),
                _plain(shift), _plain(eta), _plain(shift_scale), self._logistic, self._averaging, first_step,
            )  # fmt: skip

    def state(self) -> Tensor:
        """The current θ, shape (runs, p), or its running average when one is kept."""
        held = self._average if self._averaging else self._theta
        return torch.from_numpy(held.transpose(0, 2, 1).reshape(-1, held.shape[1])[: self._runs].copy())

    @property
    def bad(self) -> Tensor:
        return torch.from_numpy(self._bad.reshape(-1)[: self._runs].copy())


def half_mse(network: ReluNetwork, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """L = (1/2n) Σ (h(θ, x_i) - y_i)², shape (...) for θ (..., p), samples side by side in each instruction."""
    flat = _plain(theta.reshape(-1, theta.shape[-1]).numpy())
    with _threads_for(flat.size * len(X)):
        losses = _half_mse(flat, np.array(network.shapes, dtype=np.int64), _plain(X.numpy()), _plain(y.numpy()))
    return torch.from_numpy(losses).reshape(theta.shape[:-1])


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """As many of the allowed threads as the work is worth; numbers do not depend on how many."""
    allowed = get_num_threads()
    set_num_threads(max(1, min(allowed, multiplications // GRAIN)))
    try:
        yield
    finally:
        set_num_threads(allowed)


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in the one memory layout for which the loops are compiled."""
    return np.require(array, None, ("C", "W"))


def _lanes(runs: int) -> int:
    """Runs side by side: enough to fill instructions, few enough to give each thread a group."""
    share = -(-runs // get_num_threads())
    return VECTOR * min(-(-share // VECTOR), MOST_VECTORS)


def _scatter(theta: np.ndarray, held: np.ndarray) -> None:
    lanes = held.shape[2]
    for group in range(len(held)):
        part = theta[group * lanes : (group + 1) * lanes]
        held[group, :, : len(part)] = part.T


@njit(parallel=True, cache=True)
def _advance(theta, average, bad, runs, shapes, X, y, index, shift, eta, shift_scale, logistic, averaging, first_step):  # type: ignore[no-untyped-def]
    """Steps of one block for θ (groups, p, lanes), in place; the arguments' order is that of their owner above."""
    groups, size, lanes = theta.shape
    seeds, steps, batch = index.shape
    d, rows = X.shape[1], X.shape[1] + shapes[:, 0].sum()
    for group in prange(groups):
        t, dead = theta[group], bad[group]
        change = t if batch == 1 else np.empty((size, lanes))  # one sample's step is taken in place
        z, delta = np.empty((rows, lanes)), np.empty((rows, lanes))  # inputs first, then layer by layer
        target, pull = np.empty(lanes), np.empty(lanes)
        for k in range(steps):
            if batch > 1:
                change[:] = 0.0
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
                for lane in range(lanes):
                    run = min(group * lanes + lane, runs - 1)
                    h = z[rows - 1, lane]
                    r = -target[lane] / (1.0 + np.exp(target[lane] * h)) if logistic else h - target[lane]
                    if not abs(h if logistic else r) < OVERFLOW and dead[lane] < 0:
                        dead[lane] = first_step + k
                    if dead[lane] >= 0:
                        r = 0.0
                        z[:, lane] = 0.0
                    pull[lane] = -eta[run // seeds, k] / batch * r
                _backward(t, z, delta, change, pull, shapes)
            if batch > 1:
                for p in range(size):
                    for lane in range(lanes):
                        t[p, lane] += change[p, lane] if dead[lane] < 0 else 0.0
            if averaging > 0.0:
                for p in range(size):
                    for lane in range(lanes):
                        blend = averaging * average[group, p, lane] + (1 - averaging) * t[p, lane]
                        average[group, p, lane] = blend if dead[lane] < 0 else average[group, p, lane]


@njit(parallel=True, cache=True)
def _half_mse(theta, shapes, X, y):  # type: ignore[no-untyped-def]
    """Losses of θ (runs, p), shape (runs,)."""
    n, d = X.shape
    rows, lanes = d + shapes[:, 0].sum(), min(SAMPLES, -(-n // VECTOR) * VECTOR)
    losses = np.empty(len(theta))
    for run in prange(len(theta)):
        t, z, total = np.empty((theta.shape[1], lanes)), np.zeros((rows, lanes)), 0.0
        for p in range(theta.shape[1]):
            t[p, :] = theta[run, p]
        for begin in range(0, n, lanes):
            count = min(lanes, n - begin)
            for lane in range(count):
                for c in range(d):
                    z[c, lane] = X[begin + lane, c]
            _forward(t, z, shapes, d)
            for lane in range(count):
                total += (z[rows - 1, lane] - y[begin + lane]) ** 2
        losses[run] = total / (2 * n)
    return losses


@njit(cache=True)
def _forward(t, z, shapes, d):  # type: ignore[no-untyped-def]
    """Activations of every layer below the inputs that lie in z[:d]; the last row is the output."""
    lanes = z.shape[1]
    at, below, here = 0, 0, d
    for level in range(len(shapes)):
        rows, columns, biased = shapes[level, 0], shapes[level, 1], shapes[level, 2]
        for j in range(rows):
            out, first = here + j, at + j * columns
            if biased:
                bias = at + rows * columns + j
                for lane in range(lanes):
                    z[out, lane] = t[bias, lane] + t[first, lane] * z[below, lane]
            else:
                for lane in range(lanes):
                    z[out, lane] = t[first, lane] * z[below, lane]
            for c in range(1, columns):
                for lane in range(lanes):
                    z[out, lane] += t[first + c, lane] * z[below + c, lane]
            if level < len(shapes) - 1:
                for lane in range(lanes):
                    z[out, lane] = 0.0 if z[out, lane] <= 0.0 else z[out, lane]
        at += rows * columns + (rows if biased else 0)
        below = here
        here += rows


@njit(cache=True)
def _backward(t, z, delta, change, pull, shapes):  # type: ignore[no-untyped-def]
    """Adds pull · ∇h to ``change``, which may be t itself; delta holds pull · ∂h/∂z of every unit."""
    lanes = z.shape[1]
    at, here = t.shape[0], z.shape[0]
    for level in range(len(shapes) - 1, -1, -1):
        rows, columns, biased = shapes[level, 0], shapes[level, 1], shapes[level, 2]
        at -= rows * columns + (rows if biased else 0)
        here -= rows
        below = here - columns
        if level == len(shapes) - 1:
            for lane in range(lanes):
                delta[here, lane] = pull[lane]
        if level > 0:
            for c in range(columns):
                into = below + c
                for lane in range(lanes):
                    delta[into, lane] = t[at + c, lane] * delta[here, lane]
                for j in range(1, rows):
                    for lane in range(lanes):
                        delta[into, lane] += t[at + j * columns + c, lane] * delta[here + j, lane]
                for lane in range(lanes):
                    delta[into, lane] = delta[into, lane] if z[into, lane] > 0.0 else 0.0
        for j in range(rows):
            for c in range(columns):
                into = at + j * columns + c
                for lane in range(lanes):
                    change[into, lane] += delta[here + j, lane] * z[below + c, lane]
            if biased:
                into = at + rows * columns + j
                for lane in range(lanes):
                    change[into, lane] += delta[here + j, lane]
