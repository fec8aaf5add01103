"""x = e^y with dy = (a - c e^y) dt + s dB: the one equation behind the quartic well and the modes of linear networks.

Quartic well dθ = (μθ - θ³) dt + ζθ dW: x = θ², a = 2μ - ζ², c = 2, s = 2ζ. A mode of a linear network, singular value
x under gradient noise σ: a = 2S* - ησ², c = 2, s = 2√η σ. Far down y is a Brownian motion with drift a, the Lyapunov
exponent; the term -c e^y is a soft wall on top. a > 0: x settles in a Gamma law; a < 0: all mass collapses on x = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba  # type: ignore[import-untyped]
import numpy as np
from scipy import stats

Array = np.ndarray
STEPS = 60  # of the Fokker-Planck solver between two times


@dataclass(frozen=True, eq=False)
class StochasticLogistic:
    """Several processes at once; the fields are broadcast to one shape (P,).

    Attributes:
        growth: a, per unit time: the Lyapunov exponent of x = 0.
        damping: c > 0.
        noise: s > 0.

    Raises:
        ValueError: damping or noise that is not positive and finite.
    """

    growth: Array
    damping: Array
    noise: Array

    def __post_init__(self) -> None:
        given = (self.growth, self.damping, self.noise)
        parts = np.broadcast_arrays(*(np.atleast_1d(np.asarray(part, float)) for part in given))
        for name, part in zip(("growth", "damping", "noise"), parts, strict=True):
            object.__setattr__(self, name, part)
            if not np.isfinite(part).all() or (name != "growth" and not (part > 0).all()):
                raise ValueError(f"the {name} of a stochastic logistic has to be finite, and positive: choose it so.")

    @property
    def shape(self) -> Array:
        """2a/s² of the stationary Gamma law, NaN where mass collapses."""
        return np.where(self.growth > 0, 2 * self.growth / self.noise**2, np.nan)

    @property
    def scale(self) -> Array:
        """s²/2c of the stationary Gamma law."""
        return self.noise**2 / (2 * self.damping)

    def stationary_cdf(self, x: Array) -> Array:
        """P(x_∞ ≤ x): x of shape (k,) or (P, k) gives (P, k); 1 for x ≥ 0 where mass collapses."""
        x = np.asarray(x, float)
        law = stats.gamma.cdf(x, np.nan_to_num(self.shape, nan=1.0)[:, None], scale=self.scale[:, None])
        return np.where(np.isnan(self.shape)[:, None], (x >= 0).astype(float), law)


@dataclass(frozen=True, eq=False)
class LogLaw:
    """The law of y = ln x on a grid: the probability ``mass`` (P, N) of the cells between ``edges`` (P, N + 1)."""

    edges: Array
    mass: Array

    @property
    def centres(self) -> Array:
        """Shape (P, N)."""
        return (self.edges[:, 1:] + self.edges[:, :-1]) / 2

    def moment(self, power: int) -> Array:
        """E[x^power], shape (P,)."""
        return (self.mass * np.exp(power * self.centres)).sum(1)

    def mean(self) -> Array:
        """E[x], shape (P,)."""
        return self.moment(1)

    def standard_deviation(self) -> Array:
        """√Var x, shape (P,)."""
        return np.sqrt(np.maximum(self.moment(2) - self.mean() ** 2, 0.0))

    def _cumulative(self) -> Array:
        total = np.concatenate([np.zeros((len(self.mass), 1)), np.clip(self.mass, 0, None).cumsum(1)], 1)
        return total / total[:, -1:]

    def cdf(self, y: Array) -> Array:
        """P(ln x ≤ y): y of shape (k,) or (P, k) gives (P, k)."""
        y = np.broadcast_to(np.asarray(y, float), (len(self.mass), np.shape(y)[-1]))
        total = self._cumulative()
        return np.stack([np.interp(y[p], self.edges[p], total[p]) for p in range(len(y))])

    def quantile(self, u: Array) -> Array:
        """ln x below which the law has mass u: u of shape (P, k) gives (P, k)."""
        total = self._cumulative()
        return np.stack([np.interp(u[p], total[p], self.edges[p]) for p in range(len(u))])


def start(
    process: StochasticLogistic, law_of_log: tuple[Array, Array] | float, horizon: float, spacing: float = 0.03
) -> LogLaw:
    """A law of y on a grid that holds the process until the time ``horizon``.

    Args:
        law_of_log: y₀, the same for all, or (points ascending, cumulative probability) of its law.
        spacing: of the cells around the wall, where the law of x lives; it is refined where that law is narrower.
    """
    if isinstance(law_of_log, tuple):
        points, cumulative = law_of_log
        first, last = points[np.searchsorted(cumulative, 1e-7)], points[-1]
    else:
        first = last = float(law_of_log)
        points, cumulative = np.empty(0), np.empty(0)
    edges = _grid(process, first, last, horizon, spacing, sharp=not len(points))
    if len(points):
        mass = np.diff(np.interp(edges, points, cumulative, left=0.0, right=1.0), axis=1)
    else:
        centres = (edges[:, 1:] + edges[:, :-1]) / 2
        mass = np.zeros_like(centres)
        row = np.arange(len(mass))
        left = (centres <= first).sum(1) - 1
        share = (first - centres[row, left]) / (centres[row, left + 1] - centres[row, left])
        mass[row, left], mass[row, left + 1] = 1 - share, share
    return LogLaw(edges, mass / mass.sum(1, keepdims=True))


def _grid(process: StochasticLogistic, first: float, last: float, horizon: float, spacing: float, sharp: bool) -> Array:
    """Cell edges (P, N + 1): fine around the wall, below it as coarse as diffusion over drift allows."""
    a, s = process.growth[:, None], process.noise[:, None]
    variance = s**2 / 2
    settled = np.maximum(a / process.damping[:, None], process.scale[:, None])
    spread = 1 + 8 / np.sqrt(np.maximum(a / variance, 0.05))
    top = np.maximum(last, np.log(settled * spread + 40 * process.scale[:, None])) + 1
    depth = 7 * s * np.sqrt(horizon) + np.maximum(-a, 0) * horizon
    # Where the law is stationary, below e^{-40} of its mass is out of reach.
    depth = np.where(a > 0, np.minimum(depth, 40 * variance / np.maximum(a, 1e-300)), depth)
    bottom = np.minimum(first, np.log(settled)) - depth - 3
    fine = np.minimum(spacing, 0.15 * np.sqrt(variance / np.maximum(a, variance)))
    coarse = np.maximum(np.minimum(0.5 * variance / np.maximum(np.abs(a), 1e-300), 0.05 * s * np.sqrt(horizon)), fine)
    z = np.linspace(0, 1, 4001) ** 2 * (top - bottom)  # distance from the top
    wall = top - (np.minimum(first, np.log(settled)) if sharp else np.log(settled)) + 6
    size = np.clip(fine * np.exp(np.maximum(z - wall, 0) / 6), fine, coarse)
    each = np.diff(z) * (1 / size[:, 1:] + 1 / size[:, :-1]) / 2
    count = np.concatenate([np.zeros((len(z), 1)), each.cumsum(1)], 1)
    cells = int(np.ceil(count[:, -1].max()))
    levels = np.linspace(0, 1, cells + 1)
    depths = np.stack([np.interp(levels * count[p, -1], count[p], z[p]) for p in range(len(z))])
    return (top - depths)[:, ::-1]


def evolve(process: StochasticLogistic, law: LogLaw, duration: float, steps: int = STEPS) -> LogLaw:
    """The law after ``duration``: Fokker-Planck in y by exponentially fitted finite volumes, TR-BDF2 in time.

    Mass is conserved, the discrete stationary law is the exact one at the cell centres, errors are second order in
    cells and in time steps, which grow from the start on. With the defaults probabilities are right to 0.002 and the
    means of all but fully collapsed modes to 0.3 %.

    Source: Scharfetter and Gummel (1969); Bank et al. (1985) for the scheme in time.
    """
    y, width = law.centres, np.diff(law.edges, axis=1)
    variance = process.noise[:, None] ** 2 / 2
    h = np.diff(y, axis=1)
    pull = (process.growth[:, None] * h - process.damping[:, None] * np.diff(np.exp(y), axis=1)) / variance
    up = variance / h * _bernoulli(-pull) / width[:, :-1]  # rate from a cell to the next
    down = variance / h * _bernoulli(pull) / width[:, 1:]  # and back
    clock = duration * (np.arange(steps + 1) / steps) ** 1.5
    mass = np.ascontiguousarray(law.mass.T)
    _tr_bdf2(np.ascontiguousarray(up.T), np.ascontiguousarray(down.T), mass, np.diff(clock))
    return replace(law, mass=np.ascontiguousarray(mass.T))


def _bernoulli(z: Array) -> Array:
    """z/(e^z - 1)."""
    near = np.abs(z) < 1e-6
    safe = np.where(near, 1.0, np.clip(z, -700, 700))
    return np.where(near, 1 - z / 2, safe / np.expm1(safe))


@numba.njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _tr_bdf2(up: Array, down: Array, mass: Array, steps: Array) -> None:
    """Advances ``mass`` (N, P) in place by time steps of the chain with rates ``up`` and ``down``, (N - 1, P).

    Both stages solve with 1 - ½γ dt Q, tridiagonal and diagonally dominant by columns: elimination needs no pivots.
    All processes go side by side.
    """
    gamma = 2 - np.sqrt(2)
    last = len(mass) - 1
    pivot, middle = np.empty_like(mass), np.empty_like(mass)
    for dt in steps:
        c = gamma / 2 * dt
        for i in range(last + 1):
            for p in range(mass.shape[1]):
                leave = (up[i, p] if i < last else 0.0) + (down[i - 1, p] if i > 0 else 0.0)
                enter = (up[i - 1, p] * mass[i - 1, p] if i > 0 else 0.0) + (
                    down[i, p] * mass[i + 1, p] if i < last else 0.0
                )
                middle[i, p] = mass[i, p] + c * (enter - leave * mass[i, p])
                fill = c * c * up[i - 1, p] * down[i - 1, p] * pivot[i - 1, p] if i > 0 else 0.0
                pivot[i, p] = 1.0 / (1.0 + c * leave - fill)
        _solve(up, down, pivot, c, middle)
        for i in range(last + 1):
            for p in range(mass.shape[1]):
                mass[i, p] = (middle[i, p] - (1 - gamma) ** 2 * mass[i, p]) / (gamma * (2 - gamma))
        _solve(up, down, pivot, c, mass)


@numba.njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _solve(up: Array, down: Array, pivot: Array, c: float, known: Array) -> None:
    """(1 - cQ)⁻¹ ``known`` in place, by elimination with the inverse pivots."""
    for i in range(1, len(known)):
        for p in range(known.shape[1]):
            known[i, p] += c * up[i - 1, p] * pivot[i - 1, p] * known[i - 1, p]
    for p in range(known.shape[1]):
        known[-1, p] *= pivot[-1, p]
    for i in range(len(known) - 2, -1, -1):
        for p in range(known.shape[1]):
            known[i, p] = (known[i, p] + c * down[i, p] * known[i + 1, p]) * pivot[i, p]


def log_step_moments(mean: Array, deviation: Array) -> tuple[Array, Array]:
    """E and Var of ln|1 + u|, u ~ N(mean, deviation²): what one multiplicative step x ← x|1 + u| does to ln x.

    The SDE keeps ``mean - deviation²/2`` and ``deviation²``. By Gauss-Hermite quadrature, for deviations below 0.2.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    logs = np.log(np.abs(1 + np.asarray(mean)[..., None] + np.asarray(deviation)[..., None] * nodes))
    weights = weights / weights.sum()
    first = logs @ weights
    return first, (logs - first[..., None]) ** 2 @ weights
