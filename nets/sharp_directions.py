"""Measurements along the sharpest directions of the loss: spectrum, alignment, steps, cross-sections, ablations.

e_1 … e_K are the top eigenvectors of the Hessian on a fixed evaluation set, η the step size, g a minibatch gradient.
Source: Jastrzębski et al. (2019), sections 3 to 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nets.curvature import hessian
from nets.gradients import losses
from nets.lanczos import Which, eigenpairs
from nets.objective import Objective
from nets.training import Batches, TrainingState
from theory.minibatch import Minibatch
from theory.streams import named_generator

MULTIPLES = (0.25, 0.33, 0.5, 1.0, 2.0, 3.0, 4.0)
OFFSETS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
WIDTHS = (1.01, 1.1, 1.5, 2.0)


class TopEigenvalues:
    """A probe of λ_1 … λ_K of every run of :func:`nets.training.train`, each warm-started from its last look.

    Values have shape (schedules, seeds, K), NaN for runs that diverged.
    """

    def __init__(
        self, objective: Objective, k: int = 1, tolerance: float = 1e-2, which: Which = "largest", moving: bool = True
    ) -> None:
        self._objective, self._k, self._tolerance, self._which = objective, k, tolerance, which
        self._vectors: dict[tuple[int, int], Tensor] = {}
        self._moving = moving

    def __call__(self, state: TrainingState) -> Tensor:
        """The eigenvalues at this state."""
        values = state.theta.new_full((*state.theta.shape[:2], self._k), torch.nan)
        for s, r in torch.cartesian_prod(*map(torch.arange, state.theta.shape[:2])).tolist():
            if state.first_bad_step[s, r] >= 0:
                continue
            start = self._vectors.get((s, r)) if self._moving else None
            operator = hessian(self._objective.at_buffers(state.buffers_of(s, r)), state.theta[s, r])
            found = eigenpairs(operator, self._k, self._which, start, self._tolerance)
            values[s, r], self._vectors[s, r] = found.values, found.vectors
        return values


def minibatch_gradients(
    objective: Objective, theta: Tensor, batch: Minibatch, count: int, seed: int = 0, root_seed: int = 0
) -> Tensor:
    """Gradients of ``count`` minibatches at one θ, from draws apart from any run's, shape (count, p)."""
    draws = Batches(objective.n, batch, [seed], root_seed, name="probe batches")
    rows = [draws(m)[0].to(objective.X.device) for m in range(count)]
    return torch.stack([objective.on(index).gradient(theta) for index in rows])


@dataclass(frozen=True, eq=False)
class Alignment:
    """How M minibatch gradients g and their mean ḡ lie to K directions, as cosines.

    Attributes:
        to_mean: cos(g, ḡ), shape (M,).
        to_directions: cos(g, e_i), shape (M, K).
        of_mean: cos(ḡ, e_i), shape (K,).
        share: ‖Eᵀg‖²/‖g‖², the gradient's share in the span, shape (M,).
    """

    to_mean: Tensor
    to_directions: Tensor
    of_mean: Tensor
    share: Tensor


def alignment(gradients: Tensor, vectors: Tensor) -> Alignment:
    """Alignment of gradients (M, p) with orthonormal ``vectors`` (p, K); a zero gradient has cosine 0."""
    mean = gradients.mean(0)
    sizes, size = gradients.norm(dim=1).clamp_min(1e-300), mean.norm().clamp_min(1e-300)
    cosines = gradients @ vectors / sizes.unsqueeze(1)
    return Alignment(gradients @ mean / (sizes * size), cosines, mean @ vectors / size, cosines.square().sum(1))


