"""The quartic well as a compiled ensemble over noise levels × paths: blocks of paths that stay in cache.

Two schemes. ``euler``: θ ← θ(1 + h(μ - θ²) + ζ√h ξ), the recursion of the published figure. ``split``: the exact
solution θ² = E/(1/θ₀² + 2∫E) with E a geometric Brownian motion, its integral by the trapezoidal rule: near 0, where
collapse is decided, it is exact for any h, and in the well of weak order 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numba import njit, prange

from theory.device import has_triton
from theory.normals import BLOCK, fill_row, normals_key

FLOOR = 1e-145  # below it |θ| stays put: no path comes back from there, and its square is still a normal number
MAGIC = 1.5 * 2.0**52  # floats of this size are whole numbers


def quartic_well(
    mu: float,
    zeta: Sequence[float] | np.ndarray,
    start: np.ndarray,
    step: float,
    records: Sequence[int],
    root_seed: int,
    stream: str,
    scheme: Literal["euler", "split"] = "split",
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """θ of dθ = (μθ - θ³) dt + ζθ dW after the numbers of steps ``records``, shape (records, levels, paths).

    The noise of path p at level z is a function of (root seed, stream, step, z, p): levels are independent, and the
    first paths of a larger ensemble of at most the same number of blocks of 256 are the same. |θ| stops at 1e-145.

    Args:
        zeta: noise levels, shape (levels,).
        start: θ₀, shape (paths,) or (levels, paths).
        records: ascending.
        device: a CUDA device with Triton runs the same ensemble there, equal to rounding; all others run the compiled
            loop on the CPU.

    Raises:
        ValueError: arguments that do not fit, a step that is not positive.
    """
    zeta = np.asarray(zeta, float)
    if zeta.ndim != 1 or not (zeta >= 0).all() or not 0 < step < float("inf"):
        raise ValueError("the quartic well needs a list of noise levels >= 0 and a positive step: give both.")
    at = check_records(records)
    theta = np.array(np.broadcast_to(start, (len(zeta), np.shape(start)[-1])), dtype=float)
    if not np.isfinite(theta).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    key = normals_key(root_seed, stream)
    advance = {"euler": _euler, "split": _split}
    if scheme not in advance:
        raise ValueError(f"there is no scheme '{scheme}': choose euler or split.")
    if has_triton(torch.device(device)):
        from simulators.scalar_triton import well

        return well(float(mu), zeta, theta, float(step), at, key, scheme == "split", FLOOR, torch.device(device))
    out = np.empty((len(at), *theta.shape))
    advance[scheme](float(mu), zeta, theta, float(step), at, key, out)
    return out


def check_records(records: Sequence[int]) -> np.ndarray:
    """The numbers of steps at which to record, int64.

    Raises:
        ValueError: none, or not ascending from 0 or later.
    """
    at = np.asarray(records, dtype=np.int64)
    if at.ndim != 1 or not len(at) or at[0] < 0 or (np.diff(at) <= 0).any():
        raise ValueError("the records have to be ascending numbers of steps, none of them negative: give at least one.")
    return at


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _euler(mu, zeta, start, h, records, key, out):  # type: ignore[no-untyped-def]
    levels, paths = start.shape
    blocks = -(-paths // BLOCK)
    for item in prange(levels * blocks):
        level, block = item // blocks, item % blocks
        first = block * BLOCK
        count = min(BLOCK, paths - first)
        theta, xi = np.zeros(BLOCK), np.empty(BLOCK)
        theta[:count] = start[level, first : first + count]
        growth, kick, done = 1.0 + h * mu, zeta[level] * np.sqrt(h), 0
        for r in range(len(records)):
            for step in range(done, records[r]):
                fill_row(key, step, item * BLOCK, xi)
                for lane in range(BLOCK):
                    old = theta[lane]
                    new = old * (growth - h * old * old + kick * xi[lane])
                    theta[lane] = new if abs(new) > FLOOR else old
            done = records[r]
            out[r, level, first : first + count] = theta[:count]


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _split(mu, zeta, start, h, records, key, out):  # type: ignore[no-untyped-def]
    levels, paths = start.shape
    blocks = -(-paths // BLOCK)
    for item in prange(levels * blocks):
        level, block = item // blocks, item % blocks
        first = block * BLOCK
        count = min(BLOCK, paths - first)
        x, xi = np.ones(BLOCK), np.empty(BLOCK)
        mantissa, bits = np.empty(BLOCK), np.empty(BLOCK, dtype=np.int64)
        powers = bits.view(np.float64)
        for lane in range(count):
            x[lane] = start[level, first + lane] ** 2
        drift, kick, done = 2 * h * (mu - zeta[level] ** 2 / 2), 2 * zeta[level] * np.sqrt(h), 0
        for r in range(len(records)):
            for step in range(done, records[r]):
                fill_row(key, step, item * BLOCK, xi)
                for lane in range(BLOCK):
                    xi[lane] = drift + kick * xi[lane]
                exponentials(xi, mantissa, bits)
                for lane in range(BLOCK):
                    e, old = mantissa[lane] * powers[lane], x[lane]
                    new = old * e / (1.0 + h * old * (1.0 + e))
                    x[lane] = new if new > FLOOR * FLOOR else old
            done = records[r]
            for lane in range(count):
                out[r, level, first + lane] = np.copysign(np.sqrt(x[lane]), start[level, first + lane])


@njit(cache=True, inline="always", error_model="numpy")
def exponentials(x, mantissa, bits):  # type: ignore[no-untyped-def]
    """e^x = mantissa · 2^k for |x| < 700, k's bit pattern in ``bits``: range reduction and a polynomial, no branch.

    Added to 1.5 · 2^52, k stands in the last bits of the sum: most processors turn no vector of floats into integers.
    """
    shifted = bits.view(np.float64)
    for j in range(len(x)):
        z = min(max(x[j], -700.0), 700.0)
        shifted[j] = z * 1.4426950408889634 + MAGIC
        k = shifted[j] - MAGIC
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
    for j in range(len(x)):
        bits[j] = (bits[j] + 1023) << 52
