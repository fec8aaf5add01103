"""The diagonal network's SGD on the GPU: one program a replicate, its state in registers over a block of steps.

A program is one (schedule, seed). It holds mantissas and exponents of a and b, reads one row of X a sample (X stays in
cache) and nothing else but indices and step sizes; minibatches are drawn on the device. The readable twin is
:class:`nets.diagonal_torch.MultiplicativeEngine`; the two agree to rounding on equal draws. Import it only where there
is Triton.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nets.diagonal_torch import HUGE, OVERFLOW, RENORMALIZE_EVERY, SHIFT, TINY
from theory.diagonal import DiagonalState
from theory.problem import Regression

_EVERY, _SHIFT = tl.constexpr(RENORMALIZE_EVERY), tl.constexpr(SHIFT)
_TINY, _HUGE, _OVERFLOW = tl.constexpr(TINY), tl.constexpr(HUGE), tl.constexpr(OVERFLOW)
_UP, _DOWN = tl.constexpr(2.0**SHIFT), tl.constexpr(2.0**-SHIFT)


class TritonEngine:
    """Advances a flat batch of replicates; replicate k runs schedule k // seeds on the draws of seed k % seeds.

    Blocks may be numpy arrays, or tensors that lie on the device already. float64, at most 8192 features.
    """

    def __init__(self, problem: Regression, state: DiagonalState, weight_decay: float, averaging: float) -> None:
        self._X, self._y = problem.X.contiguous(), problem.y.contiguous()
        self._parts = [part.clone() for part in (state.a, state.b, state.a_exponent, state.b_exponent)]
        self._decay, self._averaging = weight_decay > 0, averaging > 0
        self._average = torch.stack(state.true_ab) if self._averaging else self._parts[0].new_empty(0)
        # A Python float would reach the kernel as float32.
        self._options = torch.tensor([weight_decay, averaging], dtype=torch.float64, device=self._X.device)
        self._bad = torch.full(state.a.shape[:1], -1, dtype=torch.int64, device=self._X.device)

    def advance(self, index: np.ndarray | Tensor, shift: np.ndarray | Tensor, eta: np.ndarray, first_step: int) -> None:
        """Take the steps of one block: index and shift (seeds, steps, B), eta (schedules, steps)."""
        self.visit(index, shift, eta, first_step, np.empty(0, dtype=np.int64))

    def visit(
        self,
        index: np.ndarray | Tensor,
        shift: np.ndarray | Tensor,
        eta: np.ndarray,
        first_step: int,
        at: np.ndarray,
    ) -> DiagonalState:
        """The same, and the states before the steps ``at`` of the block, (len(at), replicates, d)."""
        device = self._X.device
        index, shift, sizes, wanted = (
            torch.as_tensor(part, device=device).contiguous() for part in (index, shift, eta, at)
        )
        seeds, steps, size = index.shape
        replicates, d = self._parts[0].shape
        seen = [part.new_empty(len(at), replicates, d) for part in self._parts]
        block = max(triton.next_power_of_2(d), 32)
        with torch.cuda.device_of(self._X):
            _advance[(replicates,)](
                *self._parts, *seen, self._average, self._X, self._y, index, shift, sizes, wanted, self._options,
                self._bad, first_step, steps, seeds, replicates, len(at),
                DECAY=self._decay, AVERAGING=self._averaging, SHIFTED=shift.numel() > 0, SIZE=size, D=d, BLOCK=block,
                num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True,
            )  # fmt: skip
        return _of_average(seen[0], seen[1]) if self._averaging else DiagonalState(*seen)

    def state(self) -> DiagonalState:
        """The current states, or their running average when one is kept."""
        if self._averaging:
            return _of_average(*self._average)
        return DiagonalState(*(part.clone() for part in self._parts))

    @property
    def bad(self) -> Tensor:
        """Each replicate's first bad step, -1 where there was none."""
        return self._bad


def _of_average(a: Tensor, b: Tensor) -> DiagonalState:
    return DiagonalState.from_uv((a + b) / 2, (a - b) / 2)