def step_parts(gradients: Tensor, vectors: Tensor, singly: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Parts of the steps along ``gradients`` (M, p), by name, for orthonormal ``vectors`` e_1 … e_K (p, K).

    along ⟨g,e_i⟩e_i for i up to ``singly`` (K by default), shape (M, singly, p); and of shape (M, p): random, ⟨g,u⟩u
    for one random unit vector u; top, EEᵀg; complement, g - EEᵀg; whole, g.
    """
    coordinates = gradients @ vectors
    u = torch.from_numpy(named_generator(seed, "random direction").standard_normal(gradients.shape[1])).to(gradients)
    u = u / u.norm()
    top = coordinates @ vectors.T
    return {
        "along": coordinates[:, :singly].unsqueeze(-1) * vectors[:, :singly].T,
        "random": (gradients @ u).unsqueeze(1) * u,
        "top": top,
        "complement": gradients - top,
        "whole": gradients,
    }


def losses_after(
    objective: Objective, theta: Tensor, part: Tensor, step_size: float, multiples: Sequence[float] = MULTIPLES
) -> Tensor:
    """L(θ - cη·part) for each of J multiples c, shape (..., J), for parts of shape (..., p) of steps at θ (p,)."""
    sizes = step_size * torch.tensor(list(multiples), dtype=theta.dtype, device=theta.device)
    reached = theta - sizes.unsqueeze(1) * part.unsqueeze(-2)
    return losses(objective, reached.flatten(0, -2)).view(reached.shape[:-1])


@dataclass(frozen=True, eq=False)
class CrossSection:
    """L(θ + k·unit·e) through an iterate: offsets k ascending, shape (J,), and losses, shape (J,)."""

    offsets: Tensor
    losses: Tensor
    unit: float

    def width(self, ratio: float, base: float | None = None) -> float:
        """The first |k| at which the loss is ``ratio`` times ``base`` (L(θ) by default), the farther of both sides.

        Infinite when it is not reached on either side within the offsets.
        """
        centre = int(self.offsets.abs().argmin())
        level = ratio * (float(self.losses[centre]) if base is None else base)
        sides = [(self.offsets >= 0), (self.offsets <= 0)]
        reached = [self.offsets[side & (self.losses >= level)].abs() for side in sides]
        return max((float(k.min()) for k in reached if k.numel()), default=float("inf"))

    def widths(self, ratios: Sequence[float] = WIDTHS) -> dict[float, float]:
        """Widths at several ratios."""
        return {ratio: self.width(ratio) for ratio in ratios}


def cross_section(
    objective: Objective, theta: Tensor, direction: Tensor, step_size: float, gradients: Tensor,
    offsets: Sequence[float] = OFFSETS,
) -> CrossSection:  # fmt: skip
    """The loss along ±``direction`` in units of the mean SGD step along it, η·mean|⟨g, e⟩| over gradients (M, p)."""
    unit = step_size * float((gradients @ direction).abs().mean())
    k = torch.tensor([*(-o for o in reversed(offsets)), 0.0, *offsets], dtype=theta.dtype, device=theta.device)
    return CrossSection(k, losses(objective, theta + (unit * k).unsqueeze(1) * direction), unit)


Rule = Literal[
    "normal", "only top", "constant top", "remove top", "top scaled", "bottom scaled", "all top scaled", "drop",
    "constant overshoot",
]  # fmt: skip


@dataclass(frozen=True)
class EscapeRule:
    """What an update makes of the gradient, e = e_1 recomputed at every step.

    normal g; only top e⟨e,g⟩; constant top the same with e as it was first; remove top g - e⟨e,g⟩;
    top scaled g + (f-1)e⟨e,g⟩; bottom scaled fg + (1-f)e⟨e,g⟩; all top scaled g + (f-1)EEᵀg over K directions;
    drop g without each of K directions with probability f; constant overshoot g - e⟨e,g⟩ + f e sign⟨e,g⟩.
    """

    rule: Rule = "normal"
    factor: float = 1.0
    k: int = 1

    def apply(self, gradient: Tensor, E: Tensor, dropped: Tensor) -> Tensor:
        """The new direction, shape (p,), for orthonormal E (p, K) and uniform numbers ``dropped`` (K,)."""
        along, f = E.T @ gradient, self.factor
        top = E[:, 0] * along[0]
        if self.rule == "normal":
            return gradient
        if self.rule in ("only top", "constant top"):
            return top
        if self.rule == "remove top":
            return gradient - top
        if self.rule == "top scaled":
            return gradient + (f - 1) * top
        if self.rule == "bottom scaled":
            return f * gradient + (1 - f) * top
        if self.rule == "all top scaled":
            return gradient + (f - 1) * (E @ along)
        if self.rule == "drop":
            return gradient - E @ (along * (dropped < f))
        if self.rule == "constant overshoot":
            return gradient - top + f * E[:, 0] * along[0].sign()
        raise ValueError(f"there is no escape rule '{self.rule}': see EscapeRule.")


class Escape:
    """The escape ablation inside :func:`nets.training.train`: one rule for each schedule, e looked up at every step."""

    def __init__(
        self, objective: Objective, rules: Sequence[EscapeRule], tolerance: float = 1e-2, seed: int = 0
    ) -> None:
        self._objective, self._rules, self._tolerance, self._seed = objective, list(rules), tolerance, seed
        self._E: dict[tuple[int, int], Tensor] = {}

    def __call__(self, state: TrainingState, gradient: Tensor) -> Tensor:
        """The directions stepped along, shape (schedules, seeds, p)."""
        if len(gradient) != len(self._rules):
            raise ValueError(f"{len(self._rules)} rules were given for {len(gradient)} schedules: give one each.")
        changed = gradient.clone()
        for s, rule in enumerate(self._rules):
            if rule.rule == "normal":
                continue
            for r in range(gradient.shape[1]):
                if state.first_bad_step[s, r] >= 0:
                    continue
                if (s, r) not in self._E or rule.rule != "constant top":
                    objective = self._objective.at_buffers(state.buffers_of(s, r))
                    found = eigenpairs(
                        hessian(objective, state.theta[s, r]), rule.k, start=self._E.get((s, r)),
                        tolerance=self._tolerance,
                    )  # fmt: skip
                    self._E[s, r] = found.vectors
                uniform = named_generator(self._seed, "dropped directions", r, block=state.step).random(rule.k)
                changed[s, r] = rule.apply(gradient[s, r], self._E[s, r], torch.from_numpy(uniform).to(gradient))
        return changed


def distance(theta: Tensor, start: Tensor) -> Tensor:
    """‖θ - θ_0‖₂, shape (...), of parameters (..., p)."""
    return (theta - start).norm(dim=-1)


def path_length(path: Tensor) -> Tensor:
    """Σ_k ‖θ_{k+1} - θ_k‖₂ of recorded parameters (T, ..., p), shape (...): the distance travelled."""
    return path.diff(dim=0).norm(dim=-1).sum(0)


def frobenius_of_top(values: Tensor) -> Tensor:
    """√(Σ_k λ_k²) over the top K eigenvalues (..., K), the paper's F; a lower bound of ‖H‖_F."""
    return values.square().sum(-1).sqrt()
