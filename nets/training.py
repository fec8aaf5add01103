"""SGD on any network, batched over schedules x seeds, with everything it visits resident on one device.

θ has shape (schedules, seeds, p). Minibatches are a pure function of (root seed, seed, step), so a run resumed from
its state continues bit for bit, and all schedules see the same draws of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nets.gradients import written_gradient
from nets.objective import Objective
from theory.minibatch import Minibatch
from theory.schedule import StepSizes, stack_step_sizes
from theory.streams import named_generator
from theory.trajectory import Probe, Recorder, Trajectory

BLOCK = 128  # steps drawn together
OVERFLOW = 1e100
SMALL = 20_000  # parameters, below which runs are differentiated together


@dataclass(frozen=True, eq=False)
class TrainingState:
    """All that a run needs to go on after ``step`` steps; S schedules, R seeds.

    Attributes:
        theta: parameters, shape (S, R, p).
        mass: momentum m, shape (S, R, p).
        first_bad_step: step at which a run stopped being finite, shape (S, R), int64; -1 where it has not.
        buffers: running statistics of BatchNorm by name, shapes (S, R, ...).
    """

    step: int
    theta: Tensor
    mass: Tensor
    first_bad_step: Tensor
    buffers: Mapping[str, Tensor]

    def buffers_of(self, schedule: int, seed: int) -> dict[str, Tensor]:
        """One run's running statistics, as views."""
        return {name: b[schedule, seed] for name, b in self.buffers.items()}


Direction = Callable[[TrainingState, Tensor], Tensor]


class Batches:
    """Minibatches as a pure function of (root seed, seed, step); of size n without replacement: all samples."""

    def __init__(
        self, n: int, batch: Minibatch, seeds: Sequence[int], root_seed: int = 0, name: str = "batches"
    ) -> None:
        batch.variance_factor(n)  # says so when the batch cannot be drawn
        self._n, self._batch, self._seeds, self._root, self._name = n, batch, list(seeds), root_seed, name
        self._index, self._block = -1, torch.empty(0)
        self.full = not batch.replacement and batch.size == n

    def __call__(self, step: int) -> Tensor:
        """Indices of the samples of one step, shape (seeds, B), int64, on the CPU."""
        index, offset = divmod(step, BLOCK)
        if index != self._index:
            drawn = [self._draw(named_generator(self._root, self._name, seed, block=index)) for seed in self._seeds]
            self._index, self._block = index, torch.from_numpy(np.stack(drawn))
        return self._block[:, offset]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        size = self._batch.size
        if self._batch.replacement or size == 1:
            return generator.integers(0, self._n, (BLOCK, size))
        return np.argsort(generator.random((BLOCK, self._n)), 1)[:, :size].astype(np.int64)


