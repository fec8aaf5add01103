"""A single tanh neuron h = w₂ tanh(w₁x) under label noise, as a compiled ensemble over step sizes × paths.

dw = -∇L dt + √η ζ m^{-1/2} Φᵀ dW with one Brownian motion a sample. Two normals a step are enough: ηζ²/m ΦᵀΦ is 2 × 2,
and its Cholesky factor gives increments of the same law, exactly and for every step. What remains of the samples in a
step are five functions of w₁ alone, which are tabulated once a call, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from simulators.scalar import check_records
from theory.normals import BLOCK, LANES, fill_block, normals_key
from theory.threads import share

PATHS = BLOCK // 2  # that advance together, two normals each
FLOOR = 1e-140  # a path stays where both weights are below this
REACH, DENSITY = 24.0, 16  # largest |w₁| max|x| in the table, and intervals in a unit of it
DEGREE, FUNCTIONS = 7, 8  # of the polynomials; five functions are used, eight are a whole number of vector registers
TABLE_ERROR = 3e-14
"""Largest error of a tabulated function, relative to the sizes of its terms; checked for every table."""


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
    if not np.isfinite([x, y]).all() or not x.any():
        raise ValueError("inputs and targets have to be finite, and not all inputs zero: give such samples.")
    if w.ndim != 2 or w.shape[1] != 2 or not np.isfinite(w).all():
        raise ValueError(f"a start of shape {w.shape} is not usable: give finite weights of shape (paths, 2).")
    if eta.ndim != 1 or not (eta >= 0).all() or not dt > 0 or not zeta >= 0:
        raise ValueError("step sizes and noise have to be >= 0 and dt positive: choose them so.")
    at = check_records(records)
    out = np.empty((len(at), len(eta), len(w), 2))
    scale = np.sqrt(eta * zeta**2 * dt / len(x))
    table = tabulate(x, y)
    key = normals_key(root_seed, stream)
    loop = (x, y, table.coefficients, table.per_unit, scale, w, dt / len(x), at, key, out)
    share(_advance, loop, len(scale) * -(-len(w) // PATHS))
    return out


def neuron_sums(x: np.ndarray, y: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a step needs of the samples at weights w₁ > 0 of shape (...), and the sizes of its terms, (..., 5) each.

    With t = tanh(w₁x) and q = x(1 - t²): Σyt/w₁, Σyq, ‖q‖, ⟨t, q⟩/(‖q‖w₁) and ‖t - q⟨t, q⟩/‖q‖²‖/w₁³, all even and
    smooth in w₁. The last is the length of the part of p = t - w₁q orthogonal to q; p is of third order in w₁ and is
    computed so. Sizes: Σ|yt|/w₁, Σ|yq|, ‖q‖, ‖t‖/w₁, ‖p‖/w₁³.
    """
    parts = np.empty((np.size(w1), 2, 5))
    _sums_at(x, y, np.ascontiguousarray(w1, dtype=float).reshape(-1), parts)
    values, sizes = np.moveaxis(parts.reshape(*np.shape(w1), 2, 5), -2, 0)
    return values, sizes


@njit(cache=True)
def _sums_at(x, y, w1, parts):  # type: ignore[no-untyped-def]
    for k in range(len(w1)):
        _sum_up(x, y, w1[k], parts[k, 0], parts[k, 1])


