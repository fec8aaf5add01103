"""The diagonal network's SDE as a fused loop on the CPU: two matrix products and two compiled passes a step.

Equal to ``integrate(DiagonalSDE(problem, covariance), ...)`` on equal increments, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from simulators.integrate import check_run
from simulators.noise import BrownianIncrements
from theory.diagonal_sde import DiagonalSDE
from theory.problem import Regression
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe, Recorder, Trajectory


def integrate_diagonal(
    problem: Regression,
    covariance: LabelNoise | ExactCovariance,
    y0: Tensor,
    dt: float,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Euler-Maruyama for :class:`theory.diagonal_sde.DiagonalSDE`, float64 on the CPU.

    Args:
        y0: (ln a, ln b), shape (paths, 2d).
        dt, steps, noise, probes, first_step: as for :func:`simulators.integrate.integrate`.

    Raises:
        ValueError: what :func:`~simulators.integrate.integrate` raises, or another device or precision.
    """
    check_run(DiagonalSDE(problem, covariance), y0, dt, steps, noise)
    if y0.device.type != "cpu" or y0.dtype != torch.float64:
        raise ValueError("the fused loop is for float64 on the CPU: use integrate(DiagonalSDE(...)) elsewhere.")
    recorder = Recorder(probes or {}, steps, first_step)
    X, n, d = problem.X.contiguous(), problem.n, problem.d
    logs = y0.clone().contiguous()
    w, kick = torch.empty(len(logs), d).double(), torch.empty(len(logs), d).double()
    squares, mean_square = X.square(), problem.mean_square.numpy()
    offset, XT, r = -problem.y, X.T, torch.empty(len(logs), n).double()
    c, rate, own = torch.empty(len(logs), n).double(), np.empty((len(logs), 1)), np.empty(0)
    bad = np.full(len(logs), -1, dtype=np.int64)
    root, exact = math.sqrt(dt), isinstance(covariance, ExactCovariance)
    stops = set(recorder.stops)
    _weights(logs.numpy(), w.numpy())
    for k in range(first_step, steps):
        if k in stops:
            recorder.record(k, logs.clone())
        torch.addmm(offset, w, XT, out=r)
        if isinstance(covariance, ExactCovariance):
            scale = covariance.scale(n, k * dt)
            pulled = r @ X
            variation = (r.square() @ squares).sub_(pulled.square() / n).mul_(scale)
            xi = noise(k)
            c = (xi - xi.mean(1, keepdim=True)).mul_(r).mul_(root * math.sqrt(scale))
            torch.mm(c, X, out=kick)
            kick.sub_(pulled, alpha=dt / n)
            rate = variation.mul_(dt / 2).numpy()
        else:
            # s² = 2ηδκ/n = per_level·δ; a level of None is the state's own loss.
            per_level = 2 * covariance.scale(n, k * dt)
            level = covariance.level(k * dt) if callable(covariance.level) else covariance.level
            levels = own if level is None else torch.as_tensor(level, dtype=torch.float64).expand(len(logs)).numpy()
            _label_noise(r.numpy(), noise(k).numpy(), c.numpy(), rate, per_level, levels, root, dt)
            torch.mm(c, X, out=kick)
        _advance(logs.numpy(), w.numpy(), kick.numpy(), rate, mean_square, exact, bad, k + 1)
    if steps in stops:
        recorder.record(steps, logs.clone())
    first_bad_step = torch.from_numpy(bad)
    return Trajectory(recorder.series(first_bad_step), logs, first_bad_step, ("path",))


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _label_noise(r, xi, c, rate, per_level, levels, root, dt):  # type: ignore[no-untyped-def]
    """c = s ξ √dt - r dt/n and the rate s² n dt/2 of -ln α per unit of mean square; s² = per_level·δ."""
    paths, n = r.shape
    for p in prange(paths):
        level = 0.0
        for i in range(n):
            level += r[p, i] * r[p, i]
        level = levels[p] if len(levels) else level / (2 * n)
        variance = per_level * level
        scale = root * np.sqrt(variance)
        rate[p, 0] = variance * n * dt / 2
        for i in range(n):
            c[p, i] = scale * xi[p, i] - r[p, i] * (dt / n)


@njit(cache=True, inline="always", error_model="numpy")
def _exponentials(x, mantissa, bits):  # type: ignore[no-untyped-def]
    """e^{2x} = mantissa · 2^k by range reduction to ½ ln 2 and a polynomial; k's bit pattern goes to ``bits``.

    Free of branches and calls, so that the loop vectorises.
    """
    for j in range(len(x)):
        z = min(max(2.0 * x[j], -708.0), 709.0)
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
        p = p * r + 1.0
        mantissa[j] = p * r + 1.0
        bits[j] = (np.int64(k) + 1023) << 52


@njit(cache=True, inline="always", error_model="numpy")
def _predictor(logs, w, mantissa, bits, powers):  # type: ignore[no-untyped-def]
    """w = (e^{2 ln a} - e^{2 ln b})/4 for one path."""
    d = len(w)
    _exponentials(logs, mantissa, bits)
    for j in range(d):
        w[j] = 0.25 * (mantissa[j] * powers[j] - mantissa[d + j] * powers[d + j])


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _weights(logs, w):  # type: ignore[no-untyped-def]
    """The predictors of all paths."""
    paths, d = w.shape
    for p in prange(paths):
        mantissa, bits = np.empty(2 * d), np.empty(2 * d, dtype=np.int64)
        _predictor(logs[p], w[p], mantissa, bits, bits.view(np.float64))


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _advance(logs, w, kick, rate, mean_square, exact, first_bad_step, step):  # type: ignore[no-untyped-def]
    """ln a += kick - q, ln b -= kick + q, and the new w; a path that stops being finite keeps its last state."""
    paths, d = w.shape
    for p in prange(paths):
        if first_bad_step[p] >= 0:
            continue
        total = 0.0
        for j in range(d):
            total += abs(kick[p, j])
        if not np.isfinite(total):
            first_bad_step[p] = step
            continue
        row, push = logs[p], kick[p]
        for j in range(d):
            q = rate[p, j] if exact else rate[p, 0] * mean_square[j]
            row[j] += push[j] - q
            row[d + j] -= push[j] + q
        mantissa, bits = np.empty(2 * d), np.empty(2 * d, dtype=np.int64)
        _predictor(row, w[p], mantissa, bits, bits.view(np.float64))
