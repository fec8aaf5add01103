"""The diagonal network's SGD step by step in torch: any device and precision, every option of AVPF's code.

Two engines with one interface. :class:`MultiplicativeEngine` updates (a, b) = (u + v, u - v) with extended range and
is the readable twin of the compiled loop; :class:`LiteralEngine` is the recursion in (u, v) as the paper writes it.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nets.update import SAM, Update
from theory.diagonal import DiagonalState
from theory.problem import Regression

OVERFLOW = 1e100
RENORMALIZE_EVERY = 64
TINY, HUGE, SHIFT = 2.0**-256, 2.0**64, 256


class Engine(Protocol):
    """What takes the steps: a flat batch of replicates, schedule by schedule, advanced block by block."""

    @property
    def bad(self) -> Tensor:
        """Each replicate's first bad step, -1 where there was none, (replicates,)."""

    def state(self) -> DiagonalState:
        """The current states, (replicates, d)."""

    def advance(self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int) -> None:
        """Take the steps of one block: index and shift (seeds, steps, B), eta (schedules, steps)."""

    def visit(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int, at: np.ndarray
    ) -> DiagonalState:
        """The same, and the states before the steps ``at`` of the block, (len(at), replicates, d)."""


def visit_in_pieces(
    engine: Engine, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int, at: np.ndarray
) -> DiagonalState:
    """:meth:`Engine.visit` by advancing from one wanted state to the next."""
    seen: list[list[Tensor]] = []
    stops = [0, *at.tolist(), index.shape[1]]
    for begin, end in itertools.pairwise(stops):
        if end > begin:
            draw, shifts, sizes = (np.ascontiguousarray(block[:, begin:end]) for block in (index, shift, eta))
            engine.advance(draw, shifts, sizes, first_step + begin)
        if len(seen) < len(at):
            s = engine.state()
            seen.append([part.clone() for part in (s.a, s.b, s.a_exponent, s.b_exponent)])
    return DiagonalState(*(torch.stack(parts) for parts in zip(*seen, strict=True)))


class _Draws:
    """One block of draws on the device: inputs and (shifted) targets of every minibatch."""

    def __init__(self, problem: Regression, index: np.ndarray, shift: np.ndarray, schedules: int) -> None:
        rows = torch.from_numpy(index.astype(np.int64)).to(problem.X.device)
        self.x = problem.X[rows]  # (seeds, steps, B, d)
        self.y = problem.y[rows]
        if shift.size:
            self.y = self.y + torch.from_numpy(shift).to(self.y)
        self._schedules = schedules

    def step(self, k: int) -> tuple[Tensor, Tensor]:
        """Inputs (replicates, B, d) and targets (replicates, B) of step k."""
        return self.x[:, k].repeat(self._schedules, 1, 1), self.y[:, k].repeat(self._schedules, 1)


class MultiplicativeEngine:
    """a ← a(1 - g - λ), b ← b(1 + g - λ) with g = (η/B) Σ r x and weight decay λ, on a flat batch of replicates."""

    def __init__(self, problem: Regression, state: DiagonalState, update: Update) -> None:
        self._problem, self._update, self._state = problem, update, state
        # float32 has less range than the thresholds above: its mantissas are brought back sooner.
        self._tiny, self._shift = (TINY, SHIFT) if state.a.dtype == torch.float64 else (2.0**-32, 32)
        self._average = state.true_ab
        self.bad = torch.full(state.a.shape[:1], -1, dtype=torch.int64, device=state.a.device)

    def advance(self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int) -> None:
        """Take the steps of one block: index and shift (seeds, steps, B), eta (schedules, steps)."""
        draws = _Draws(self._problem, index, shift, len(eta))
        s, decay = self._state, self._update.weight_decay
        a, b, limit = s.a, s.b, min(OVERFLOW, torch.finfo(s.a.dtype).max ** 0.5)
        sizes = torch.from_numpy(np.repeat(eta, len(index), 0)).to(a) / index.shape[2]
        for k in range(index.shape[1]):
            x, y = draws.step(k)
            w = DiagonalState(a, b, s.a_exponent, s.b_exponent).w
            r = torch.einsum("rbd,rd->rb", x, w) - y
            overflow = ~(r.abs() < limit).all(1)
            self.bad = torch.where((self.bad < 0) & overflow, first_step + k, self.bad)
            g = sizes[:, k : k + 1] * torch.einsum("rb,rbd->rd", r, x)
            g = g.masked_fill((self.bad >= 0).unsqueeze(1), 0.0)
            kept = decay * (self.bad < 0).to(a).unsqueeze(1)
            a, b = a - a * (g + kept), b + b * (g - kept)
            if (first_step + k + 1) % RENORMALIZE_EVERY == 0:
                s = self._renormalize(a, b, s)
                a, b = s.a, s.b
            if self._update.averaging:
                true = DiagonalState(a, b, s.a_exponent, s.b_exponent).true_ab
                self._average = _blend(self._average, true, self._update.averaging)
        self._state = DiagonalState(a, b, s.a_exponent, s.b_exponent)

    def visit(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int, at: np.ndarray
    ) -> DiagonalState:
        """The same, and the states before the steps ``at`` of the block, (len(at), replicates, d)."""
        return visit_in_pieces(self, index, shift, eta, first_step, at)

    def _renormalize(self, a: Tensor, b: Tensor, s: DiagonalState) -> DiagonalState:
        """The same numbers with mantissas back in range: exact, powers of two only."""
        parts = []
        for mantissa, exponent in ((a, s.a_exponent), (b, s.b_exponent)):
            small = (mantissa.abs() < self._tiny) & (mantissa != 0)
            large = (exponent < 0) & (mantissa.abs() > HUGE)
            power = small.int() - large.int()
            parts.append(
                (mantissa * torch.exp2(power.to(mantissa.dtype) * self._shift), exponent - power * self._shift)
            )
        (a, a_exponent), (b, b_exponent) = parts
        return DiagonalState(a, b, a_exponent, b_exponent)

    def state(self) -> DiagonalState:
        """The current states, or their running average when one is kept."""
        if self._update.averaging:
            a, b = self._average
            return DiagonalState.from_uv((a + b) / 2, (a - b) / 2)
        return self._state


