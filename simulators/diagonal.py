"""The diagonal network's SDE as a fused loop on the CPU: each thread takes its paths through many steps at a time.

Equal to ``integrate(DiagonalSDE(problem, covariance), ...)`` on equal increments, to rounding. Paths are taken in
chunks that stay in cache; increments are drawn where they are used, and nothing waits for the other chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numba import njit, prange
from threadpoolctl import threadpool_limits
from torch import Tensor

from simulators.integrate import check_run
from simulators.noise import BrownianIncrements
from simulators.normals import fill_row
from simulators.scalar import exponentials
from theory.diagonal_sde import DiagonalSDE
from theory.problem import Regression
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe, Recorder, Trajectory

CHUNK = 32  # paths
STEPS = 256  # taken between two returns to Python


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
    X, logs = np.ascontiguousarray(problem.X.numpy()), y0.clone().contiguous()
    XT, exact = np.ascontiguousarray(X.T), isinstance(covariance, ExactCovariance)
    squares = X**2 if exact else np.empty((0, 0))
    bad = np.full(len(logs), -1, dtype=np.int64)
    k = first_step
    with threadpool_limits(limits=1, user_api="blas"):  # the chunks are the threads
        for stop in sorted({*recorder.stops, steps}):
            while k < stop:
                times = [dt * step for step in range(k, min(k + STEPS, stop))]
                scales, levels = _scales(covariance, problem.n, times, len(logs))
                _advance(
                    logs.numpy(), X, XT, squares, problem.y.numpy(), problem.mean_square.numpy(), noise.key,
                    noise.refine, k, dt, scales, levels, bad,
                )  # fmt: skip
                k += len(times)
            if stop in recorder.stops:
                recorder.record(stop, logs.clone())
    first_bad_step = torch.from_numpy(bad)
    return Trajectory(recorder.series(first_bad_step), logs, first_bad_step, ("path",))


def _scales(
    covariance: LabelNoise | ExactCovariance, n: int, times: list[float], paths: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per step: ηκ/n, and for label noise the level δ, shape (steps, paths), or (steps, 0) for the state's own loss."""
    scales = np.array([covariance.scale(n, t) for t in times])
    if isinstance(covariance, ExactCovariance) or covariance.level is None:
        return scales, np.empty((len(times), 0))
    level = covariance.level
    found = [torch.as_tensor(level(t) if callable(level) else level, dtype=torch.float64) for t in times]
    return scales, torch.stack([value.expand(paths) for value in found]).numpy()


@njit(cache=True, inline="always", error_model="numpy")
def _predictor(logs, w, mantissa, bits, powers):  # type: ignore[no-untyped-def]
    """w = (e^{2 ln a} - e^{2 ln b})/4 for one path."""
    d = len(w)
    for j in range(2 * d):
        mantissa[j] = 2.0 * logs[j]
    exponentials(mantissa, mantissa, bits)
    for j in range(d):
        w[j] = 0.25 * (mantissa[j] * powers[j] - mantissa[d + j] * powers[d + j])


@njit(cache=True, error_model="numpy")
def _increments(key, refine, step, first, out, spare):  # type: ignore[no-untyped-def]
    """What :class:`~simulators.noise.BrownianIncrements` returns for a step, from number ``first`` on."""
    fill_row(key, step * refine, first, out)
    for fine in range(1, refine):
        fill_row(key, step * refine + fine, first, spare)
        out += spare
    if refine > 1:
        out /= np.sqrt(refine)


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _advance(  # type: ignore[no-untyped-def]
    logs, X, XT, squares, y, mean_square, key, refine, first_step, dt, scales, levels, first_bad_step
):
    """``len(scales)`` steps of every path; one that stops being finite keeps its last state.

    With c = s ξ √dt - r dt/n, both ln a += Xᵀc - q and ln b -= Xᵀc + q; q is half the variance of Xᵀc.
    """
    paths, n, d = len(logs), len(y), len(mean_square)
    exact, root = len(squares) > 0, np.sqrt(dt)
    for chunk in prange(-(-paths // CHUNK)):
        begin = chunk * CHUNK
        size = min(CHUNK, paths - begin)
        xi, spare = np.empty(size * n), np.empty(size * n if refine > 1 else 0)
        w, kick, r, c = np.empty((size, d)), np.empty((size, d)), np.empty((size, n)), np.empty((size, n))
        pulled, variation = np.empty((size, d)), np.empty((size, d))
        mantissa, bits = np.empty(2 * d), np.empty(2 * d, dtype=np.int64)
        powers = bits.view(np.float64)
        for p in range(size):
            _predictor(logs[begin + p], w[p], mantissa, bits, powers)
        for s in range(len(scales)):
            np.dot(w, XT, r)
            _increments(key, refine, first_step + s, begin * n, xi, spare)
            for p in range(size):
                own, mean_xi = 0.0, 0.0
                for i in range(n):
                    r[p, i] -= y[i]
                    own += r[p, i] * r[p, i]
                    mean_xi += xi[p * n + i]
                if exact:
                    spread, mean_xi = root * np.sqrt(scales[s]), mean_xi / n
                    for i in range(n):
                        c[p, i] = (spread * (xi[p * n + i] - mean_xi) - dt / n) * r[p, i]
                else:
                    level = levels[s, begin + p] if levels.shape[1] else own / (2 * n)
                    variance = 2 * scales[s] * level  # s² = 2ηδκ/n
                    for j in range(d):
                        variation[p, j] = variance * n * mean_square[j]
                    spread = root * np.sqrt(variance)
                    for i in range(n):
                        c[p, i] = spread * xi[p * n + i] - r[p, i] * (dt / n)
            np.dot(c, X, kick)
            if exact:
                np.dot(r, X, pulled)
                np.dot(r * r, squares, variation)
                for p in range(size):
                    for j in range(d):
                        variation[p, j] = (variation[p, j] - pulled[p, j] * pulled[p, j] / n) * scales[s]
            for p in range(size):
                if first_bad_step[begin + p] >= 0:
                    continue
                total = 0.0
                for j in range(d):
                    total += abs(kick[p, j])
                if not np.isfinite(total):
                    first_bad_step[begin + p] = first_step + s + 1
                    continue
                row = logs[begin + p]
                for j in range(d):
                    q = variation[p, j] * (dt / 2)
                    row[j] += kick[p, j] - q
                    row[d + j] -= kick[p, j] + q
                _predictor(row, w[p], mantissa, bits, powers)
