"""SGD on two-layer linear networks: mode by mode in the frame of the data, and in general with minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from nets.sampling import Draws
from theory.collapse_data import LinearTeacher
from theory.minibatch import Minibatch
from theory.normals import fill_row, normals_key
from theory.schedule import StepSizes

BLOCK = 256


def diagonal_sgd(
    teacher: LinearTeacher, sigmas: Sequence[float], schedule: StepSizes, steps: int, records: Sequence[int],
    seeds: Sequence[int], root_seed: int = 0, start: float = 1.0,
) -> np.ndarray:  # fmt: skip
    """Singular values s = s_u s_v after the numbers of steps ``records``, shape (records, sigmas, seeds, modes).

    r = s_u s_v - S* + σξ, s_u ← s_u - η r s_v and s_v ← s_v - η r s_u at once, ξ ~ N(0, 1) fresh for every mode and
    step. All noise levels see the same ξ of a seed. A mode stays where |s| < 1e-280.

    Args:
        schedule: η per step (the published 3/1024, divided by 10 after step 50 000).
        start: s_u and s_v at the start.

    Raises:
        ValueError: records that do not ascend up to ``steps``, no seed, a negative noise level.
    """
    at = np.asarray(records, dtype=np.int64)
    if not len(at) or at[0] < 0 or (np.diff(at) <= 0).any() or at[-1] > steps:
        raise ValueError(f"the records have to be ascending numbers of steps up to {steps}: give at least one.")
    if not len(seeds) or not all(sigma >= 0 for sigma in sigmas):
        raise ValueError("a run needs at least one seed and noise levels >= 0: give both.")
    singular, eta = teacher.singular.numpy(), schedule.step_sizes(steps).numpy()
    keys = np.array([normals_key(root_seed, f"mode noise {seed}") for seed in seeds])
    u = np.full((len(seeds), len(sigmas), len(singular)), float(start))
    v, out = u.copy(), np.empty((len(at), len(sigmas), len(seeds), len(singular)))
    for begin, end in pairwise(sorted({0, *at.tolist()})):
        _advance(u, v, singular, np.asarray(sigmas, float), eta[begin:end], keys, begin)
        out[np.searchsorted(at, end)] = (u * v).transpose(1, 0, 2)
    if at[0] == 0:
        out[0] = start**2
    return out


@njit(parallel=True, cache=True, fastmath={"contract", "nsz"}, error_model="numpy")
def _advance(u, v, singular, sigmas, eta, keys, first):  # type: ignore[no-untyped-def]
    """Steps ``first`` … of every seed; ξ of step k and mode j is normal number k·modes + j of row 0."""
    seeds, levels, modes = u.shape
    for seed in prange(seeds):
        xi = np.empty(BLOCK * modes)
        for begin in range(0, len(eta), BLOCK):
            count = min(BLOCK, len(eta) - begin)
            fill_row(keys[seed], 0, (first + begin) * modes, xi[: count * modes])
            for level in range(levels):
                su, sv, sigma = u[seed, level], v[seed, level], sigmas[level]
                for k in range(count):
                    rate = eta[begin + k]
                    for j in range(modes):
                        a, b = su[j], sv[j]
                        step = rate * (a * b - singular[j] + sigma * xi[k * modes + j])
                        moves = abs(a * b) > 1e-280
                        su[j] = a - step * b if moves else a
                        sv[j] = b - step * a if moves else b


def general_sgd(
    X: Tensor, Y: Tensor, start: tuple[Tensor, Tensor], schedule: StepSizes, steps: int, records: Sequence[int],
    seeds: Sequence[int], batch: Minibatch, root_seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """V and U of Ŷ = X V U after the numbers of steps ``records``, shapes (records, seeds, ...): minibatch SGD.

    V ← V - (η/B) Σ x (Ur)ᵀ, U ← U - (η/B) Σ (Vᵀx) rᵀ at once, r = UᵀVᵀx - y; without replacement and of size n the
    batch is full. Float64 on the CPU.

    Args:
        X, Y: inputs (n, d) and targets (n, m).
        start: V (d, k) and U (k, m).

    Raises:
        ValueError: shapes that do not fit, a batch that cannot be drawn, records that do not ascend up to ``steps``.
    """
    v, u = start
    if X.shape[0] != Y.shape[0] or v.shape[0] != X.shape[1] or u.shape != (v.shape[1], Y.shape[1]):
        raise ValueError(
            f"X {tuple(X.shape)}, Y {tuple(Y.shape)}, V {tuple(v.shape)}, U {tuple(u.shape)} do not chain: "
            "give (n, d), (n, m), (d, k) and (k, m)."
        )
    at = np.asarray(records, dtype=np.int64)
    if not len(at) or at[0] < 0 or (np.diff(at) <= 0).any() or at[-1] > steps or not len(seeds):
        raise ValueError(f"give at least one seed, and records that ascend up to {steps}.")
    eta, draws = schedule.step_sizes(steps).numpy(), Draws(len(X), batch, seeds, steps, root_seed, 0.0, None)
    V, U = (part.double().expand(len(seeds), *part.shape).clone().numpy() for part in (v, u))
    inputs, targets = (part.double().contiguous().numpy() for part in (X, Y))
    kept = {0: (V.copy(), U.copy())}
    stops = sorted({*range(0, steps, BLOCK), *at.tolist(), steps})
    for begin, end in pairwise(stops):
        index, _ = draws.block(begin, end - begin)
        _general(V, U, inputs, targets, index, eta[begin:end] / draws.size)
        if end in at:
            kept[end] = V.copy(), U.copy()
    pairs = [kept[step] for step in at.tolist()]
    return torch.from_numpy(np.stack([v for v, _ in pairs])), torch.from_numpy(np.stack([u for _, u in pairs]))


@njit(parallel=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _general(V, U, X, Y, index, scale):  # type: ignore[no-untyped-def]
    seeds, d, k = V.shape
    m = U.shape[2]
    for seed in prange(seeds):
        v, u = V[seed], U[seed]
        gv, gu, hidden, r, back = np.empty((d, k)), np.empty((k, m)), np.empty(k), np.empty(m), np.empty(k)
        for step in range(len(scale)):
            gv[:], gu[:] = 0.0, 0.0
            for b in range(index.shape[2]):
                x, y = X[index[seed, step, b]], Y[index[seed, step, b]]
                hidden[:] = 0.0
                for i in range(d):
                    for j in range(k):
                        hidden[j] += x[i] * v[i, j]
                for o in range(m):
                    r[o] = -y[o]
                for j in range(k):
                    for o in range(m):
                        r[o] += hidden[j] * u[j, o]
                for j in range(k):
                    total = 0.0
                    for o in range(m):
                        total += u[j, o] * r[o]
                        gu[j, o] += hidden[j] * r[o]
                    back[j] = total
                for i in range(d):
                    for j in range(k):
                        gv[i, j] += x[i] * back[j]
            for i in range(d):
                for j in range(k):
                    v[i, j] -= scale[step] * gv[i, j]
            for j in range(k):
                for o in range(m):
                    u[j, o] -= scale[step] * gu[j, o]
