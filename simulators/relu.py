"""SDEs of ReLU networks as one compiled loop, several paths side by side in each instruction (CPU, float64).

Equal to ``integrate(ReluSDE(network, problem, covariance), ...)`` on equal increments, to rounding; with
:class:`theory.relu.Isotropic` to ``integrate(IsotropicSDE(...), ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from simulators.integrate import check_run
from simulators.noise import BrownianIncrements
from simulators.normals import fill_rows
from theory.problem import Regression
from theory.relu import Isotropic, LossName, MeasuredLevel, ReluSDE
from theory.relu_network import ReluNetwork
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe, Recorder, Trajectory

FEWEST, LANES = 8, 40  # paths side by side
BLOCK = 1 << 19  # normals held at once
OWN, GIVEN, EXACT, ISOTROPIC, ISOTROPIC_GIVEN = range(5)
Covariance = LabelNoise | ExactCovariance | Isotropic
Level = float | Callable[[float], float | Tensor] | None


def integrate_relu(
    network: ReluNetwork,
    problem: Regression,
    covariance: Covariance,
    y0: Tensor,
    dt: float | Tensor,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    first_step: int = 0,
    loss: LossName = "squared",
) -> Trajectory:
    """Euler-Maruyama for :class:`theory.relu.ReluSDE` and for isotropic noise of equal power.

    Args:
        covariance: the noise; a step size or level that changes is a function of SDE time, see
            :class:`theory.schedule.StepClock` and :class:`theory.relu.MeasuredLevel`.
        y0: θ, shape (paths, p).
        dt, steps, noise, probes, first_step: as for :func:`simulators.integrate.integrate`.

    Raises:
        ValueError: what :func:`~simulators.integrate.integrate` raises, or another device or precision.
    """
    sde = ReluSDE(network, problem, covariance, loss)
    check_run(sde, y0, dt, steps, noise)
    if y0.device.type != "cpu" or y0.dtype != torch.float64:
        raise ValueError("the fused loop is for float64 on the CPU: use integrate(ReluSDE(...)) elsewhere.")
    recorder = Recorder(probes or {}, steps, first_step)
    sizes = (dt.double() if isinstance(dt, Tensor) else torch.full((steps,), dt, dtype=torch.float64)).numpy()
    times = list(accumulate(sizes.tolist(), initial=0.0)) if isinstance(dt, Tensor) else [k * dt for k in range(steps)]
    kind, given = _kind(covariance)
    lanes = 1 if len(y0) == 1 else min(FEWEST * -(-len(y0) // (2 * FEWEST)), LANES)  # small ensembles make two groups
    theta = np.zeros((-(-len(y0) // lanes), network.size, lanes))  # idle lanes hold zeros
    _scatter(y0.numpy(), theta)
    bad = np.full((len(theta), lanes), -1, dtype=np.int64)
    X, y = np.ascontiguousarray(problem.X.numpy()), problem.y.numpy()
    shapes = np.array(network.shapes, dtype=np.int64)
    block = max(BLOCK // (noise.paths * noise.channels), 1)
    stops = sorted({*recorder.stops, *range(first_step, steps, block), first_step, steps})
    for begin, end in zip(stops, [*stops[1:], steps], strict=True):
        recorder.record(begin, _gather(theta, len(y0)))
        if end == begin:
            continue
        clock = times[begin:end]
        scale = np.array([covariance.scale(problem.n, t) for t in clock])
        level = _levels(given, clock, len(y0))
        _advance(
            theta, bad, shapes, X, y, _normals(noise, begin, end), sizes[begin:end], scale, level, kind,
            loss == "logistic", begin,
        )  # fmt: skip
    first_bad_step = torch.from_numpy(bad.reshape(-1)[: len(y0)].copy())
    return Trajectory(recorder.series(first_bad_step), _gather(theta, len(y0)), first_bad_step, ("path",))


def _kind(covariance: Covariance) -> tuple[int, Level]:
    """Which noise, and the level it is given."""
    if isinstance(covariance, ExactCovariance):
        return EXACT, None
    if isinstance(covariance, Isotropic):
        return (ISOTROPIC if covariance.level is None else ISOTROPIC_GIVEN), covariance.level
    return (OWN if covariance.level is None else GIVEN), covariance.level


def _levels(level: Level, clock: list[float], paths: int) -> np.ndarray:
    """δ of each step and path, shape (steps, paths), or (0, 0) where none is given."""
    if level is None:
        return np.empty((0, 0))
    if not callable(level):
        return np.full((len(clock), paths), float(level))
    if isinstance(level, MeasuredLevel):
        return level.at(clock).numpy()
    return np.stack([np.broadcast_to(np.asarray(level(t), dtype=float), (paths,)) for t in clock])


def _normals(noise: BrownianIncrements, begin: int, end: int) -> np.ndarray:
    """The increments of a block of steps, shape (steps, paths, channels)."""
    if noise.refine > 1:
        return torch.stack([noise(k) for k in range(begin, end)]).numpy()
    drawn = np.empty((end - begin, noise.paths * noise.channels))
    fill_rows(noise.key, begin, drawn)
    return drawn.reshape(end - begin, noise.paths, noise.channels)


def _scatter(theta: np.ndarray, held: np.ndarray) -> None:
    lanes = held.shape[2]
    for group in range(len(held)):
        part = theta[group * lanes : (group + 1) * lanes]
        held[group, :, : len(part)] = part.T


def _gather(held: np.ndarray, paths: int) -> Tensor:
    return torch.from_numpy(held.transpose(0, 2, 1).reshape(-1, held.shape[1])[:paths].copy())


@njit(parallel=True, cache=True, error_model="numpy")
def _advance(theta, bad, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step):  # type: ignore[no-untyped-def]
    """Steps of all paths; ``xi`` (steps, paths, channels), ``dt``, ``scale`` = ηκ/n and ``level`` one a step."""
    lanes = theta.shape[2]
    for group in prange(len(theta)):
        t, b, first = theta[group], bad[group], group * lanes
        if lanes == FEWEST:  # inlined with a constant, the loops over lanes unroll
            _advance_group(t, b, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first, FEWEST)
        elif lanes == 1:
            _advance_group(t, b, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first, 1)
        else:
            _advance_group(t, b, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first, lanes)


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"}, forceinline=True)
def _advance_group(t, bad, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first, lanes):  # type: ignore[no-untyped-def]
    """The paths from number ``first`` on that lie side by side in ``t``, shape (p, lanes)."""
    size = len(t)
    steps, paths = xi.shape[:2]
    n, d = X.shape
    units = d
    for layer in range(len(shapes)):
        units += shapes[layer, 0]
    kick, spare = np.empty((size, lanes)), np.empty((size, lanes))
    z, delta = np.empty((n, units, lanes)), np.empty((n, units, lanes))  # inputs first, then layer by layer
    r, c, ones = np.empty((n, lanes)), np.empty((n, lanes)), np.ones((n, lanes))
    total, power = np.empty(lanes), np.empty(lanes)
    for i in range(n):
        for q in range(d):
            for lane in range(lanes):
                z[i, q, lane] = X[i, q]
    for k in range(steps):
        _forward(t, z, shapes, d, lanes)
        total[:] = 0.0
        for i in range(n):
            for lane in range(lanes):
                output = z[i, units - 1, lane]
                r[i, lane] = -y[i] / (1.0 + np.exp(y[i] * output)) if logistic else output - y[i]
                total[lane] += r[i, lane] * r[i, lane]
        root, pull = np.sqrt(dt[k]), -dt[k] / n
        if kind == EXACT:
            factor = root * np.sqrt(scale[k])
            for lane in range(lanes):
                path, mean = min(first + lane, paths - 1), 0.0
                for i in range(n):
                    mean += xi[k, path, i]
                mean /= n
                for i in range(n):
                    c[i, lane] = r[i, lane] * (pull + factor * (xi[k, path, i] - mean))
        elif kind < EXACT:
            for lane in range(lanes):
                path = min(first + lane, paths - 1)
                now = level[k, path] if kind == GIVEN else total[lane] / (2 * n)
                factor = root * np.sqrt(2 * scale[k] * now)
                for i in range(n):
                    c[i, lane] = pull * r[i, lane] + factor * xi[k, path, i]
        kick[:] = 0.0
        if kind < ISOTROPIC:
            _backward(t, z, delta, kick, c, shapes, lanes)
        else:
            if kind == ISOTROPIC_GIVEN:  # the power of Φ itself, without residuals
                _backward(t, z, delta, spare, ones, shapes, lanes)
                _powers(z, delta, power, shapes, lanes)
            _backward(t, z, delta, kick, r, shapes, lanes)
            if kind == ISOTROPIC:
                _powers(z, delta, power, shapes, lanes)
            for lane in range(lanes):
                path, slope = min(first + lane, paths - 1), 0.0
                if kind == ISOTROPIC:
                    for p in range(size):
                        slope += kick[p, lane] * kick[p, lane]
                    variance = scale[k] * max(power[lane] - slope / n, 0.0) / size
                else:
                    variance = 2 * scale[k] * level[k, path] * power[lane] / size
                factor = root * np.sqrt(variance)
                for p in range(size):
                    kick[p, lane] = pull * kick[p, lane] + factor * xi[k, path, p]
        total[:] = 0.0
        for p in range(size):
            for lane in range(lanes):
                kick[p, lane] += t[p, lane]
                total[lane] += abs(kick[p, lane])
        for lane in range(lanes):
            if bad[lane] < 0 and not total[lane] < np.inf:
                bad[lane] = first_step + k + 1
            total[lane] = 0.0 if bad[lane] < 0 else 1.0
        for p in range(size):
            for lane in range(lanes):
                t[p, lane] = kick[p, lane] if total[lane] == 0.0 else t[p, lane]


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"}, forceinline=True)
def _forward(t, z, shapes, d, lanes):  # type: ignore[no-untyped-def]
    """Activations of every layer above the inputs that lie in z[:, :d]; the last row is the output."""
    at, below, here = np.uint64(0), np.uint64(0), np.uint64(d)
    for layer in range(len(shapes)):
        rows, columns, biased = np.uint64(shapes[layer, 0]), np.uint64(shapes[layer, 1]), shapes[layer, 2]
        hidden = layer < len(shapes) - 1
        for i in range(np.uint64(len(z))):
            for j in range(rows):
                if biased:
                    for lane in range(lanes):
                        z[i, here + j, lane] = t[at + rows * columns + j, lane]
                else:
                    for lane in range(lanes):
                        z[i, here + j, lane] = 0.0
                for q in range(columns):
                    for lane in range(lanes):
                        z[i, here + j, lane] += t[at + j * columns + q, lane] * z[i, below + q, lane]
                if hidden:
                    for lane in range(lanes):
                        z[i, here + j, lane] = z[i, here + j, lane] if z[i, here + j, lane] > 0.0 else 0.0
        at += rows * columns
        if biased:
            at += rows
        below = here
        here += rows


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"}, forceinline=True)
def _backward(t, z, delta, kick, c, shapes, lanes):  # type: ignore[no-untyped-def]
    """Adds Σ_i c_i ∇h_i to the kick; delta holds c_i ∂h_i/∂z of every unit."""
    at, here, samples = np.uint64(t.shape[0]), np.uint64(z.shape[1]), np.uint64(len(z))
    for layer in range(len(shapes) - 1, -1, -1):
        rows, columns, biased = np.uint64(shapes[layer, 0]), np.uint64(shapes[layer, 1]), shapes[layer, 2]
        at -= rows * columns
        if biased:
            at -= rows
        here -= rows
        below = here - columns
        if layer == len(shapes) - 1:
            for i in range(samples):
                for lane in range(lanes):
                    delta[i, here, lane] = c[i, lane]
        if layer > 0:
            for i in range(samples):
                for q in range(columns):
                    for lane in range(lanes):
                        delta[i, below + q, lane] = 0.0
                    for j in range(rows):
                        for lane in range(lanes):
                            delta[i, below + q, lane] += t[at + j * columns + q, lane] * delta[i, here + j, lane]
                    for lane in range(lanes):
                        on = z[i, below + q, lane] > 0.0
                        delta[i, below + q, lane] = delta[i, below + q, lane] if on else 0.0
        for j in range(rows):
            for q in range(columns):
                for i in range(samples):
                    for lane in range(lanes):
                        kick[at + j * columns + q, lane] += delta[i, here + j, lane] * z[i, below + q, lane]
            if biased:
                for i in range(samples):
                    for lane in range(lanes):
                        kick[at + rows * columns + j, lane] += delta[i, here + j, lane]


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"}, forceinline=True)
def _powers(z, delta, power, shapes, lanes):  # type: ignore[no-untyped-def]
    """Σ_i ‖c_i ∇h_i‖²: over layers, ‖delta‖² times ‖activations below‖² (and 1 if biased)."""
    outer, inner, here = np.empty(lanes), np.empty(lanes), z.shape[1]
    power[:] = 0.0
    for layer in range(len(shapes) - 1, -1, -1):
        rows, columns, biased = shapes[layer]
        here -= rows
        below = here - columns
        for i in range(len(z)):
            for lane in range(lanes):
                outer[lane], inner[lane] = 0.0, 1.0 if biased else 0.0
            for j in range(rows):
                for lane in range(lanes):
                    outer[lane] += delta[i, here + j, lane] * delta[i, here + j, lane]
            for q in range(columns):
                for lane in range(lanes):
                    inner[lane] += z[i, below + q, lane] * z[i, below + q, lane]
            for lane in range(lanes):
                power[lane] += outer[lane] * inner[lane]