@triton.jit
def _power(exponent):  # type: ignore[no-untyped-def]
    """2^exponent in float64, 0 below its range."""
    biased = tl.minimum(tl.maximum(exponent + 1023, 0), 2046)
    return (biased.to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _renormalized(mantissa, exponent):  # type: ignore[no-untyped-def]
    """The same number with its mantissa back in range: exact, powers of two only."""
    size = tl.abs(mantissa)
    small = (size < _TINY) & (size > 0.0)
    large = (size > _HUGE) & (exponent < 0)
    mantissa = tl.where(small, mantissa * _UP, tl.where(large, mantissa * _DOWN, mantissa))
    return mantissa, exponent - tl.where(small, _SHIFT, 0) + tl.where(large, _SHIFT, 0)


@triton.jit(do_not_specialize=["first_step", "steps", "seeds", "replicates", "count"])  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    a_at, b_at, a_exp_at, b_exp_at, seen_a, seen_b, seen_a_exp, seen_b_exp, average, X, y, index, shift, eta, at,
    options, bad_at, first_step, steps, seeds, replicates, count,
    DECAY: tl.constexpr, AVERAGING: tl.constexpr, SHIFTED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All steps of one replicate; one whose residual overflows keeps its last state."""
    rep = tl.program_id(0).to(tl.int64)
    schedule, seed = rep // seeds, rep % seeds
    column = tl.arange(0, BLOCK)
    inside, mine = column < D, rep * D + column
    a, b = tl.load(a_at + mine, mask=inside, other=0.0), tl.load(b_at + mine, mask=inside, other=0.0)
    a_exp, b_exp = tl.load(a_exp_at + mine, mask=inside, other=0), tl.load(b_exp_at + mine, mask=inside, other=0)
    bad = tl.load(bad_at + rep)
    taken, wanted = tl.full((), 0, tl.int64), tl.load(at, mask=count > 0, other=-1)
    if AVERAGING:
        weight = tl.load(options + 1)
        mean_a = tl.load(average + mine, mask=inside, other=0.0)
        mean_b = tl.load(average + replicates * D + mine, mask=inside, other=0.0)
    index += seed * steps * SIZE
    shift += seed * steps * SIZE
    last = steps * SIZE - 1
    i = tl.load(index, mask=last >= 0, other=0)
    x = tl.load(X + i.to(tl.int64) * D + column, mask=inside, other=0.0)
    ahead = tl.load(index + 1, mask=last >= 1, other=0)  # two samples on, so that no step waits for its input
    for k in range(0, steps):
        if k == wanted:
            place = taken * replicates * D + mine
            if AVERAGING:
                tl.store(seen_a + place, mean_a, mask=inside)
                tl.store(seen_b + place, mean_b, mask=inside)
            else:
                tl.store(seen_a + place, a, mask=inside)
                tl.store(seen_b + place, b, mask=inside)
                tl.store(seen_a_exp + place, a_exp, mask=inside)
                tl.store(seen_b_exp + place, b_exp, mask=inside)
            taken += 1
            wanted = tl.load(at + taken, mask=taken < count, other=-1)
        four_w = _power(2 * a_exp) * a * a - _power(2 * b_exp) * b * b
        size = tl.load(eta + schedule * steps + k) / SIZE
        step = tl.zeros((BLOCK,), tl.float64)
        for m in range(0, SIZE):
            sample = k * SIZE + m
            following = tl.load(X + ahead.to(tl.int64) * D + column, mask=inside, other=0.0)
            after = tl.load(index + sample + 2, mask=sample + 2 <= last, other=0)
            r = tl.sum(x * four_w, 0) * 0.25 - tl.load(y + i)
            if SHIFTED:
                r -= tl.load(shift + sample)
            bad = tl.where((bad < 0) & ((tl.abs(r) < _OVERFLOW) == 0), first_step + k, bad)
            step += tl.where(bad < 0, size * r, 0.0) * x
            x, i, ahead = following, ahead, after
        alive = bad < 0
        if SIZE > 1:  # samples before the one that overflowed
            step = tl.where(alive, step, 0.0)
        if DECAY:
            kept = tl.where(alive, tl.load(options), 0.0)
            a -= a * (step + kept)
            b += b * (step - kept)
        else:
            a -= a * step
            b += b * step
        if AVERAGING:
            mean_a = tl.where(alive, mean_a + (1.0 - weight) * (a * _power(a_exp) - mean_a), mean_a)
            mean_b = tl.where(alive, mean_b + (1.0 - weight) * (b * _power(b_exp) - mean_b), mean_b)
        if (first_step + k + 1) % _EVERY == 0:
            a, a_exp = _renormalized(a, a_exp)
            b, b_exp = _renormalized(b, b_exp)
    tl.store(a_at + mine, a, mask=inside)
    tl.store(b_at + mine, b, mask=inside)
    tl.store(a_exp_at + mine, a_exp, mask=inside)
    tl.store(b_exp_at + mine, b_exp, mask=inside)
    tl.store(bad_at + rep, bad)
    if AVERAGING:
        tl.store(average + mine, mean_a, mask=inside)
        tl.store(average + replicates * D + mine, mean_b, mask=inside)
