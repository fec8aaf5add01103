"""SGD and GD on the diagonal linear network h(x) = ⟨u∘v, x⟩, batched over schedules × seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nets.diagonal_torch import Engine, LiteralEngine, MultiplicativeEngine
from nets.sampling import Draws
from nets.update import Update
from theory import observables
from theory.device import has_triton, interprets_triton
from theory.diagonal import DiagonalState
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.schedule import Schedule, StepSizes, stack_step_sizes
from theory.trajectory import Probe, Recorder, Trajectory

BLOCK = 1024
SEEN_BYTES, SEEN_BYTES_ON_GPU = 2**21, 2**29  # of recorded states that are kept until they are measured together
MOST_FEATURES_ON_CHIP = 8192
EngineName = Literal["auto", "compiled", "triton", "multiplicative", "literal"]


def initial_state(problem: Regression, u0: float | Tensor = 0.1, v0: float | Tensor = 0.0) -> DiagonalState:
    """The start u = u0, v = v0 (numbers or shape (d,)), AVPF's default 0.1 and 0, on the problem's device."""
    X = problem.X
    u, v = (torch.as_tensor(part, dtype=X.dtype, device=X.device).expand(problem.d) for part in (u0, v0))
    return DiagonalState.from_uv(u, v)


def standard_measurements(problem: Regression) -> dict[str, Callable[[DiagonalState], Tensor]]:
    """Train and test loss, ℓ1, ℓ0, mean ln α and balancedness, by the names used in results.

    All take states with any leading axes, so that a :class:`~theory.trajectory.Probe` may have them ``at_once``.
    """
    train_loss, test_loss = (
        observables.HalfMSE(*data) for data in ((problem.X, problem.y), (problem.X_test, problem.y_test))
    )
    return {
        "train loss": lambda state: train_loss(state.w),
        "test loss": lambda state: test_loss(state.w),
        "l1": lambda state: observables.l1_norm(state.w),
        "l0": lambda state: observables.support_size(state.w),
        "ln alpha": lambda state: state.mean_log_alpha,
        "balancedness": lambda state: observables.balancedness(state.u, state.v),
    }


def sgd(
    problem: Regression,
    start: DiagonalState,
    schedules: Sequence[StepSizes],
    steps: int,
    *,
    seeds: Sequence[int] = range(32),
    batch: Minibatch | None = None,
    update: Update | None = None,
    probes: Mapping[str, Probe] | None = None,
    root_seed: int = 0,
    indices: np.ndarray | None = None,
    engine: EngineName = "auto",
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Run SGD on L = (1/2n)‖X(u∘v) - y‖² for every schedule × seed at once.

    Args:
        start: initial state, shape (d,) or (schedules, seeds, d).
        seeds: seeds of the draws. All schedules see the same draws of a seed, so they can be compared pairwise.
        batch: minibatch size and sampling; one sample with replacement by default.
        update: options beside the plain step.
        probes: what to measure; functions see states of shape (schedules, seeds, d).
        indices: samples to visit instead of random ones, shape (seeds, steps) or (seeds, steps, B).
        engine: ``compiled`` (CPU, float64), ``triton`` (CUDA, float64), ``multiplicative`` (torch) or ``literal``
            (torch, in u and v); ``auto`` takes the first that can do what is asked. All see the same draws.
        progress: called with the number of steps done.

    Returns:
        a trajectory with batch axes (schedule, seed) and the final :class:`DiagonalState`.

    Raises:
        ValueError: arguments that do not fit, each with a sentence on what to do.
    """
    batch, update, seeds = batch or Minibatch(), update or Update(), list(seeds)
    if steps < 0 or not seeds:
        raise ValueError(f"{steps} steps with {len(seeds)} seeds is not a run: give steps >= 0 and at least one seed.")
    eta = stack_step_sizes(schedules, steps).numpy()
    recorder = Recorder(probes or {}, steps)
    engine = _engine_name(engine, problem, update)
    on_device = problem.X.device if engine == "triton" else None
    draws = Draws(problem.n, batch, seeds, steps, root_seed, update.label_noise, indices, on_device)
    runner = _engine(engine, problem, start.expand(len(schedules), len(seeds)), update)
    shape = (len(schedules), len(seeds))
    records = np.array([stop for stop in recorder.stops if stop < steps], dtype=np.int64)
    together = SEEN_BYTES if problem.X.device.type == "cpu" else SEEN_BYTES_ON_GPU
    most = max(1, together // (24 * runner.state().a.numel()))
    for begin in range(0, steps, BLOCK):
        length = min(BLOCK, steps - begin)
        index, shift = draws.block(begin, length)
        at = records[(records >= begin) & (records < begin + length)] - begin
        for first, last in itertools.pairwise([0, *at[most::most].tolist(), length]):
            now = begin + first
            draw = _columns(index, first, last), _columns(shift, first, last)
            sizes, inside = _columns(eta, now, begin + last), at[(at >= first) & (at < last)] - first
            if len(inside):
                seen = runner.visit(*draw, sizes, now, inside)
                recorder.record_several((now + inside).tolist(), _shaped(seen, (len(inside), *shape)))
            else:
                runner.advance(*draw, sizes, now)
            if progress:
                progress(begin + last)
    recorder.record(steps, _shaped(runner.state(), shape))
    bad = runner.bad.reshape(shape)
    return Trajectory(recorder.series(bad), _shaped(runner.state(), shape), bad, ("schedule", "seed"))


def gd(
    problem: Regression,
    start: DiagonalState,
    schedules: Sequence[StepSizes],
    steps: int,
    *,
    update: Update | None = None,
    probes: Mapping[str, Probe] | None = None,
    seeds: Sequence[int] = (0,),
    root_seed: int = 0,
    engine: EngineName = "auto",
) -> Trajectory:
    """Full-batch gradient descent: :func:`sgd` with every sample in every step. Seeds matter for label noise only."""
    return sgd(
        problem, start, schedules, steps, seeds=seeds, batch=Minibatch(problem.n, replacement=False), update=update,
        probes=probes, root_seed=root_seed, engine=engine,
    )  # fmt: skip


def valley_projection(
    problem: Regression, state: DiagonalState, step_size: float = 0.5, steps: int = 2000
) -> DiagonalState:
    """The bottom of the valley below each state: ``steps`` of gradient descent with a small ``step_size``."""
    batch = state.a.shape[:-1]
    flat = DiagonalState(*(p.reshape(1, -1, problem.d) for p in (state.a, state.b, state.a_exponent, state.b_exponent)))
    below = gd(problem, flat, [Schedule(step_size)], steps, seeds=range(flat.a.shape[1])).final
    return _shaped(below, batch)


def _engine_name(name: EngineName, problem: Regression, update: Update) -> EngineName:
    """The engine that runs.

    Raises:
        ValueError: one that cannot do what is asked.
    """
    if name not in get_args(EngineName):
        raise ValueError(f"there is no engine '{name}': choose {', '.join(get_args(EngineName))}.")
    double, device = problem.X.dtype == torch.float64, problem.X.device
    compilable = device.type == "cpu" and double
    on_chip = double and problem.d <= MOST_FEATURES_ON_CHIP
    if name == "auto":
        if not update.multiplicative:
            return "literal"
        return "compiled" if compilable else "triton" if on_chip and has_triton(device) else "multiplicative"
    if name != "literal" and not update.multiplicative:
        raise ValueError(
            "balance shrinkage, normalised gradients and SAM need the literal engine: choose engine='literal'."
        )
    if name == "compiled" and not compilable:
        raise ValueError("the compiled engine needs float64 data on the CPU: choose engine='auto'.")
    if name == "triton" and not (on_chip and (has_triton(device) or interprets_triton(device))):
        raise ValueError(
            "the triton engine needs float64 data of at most 8192 features on a CUDA device with Triton: "
            "choose engine='auto'."
        )
    return name


def _engine(name: EngineName, problem: Regression, start: DiagonalState, update: Update) -> Engine:
    flat = DiagonalState(*(p.flatten(0, -2).clone() for p in (start.a, start.b, start.a_exponent, start.b_exponent)))
    if name == "literal":
        return LiteralEngine(problem, flat, update)
    if name == "multiplicative":
        return MultiplicativeEngine(problem, flat, update)
    if name == "triton":
        from nets.diagonal_triton import TritonEngine

        return TritonEngine(problem, flat, update.weight_decay, update.averaging)
    from nets.diagonal_compiled import CompiledEngine

    return CompiledEngine(problem, flat, update.weight_decay, update.averaging)


def _columns(block: Any, first: int, last: int) -> Any:
    """Steps ``first`` … ``last`` - 1 of draws (an array, or a tensor on its device), contiguous."""
    part = block[:, first:last]
    return np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part.contiguous()


def _shaped(state: DiagonalState, batch: Sequence[int]) -> DiagonalState:
    parts = (state.a, state.b, state.a_exponent, state.b_exponent)
    return DiagonalState(*(part.reshape(*batch, part.shape[-1]) for part in parts))
