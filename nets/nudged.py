"""Nudged-SGD: the step's component in the K sharpest directions is multiplied by γ.

With P = V Vᵀ, V the K sharpest eigenvectors of the loss's Hessian, and g the minibatch gradient (with weight decay):

    correct_v     m ← μm + g;   θ ← θ - η(m + (γ-1) P m)            (the default; the momentum itself is not nudged)
    correct_g     m ← μm + g + (γ-1) P g;   θ ← θ - ηm
    correct_both  m ← μm + g + (γ-1) P g;   θ ← θ - η(m + (γ-1) P m)

γ = 1 is SGD; without momentum the first two agree and the third multiplies by γ². The momentum holds gradients, as in
``torch.optim.SGD``; where the step size is constant that is the published v = μm - ηg.
Source: Jastrzębski et al. (2019), section 5 and their ``NSGD``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from nets.curvature import Operator, hessian
from nets.lanczos import eigenpairs
from nets.objective import CROSS_ENTROPY, Loss, Objective
from nets.training import TrainingState
from theory.streams import named_generator

Variant = Literal["correct_v", "correct_g", "correct_both"]
Directions = Callable[[int, Tensor, Tensor | None], Tensor]
"""(step, θ (p,), previous V or None) ↦ V with orthonormal columns (p, K)."""
Entry = tuple[dict[str, Any], Tensor]


class NudgedSGD(torch.optim.Optimizer):
    """Nudged-SGD as a drop-in for ``torch.optim.SGD``; at γ = 1 it takes the same steps bit for bit.

    Args:
        params: as of any optimizer. V spans all of them together, in the order given.
        directions: called every ``refresh`` steps with the number of steps done, the parameters as one vector, and
            the V in use (None at first); returns orthonormal columns (p, K). See :class:`SharpestDirections`,
            :func:`sharpest_directions_of` and :class:`RandomDirections`.
        lr: η, and
        gamma: γ ≥ 0; both are entries of the parameter groups, so schedulers and groups can change them.
        variant: what is nudged, see above.
        refresh: steps between two looks at the curvature.
        burn_in: steps of plain SGD at the beginning.

    ``state_dict`` holds V, momentum and the count of steps: a loaded optimizer goes on bit for bit.

    Raises:
        ValueError: options out of range, or directions that do not fit the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        directions: Directions,
        lr: float,
        gamma: float = 1.0,
        *,
        variant: Variant = "correct_v",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        refresh: int = 100,
        burn_in: int = 0,
    ) -> None:
        if variant not in ("correct_v", "correct_g", "correct_both"):
            raise ValueError(f"there is no variant '{variant}': choose correct_v, correct_g or correct_both.")
        if refresh < 1 or burn_in < 0:
            raise ValueError(f"refresh {refresh}, burn-in {burn_in} are not usable: choose >= 1 and >= 0 steps.")
        for what, value in (("step size", lr), ("gamma", gamma), ("weight decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{what} {value} is not usable: choose a number >= 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum {momentum} is not usable: choose a number in [0, 1).")
        super().__init__(params, {"lr": lr, "gamma": gamma, "momentum": momentum, "weight_decay": weight_decay})
        self._directions, self._variant, self._refresh, self._burn_in = directions, variant, refresh, burn_in

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step along the gradients in ``.grad``; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [(group, p) for group in self.param_groups for p in group["params"]]
        self._look(entries)
        d = [_decayed(p, group["weight_decay"]) for group, p in entries]
        if self._variant != "correct_v":
            d = self._nudged(entries, d)
        d = [None if g is None else self._massive(group, p, g) for (group, p), g in zip(entries, d, strict=True)]
        if self._variant != "correct_g":
            d = self._nudged(entries, d)
        for (group, p), update in zip(entries, d, strict=True):
            if update is not None:
                p.add_(update, alpha=-group["lr"])
            self.state[p]["step"] += 1
        return loss

    @torch.no_grad()
    def overlap(self) -> float:
        """|Vᵀg| / ‖g‖ of the gradients in ``.grad``: 1 when the gradient lies in the sharpest directions."""
        entries = [(group, p) for group in self.param_groups for p in group["params"]]
        d = [_decayed(p, group["weight_decay"]) for group, p in entries]
        along = self._coordinates(entries, d)
        size = torch.stack([g.square().sum() for g in d if g is not None]).sum().sqrt()
        return 0.0 if along is None else float(along.norm() / size)

    def _look(self, entries: list[Entry]) -> None:
        """Fresh directions where they are due, cut into the parameters' parts."""
        for _, p in entries:
            self.state[p].setdefault("step", 0)
        step = self.state[entries[0][1]]["step"]
        if step < self._burn_in or (step - self._burn_in) % self._refresh:
            return
        sizes = [p.numel() for _, p in entries]
        known = "directions" in self.state[entries[0][1]]
        previous = torch.cat([self.state[p]["directions"] for _, p in entries]) if known else None
        V = self._directions(step, torch.cat([p.reshape(-1) for _, p in entries]), previous)
        if V.ndim != 2 or len(V) != sum(sizes) or not torch.isfinite(V).all():
            raise ValueError(f"directions of shape {tuple(V.shape)} do not fit: give finite columns ({sum(sizes)}, K).")
        for (_, p), part in zip(entries, V.split(sizes), strict=True):
            self.state[p]["directions"] = part.clone()

    def _coordinates(self, entries: list[Entry], d: list[Tensor | None]) -> Tensor | None:
        """Vᵀd, shape (K,), or None before the first look."""
        parts = [
            self.state[p]["directions"].T @ g.reshape(-1)
            for (_, p), g in zip(entries, d, strict=True)
            if g is not None and "directions" in self.state[p]
        ]
        return torch.stack(parts).sum(0) if parts else None

    def _nudged(self, entries: list[Entry], d: list[Tensor | None]) -> list[Tensor | None]:
        """d + (γ-1) V Vᵀ d."""
        if all(group["gamma"] == 1 for group in self.param_groups):
            return d
        along = self._coordinates(entries, d)
        if along is None:
            return d
        return [
            g
            if g is None or group["gamma"] == 1
            else g + (group["gamma"] - 1) * (self.state[p]["directions"] @ along).view_as(p)
            for (group, p), g in zip(entries, d, strict=True)
        ]

    def _massive(self, group: dict[str, Any], p: Tensor, g: Tensor) -> Tensor:
        """m ← μm + g, as ``torch.optim.SGD`` keeps it."""
        if group["momentum"] == 0:
            return g
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = g.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(g)
        return state["momentum_buffer"]


def _decayed(p: Tensor, weight_decay: float) -> Tensor | None:
    if p.grad is None:
        return None
    return p.grad.add(p, alpha=weight_decay) if weight_decay else p.grad


@dataclass(frozen=True, eq=False)
class SharpestDirections:
    """The K sharpest directions of a module's loss on a fixed evaluation set, warm-started from the last ones.

    BatchNorm is in eval mode, with the module's running statistics of the moment.
    """

    module: nn.Module
    X: Tensor
    labels: Tensor
    loss: Loss = CROSS_ENTROPY
    k: int = 5
    tolerance: float = 1e-2
    chunk: int | None = None

    def __call__(self, step: int, theta: Tensor, previous: Tensor | None) -> Tensor:
        """V, shape (p, K)."""
        objective = Objective(self.module, self.X, self.labels, self.loss, chunk=self.chunk)
        return eigenpairs(hessian(objective, theta), self.k, start=previous, tolerance=self.tolerance).vectors


def sharpest_directions_of(
    closure: Callable[[], Tensor], params: Iterable[Tensor], k: int = 5, tolerance: float = 1e-2
) -> Directions:
    """The K sharpest directions of whatever scalar loss ``closure()`` computes from ``params``, on any data."""
    params = [p for p in params if p.requires_grad]

    def directions(step: int, theta: Tensor, previous: Tensor | None) -> Tensor:
        with torch.enable_grad():
            gradient = torch.autograd.grad(closure(), params, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradient])

        def product(v: Tensor) -> Tensor:
            parts = torch.autograd.grad(flat, params, v, retain_graph=True)
            return torch.cat([part.reshape(-1) for part in parts])

        operator = Operator("Hessian", len(flat), flat.dtype, flat.device, product)
        return eigenpairs(operator, k, start=previous, tolerance=tolerance).vectors

    return directions


