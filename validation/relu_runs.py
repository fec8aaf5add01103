"""The ReLU experiments' ensembles: SGD, and the SDEs that are to predict them, with everything the claims need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nets.relu import half_mse, sgd
from simulators.noise import BrownianIncrements
from simulators.relu import Covariance, integrate_relu
from theory import relu
from theory.problem import Regression
from theory.relu import Isotropic, MeasuredLevel
from theory.relu_network import ReluNetwork
from theory.relu_published import PublishedRun
from theory.schedule import Schedule, StepClock
from theory.sde import LabelNoise
from theory.sparsity import distinct_features, feature_sparsity, jacobian_rank
from theory.trajectory import Probe, dense_grid

FLOAT = torch.float32  # of SDEs: noise moves θ by 1e-3 a step, and steps cost less
FLOOR = 1e-30
EARLY, STRIDE = 300, 30  # losses are recorded at every step up to the first, then once in the second
SDE_STRIDE = 4 * STRIDE  # what SDEs are told is SGD's loss: theirs is only averaged and drawn


@dataclass(frozen=True, eq=False)
class Experiment:
    """One ReLU experiment: data, network, start, and the schedules held against the SDE.

    Attributes:
        name: what series and settings are called, e.g. ``two-layer``.
        threshold: correlation at which units count as duplicates.
    """

    name: str
    problem: Regression
    network: ReluNetwork
    start: Tensor
    steps: int
    schedules: tuple[Schedule, ...]
    rank_inputs: Tensor
    threshold: float = 0.99

    @classmethod
    def of(
        cls, name: str, run: PublishedRun, steps: int, schedules: Sequence[Schedule], threshold: float = 0.99
    ) -> Experiment:
        """A published run, with its own or other steps and schedules."""
        return cls(name, run.problem, run.network, run.start, steps, tuple(schedules), run.rank_inputs, threshold)

    def loss(self, theta: Tensor) -> Tensor:
        """L, shape (...)."""
        return half_mse(self.network, theta, self.problem.X, self.problem.y)

    def setting(self, schedule: Schedule) -> str:
        """What tables call a schedule."""
        return f"{self.name}: {schedule.label}"

    @property
    def hidden(self) -> int:
        """Number of hidden layers."""
        return self.network.depth - 1

    def balance(self, theta: Tensor) -> Tensor:
        """Σ over hidden units of ‖in‖² - ‖out‖², shape (...)."""
        layers = [relu.balance(self.network, theta, layer).sum(-1) for layer in range(1, self.hidden + 1)]
        return torch.stack(layers).sum(0)

    def final_measures(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What is read at the end of a run, by the name used in results; values have the shape of θ's batch."""
        network, problem, last = self.network, self.problem, self.hidden

        def features(theta: Tensor) -> Tensor:
            return network.activations(theta, problem.X, last)

        def test_loss(theta: Tensor) -> Tensor:
            return half_mse(network, theta, problem.X_test, problem.y_test).clamp(min=FLOOR).log()

        def mean_column(theta: Tensor) -> Tensor:
            return relu.column_norms(network, theta, problem.X).mean(-1)

        return {
            "sparsity": lambda theta: feature_sparsity(features(theta), self.threshold),
            "distinct features": lambda theta: distinct_features(features(theta), self.threshold),
            "rank": lambda theta: jacobian_rank(network, theta, self.rank_inputs),
            "balance": self.balance,
            "ln test loss": test_loss,
            "mean column norm": mean_column,
        }


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Finished runs of one schedule.

    Attributes:
        final: measures at the end by name, shape (replicates,), NaN where a run diverged.
        finite: which did not diverge, shape (replicates,).
        steps, loss: the loss curve, shape (T,) and (T, replicates).
        theta: final states, shape (replicates, p).
    """

    final: Mapping[str, Tensor]
    finite: Tensor
    steps: Tensor
    loss: Tensor
    theta: Tensor

    @classmethod
    def of(cls, experiment: Experiment, theta: Tensor, finite: Tensor, steps: Tensor, loss: Tensor) -> Ensemble:
        final = {}
        for name, measure in experiment.final_measures().items():
            final[name] = measure(theta).masked_fill(~finite, torch.nan)
        return cls(final, finite, steps, loss, theta)

    def level(self, eta: Tensor) -> Tensor:
        """ln of the mean loss over the steps from 1 % of the run on whose size is at least 0.7 of the largest."""
        phase = (eta[self.steps] > 0.7 * eta.max()) & (self.steps >= 0.01 * len(eta)) & (self.steps % STRIDE == 0)
        return self.loss[phase].mean(0).clamp(min=FLOOR).log()


def sgd_ensemble(experiment: Experiment, seeds: Sequence[int], root_seed: int) -> list[Ensemble]:
    """SGD with one sample a step on every schedule × seed, one ensemble a schedule."""
    grid = dense_grid(experiment.steps, every_until=EARLY, stride=STRIDE)
    run = sgd(
        experiment.network, experiment.problem, experiment.start, experiment.schedules, experiment.steps, seeds=seeds,
        probes={"loss": Probe(experiment.loss, grid)}, root_seed=root_seed,
    )  # fmt: skip
    return [
        Ensemble.of(experiment, run.final[c], run.finite[c], grid, run["loss"].values[:, c])
        for c in range(len(experiment.schedules))
    ]


def simulate(
    experiment: Experiment,
    schedule: Schedule,
    covariance: Callable[[StepClock], Covariance],
    paths: int,
    root_seed: int,
    stream: str,
    substeps: int,
    dtype: torch.dtype = FLOAT,
) -> Ensemble:
    """The SDE on a schedule, ``substeps`` Euler-Maruyama steps for each of SGD's; measured in float64."""
    eta, network = schedule.step_sizes(experiment.steps), experiment.network
    noise_of = covariance(StepClock(eta))
    channels = network.size if isinstance(noise_of, Isotropic) else experiment.problem.n
    noise = BrownianIncrements(root_seed, f"{experiment.setting(schedule)} {stream}", paths, channels, dtype=dtype)
    at = torch.arange(0, experiment.steps, SDE_STRIDE)
    run = integrate_relu(
        network, experiment.problem, noise_of, experiment.start.expand(paths, -1).to(dtype),
        (eta / substeps).repeat_interleave(substeps), experiment.steps * substeps, noise,
        {"loss": Probe(lambda theta: experiment.loss(theta.double()), at * substeps)},
    )  # fmt: skip
    return Ensemble.of(experiment, run.final.double(), run.finite, at, run["loss"].values)


def level_of(ensemble: Ensemble, rows: Tensor, schedule: Schedule, steps: int) -> MeasuredLevel:
    """The measured δ(k) of some runs of SGD."""
    return MeasuredLevel(ensemble.steps, ensemble.loss[:, rows].contiguous(), schedule.step_sizes(steps))


def gradient_descent(experiment: Experiment, schedule: Schedule) -> Ensemble:
    """No noise, SGD's own steps: what finite steps do by themselves."""
    return simulate(experiment, schedule, lambda clock: LabelNoise(clock, 0.0), 1, 0, "descent", 1, torch.float64)


def gradient_flow(experiment: Experiment) -> Ensemble:
    """No noise: gradient descent at half the first schedule's step size, as good as the flow."""
    first = experiment.schedules[0]
    return simulate(experiment, first, lambda clock: LabelNoise(clock, 0.0), 1, 0, "flow", 2, torch.float64)
