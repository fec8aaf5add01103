"""Replicas of SGD that leave one state together: plain steps on prescribed samples, nothing else, as fast as it goes.

Their mean follows the valley floor as it drifts, and what is left is what the minibatches alone did. For schedules,
weight decay, BatchNorm and the like see :mod:`nets.training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nets.gradients import batched_gradients
from nets.objective import Objective
from theory.streams import named_generator

Draws = Callable[[int], Tensor]


class Epochs:
    """Minibatches of a fresh random order of the data every epoch, a pure function of (root seed, seed, step).

    With ``drop_rest`` the last n mod B samples of each order are left out, as data loaders' ``drop_last`` does.

    Raises:
        ValueError: a batch size that does not divide n; with ``drop_rest``, one above n.
    """

    def __init__(self, n: int, size: int, seeds: Sequence[int], root_seed: int = 0, drop_rest: bool = False) -> None:
        if not 1 <= size <= n or (n % size and not drop_rest):
            choice = f"1 to {n}" if drop_rest else f"a divisor of {n}"
            raise ValueError(f"{n} samples cannot be dealt into batches of {size}: choose {choice}.")
        self._n, self._size, self._seeds, self._root = n, size, list(seeds), root_seed
        self.batches = n // size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Indices of the samples of one step, shape (seeds, B), int64, on the CPU."""
        epoch, place = divmod(step, self.batches)
        if epoch != self._epoch:
            orders = [named_generator(self._root, "epochs", s, block=epoch).permutation(self._n) for s in self._seeds]
            self._epoch, self._order = epoch, torch.from_numpy(np.stack(orders))
        return self._order[:, place * self._size : (place + 1) * self._size]


def replicas(
    objective: Objective,
    theta: Tensor,
    mass: Tensor,
    step_size: float | Tensor,
    steps: int,
    draws: Draws,
    momentum: float | Tensor = 0.0,
    observe: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """m ← μm + g, θ ← θ - ηm for every row of θ, shape (runs, p); returns θ and m after ``steps`` steps.

    A run that stops being finite is NaN from there on.

    Args:
        theta, mass: states, shape (runs, p); not changed.
        step_size, momentum: numbers, or one per run, shape (runs,).
        draws: step ↦ indices of the samples visited, shape (runs, B).
        observe: called with k and the states after k steps, k = 0 … steps - 1; it must not keep or change them.

    Raises:
        ValueError: states that do not fit the objective.
    """
    if theta.ndim != 2 or theta.shape[1] != objective.p or mass.shape != theta.shape:
        raise ValueError(
            f"states of shapes {tuple(theta.shape)} and {tuple(mass.shape)} do not fit {objective.p} parameters: give "
            "(runs, p) twice."
        )
    gradients, device = batched_gradients(objective), objective.X.device
    eta, mu = (torch.as_tensor(a, dtype=theta.dtype, device=device).reshape(-1, 1) for a in (step_size, momentum))
    theta, mass, heavy = theta.clone(), mass.clone(), bool((mu > 0).any())
    for k in range(steps):
        if observe is not None:
            observe(k, theta)
        rows = draws(k).to(device)
        g, _ = gradients(theta, rows)
        mass = mass.mul_(mu).add_(g) if heavy else g
        theta -= eta * mass
    return theta, mass