@dataclass(frozen=True)
class RandomDirections:
    """Control: K orthonormal directions at random, uniformly, a fresh draw at each look."""

    k: int = 5
    seed: int = 0

    def __call__(self, step: int, theta: Tensor, previous: Tensor | None) -> Tensor:
        """V, shape (p, K), a function of (seed, step) alone."""
        generator = torch.Generator().manual_seed(int(named_generator(self.seed, "directions", step).integers(2**63)))
        draw = torch.randn(len(theta), self.k, generator=generator, dtype=theta.dtype)
        return torch.linalg.qr(draw.to(theta.device)).Q


class Nudge:
    """Nudged-SGD inside :func:`nets.training.train`, every run with its own directions: g ↦ g + (γ-1) V Vᵀ g.

    Without momentum this is ``correct_v`` and ``correct_g`` at once, with momentum it is ``correct_g``.

    Args:
        directions: called for each run, as by :class:`NudgedSGD`, one per schedule or one for all.
        gammas: γ of each schedule, shape (schedules,); runs at γ = 1 take no look at the curvature.
        refresh: steps between two looks.
    """

    def __init__(self, directions: Directions | list[Directions], gammas: list[float], refresh: int = 100) -> None:
        self._directions = directions if isinstance(directions, list) else [directions] * len(gammas)
        if len(self._directions) != len(gammas) or not all(0 <= gamma < float("inf") for gamma in gammas):
            raise ValueError(f"gammas {gammas} are not usable: give one number >= 0 for each schedule and directions.")
        if refresh < 1:
            raise ValueError(f"refresh {refresh} is not usable: choose 1 step or more.")
        self._gammas, self._refresh = gammas, refresh
        self._V: Tensor | None = None
        self._factors = torch.empty(0)

    @torch.no_grad()
    def __call__(self, state: TrainingState, gradient: Tensor) -> Tensor:
        """The nudged gradients, shape (schedules, seeds, p)."""
        if len(gradient) != len(self._gammas):
            raise ValueError(f"{len(self._gammas)} gammas were given for {len(gradient)} schedules: give one each.")
        if state.step % self._refresh == 0 or self._V is None:
            self._look(state)
        assert self._V is not None
        along = gradient.unsqueeze(-2) @ self._V.mT
        return gradient + ((self._factors * along) @ self._V).squeeze(-2)

    def _look(self, state: TrainingState) -> None:
        """Directions of every run; columns of zeros where there is nothing to nudge."""
        S, R, p = state.theta.shape
        found: dict[tuple[int, int], Tensor] = {}
        for s, gamma in enumerate(self._gammas):
            for r in range(R):
                if gamma != 1 and state.first_bad_step[s, r] < 0:
                    previous = None if self._V is None else self._V[s, r].T
                    found[s, r] = self._directions[s](state.step, state.theta[s, r], previous)
        columns = max((V.shape[1] for V in found.values()), default=1)
        if self._V is None:
            self._V = state.theta.new_zeros(S, R, columns, p)
        for (s, r), V in found.items():
            self._V[s, r] = V.T
        self._factors = state.theta.new_tensor(self._gammas).view(-1, 1, 1, 1) - 1


def sharpest_of(objective: Objective, k: int = 5, tolerance: float = 1e-2) -> Directions:
    """The K sharpest directions of a fixed objective."""

    def directions(step: int, theta: Tensor, previous: Tensor | None) -> Tensor:
        return eigenpairs(hessian(objective, theta), k, start=previous, tolerance=tolerance).vectors

    return directions