class LiteralEngine:
    """u ← u - η ∂_u L_batch - λu ∓ ρu, v likewise: the recursion in (u, v), on a flat batch of replicates.

    α = u² - v² loses its digits once it is below 1e-16 of u²; use the other engines to follow it further.
    """

    def __init__(self, problem: Regression, state: DiagonalState, update: Update) -> None:
        self._problem, self._update = problem, update
        self._uv = (state.u, state.v)
        self._average = self._uv
        self.bad = torch.full(state.a.shape[:1], -1, dtype=torch.int64, device=state.a.device)

    def advance(self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int) -> None:
        """Take the steps of one block: index and shift (seeds, steps, B), eta (schedules, steps)."""
        draws = _Draws(self._problem, index, shift, len(eta))
        sizes = torch.from_numpy(np.repeat(eta, len(index), 0)).to(self._uv[0])
        option = self._update
        for k in range(index.shape[1]):
            u, v = self._uv
            grad_u, grad_v = batch_gradient(u, v, *draws.step(k), option.sam)
            if option.normalized:
                grad_u, grad_v = _unit(grad_u), _unit(grad_v)
            shrink_u, shrink_v = (2 * (u.abs() > v.abs()).to(u) - 1), (2 * (v.abs() > u.abs()).to(u) - 1)
            size, decay, balance = sizes[:, k : k + 1], option.weight_decay, option.balance_shrinkage
            new_u = u - size * grad_u - decay * u - balance * u * shrink_u
            new_v = v - size * grad_v - decay * v - balance * v * shrink_v
            broken = ~(torch.isfinite(new_u) & torch.isfinite(new_v)).all(1)
            self.bad = torch.where((self.bad < 0) & broken, first_step + k, self.bad)
            keep = (self.bad >= 0).unsqueeze(1)
            self._uv = (torch.where(keep, u, new_u), torch.where(keep, v, new_v))
            if option.averaging:
                self._average = _blend(self._average, self._uv, option.averaging)

    def visit(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, first_step: int, at: np.ndarray
    ) -> DiagonalState:
        """The same, and the states before the steps ``at`` of the block, (len(at), replicates, d)."""
        return visit_in_pieces(self, index, shift, eta, first_step, at)

    def state(self) -> DiagonalState:
        """The current states, or their running average when one is kept."""
        return DiagonalState.from_uv(*(self._average if self._update.averaging else self._uv))


def batch_gradient(u: Tensor, v: Tensor, x: Tensor, y: Tensor, sam: SAM | None = None) -> tuple[Tensor, Tensor]:
    """Gradient of (1/2B) Σ (⟨u∘v, x_i⟩ - y_i)² in u and v, each (R, d), for u, v (R, d), x (R, B, d), y (R, B).

    With ``sam``, the gradient at the ascended weights: u + ρ∂_u L (batch) or, per sample, u + 2ρ r_i x_i∘v.
    """
    size = x.shape[1]
    r = torch.einsum("rbd,rd->rb", x, u * v) - y
    if sam is None:
        pull = torch.einsum("rb,rbd->rd", r, x) / size
        return pull * v, pull * u
    if not sam.per_sample:
        pull = torch.einsum("rb,rbd->rd", r, x) / size
        return batch_gradient(u + sam.radius * pull * v, v + sam.radius * pull * u, x, y)
    ascent = 2 * sam.radius * r.unsqueeze(2) * x
    up, vp = u.unsqueeze(1) + ascent * v.unsqueeze(1), v.unsqueeze(1) + ascent * u.unsqueeze(1)
    rp = ((x * up * vp).sum(2) - y).unsqueeze(2)
    if sam.loss_derivative_only:
        up, vp = u.unsqueeze(1), v.unsqueeze(1)
    return (rp * vp * x).mean(1), (rp * up * x).mean(1)


def _unit(gradient: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    return torch.where(norm > 0, gradient / norm, gradient)


def _blend(average: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Tensor]:
    return weight * average[0] + (1 - weight) * new[0], weight * average[1] + (1 - weight) * new[1]
