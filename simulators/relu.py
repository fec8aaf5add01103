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
from theory.lanes import LANES, load, multiply, multiply_add, spread, store, where_positive
from theory.problem import Regression
from theory.relu import Isotropic, LossName, MeasuredLevel, ReluSDE
from theory.relu_network import ReluNetwork
from theory.schedule import StepClock
from theory.sde import ExactCovariance, LabelNoise, StepSize, step_size_at
from theory.trajectory import Probe, Recorder, Trajectory

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
    kappa = covariance.minibatch.variance_factor(problem.n)
    scales = _step_sizes(covariance.step_size, times[:steps]) * kappa / problem.n
    kind, given = _kind(covariance)
    theta = np.zeros((-(-len(y0) // LANES), network.size, LANES))  # idle lanes hold zeros
    _scatter(y0.numpy(), theta)
    bad = np.full((len(theta), LANES), -1, dtype=np.int64)
    X, y = np.ascontiguousarray(problem.X.numpy()), problem.y.numpy()
    shapes = np.array(network.shapes, dtype=np.int64)
    block = max(BLOCK // (noise.paths * noise.channels), 1)
    stops = sorted({*recorder.stops, *range(first_step, steps, block), first_step, steps})
    for begin, end in zip(stops, [*stops[1:], steps], strict=True):
        recorder.record(begin, _gather(theta, len(y0)))
        if end == begin:
            continue
        level = _levels(given, times[begin:end], len(y0))
        _advance(
            theta, bad, shapes, X, y, _normals(noise, begin, end), sizes[begin:end], scales[begin:end], level, kind,
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


def _step_sizes(step_size: StepSize, clock: list[float]) -> np.ndarray:
    """η at several times."""
    if isinstance(step_size, StepClock):
        return step_size.at(clock).numpy()
    return np.array([step_size_at(step_size, t) for t in clock])


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
    for group in prange(len(theta)):
        _advance_group(
            theta[group], bad[group], shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, group * LANES
        )


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"})
def _advance_group(t, bad, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first):  # type: ignore[no-untyped-def]
    """The paths from number ``first`` on that lie side by side in ``t``, shape (p, LANES)."""
    size = len(t)
    steps, paths = xi.shape[:2]
    n, d = X.shape
    units = d + shapes[:, 0].sum()
    kick, z, delta = np.empty((size, LANES)), np.empty((n * units, LANES)), np.empty((units, LANES))
    r, c, weight = np.empty((n, LANES)), np.empty((n, LANES)), np.ones((n, LANES))
    total, power = np.empty(LANES), np.empty((1, LANES))
    for i in range(n):  # a sample's inputs first, then layer by layer its units
        for q in range(d):
            z[i * units + q, :] = X[i, q]
    for k in range(steps):
        total[:] = 0.0
        for i in range(n):
            _forward(t, z, i * units, shapes, d)
            for lane in range(LANES):
                output = z[(i + 1) * units - 1, lane]
                r[i, lane] = -y[i] / (1.0 + np.exp(y[i] * output)) if logistic else output - y[i]
                total[lane] += r[i, lane] * r[i, lane]
        root, pull = np.sqrt(dt[k]), -dt[k] / n
        for lane in range(LANES):
            path = min(first + lane, paths - 1)
            if kind == EXACT:
                factor, mean = root * np.sqrt(scale[k]), 0.0
                for i in range(n):
                    mean += xi[k, path, i]
                mean /= n
                for i in range(n):
                    c[i, lane] = r[i, lane] * (pull + factor * (xi[k, path, i] - mean))
            elif kind < EXACT:
                now = level[k, path] if kind == GIVEN else total[lane] / (2 * n)
                factor = root * np.sqrt(2 * scale[k] * now)
                for i in range(n):
                    c[i, lane] = pull * r[i, lane] + factor * xi[k, path, i]
            else:
                for i in range(n):
                    c[i, lane] = r[i, lane]
                    weight[i, lane] = r[i, lane] * r[i, lane] if kind == ISOTROPIC else 1.0
        kick[:], power[:] = 0.0, 0.0
        for i in range(n):
            _backward(t, z, i * units, delta, shapes)
            _add_gradient(kick, z, i * units, delta, load(c, i), shapes)
            if kind >= ISOTROPIC:
                store(power, 0, multiply_add(load(weight, i), _squares(z, i * units, delta, shapes), load(power, 0)))
        if kind >= ISOTROPIC:
            for lane in range(LANES):
                path, slope = min(first + lane, paths - 1), 0.0
                if kind == ISOTROPIC:
                    for p in range(size):
                        slope += kick[p, lane] * kick[p, lane]
                    variance = scale[k] * max(power[0, lane] - slope / n, 0.0) / size
                else:
                    variance = 2 * scale[k] * level[k, path] * power[0, lane] / size
                factor = root * np.sqrt(variance)
                for p in range(size):
                    kick[p, lane] = pull * kick[p, lane] + factor * xi[k, path, p]
        total[:] = 0.0
        for p in range(size):
            for lane in range(LANES):
                kick[p, lane] += t[p, lane]
                total[lane] += abs(kick[p, lane])
        for lane in range(LANES):
            if bad[lane] < 0 and not total[lane] < np.inf:
                bad[lane] = first_step + k + 1
        for p in range(size):
            for lane in range(LANES):
                t[p, lane] = kick[p, lane] if bad[lane] < 0 else t[p, lane]


@njit(cache=True, error_model="numpy", inline="always")
def _forward(t, z, sample, shapes, d):  # type: ignore[no-untyped-def]
    """Activations of every layer above the inputs of the sample whose rows begin at ``sample``; the output is last."""
    at, below, here = 0, sample, sample + d
    for layer in range(len(shapes)):
        rows, columns, biased = shapes[layer, 0], shapes[layer, 1], shapes[layer, 2]
        for j in range(rows):
            h = load(t, at + rows * columns + j) if biased else spread(0.0)
            for q in range(columns):
                h = multiply_add(load(t, at + j * columns + q), load(z, below + q), h)
            store(z, here + j, where_positive(h, h) if layer < len(shapes) - 1 else h)
        at += rows * columns + (rows if biased else 0)
        below = here
        here += rows


@njit(cache=True, error_model="numpy", inline="always")
def _backward(t, z, sample, delta, shapes):  # type: ignore[no-untyped-def]
    """∂h/∂z of every unit of a sample, to ``delta``."""
    at, here = len(t), len(delta)
    for layer in range(len(shapes) - 1, -1, -1):
        rows, columns, biased = shapes[layer, 0], shapes[layer, 1], shapes[layer, 2]
        at -= rows * columns + (rows if biased else 0)
        here -= rows
        below = here - columns
        if layer == len(shapes) - 1:
            store(delta, here, spread(1.0))
        if layer > 0:
            for q in range(columns):
                slope = spread(0.0)
                for j in range(rows):
                    slope = multiply_add(load(t, at + j * columns + q), load(delta, here + j), slope)
                store(delta, below + q, where_positive(load(z, sample + below + q), slope))


@njit(cache=True, error_model="numpy", inline="always")
def _add_gradient(kick, z, sample, delta, c, shapes):  # type: ignore[no-untyped-def]
    """Adds c ∇h of a sample to the kick."""
    at, below = 0, 0
    for layer in range(len(shapes)):
        rows, columns, biased = shapes[layer, 0], shapes[layer, 1], shapes[layer, 2]
        for j in range(rows):
            slope = multiply(c, load(delta, below + columns + j))
            for q in range(columns):
                row = at + j * columns + q
                store(kick, row, multiply_add(slope, load(z, sample + below + q), load(kick, row)))
            if biased:
                row = at + rows * columns + j
                store(kick, row, multiply_add(slope, spread(1.0), load(kick, row)))
        at += rows * columns + (rows if biased else 0)
        below += columns


@njit(cache=True, error_model="numpy", inline="always")
def _squares(z, sample, delta, shapes):  # type: ignore[no-untyped-def]
    """‖∇h‖² of a sample: over layers, ‖delta‖² times ‖activations below‖² (and 1 if biased)."""
    total, below = spread(0.0), 0
    for layer in range(len(shapes)):
        rows, columns, biased = shapes[layer, 0], shapes[layer, 1], shapes[layer, 2]
        outer, inner = spread(0.0), spread(1.0 if biased else 0.0)
        for q in range(columns):
            inner = multiply_add(load(z, sample + below + q), load(z, sample + below + q), inner)
        for j in range(rows):
            outer = multiply_add(load(delta, below + columns + j), load(delta, below + columns + j), outer)
        total = multiply_add(outer, inner, total)
        below += columns
    return total
