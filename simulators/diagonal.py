"""The diagonal network's SDE as a fused loop: each thread or program takes its paths through many steps at a time.

Equal to ``integrate(DiagonalSDE(problem, covariance), ...)`` on equal increments, to rounding. On the CPU paths are
taken in chunks that stay in cache; increments are drawn where they are used, and nothing waits for the other chunks.
The loop of GPUs is :mod:`simulators.diagonal_triton`; what neither does goes to the generic integrator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange
from threadpoolctl import ThreadpoolController
from torch import Tensor

from simulators.integrate import check_run, integrate
from simulators.noise import BrownianIncrements
from simulators.scalar import exponentials
from theory.device import has_triton, say_once
from theory.diagonal_sde import DiagonalSDE
from theory.normals import fill_row
from theory.problem import Regression
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe, Recorder, Trajectory

if TYPE_CHECKING:
    from simulators.diagonal_triton import TritonLoop

CHUNK, MANY = 32, 512  # paths; where there are many, chunks of twice the size still give every thread work
MOST_SAMPLES_ON_CHIP = 512
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
    """Euler-Maruyama for :class:`theory.diagonal_sde.DiagonalSDE` in the state's precision and on its device.

    float64 runs in a compiled loop on the CPU, and on CUDA devices in a Triton kernel (at most 512 samples); all else
    in :func:`simulators.integrate.integrate`.

    Args:
        y0: (ln a, ln b), shape (paths, 2d).
        dt, steps, noise, probes, first_step: as for :func:`simulators.integrate.integrate`.

    Raises:
        ValueError: what :func:`~simulators.integrate.integrate` raises.
    """
    sde = DiagonalSDE(problem, covariance)
    check_run(sde, y0, dt, steps, noise)
    loop = _loop(problem, covariance, y0, dt, noise)
    if loop is None:
        return integrate(sde, y0, dt, steps, noise, probes, first_step=first_step)
    recorder = Recorder(probes or {}, steps, first_step)
    k = first_step
    for stop in sorted({*recorder.stops, steps}):
        while k < stop:
            times = [dt * step for step in range(k, min(k + STEPS, stop))]
            loop.advance(k, *_scales(covariance, problem.n, times, y0))
            k += len(times)
        if stop in recorder.stops:
            recorder.record(stop, loop.logs.clone())
    return Trajectory(recorder.series(loop.bad), loop.logs, loop.bad, ("path",))


def _loop(
    problem: Regression, covariance: LabelNoise | ExactCovariance, y0: Tensor, dt: float, noise: BrownianIncrements
) -> CompiledLoop | TritonLoop | None:
    """The loop made for the device and precision, if there is one."""
    logs, exact = y0.clone().contiguous(), isinstance(covariance, ExactCovariance)
    if y0.dtype != torch.float64:
        return None
    if y0.device.type == "cpu":
        return CompiledLoop(problem, exact, logs, dt, noise)
    if problem.n > MOST_SAMPLES_ON_CHIP:
        say_once(f"The diagonal SDE with over {MOST_SAMPLES_ON_CHIP} samples runs on the GPU in plain torch.")
        return None
    if not has_triton(y0.device):
        return None
    from simulators.diagonal_triton import TritonLoop

    return TritonLoop(problem, exact, logs, dt, noise)


def _scales(covariance: LabelNoise | ExactCovariance, n: int, times: list[float], y0: Tensor) -> tuple[Tensor, Tensor]:
    """Per step: ηκ/n, and for label noise the level δ, shape (steps, paths), or (steps, 0) for the state's own loss."""
    scales = torch.tensor([covariance.scale(n, t) for t in times], dtype=torch.float64, device=y0.device)
    if isinstance(covariance, ExactCovariance) or covariance.level is None:
        return scales, scales.new_empty(len(times), 0)
    level = covariance.level
    given = [level(t) if callable(level) else level for t in times]
    each = [torch.as_tensor(value, dtype=torch.float64, device=y0.device).expand(len(y0)) for value in given]
    return scales, torch.stack(each)


class CompiledLoop:
    """Advances all paths by blocks of steps, float64 on the CPU; ``logs`` and ``bad`` change in place."""

    def __init__(self, problem: Regression, exact: bool, logs: Tensor, dt: float, noise: BrownianIncrements) -> None:
        self.logs, self.bad = logs, torch.full(logs.shape[:1], -1, dtype=torch.int64)
        self._X, self._dt, self._noise = np.ascontiguousarray(problem.X.numpy()), dt, noise
        self._XT, self._squares = np.ascontiguousarray(self._X.T), self._X**2 if exact else np.empty((0, 0))
        self._y, self._mean_square = problem.y.numpy(), problem.mean_square.numpy()
        self._libraries = ThreadpoolController()  # finding them takes longer than many a block of steps

    def advance(self, first_step: int, scales: Tensor, levels: Tensor) -> None:
        """Steps ``first_step`` … with ηκ/n, shape (steps,), and given noise levels, (steps, paths) or (steps, 0)."""
        with self._libraries.limit(limits=1, user_api="blas"):  # the chunks are the threads
            _advance(
                self.logs.numpy(), self._X, self._XT, self._squares, self._y, self._mean_square, self._noise.key,
                self._noise.refine, first_step, self._dt, scales.numpy(), levels.numpy(), self.bad.numpy(),
            )  # fmt: skip


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
    most = CHUNK * (1 + (paths >= MANY))  # an if here and numba runs no chunk at all
    for chunk in prange(-(-paths // most)):
        begin = chunk * most
        size = min(most, paths - begin)
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
