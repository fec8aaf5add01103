"""The diagonal network's SGD as one compiled loop per replicate, threads over replicates (CPU, float64).

The readable twin is :class:`nets.diagonal_torch.MultiplicativeEngine`; the two agree to rounding on equal draws.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from nets.diagonal_torch import visit_in_pieces
from theory.diagonal import DiagonalState
from theory.problem import Regression
from theory.threads import share

RENORMALIZE_EVERY = 64
TINY, HUGE, SHIFT = 2.0**-256, 2.0**64, 256
OVERFLOW = 1e100
GRAIN = 500_000  # coordinates updated for which it pays to wake another thread


class CompiledEngine:
    """Advances a flat batch of replicates; replicate k runs schedule k // seeds on the draws of seed k % seeds."""

    def __init__(self, problem: Regression, state: DiagonalState, weight_decay: float, averaging: float) -> None:
        self._X, self._y = problem.X.numpy(), problem.y.numpy()
        self._a, self._b = state.a.clone().numpy(), state.b.clone().numpy()
        self._a_exp, self._b_exp = state.a_exponent.clone().numpy(), state.b_exponent.clone().numpy()
        self._average = np.stack([part.numpy() for part in state.true_ab])
        self._weight_decay, self._averaging = weight_decay, averaging
        self.first_bad_step = np.full(len(self._a), -1, dtype=np.int64)

    def advance(self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int) -> None:
        """Take the steps of one block: index and shift (seeds, steps, B), eta (schedules, steps)."""
        if self._single(index):
            self.visit(index, shift, eta, first_step, np.empty(0, dtype=np.int64))
            return
        loop = (
            self._a, self._b, self._a_exp, self._b_exp, self._average, self._X, self._y, index, shift, eta,
            self._weight_decay, self._averaging, self.first_bad_step, first_step,
        )  # fmt: skip
        share(_advance, loop, min(len(self._a), self._a.size * index.shape[1] * index.shape[2] // GRAIN))

    def visit(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int, at: np.ndarray
    ) -> DiagonalState:
        """The same, and the states before the steps ``at`` of the block, (len(at), replicates, d)."""
        if not self._single(index):
            return visit_in_pieces(self, index, shift, eta, first_step, at)
        shape = (len(at), *self._a.shape)
        seen = (np.empty(shape), np.empty(shape), np.empty(shape, np.int32), np.empty(shape, np.int32))
        _advance_single(
            self._a, self._b, self._a_exp, self._b_exp, self._X, self._y, index[:, :, 0], shift, eta,
            self._weight_decay, self.first_bad_step, first_step, at, *seen,
        )  # fmt: skip
        return DiagonalState(*(torch.from_numpy(part) for part in seen))

    def _single(self, index: np.ndarray) -> bool:
        return index.shape[2] == 1 and not self._averaging

    def state(self) -> DiagonalState:
        """The current states (a view), or their running average when one is kept."""
        if self._averaging:
            a, b = torch.from_numpy(self._average)
            return DiagonalState.from_uv((a + b) / 2, (a - b) / 2)
        parts = (self._a, self._b, self._a_exp, self._b_exp)
        return DiagonalState(*(torch.from_numpy(part) for part in parts))

    @property
    def bad(self) -> torch.Tensor:
        return torch.from_numpy(self.first_bad_step)


@njit(cache=True, inline="always")
def _sweep(a, b, x, following, pull):  # type: ignore[no-untyped-def]
    """One step of size ``pull`` along ``x``, and 4⟨w, following⟩ after it, in one pass over the state."""
    r = 0.0
    for j in range(len(a)):
        step = pull * x[j]
        a_j, b_j = a[j] - a[j] * step, b[j] + b[j] * step
        a[j], b[j] = a_j, b_j
        r += following[j] * (a_j * a_j - b_j * b_j)
    return r


@njit(cache=True, inline="always")
def _sweep_scaled(a, b, a_unit, b_unit, x, following, pull, decay):  # type: ignore[no-untyped-def]
    """The same with weight decay, where a² enters w as a_unit · mantissa²."""
    r = 0.0
    for j in range(len(a)):
        step = pull * x[j]
        a_j, b_j = a[j] - a[j] * (step + decay), b[j] + b[j] * (step - decay)
        a[j], b[j] = a_j, b_j
        r += following[j] * (a_unit[j] * a_j * a_j - b_unit[j] * b_j * b_j)
    return r


@njit(parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True)
def _advance_single(  # type: ignore[no-untyped-def]
    a, b, a_exp, b_exp, X, y, index, shift, eta, weight_decay, first_bad_step, first_step,
    at, seen_a, seen_b, seen_a_exp, seen_b_exp,
):  # fmt: skip
    """One sample a step: the update and the next sample's residual in one pass over the state."""
    replicates, d = a.shape
    seeds, steps = index.shape
    for rep in prange(replicates):
        a_r, b_r, schedule, seed = a[rep], b[rep], rep // seeds, rep % seeds
        a_unit, b_unit = np.empty(d), np.empty(d)
        plain, taken, r = weight_decay == 0.0, 0, 0.0  # plain: neither exponents nor weight decay
        for j in range(d):
            a_unit[j] = 1.0 if a_exp[rep, j] == 0 else 2.0 ** (2.0 * a_exp[rep, j])
            b_unit[j] = 1.0 if b_exp[rep, j] == 0 else 2.0 ** (2.0 * b_exp[rep, j])
            plain = plain and a_exp[rep, j] == 0 and b_exp[rep, j] == 0
        if first_bad_step[rep] < 0 and steps > 0:  # a pass that changes nothing finds the first residual
            x = X[index[seed, 0]]
            r = _sweep(a_r, b_r, x, x, 0.0) if plain else _sweep_scaled(a_r, b_r, a_unit, b_unit, x, x, 0.0, 0.0)
        for k in range(steps):
            if taken < len(at) and at[taken] == k:
                seen_a[taken, rep], seen_b[taken, rep] = a_r, b_r
                seen_a_exp[taken, rep], seen_b_exp[taken, rep] = a_exp[rep], b_exp[rep]
                taken += 1
            if first_bad_step[rep] >= 0:
                if taken == len(at):
                    break
                continue
            r = 0.25 * r - y[index[seed, k]]
            if shift.shape[0] > 0:
                r -= shift[seed, k, 0]
            if not (abs(r) < OVERFLOW):
                first_bad_step[rep] = first_step + k
                continue
            pull, x, following = eta[schedule, k] * r, X[index[seed, k]], X[index[seed, min(k + 1, steps - 1)]]
            if plain:
                r = _sweep(a_r, b_r, x, following, pull)
            else:
                r = _sweep_scaled(a_r, b_r, a_unit, b_unit, x, following, pull, weight_decay)
            if (first_step + k + 1) % RENORMALIZE_EVERY == 0:
                plain = weight_decay == 0.0
                for j in range(d):
                    if a_exp[rep, j] != 0 or abs(a_r[j]) < TINY:
                        a_r[j], a_exp[rep, j] = _renormalize(a_r[j], a_exp[rep, j])
                        a_unit[j] = 2.0 ** (2.0 * a_exp[rep, j])
                    if b_exp[rep, j] != 0 or abs(b_r[j]) < TINY:
                        b_r[j], b_exp[rep, j] = _renormalize(b_r[j], b_exp[rep, j])
                        b_unit[j] = 2.0 ** (2.0 * b_exp[rep, j])
                    plain = plain and a_exp[rep, j] == 0 and b_exp[rep, j] == 0


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=True)
def _advance(  # type: ignore[no-untyped-def]
    a, b, a_exp, b_exp, average, X, y, index, shift, eta, weight_decay, averaging, first_bad_step, first_step,
    begin, stride,
):  # fmt: skip
    replicates, d = a.shape
    seeds, steps, size = index.shape
    for rep in range(begin, replicates, stride):
        if first_bad_step[rep] >= 0:
            continue
        a_r, b_r, schedule, seed = a[rep], b[rep], rep // seeds, rep % seeds
        a_unit, b_unit, g = np.empty(d), np.empty(d), np.empty(d)  # a² enters w as a_unit · mantissa²
        for j in range(d):
            a_unit[j], b_unit[j] = 0.25 * 2.0 ** (2.0 * a_exp[rep, j]), 0.25 * 2.0 ** (2.0 * b_exp[rep, j])
        for k in range(steps):
            overflow = False
            for m in range(size):
                x = X[index[seed, k, m]]
                r = 0.0
                for j in range(d):
                    r += x[j] * (a_unit[j] * a_r[j] * a_r[j] - b_unit[j] * b_r[j] * b_r[j])
                r -= y[index[seed, k, m]]
                if shift.shape[0] > 0:
                    r -= shift[seed, k, m]
                overflow = overflow or not (abs(r) < OVERFLOW)
                if m == 0:
                    for j in range(d):
                        g[j] = r * x[j]
                else:
                    for j in range(d):
                        g[j] += r * x[j]
            if overflow:
                first_bad_step[rep] = first_step + k
                break
            scale = eta[schedule, k] / size
            for j in range(d):
                step = scale * g[j]
                a_r[j] -= a_r[j] * (step + weight_decay)
                b_r[j] += b_r[j] * (step - weight_decay)
            if averaging > 0.0:
                for j in range(d):
                    average[0, rep, j] += (1 - averaging) * (a_r[j] * 2.0 ** a_exp[rep, j] - average[0, rep, j])
                    average[1, rep, j] += (1 - averaging) * (b_r[j] * 2.0 ** b_exp[rep, j] - average[1, rep, j])
            if (first_step + k + 1) % RENORMALIZE_EVERY == 0:
                for j in range(d):
                    if a_exp[rep, j] != 0 or abs(a_r[j]) < TINY:
                        a_r[j], a_exp[rep, j] = _renormalize(a_r[j], a_exp[rep, j])
                        a_unit[j] = 0.25 * 2.0 ** (2.0 * a_exp[rep, j])
                    if b_exp[rep, j] != 0 or abs(b_r[j]) < TINY:
                        b_r[j], b_exp[rep, j] = _renormalize(b_r[j], b_exp[rep, j])
                        b_unit[j] = 0.25 * 2.0 ** (2.0 * b_exp[rep, j])


@njit(cache=True)
def _renormalize(mantissa, exponent):  # type: ignore[no-untyped-def]
    """The same number with its mantissa back in range: exact, powers of two only."""
    while mantissa != 0.0 and abs(mantissa) < TINY:
        mantissa *= 2.0**SHIFT
        exponent -= SHIFT
    while exponent < 0 and abs(mantissa) > HUGE:
        mantissa *= 2.0**-SHIFT
        exponent += SHIFT
    return mantissa, exponent
