"""SDEs of ReLU networks as one compiled loop, several paths side by side in each instruction (CPU).

Equal to ``integrate(ReluSDE(network, problem, covariance), ...)`` on equal increments, to rounding; with
:class:`theory.relu.Isotropic` to ``integrate(IsotropicSDE(...), ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import numpy as np
import torch
from numba import njit, uint64
from torch import Tensor

from simulators.integrate import check_run
from simulators.noise import BrownianIncrements
from theory.lanes import (
    LANES,
    add,
    add_rows,
    fill_tile,
    load,
    load_tile,
    multiply,
    multiply_add,
    spread,
    store,
    store_tile,
    subtract,
    tile_where_positive,
    tile_where_rows_positive,
    zero,
)
from theory.normals import fill_rows
from theory.problem import Regression
from theory.relu import Isotropic, LossName, MeasuredLevel, ReluSDE
from theory.relu_network import ReluNetwork
from theory.schedule import StepClock
from theory.sde import ExactCovariance, LabelNoise, StepSize, step_size_at
from theory.threads import share
from theory.trajectory import Probe, Recorder, Trajectory

_LANES = uint64(LANES)
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
        y0: θ, shape (paths, p), float64, or float32, which is faster.
        dt, steps, noise, probes, first_step: as for :func:`simulators.integrate.integrate`.

    Raises:
        ValueError: what :func:`~simulators.integrate.integrate` raises, or another device or precision.
    """
    sde = ReluSDE(network, problem, covariance, loss)
    check_run(sde, y0, dt, steps, noise)
    if y0.device.type != "cpu" or y0.dtype not in (torch.float64, torch.float32):
        raise ValueError("the fused loop is for float64 and float32 on the CPU: use integrate(ReluSDE(...)) elsewhere.")
    recorder = Recorder(probes or {}, steps, first_step)
    sizes = (dt.double() if isinstance(dt, Tensor) else torch.full((steps,), dt, dtype=torch.float64)).numpy()
    times = list(accumulate(sizes.tolist(), initial=0.0)) if isinstance(dt, Tensor) else [k * dt for k in range(steps)]
    kappa = covariance.minibatch.variance_factor(problem.n)
    scales = _step_sizes(covariance.step_size, times[:steps]) * kappa / problem.n
    kind, given = _kind(covariance)
    theta = np.zeros((-(-len(y0) // LANES), network.size, LANES), y0.numpy().dtype)  # idle lanes hold zeros
    _scatter(y0.numpy(), theta)
    bad = np.full((len(theta), LANES), -1, dtype=np.int64)
    X, y = (np.ascontiguousarray(part.numpy(), theta.dtype) for part in (problem.X, problem.y))
    shapes = np.array(network.shapes, dtype=np.int64)
    together = max(BLOCK // (noise.paths * noise.channels), 1)
    stops = sorted({*recorder.stops, *range(first_step, steps, together), first_step, steps})
    for begin, end in zip(stops, [*stops[1:], steps], strict=True):
        recorder.record(begin, _gather(theta, len(y0)))
        if end == begin:
            continue
        level = _levels(given, times[begin:end], len(y0))
        xi = _normals(noise, begin, end)
        block = (X, y, xi, sizes[begin:end], scales[begin:end], level, kind, loss == "logistic", begin)
        share(_advance, (theta, bad, shapes, *block), len(theta))
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
    """The increments of a block of steps, shape (steps, paths, channels), float64."""
    if noise.refine > 1:
        return torch.stack([noise(k) for k in range(begin, end)]).double().numpy()
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


@njit(nogil=True, cache=True, error_model="numpy")
def _advance(theta, bad, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, begin, stride):  # type: ignore[no-untyped-def]
    """Steps of paths; ``xi`` (steps, paths, channels), ``dt``, ``scale`` = ηκ/n and ``level`` one a step."""
    for group in range(begin, len(theta), stride):
        _advance_group(
            theta[group], bad[group], shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, group * LANES
        )


@njit(cache=True, error_model="numpy", fastmath={"contract", "nsz"})
def _advance_group(t, bad, shapes, X, y, xi, dt, scale, level, kind, logistic, first_step, first):  # type: ignore[no-untyped-def]
    """The paths from number ``first`` on that lie side by side in ``t``, shape (p, LANES)."""
    size, of, none = len(t), t.dtype.type, t.dtype.type(0)
    steps, paths = xi.shape[:2]
    n, d = X.shape
    units, padded = d + shapes[:, 0].sum(), -(-n // LANES) * LANES
    kick, z = np.empty((size, LANES), t.dtype), np.zeros((padded * units, LANES), t.dtype)
    delta = np.empty((LANES * units, LANES), t.dtype)
    power, total = np.empty((1, LANES), t.dtype), np.empty((1, LANES), t.dtype)
    r, c, weight = np.empty((n, LANES), t.dtype), np.zeros((padded, LANES), t.dtype), np.ones((n, LANES), t.dtype)
    for i in range(n):  # a sample's inputs first, then layer by layer its units
        for q in range(d):
            z[i * units + q, :] = X[i, q]
    for k in range(steps):
        for i in range(0, padded, LANES):
            _forward(t, z, uint64(i * units), uint64(units), shapes, d)
        store(total, 0, zero(t))
        for i in range(n):
            last = (i + 1) * units - 1
            if logistic:
                for lane in range(LANES):
                    r[i, lane] = -y[i] / (of(1) + np.exp(y[i] * z[last, lane]))
            else:
                store(r, i, subtract(load(z, last), spread(y[i])))
            store(total, 0, multiply_add(load(r, i), load(r, i), load(total, 0)))
        root, pull = np.sqrt(dt[k]), of(-dt[k] / n)
        for lane in range(LANES):
            path = min(first + lane, paths - 1)
            if kind == EXACT:
                factor, mean = of(root * np.sqrt(scale[k])), 0.0
                for i in range(n):
                    mean += xi[k, path, i]
                mean /= n
                for i in range(n):
                    c[i, lane] = r[i, lane] * (pull + factor * of(xi[k, path, i] - mean))
            elif kind < EXACT:
                now = level[k, path] if kind == GIVEN else total[0, lane] / (2 * n)
                factor = of(root * np.sqrt(2 * scale[k] * now))
                for i in range(n):
                    c[i, lane] = pull * r[i, lane] + factor * of(xi[k, path, i])
            else:
                for i in range(n):
                    c[i, lane] = r[i, lane]
                    weight[i, lane] = r[i, lane] * r[i, lane] if kind == ISOTROPIC else of(1)
        kick[:], power[:] = none, none
        for i in range(0, padded, LANES):
            _backward(t, z, uint64(i * units), uint64(units), delta, c, i, kind >= ISOTROPIC, shapes)
            if kind >= ISOTROPIC:
                for s in range(min(LANES, n - i)):
                    square = _squares(z, (i + s) * units, delta, s * units, shapes)
                    store(power, 0, multiply_add(load(weight, i + s), square, load(power, 0)))
                for s in range(LANES):
                    for row in range(s * units, (s + 1) * units):
                        store(delta, row, multiply(load(c, i + s), load(delta, row)))
            _add_gradient(kick, z, uint64(i * units), uint64(units), delta, shapes)
        if kind >= ISOTROPIC:
            for lane in range(LANES):
                path, slope = min(first + lane, paths - 1), 0.0
                if kind == ISOTROPIC:
                    for p in range(size):
                        slope += kick[p, lane] * kick[p, lane]
                    variance = scale[k] * max(power[0, lane] - slope / n, 0.0) / size
                else:
                    variance = 2 * scale[k] * level[k, path] * power[0, lane] / size
                factor = of(root * np.sqrt(variance))
                for p in range(size):
                    kick[p, lane] = pull * kick[p, lane] + factor * of(xi[k, path, p])
        store(total, 0, zero(t))
        for p in range(size):
            new = add(load(kick, p), load(t, p))
            store(kick, p, new)
            store(total, 0, multiply_add(new, zero(t), load(total, 0)))  # stays 0 while all are finite
        for lane in range(LANES):
            if bad[lane] < 0 and total[0, lane] != 0:
                bad[lane] = first_step + k + 1
        if bad.max() < 0:
            for p in range(size):
                store(t, p, load(kick, p))
        else:
            for p in range(size):
                for lane in range(LANES):
                    t[p, lane] = kick[p, lane] if bad[lane] < 0 else t[p, lane]


@njit(cache=True, error_model="numpy")
def _forward(t, z, sample, units, shapes, d):  # type: ignore[no-untyped-def]
    """Activations of every layer above the inputs of the eight samples from row ``sample`` on; the output is last."""
    at, below, here = uint64(0), sample, sample + uint64(d)
    for layer in range(len(shapes)):
        rows, columns, biased = uint64(shapes[layer, 0]), uint64(shapes[layer, 1]), shapes[layer, 2]
        for j in range(rows):
            tile = fill_tile(load(t, at + rows * columns + j) if biased else zero(t))
            for q in range(columns):
                tile = add_rows(tile, load(t, at + j * columns + q), z, below + q, units)
            store_tile(z, here + j, units, tile if layer == len(shapes) - 1 else tile_where_positive(tile))
        at += rows * columns + (rows if biased else uint64(0))
        below, here = here, here + rows


@njit(cache=True, error_model="numpy")
def _backward(t, z, sample, units, delta, c, first, plain, shapes):  # type: ignore[no-untyped-def]
    """c ∂h/∂z of every unit of eight samples, or ∂h/∂z if ``plain``, to ``delta``."""
    at, here = uint64(len(t)), units
    for s in range(_LANES):
        last = s * units + units - uint64(1)
        store(delta, last, spread(t.dtype.type(1)) if plain else load(c, first + s))
    for layer in range(len(shapes) - 1, 0, -1):
        rows, columns, biased = uint64(shapes[layer, 0]), uint64(shapes[layer, 1]), shapes[layer, 2]
        at -= rows * columns + (rows if biased else uint64(0))
        here -= rows
        below = here - columns
        for q in range(columns):
            tile = fill_tile(zero(t))
            for j in range(rows):
                tile = add_rows(tile, load(t, at + j * columns + q), delta, here + j, units)
            store_tile(delta, below + q, units, tile_where_rows_positive(tile, z, sample + below + q, units))


@njit(cache=True, error_model="numpy")
def _add_gradient(kick, z, sample, units, delta, shapes):  # type: ignore[no-untyped-def]
    """Adds Σ delta · activations of eight samples to the kick, for eight weights at a time."""
    at, below, one = uint64(0), uint64(0), uint64(1)
    for layer in range(len(shapes)):
        rows, columns, biased = uint64(shapes[layer, 0]), uint64(shapes[layer, 1]), shapes[layer, 2]
        here, tall = below + columns, rows >= columns
        whole = (rows if tall else columns) // _LANES * _LANES  # the longer side in tiles
        for first in range(uint64(0), whole, _LANES):
            for other in range(columns if tall else rows):
                row = at + (first * columns + other if tall else other * columns + first)
                tile = load_tile(kick, row, columns if tall else one)
                for s in range(_LANES):
                    up, down = s * units + here, sample + s * units + below
                    if tall:
                        tile = add_rows(tile, load(z, down + other), delta, up + first, one)
                    else:
                        tile = add_rows(tile, load(delta, up + other), z, down + first, one)
                store_tile(kick, row, columns if tall else one, tile)
        for j in range(whole if tall else uint64(0), rows):
            for q in range(uint64(0) if tall else whole, columns):
                row = at + j * columns + q
                value = load(kick, row)
                for s in range(_LANES):
                    value = multiply_add(
                        load(delta, s * units + here + j), load(z, sample + s * units + below + q), value
                    )
                store(kick, row, value)
        at += rows * columns
        if biased:
            for j in range(rows):
                value = load(kick, at + j)
                for s in range(_LANES):
                    value = add(value, load(delta, s * units + here + j))
                store(kick, at + j, value)
            at += rows
        below += columns


@njit(cache=True, error_model="numpy")
def _squares(z, sample, delta, slopes, shapes):  # type: ignore[no-untyped-def]
    """‖∇h‖² of a sample: over layers, ‖delta‖² times ‖activations below‖² (and 1 if biased)."""
    total, below = zero(z), 0
    for layer in range(len(shapes)):
        rows, columns, biased = shapes[layer, 0], shapes[layer, 1], shapes[layer, 2]
        outer, inner = zero(z), spread(z.dtype.type(1 if biased else 0))
        for q in range(columns):
            inner = multiply_add(load(z, sample + below + q), load(z, sample + below + q), inner)
        for j in range(rows):
            row = slopes + below + columns + j
            outer = multiply_add(load(delta, row), load(delta, row), outer)
        total = multiply_add(outer, inner, total)
        below += columns
    return total
