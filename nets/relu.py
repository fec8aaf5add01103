"""SGD and GD on fully connected ReLU networks, batched over schedules × seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from nets.relu_torch import LiteralEngine, ReplayedEngine
from nets.sampling import Draws
from theory.device import has_triton
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.relu_network import ReluNetwork
from theory.schedule import Schedule, stack_step_sizes
from theory.sparsity import active_fraction, distinct_features, feature_sparsity
from theory.trajectory import Probe, Recorder, Trajectory

if TYPE_CHECKING:
    from nets.relu_compiled import CompiledEngine

BLOCK = 1024
EngineName = Literal["auto", "compiled", "replayed", "literal"]
LossName = Literal["squared", "logistic"]


def standard_measurements(
    network: ReluNetwork, problem: Regression, threshold: float = 0.99
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses and sparsity of every hidden layer on the training inputs, by the names used in results.

    With one hidden layer the sparsity measures are called "sparsity", "distinct features", "active fraction"; with
    more, "sparsity 1", "sparsity 2", … from the inputs up.
    """

    def loss(X: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda theta: half_mse(network, theta, X, y)

    measures = {"train loss": loss(problem.X, problem.y), "test loss": loss(problem.X_test, problem.y_test)}
    for layer in range(1, network.depth):
        suffix = f" {layer}" if network.depth > 2 else ""
        measures |= {
            name + suffix: measure for name, measure in _layer_measurements(network, problem, threshold, layer)
        }
    return measures


def half_mse(network: ReluNetwork, theta: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """L = (1/2n) Σ (h(θ, x_i) - y_i)², shape (...) for θ (..., p); compiled on the CPU in float64."""
    compilable = theta.device.type == "cpu" and theta.dtype == X.dtype == torch.float64 and not theta.requires_grad
    if compilable and len(X):
        from nets import relu_compiled

        return relu_compiled.half_mse(network, theta, X, y)
    return (network(theta, X) - y).square().mean(-1) / 2


def _layer_measurements(
    network: ReluNetwork, problem: Regression, threshold: float, layer: int
) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    def of(measure: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda theta: measure(network.activations(theta, problem.X, layer))

    return [
        ("sparsity", of(lambda phi: feature_sparsity(phi, threshold))),
        ("distinct features", of(lambda phi: distinct_features(phi, threshold))),
        ("active fraction", of(active_fraction)),
    ]


def sgd(
    network: ReluNetwork,
    problem: Regression,
    start: Tensor,
    schedules: Sequence[Schedule],
    steps: int,
    *,
    seeds: Sequence[int] = range(32),
    batch: Minibatch | None = None,
    loss: LossName = "squared",
    label_noise: float = 0.0,
    label_noise_decays: bool = False,
    averaging: float = 0.0,
    probes: Mapping[str, Probe] | None = None,
    root_seed: int = 0,
    indices: np.ndarray | None = None,
    engine: EngineName = "auto",
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Run θ ← θ - η (1/B) Σ ∇ℓ(h(θ, x_i), y_i) for every schedule × seed at once.

    ℓ is ½(h - y)², so L = (1/2n) Σ r_i² (AVPF's code for these networks drops the ½: their step size γ is η = 2γ),
    or with ``logistic`` ln(1 + e^{-yh}) for labels ±1. A run a residual (with ``logistic``, output) of which
    exceeds 1e100 (in float32 1.8e19) keeps its last θ from that step on. The draws are those of
    :func:`nets.diagonal.sgd` and :func:`nets.sgd.sgd` for the same seeds.

    Args:
        network: the layout of θ; one or more hidden layers, with or without biases.
        start: initial θ, shape (p,), (seeds, p) or (schedules, seeds, p), in the problem's dtype and on its device.
        seeds: seeds of the draws. All schedules see the same draws of a seed, so they can be compared pairwise.
        batch: minibatch size and sampling; one sample with replacement by default.
        label_noise: standard deviation of explicit label noise, fresh for every sample drawn.
        label_noise_decays: divide that standard deviation by the schedule's decays, as the step size is.
        averaging: ω in [0, 1) of the running average θ̄ ← ωθ̄ + (1-ω)θ; what is measured is then θ̄.
        probes: what to measure; functions see θ of shape (schedules, seeds, p).
        indices: samples to visit instead of random ones, shape (seeds, steps) or (seeds, steps, B).
        engine: ``compiled`` (CPU, float64), ``replayed`` (torch, recorded as a CUDA graph) or ``literal`` (torch,
            step by step); ``auto`` takes the first that is made for the device. All see the same draws.
        progress: called with the number of steps done.

    Returns:
        a trajectory with batch axes (schedule, seed) and the final θ, shape (schedules, seeds, p).

    Raises:
        ValueError: arguments that do not fit, each with a sentence on what to do.
    """
    batch, seeds = batch or Minibatch(), list(seeds)
    if steps < 0 or not seeds:
        raise ValueError(f"{steps} steps with {len(seeds)} seeds is not a run: give steps >= 0 and at least one seed.")
    _check_options(problem, loss, label_noise, averaging)
    eta = stack_step_sizes(schedules, steps).numpy()
    decay = np.stack([schedule.decay_factors(steps).numpy() for schedule in schedules])
    scale = 1 / decay if label_noise_decays else np.ones_like(eta)
    shape = (len(schedules), len(seeds))
    runner = _engine(engine, network, problem, _start(network, problem, start, *shape), loss, averaging)
    recorder = Recorder(probes or {}, steps)
    there = problem.X.device if has_triton(problem.X.device) and isinstance(runner, ReplayedEngine) else None
    draws = Draws(problem.n, batch, seeds, steps, root_seed, label_noise, indices, there)
    stops = sorted({*recorder.stops, *range(0, steps, BLOCK), steps})
    index, shift, block_start = np.empty((0, 0, 0), dtype=np.int32), np.empty((0, 0, 0)), 0
    for begin, end in zip(stops, [*stops[1:], steps], strict=True):
        if begin in recorder.stops:
            recorder.record(begin, runner.state().reshape(*shape, -1))
        if begin % BLOCK == 0 and begin < steps:
            block_start = begin
            index, shift = draws.block(begin, min(BLOCK, steps - begin))
        if end > begin:
            cut, now = slice(begin - block_start, end - block_start), slice(begin, end)
            runner.advance(index[:, cut], shift[:, cut], eta[:, now], scale[:, now], begin)
        if progress:
            progress(end)
    bad = runner.bad.reshape(shape)
    return Trajectory(recorder.series(bad), runner.state().reshape(*shape, -1), bad, ("schedule", "seed"))


def gd(
    network: ReluNetwork,
    problem: Regression,
    start: Tensor,
    schedules: Sequence[Schedule],
    steps: int,
    *,
    loss: LossName = "squared",
    label_noise: float = 0.0,
    averaging: float = 0.0,
    probes: Mapping[str, Probe] | None = None,
    seeds: Sequence[int] = (0,),
    root_seed: int = 0,
    engine: EngineName = "auto",
) -> Trajectory:
    """Full-batch gradient descent: :func:`sgd` with every sample in every step. Seeds matter for label noise only."""
    return sgd(
        network, problem, start, schedules, steps, seeds=seeds, batch=Minibatch(problem.n, replacement=False),
        loss=loss, label_noise=label_noise, averaging=averaging, probes=probes, root_seed=root_seed, engine=engine,
    )  # fmt: skip


def _engine(
    name: EngineName, network: ReluNetwork, problem: Regression, theta: Tensor, loss: LossName, averaging: float
) -> CompiledEngine | ReplayedEngine | LiteralEngine:
    on_cpu = problem.X.device.type == "cpu"
    compilable = on_cpu and problem.X.dtype == torch.float64
    if name == "auto":
        name = "compiled" if compilable else "literal" if on_cpu else "replayed"
    if name == "literal":
        return LiteralEngine(network, problem, theta, loss == "logistic", averaging)
    if name == "replayed":
        return ReplayedEngine(network, problem, theta, loss == "logistic", averaging)
    if not compilable:
        raise ValueError("the compiled engine needs float64 data on the CPU: choose engine='auto'.")
    from nets.relu_compiled import CompiledEngine

    return CompiledEngine(network, problem, theta, loss == "logistic", averaging)


def _start(network: ReluNetwork, problem: Regression, start: Tensor, schedules: int, seeds: int) -> Tensor:
    """The start for every replicate, shape (schedules · seeds, p)."""
    shapes = [(network.size,), (seeds, network.size), (schedules, seeds, network.size)]
    if tuple(start.shape) not in shapes:
        raise ValueError(
            f"a start of shape {tuple(start.shape)} does not fit: give {', '.join(map(str, shapes))} for {schedules} "
            f"schedules and {seeds} seeds of the network {network.widths}."
        )
    if problem.d != network.widths[0]:
        raise ValueError(f"the network takes {network.widths[0]} inputs and the problem has {problem.d}: change one.")
    if start.dtype != problem.X.dtype or start.device != problem.X.device:
        raise ValueError(
            f"the start is {start.dtype} on {start.device} and the problem {problem.X.dtype} on {problem.X.device}: "
            "move one of them with .to()."
        )
    if not torch.isfinite(start).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    return start.detach().expand(schedules, seeds, -1).reshape(schedules * seeds, -1).clone()


def _check_options(problem: Regression, loss: LossName, label_noise: float, averaging: float) -> None:
    if loss not in ("squared", "logistic"):
        raise ValueError(f"there is no loss '{loss}': choose 'squared' or 'logistic'.")
    if loss == "logistic" and not (problem.y.abs() == 1).all():
        raise ValueError("the logistic loss needs labels -1 and 1: code the classes so.")
    if not 0 <= label_noise < float("inf"):
        raise ValueError(f"label noise {label_noise} is not usable: choose a number >= 0.")
    if not 0 <= averaging < 1:
        raise ValueError(f"averaging weight {averaging} is not usable: choose a number in [0, 1).")