@njit(cache=True, error_model="numpy")
def _sum_up(x, y, w1, values, sizes):  # type: ignore[no-untyped-def]
    """Values and sizes at one w₁ > 0; of z = w₁|x|, since h is even in (x, y)."""
    q, p = np.empty(len(x)), np.empty(len(x))
    yt, yq, tt, qq, pp, pq, size_yt, size_yq = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(x)):
        z, target = w1 * abs(x[i]), y[i] if x[i] >= 0.0 else -y[i]
        decay, square = np.exp(-2.0 * z), 4.0 * z * z
        slope = 4.0 * decay / (1.0 + decay) ** 2  # 1 - t²
        if square < 1.0:  # sinh 2z - 2z = (2z)³/6 (1 + (2z)²/20 (1 + (2z)²/42 (1 + …))), which would cancel
            series = 1.0
            for k in range(18, 3, -2):
                series = 1.0 + square / (k * (k + 1)) * series
            p[i] = z * square / 6.0 * series * slope
        else:
            p[i] = (1.0 - decay * (decay + 4.0 * z)) / (1.0 + decay) ** 2
        q[i], t = abs(x[i]) * slope, p[i] + z * slope
        yt, size_yt = yt + target * t, size_yt + abs(target) * t
        yq, size_yq = yq + target * q[i], size_yq + abs(target) * q[i]
        tt, qq, pp, pq = tt + t * t, qq + q[i] * q[i], pp + p[i] * p[i], pq + p[i] * q[i]
    across, share, length = 0.0, pq / qq if qq > 0.0 else 0.0, np.sqrt(qq)
    for i in range(len(x)):
        across += (p[i] - share * q[i]) ** 2
    values[0], values[1], values[2] = yt / w1, yq, length
    values[3], values[4] = length + share * length / w1, np.sqrt(across) / w1**3
    sizes[0], sizes[1], sizes[2] = size_yt / w1, size_yq, length
    sizes[3], sizes[4] = np.sqrt(tt) / w1, np.sqrt(pp) / w1**3


@dataclass(frozen=True, eq=False)
class NeuronTable:
    """:func:`neuron_sums` for |w₁| max|x| < ``REACH`` as polynomials, one a function in each of equal intervals.

    Attributes:
        coefficients: of z^k, z in (-1, 1) over the interval, shape (intervals, DEGREE + 1, FUNCTIONS).
        per_unit: intervals in a unit of w₁.
        error: largest error seen between the nodes, relative to the sizes of the terms.
    """

    coefficients: np.ndarray
    per_unit: float
    error: float

    def __call__(self, w1: np.ndarray) -> np.ndarray:
        """The five functions at weights 0 <= w₁ of shape (...), shape (..., 5)."""
        row = (w1 * self.per_unit).astype(int)
        z, rows = 2 * (w1 * self.per_unit - row) - 1, self.coefficients[row, :, :5]
        return np.einsum("...kf,...k->...f", rows, z[..., None] ** np.arange(DEGREE + 1))


def tabulate(x: np.ndarray, y: np.ndarray) -> NeuronTable:
    """The table for samples (x, y).

    Raises:
        ValueError: samples for which it is not right to ``TABLE_ERROR``.
    """
    angles = (np.arange(DEGREE + 1) + 0.5) * np.pi / (DEGREE + 1)
    nodes, between = np.cos(angles), np.cos(angles + angles[0])[[0, DEGREE // 2]]
    per_unit, rows = DENSITY * float(np.abs(x).max()), np.arange(int(REACH * DENSITY))[:, None]
    values, _ = neuron_sums(x, y, (rows + (nodes + 1) / 2) / per_unit)
    coefficients = np.zeros((len(rows), DEGREE + 1, FUNCTIONS))
    coefficients[:, :, :5] = np.linalg.solve(np.vander(nodes, increasing=True), values)
    at = (rows + (between + 1) / 2) / per_unit
    values, sizes = neuron_sums(x, y, at)
    error = float((np.abs(NeuronTable(coefficients, per_unit, 0.0)(at) - values) / (sizes + 1e-300)).max())
    if not error < TABLE_ERROR:
        raise ValueError(f"the sums over these samples are tabulated to {error:.1e} only: scale the inputs to about 1.")
    return NeuronTable(coefficients, per_unit, error)


@intrinsic
def _polynomials(context, coefficients, base, z, values, to):  # type: ignore[no-untyped-def]
    """values[to + f] = Σ_k coefficients[base + 8k + f] z^k for f < 8: a vector load and a multiply-add a power."""

    def generate(target, builder, signature, arguments):  # type: ignore[no-untyped-def]
        eight, one = ir.VectorType(ir.DoubleType(), FUNCTIONS), ir.IntType(32)

        def at(array, number, shift):  # type: ignore[no-untyped-def]
            data = target.make_array(signature.args[array])(target, builder, arguments[array]).data
            index = builder.add(arguments[number], ir.Constant(arguments[number].type, shift))
            return builder.bitcast(builder.gep(data, [index]), eight.as_pointer())

        empty = ir.Constant(eight, ir.Undefined)
        first = builder.insert_element(empty, arguments[2], ir.Constant(one, 0))
        z = builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(one, FUNCTIONS), [0] * FUNCTIONS))
        p = builder.load(at(0, 1, FUNCTIONS * DEGREE), align=8)
        for k in range(DEGREE - 1, -1, -1):
            product = builder.fmul(p, z, flags=["contract"])
            p = builder.fadd(product, builder.load(at(0, 1, FUNCTIONS * k), align=8), flags=["contract"])
        builder.store(p, at(3, 4, 0), align=8)
        return target.get_dummy_value()

    return types.void(coefficients, base, z, values, to), generate