def train(
    objective: Objective,
    start: Tensor | TrainingState,
    schedules: Sequence[StepSizes],
    steps: int,
    *,
    seeds: Sequence[int] = range(8),
    batch: Minibatch | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    probes: Mapping[str, Probe] | None = None,
    direction: Direction | None = None,
    root_seed: int = 0,
    together: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Run m ← μm + g + λθ, θ ← θ - ηm, g the minibatch gradient of L, for every schedule x seed.

    A run whose next θ or minibatch loss is not finite keeps its last θ from that step on.

    Args:
        objective: network, training set and loss. BatchNorm normalises by the minibatch while training.
        start: θ of shape (p,), (seeds, p) or (schedules, seeds, p); or the state in which an earlier run of the same
            schedules, seeds and options ended, to go on from its step to ``steps``.
        schedules: step sizes; their decays refer to ``steps``.
        batch: minibatch size and sampling; 32 with replacement by default.
        probes: what to measure; functions see a :class:`TrainingState`.
        direction: turns the gradients, shape (schedules, seeds, p), into what is stepped along, given the state.
        together: differentiate all runs in one batched pass, or one after the other (always so with running
            statistics). By default together where p < 20 000, unless the network is convolutional, on a CPU, and not
            of the kind that compiled loops know: batching does not pay there.
        progress: called with the number of steps done.

    Returns:
        a trajectory with batch axes (schedule, seed) whose ``final`` is a :class:`TrainingState`.

    Raises:
        ValueError: arguments that do not fit, each with a sentence on what to do.
    """
    batch, seeds = batch or Minibatch(32), list(seeds)
    if steps < 0 or not seeds:
        raise ValueError(f"{steps} steps with {len(seeds)} seeds is not a run: give steps >= 0 and at least one seed.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not usable: choose a number in [0, 1).")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight decay {weight_decay} is not usable: choose a number >= 0.")
    state = _state(objective, start, len(schedules), len(seeds), steps)
    eta = stack_step_sizes(schedules, steps).to(state.theta)
    recorder, draws = Recorder(probes or {}, steps, state.step), Batches(objective.n, batch, seeds, root_seed)
    gradients = _gradients(objective, together)
    due, limit = set(recorder.stops), min(OVERFLOW, torch.finfo(state.theta.dtype).max ** 0.5)
    for k in range(state.step, steps):
        if k in due:
            recorder.record(k, state)
        rows = None if draws.full else draws(k).to(objective.X.device)
        g, losses = gradients(objective, state, rows)
        g = g if weight_decay == 0 else g + weight_decay * state.theta
        g = g if direction is None else direction(state, g)
        mass = g if momentum == 0 else momentum * state.mass + g
        new = state.theta - eta[:, k, None, None] * mass
        broken = ~((new.abs().amax(-1) < torch.inf) & (losses.abs() < limit))  # false for NaN
        bad = torch.where((state.first_bad_step < 0) & broken, k, state.first_bad_step)
        new = torch.where((bad >= 0).unsqueeze(-1), state.theta, new)
        state = replace(state, step=k + 1, theta=new, mass=mass, first_bad_step=bad)
        if progress and (k + 1) % 1024 == 0:
            progress(k + 1)
    recorder.record(steps, state)
    if progress:
        progress(steps)
    return Trajectory(recorder.series(state.first_bad_step), state, state.first_bad_step, ("schedule", "seed"))


Gradients = Callable[[Objective, TrainingState, Tensor | None], tuple[Tensor, Tensor]]


def _gradients(objective: Objective, together: bool | None) -> Gradients:
    """How gradients are found: written out where that is known of a small network, else by autograd."""
    if together is False or objective.net.buffers or (together is None and objective.p >= SMALL):
        return _one_by_one
    found = written_gradient(objective)
    if found is None:
        convolves = any(isinstance(part, nn.Conv2d) for part in objective.net.module.modules())
        slow = convolves and objective.X.device.type == "cpu"
        return _one_by_one if slow and together is None else _together
    written = found.on(objective.X, objective.labels)

    def by_hand(objective: Objective, state: TrainingState, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        S, R, p = state.theta.shape
        rows = rows if rows is None else rows.repeat(S, 1)
        gradient, losses = written(state.theta.view(S * R, p), rows)
        return gradient.view(S, R, p), losses.view(S, R)

    return by_hand


def _together(objective: Objective, state: TrainingState, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients, shape (S, R, p), and losses (S, R): the forward pass is batched once, the backward pass follows."""
    net, axis = objective.net, None if rows is None else 0
    X, labels = (objective.X, objective.labels) if rows is None else (objective.X[rows], objective.labels[rows])
    run = torch.func.vmap(torch.func.vmap(net.outputs, (0, axis)), (0, None))
    with torch.enable_grad():
        leaf = state.theta.detach().requires_grad_()
        outputs = run(leaf, X)
        losses = objective.loss.values(outputs, labels.expand(outputs.shape[:-1])).mean(-1)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return gradient, losses.detach()


def _one_by_one(objective: Objective, state: TrainingState, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, run after run; running statistics are updated in place."""
    gradient, losses = torch.empty_like(state.theta), state.theta.new_empty(state.theta.shape[:2])
    for s in range(state.theta.shape[0]):
        for r in range(state.theta.shape[1]):
            if state.first_bad_step[s, r] >= 0:
                gradient[s, r], losses[s, r] = 0.0, torch.nan
                continue
            X = objective.X if rows is None else objective.X[rows[r]]
            labels = objective.labels if rows is None else objective.labels[rows[r]]
            with torch.enable_grad():
                leaf = state.theta[s, r].detach().requires_grad_()
                outputs = objective.net.outputs(leaf, X, state.buffers_of(s, r), training=True)
                loss = objective.loss.values(outputs, labels).mean()
                (gradient[s, r],) = torch.autograd.grad(loss, leaf)
            losses[s, r] = loss.detach()
    return gradient, losses


def _state(
    objective: Objective, start: Tensor | TrainingState, schedules: int, seeds: int, steps: int
) -> TrainingState:
    net = objective.net
    if isinstance(start, TrainingState):
        if start.theta.shape != (schedules, seeds, net.p) or start.step > steps:
            raise ValueError(
                f"a state of shape {tuple(start.theta.shape)} after {start.step} steps cannot go on to {steps} steps "
                f"of {schedules} schedules and {seeds} seeds: give the ones it was made with."
            )
        # The run updates running statistics in place; the caller's state stays as it is.
        return replace(start, buffers={name: b.clone() for name, b in start.buffers.items()})
    fits = {(net.p,), (seeds, net.p), (schedules, seeds, net.p)}
    if tuple(start.shape) not in fits:
        raise ValueError(
            f"a start of shape {tuple(start.shape)} does not fit {schedules} schedules, {seeds} seeds and {net.p} "
            "parameters: give (p,), (seeds, p) or (schedules, seeds, p)."
        )
    if start.dtype != net.theta.dtype or start.device != net.theta.device:
        raise ValueError(f"the start is {start.dtype} on {start.device}: move it to the network's dtype and device.")
    if not torch.isfinite(start).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    theta = start.detach().expand(schedules, seeds, -1).clone()
    bad = torch.full((schedules, seeds), -1, dtype=torch.int64, device=theta.device)
    buffers = {name: b.expand(schedules, seeds, *b.shape).clone() for name, b in net.buffers.items()}
    return TrainingState(0, theta, torch.zeros_like(theta), bad, buffers)
