"""A single tanh neuron h = w₂ tanh(w₁x) under label noise, as a compiled ensemble over step sizes × paths.

dw = -∇L dt + √η ζ m^{-1/2} Φᵀ dW with one Brownian motion a sample. Two normals a step are enough: ηζ²/m ΦᵀΦ is 2 × 2,
and its Cholesky factor gives increments of the same law. The sums over samples run over blocks of paths in cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit, prange

from simulators.normals import fill_row, normals_key
from simulators.scalar import check_records

PATHS = 128  # that advance together, two normals each
FLOOR = 1e-140  # a path stays where both weights are below this
TANH_ERROR = 4e-16
"""Largest relative error of the kernel's tanh against numpy's, checked in the tests."""


def single_neuron(
    x: np.ndarray,
    y: np.ndarray,
    step_sizes: Sequence[float] | np.ndarray,
    start: np.ndarray,
    dt: float,
    records: Sequence[int],
    root_seed: int,
    stream: str,
    zeta: float = 1.0,
) -> np.ndarray:
    """(w₁, w₂) by Euler-Maruyama after the numbers of steps ``records``, shape (records, step sizes, paths, 2).

    The noise is a function of (root seed, stream, step, step size's number, path's): step sizes are independent.

    Args:
        x, y: samples, shape (m,).
        step_sizes: η, the SGD step size that scales the noise, shape (levels,).
        start: (w₁, w₂), shape (paths, 2).
        dt: the integration step.
        zeta: ζ, standard deviation of the label noise.

    Raises:
        ValueError: arguments that do not fit.
    """
    x, y, eta, w = (np.ascontiguousarray(part, dtype=float) for part in (x, y, step_sizes, start))
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"inputs {x.shape} and targets {y.shape} do not fit: give two lists of the same length.")
    if w.ndim != 2 or w.shape[1] != 2 or not np.isfinite(w).all():
        raise ValueError(f"a start of shape {w.shape} is not usable: give finite weights of shape (paths, 2).")
    if eta.ndim != 1 or not (eta >= 0).all() or not dt > 0 or not zeta >= 0:
        raise ValueError("step sizes and noise have to be >= 0 and dt positive: choose them so.")
    at = check_records(records)
    out = np.empty((len(at), len(eta), len(w), 2))
    scale = np.sqrt(eta * zeta**2 * dt / len(x))
    _advance(x, y, scale, w, float(dt), at, normals_key(root_seed, stream), out)
    return out


@njit(cache=True, inline="always", error_model="numpy")
def tanh_parts(w1, two_x, mantissa, bits):  # type: ignore[no-untyped-def]
    """e^z - 1 = 2^k p + (2^k - 1) for z = 2 w₁ x: p to ``mantissa`` and the bit pattern of 2^k to ``bits``.

    In this form tanh = (e^z - 1)/(e^z + 1) keeps its relative accuracy down to the smallest weights.
    """
    for lane in range(len(w1)):
        z = min(max(two_x * w1[lane], -40.0), 40.0)
        k = np.floor(z * 1.4426950408889634 + 0.5)
        r = (z - k * 0.6931471803691238) - k * 1.9082149292705877e-10
        p = 2.08767569878681e-9  # 1/12!
        p = p * r + 2.505210838544172e-8
        p = p * r + 2.755731922398589e-7
        p = p * r + 2.7557319223985893e-6
        p = p * r + 2.48015873015873e-5
        p = p * r + 1.984126984126984e-4
        p = p * r + 1.3888888888888889e-3
        p = p * r + 8.333333333333333e-3
        p = p * r + 4.1666666666666664e-2
        p = p * r + 1.6666666666666666e-1
        p = p * r + 0.5
        mantissa[lane] = (p * r + 1.0) * r
        bits[lane] = (np.int64(k) + 1023) << 52


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _advance(x, y, scale, start, dt, records, key, out):  # type: ignore[no-untyped-def]
    levels, m = len(scale), len(x)
    paths = len(start)
    blocks = -(-paths // PATHS)
    for item in prange(levels * blocks):
        level, block = item // blocks, item % blocks
        first = block * PATHS
        count = min(PATHS, paths - first)
        w1, w2, xi = np.zeros(PATHS), np.zeros(PATHS), np.empty(2 * PATHS)
        yt, yd, tt, td, dd = np.empty(PATHS), np.empty(PATHS), np.empty(PATHS), np.empty(PATHS), np.empty(PATHS)
        mantissa, bits = np.empty(PATHS), np.empty(PATHS, dtype=np.int64)
        powers = bits.view(np.float64)
        for lane in range(count):
            w1[lane], w2[lane] = start[first + lane, 0], start[first + lane, 1]
        rate, kick, done, alive = dt / m, scale[level], 0, True
        for r in range(len(records)):
            for step in range(done, records[r]):
                if step % 256 == 0:
                    largest = 0.0
                    for lane in range(PATHS):
                        largest = max(largest, max(abs(w1[lane]), abs(w2[lane])))
                    alive = largest > FLOOR
                if not alive:
                    break
                fill_row(key, step, item * 2 * PATHS, xi)
                yt[:], yd[:], tt[:], td[:], dd[:] = 0.0, 0.0, 0.0, 0.0, 0.0
                for i in range(m):
                    xi_, yi = x[i], y[i]
                    tanh_parts(w1, 2.0 * xi_, mantissa, bits)
                    for lane in range(PATHS):
                        e = powers[lane] * mantissa[lane] + (powers[lane] - 1.0)
                        t = e / (e + 2.0)
                        xd = xi_ - xi_ * t * t
                        yt[lane] += yi * t
                        yd[lane] += yi * xd
                        tt[lane] += t * t
                        td[lane] += t * xd
                        dd[lane] += xd * xd
                for lane in range(PATHS):
                    a, b = w1[lane], w2[lane]
                    # ΦᵀΦ = [[b² dd, b td], [b td, tt]] = C Cᵀ, C = [[b √dd, 0], [td/√dd, √(tt - td²/dd)]].
                    root = np.sqrt(dd[lane])
                    cross = td[lane] / root
                    rest = np.sqrt(max(tt[lane] - cross * cross, 0.0))
                    one, two = kick * xi[lane], kick * xi[PATHS + lane]
                    new_a = a - rate * b * (b * td[lane] - yd[lane]) + b * root * one
                    new_b = b - rate * (b * tt[lane] - yt[lane]) + cross * one + rest * two
                    moves = max(abs(a), abs(b)) > FLOOR
                    w1[lane] = new_a if moves else a
                    w2[lane] = new_b if moves else b
            done = records[r]
            for lane in range(count):
                out[r, level, first + lane, 0], out[r, level, first + lane, 1] = w1[lane], w2[lane]