@njit(cache=True, inline="always")
def _look_up(coefficients, place, values):  # type: ignore[no-untyped-def]
    """The functions at each lane's ``place``, in intervals, to ``values``, (lanes, FUNCTIONS) in one row."""
    for lane in range(PATHS):
        row = np.int64(place[lane])
        z = 2.0 * (place[lane] - row) - 1.0
        _polynomials(coefficients, row * (FUNCTIONS * (DEGREE + 1)), z, values, lane * FUNCTIONS)


@njit(nogil=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _advance(x, y, table, per_unit, scale, start, rate, records, key, out, begin, stride):  # type: ignore[no-untyped-def]
    levels, paths, intervals = len(scale), len(start), len(table)
    flat, blocks = table.reshape(-1), -(-paths // PATHS)
    for item in range(begin, levels * blocks, stride):
        level, block = item // blocks, item % blocks
        first = block * PATHS
        count = min(PATHS, paths - first)
        w1, w2, xi = np.zeros(PATHS), np.zeros(PATHS), np.empty(BLOCK)
        bits, work = np.empty((2, LANES), np.uint64), np.empty(LANES)
        place, values, spare = np.empty(PATHS), np.empty((PATHS, FUNCTIONS)), np.empty(5)
        for lane in range(count):
            w1[lane], w2[lane] = start[first + lane, 0], start[first + lane, 1]
        kick, done, alive = scale[level], 0, True
        for r in range(len(records)):
            for step in range(done, records[r]):
                if step % 256 == 0:
                    largest = 0.0
                    for lane in range(PATHS):
                        largest = max(largest, max(abs(w1[lane]), abs(w2[lane])))
                    alive = largest > FLOOR
                if not alive:
                    break
                fill_block(key, np.uint64(step), item, xi, bits, work)
                beyond = 0
                for lane in range(PATHS):
                    at = abs(w1[lane]) * per_unit
                    place[lane] = at if at < intervals else 0.0
                    beyond += at >= intervals
                _look_up(flat, place, values.reshape(-1))
                if beyond:
                    for lane in range(count):
                        if abs(w1[lane]) * per_unit >= intervals:
                            _sum_up(x, y, abs(w1[lane]), values[lane], spare)
                for lane in range(PATHS):
                    a, b = w1[lane], w2[lane]
                    yt, yq, length = a * values[lane, 0], values[lane, 1], values[lane, 2]
                    along, across = a * values[lane, 3], a * a * abs(a) * values[lane, 4]
                    # ΦᵀΦ = C Cᵀ with C = [[b ‖q‖, 0], [along, across]].
                    one, two = kick * xi[lane], kick * xi[PATHS + lane]
                    new_a = a + b * (rate * (yq - b * along * length) + length * one)
                    new_b = b + rate * (yt - b * (along * along + across * across)) + along * one + across * two
                    moves = abs(a) > FLOOR or abs(b) > FLOOR
                    w1[lane] = new_a if moves else a
                    w2[lane] = new_b if moves else b
            done = records[r]
            for lane in range(count):
                out[r, level, first + lane, 0], out[r, level, first + lane, 1] = w1[lane], w2[lane]
