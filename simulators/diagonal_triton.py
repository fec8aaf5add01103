"""The diagonal network's SDE on the GPU: one program takes a few paths through many steps, without leaving the chip.

Per step a program reads its logs twice, tile by tile: once for the residuals, once to move them. Logs and X stay in
cache; residuals, normals (drawn where they are used) and weights of all samples stay in registers; the products with X
are small matrix products in float64. No program waits for another. Equal to :mod:`simulators.diagonal`'s compiled loop
on equal increments, to rounding. Import it only where there is Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simulators.noise import BrownianIncrements
from simulators.normals_triton import normals_at, signed
from theory.problem import Regression

ROWS, COLUMNS = 16, 32  # paths of a program, features at a time: what registers hold
OWN, GIVEN, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class TritonLoop:
    """Advances all paths by blocks of steps, on the device of ``logs``; float64, at most 512 samples."""

    def __init__(self, problem: Regression, exact: bool, logs: Tensor, dt: float, noise: BrownianIncrements) -> None:
        self.logs, self.bad = logs, torch.full(logs.shape[:1], -1, dtype=torch.int64, device=logs.device)
        self._X, self._y = problem.X.contiguous(), problem.y.contiguous()
        self._mean_square, self._exact = problem.mean_square, exact
        self._dt = torch.tensor([dt], dtype=torch.float64, device=logs.device)  # a Python float would become float32
        self._key, self._refine = signed(noise.key), noise.refine

    def advance(self, first_step: int, scales: Tensor, levels: Tensor) -> None:
        """Steps ``first_step`` … with ηκ/n, shape (steps,), and given noise levels, (steps, paths) or (steps, 0)."""
        (paths, twice), n = self.logs.shape, len(self._y)
        kind = EXACT if self._exact else GIVEN if levels.shape[1] else OWN
        samples = max(triton.next_power_of_2(n), 16)
        with torch.cuda.device_of(self.logs):
            _advance[(triton.cdiv(paths, ROWS),)](
                self.logs, self._X, self._y, self._mean_square, scales.contiguous(), levels.contiguous(), self._dt,
                self.bad, self._key, first_step, len(scales), paths,
                KIND=kind, REFINE=self._refine, N=n, D=twice // 2, ROWS=ROWS, SAMPLES=samples, COLUMNS=COLUMNS,
                num_warps=4 if samples <= 128 else 8, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _tile(at, path, paths, begin, D: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses of ln a of some paths and features, and which of them there are."""
    column = begin + tl.arange(0, COLUMNS)
    where = at + path[:, None] * (2 * D) + column[None, :]
    return where, (path < paths)[:, None] & (column < D)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(X, begin, N: tl.constexpr, D: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of X, shape (SAMPLES, COLUMNS), zeros beyond it."""
    sample, column = tl.arange(0, SAMPLES), begin + tl.arange(0, COLUMNS)
    there = (sample < N)[:, None] & (column < D)[None, :]
    return tl.load(X + sample[:, None] * D + column[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=["key", "first_step", "steps", "paths"])  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    logs, X, y, mean_square, scales, levels, dt_at, bad_at, key, first_step, steps, paths,
    KIND: tl.constexpr, REFINE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All steps of ``ROWS`` paths; one whose weights stop being finite keeps its last state.

    With c = s ξ √dt - r dt/n, both ln a += Xᵀc - q and ln b -= Xᵀc + q; q is half the variance of Xᵀc.
    """
    path, sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, SAMPLES)
    real, here = path < paths, (sample < N)[None, :]
    target = tl.load(y + sample, mask=sample < N, other=0.0)[None, :]
    bad, dt = tl.load(bad_at + path, mask=real, other=0), tl.load(dt_at)
    for s in range(0, steps):
        scale = tl.load(scales + s)
        r = tl.zeros((ROWS, SAMPLES), tl.float64)
        for begin in range(0, D, COLUMNS):
            at, there = _tile(logs, path, paths, begin, D, COLUMNS)
            log_a, log_b = tl.load(at, mask=there, other=0.0), tl.load(at + D, mask=there, other=0.0)
            w = (tl.exp(2.0 * log_a) - tl.exp(2.0 * log_b)) * 0.25
            r = tl.dot(w, tl.trans(_inputs(X, begin, N, D, SAMPLES, COLUMNS)), r, out_dtype=tl.float64)
        r -= target
        xi = tl.zeros((ROWS, SAMPLES), tl.float64)
        for fine in tl.static_range(REFINE):
            row = (first_step + s).to(tl.int64) * REFINE + fine
            xi += normals_at(key, row, path[:, None] * N + sample[None, :])
        xi = tl.where(here, xi, 0.0)
        if REFINE > 1:
            xi /= tl.sqrt(tl.full((), REFINE, tl.float64))
        if KIND == EXACT:
            c = r * (tl.sqrt(dt * scale) * (xi - (tl.sum(xi, 1) / N)[:, None]) - dt / N)
        else:
            if KIND == GIVEN:
                level = tl.load(levels + s * paths + path, mask=real, other=0.0)
            else:
                level = tl.sum(r * r, 1) / (2 * N)
            variance = 2.0 * scale * level  # s² = 2ηδκ/n
            c = tl.sqrt(dt * variance)[:, None] * xi - r * (dt / N)
        finite = tl.sum(tl.abs(c), 1) < float("inf")
        bad = tl.where((bad < 0) & (finite == 0), first_step + s + 1, bad)
        moves = (bad < 0)[:, None]
        tl.debug_barrier()  # all logs have been read before the first is written, and the other way round below
        for begin in range(0, D, COLUMNS):
            at, there = _tile(logs, path, paths, begin, D, COLUMNS)
            x = _inputs(X, begin, N, D, SAMPLES, COLUMNS)
            kick = tl.dot(c, x, out_dtype=tl.float64)
            if KIND == EXACT:
                pulled = tl.dot(r, x, out_dtype=tl.float64)
                q = (tl.dot(r * r, x * x, out_dtype=tl.float64) - pulled * pulled / N) * (scale * dt * 0.5)
            else:
                column = begin + tl.arange(0, COLUMNS)
                m = tl.load(mean_square + column, mask=column < D, other=0.0)
                q = (variance * N * dt * 0.5)[:, None] * m[None, :]
            log_a, log_b = tl.load(at, mask=there, other=0.0), tl.load(at + D, mask=there, other=0.0)
            tl.store(at, log_a + (kick - q), mask=there & moves)
            tl.store(at + D, log_b - (kick + q), mask=there & moves)
        tl.debug_barrier()
    tl.store(bad_at + path, bad, mask=real)
