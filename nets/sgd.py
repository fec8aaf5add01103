"""SGD on the squared loss of any model h(θ, X), batched over schedules × seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nets.sampling import Draws
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.schedule import StepSizes, stack_step_sizes
from theory.trajectory import Probe, Recorder, Trajectory

BLOCK = 1024
OVERFLOW = 1e100
Model = Callable[[Tensor, Tensor], Tensor]


def sgd(
    model: Model,
    problem: Regression,
    start: Tensor,
    schedules: Sequence[StepSizes],
    steps: int,
    *,
    seeds: Sequence[int] = range(32),
    batch: Minibatch | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    label_noise: float = 0.0,
    probes: Mapping[str, Probe] | None = None,
    root_seed: int = 0,
    indices: np.ndarray | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Run m ← μm + g + λθ, θ ← θ - ηm with g = (1/B) Σ r_i ∇h(θ, x_i) for every schedule × seed at once.

    g is the minibatch gradient of L = (1/2n) Σ r_i², r_i = h(θ, x_i) - y_i; m starts at 0. A run whose next θ is not
    finite, or a residual of which exceeds 1e100 (in float32 1.8e19), keeps its last θ from that step on. The draws
    are those of :func:`nets.diagonal.sgd` for the same seeds.

    Args:
        model: h taking θ of shape (p,) and inputs of shape (B, d), returning shape (B,); ``torch.func`` has to be able
            to differentiate and batch it.
        start: initial θ, shape (p,) or (schedules, seeds, p), in the problem's dtype and on its device.
        seeds: seeds of the draws. All schedules see the same draws of a seed, so they can be compared pairwise.
        batch: minibatch size and sampling; one sample with replacement by default.
        momentum: μ in [0, 1) of the heavy ball.
        weight_decay: λ ≥ 0, multiplied by the step size: θ ← θ - η(g + λθ) without momentum.
        label_noise: standard deviation of explicit label noise, fresh for every sample drawn.
        probes: what to measure; functions see θ of shape (schedules, seeds, p).
        indices: samples to visit instead of random ones, shape (seeds, steps) or (seeds, steps, B).
        progress: called with the number of steps done.

    Returns:
        a trajectory with batch axes (schedule, seed) and the final θ, shape (schedules, seeds, p).

    Raises:
        ValueError: arguments that do not fit, each with a sentence on what to do.

    Source: Andriushchenko et al. (2023), SGD with and without explicit label noise.
    """
    batch, seeds = batch or Minibatch(), list(seeds)
    if steps < 0 or not seeds:
        raise ValueError(f"{steps} steps with {len(seeds)} seeds is not a run: give steps >= 0 and at least one seed.")
    _check_options(momentum, weight_decay, label_noise)
    eta = stack_step_sizes(schedules, steps).to(problem.X)
    theta = _start(model, problem, start, len(schedules), len(seeds))
    recorder = Recorder(probes or {}, steps)
    draws = Draws(problem.n, batch, seeds, steps, root_seed, label_noise, indices)
    minibatches = _Minibatches(problem, draws, len(schedules), len(seeds))
    due = set(recorder.stops)
    mass, bad = torch.zeros_like(theta), torch.full(theta.shape[:2], -1, dtype=torch.int64, device=theta.device)
    limit = min(OVERFLOW, torch.finfo(theta.dtype).max ** 0.5)
    predict = torch.func.vmap(model, (0, minibatches.axis))
    for k in range(steps):
        if k in due:
            recorder.record(k, theta)
        x, y = minibatches.step(k, steps)
        r, gradient = _gradient(predict, theta, x, y)
        mass = momentum * mass + gradient + weight_decay * theta
        new = theta - eta[:, k, None, None] * mass
        broken = ~(torch.isfinite(new).all(-1) & (r.abs() < limit).all(-1))
        bad = torch.where((bad < 0) & broken, k, bad)
        theta = torch.where((bad >= 0).unsqueeze(-1), theta, new)
        if progress and (k + 1) % BLOCK == 0:
            progress(k + 1)
    recorder.record(steps, theta)
    if progress:
        progress(steps)
    return Trajectory(recorder.series(bad), theta, bad, ("schedule", "seed"))


def _gradient(predict: Model, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals, shape (schedules, seeds, B), and (1/B) Σ r ∇h of every run, like θ."""
    every = theta.detach().flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        h = predict(every, x)
    r = h.detach().view(*theta.shape[:2], -1) - y
    (gradient,) = torch.autograd.grad(h, every, (r / r.shape[-1]).flatten(0, 1))
    return r, gradient.view_as(theta)


class _Minibatches:
    """Inputs and targets of each step on the device; with every sample in every step the inputs are never copied."""

    def __init__(self, problem: Regression, draws: Draws, schedules: int, seeds: int) -> None:
        self._problem, self._draws, self._schedules, self._seeds = problem, draws, schedules, seeds
        self._rows, self._shift = torch.empty(0), torch.empty(0)

    @property
    def axis(self) -> int | None:
        """The axis of the inputs that counts runs, if there is one."""
        return None if self._draws.full_batch else 0

    def step(self, k: int, steps: int) -> tuple[Tensor, Tensor]:
        """Inputs (schedules · seeds, B, d), or (n, d) where they are everyone's, and targets (seeds, B) of step k."""
        X, y, at = self._problem.X, self._problem.y, k % BLOCK
        if at == 0:
            index, shift = self._draws.block(k, min(BLOCK, steps - k))
            self._rows = torch.from_numpy(index.astype(np.int64)).to(X.device)
            self._shift = torch.from_numpy(shift).to(X)
        if self._draws.full_batch:
            x, targets = X, y.expand(self._seeds, -1)
        else:
            rows = self._rows[:, at]
            x, targets = X[rows].expand(self._schedules, -1, -1, -1).flatten(0, 1), y[rows]
        return x, targets + self._shift[:, at] if self._shift.numel() else targets


def _start(model: Model, problem: Regression, start: Tensor, schedules: int, seeds: int) -> Tensor:
    """The start for every replicate, shape (schedules, seeds, p)."""
    if start.ndim not in (1, 3) or (start.ndim == 3 and start.shape[:2] != (schedules, seeds)) or not start.numel():
        raise ValueError(
            f"a start of shape {tuple(start.shape)} does not fit: give (p,) or ({schedules}, {seeds}, p) for "
            f"{schedules} schedules and {seeds} seeds."
        )
    if start.dtype != problem.X.dtype or start.device != problem.X.device:
        raise ValueError(
            f"the start is {start.dtype} on {start.device} and the problem {problem.X.dtype} on {problem.X.device}: "
            "move one of them with .to()."
        )
    if not torch.isfinite(start).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    shown = model(start.reshape(-1, start.shape[-1])[0], problem.X).shape
    if shown != (problem.n,):
        raise ValueError(f"the model returns shape {tuple(shown)} for {problem.n} inputs: return one number per input.")
    return start.detach().expand(schedules, seeds, -1).clone()


def _check_options(momentum: float, weight_decay: float, label_noise: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not usable: choose a number in [0, 1).")
    for what, value in (("weight decay", weight_decay), ("label noise", label_noise)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{what} {value} is not usable: choose a number >= 0.")
