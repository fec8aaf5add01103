"""The three ReLU experiments of AVPF as they were run: data, start, samples visited and schedules, draw for draw.

Data and samples come from numpy's legacy generator, weights from torch's, each in the published order, so the
published numbers come out. Data and start are the published float32 numbers, held in float64: to the bit where torch's
kernels are those of the authors' CPU, elsewhere some weights differ in the last bit. Runs at the largest step sizes
tell a change of 1e-8, so their last digits need such a CPU and ``problem.to(dtype=torch.float32)``.

AVPF's loss for these networks is the mean of (h - y)² without ½: their step size γ is our η = 2γ.
Source: Andriushchenko et al. (2023), Figs. on two-layer, multi-layer and one-dimensional ReLU networks, and their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theory.problem import Regression
from theory.relu_network import ReluNetwork
from theory.relu_problems import taught, twelve_points
from theory.schedule import Schedule, Warmup
from theory.trajectory import linear_grid


@dataclass(frozen=True, eq=False)
class PublishedRun:
    """One published experiment: everything that is fixed before SGD starts.

    Attributes:
        problem: the data.
        network: the student.
        start: its initial parameters θ₀, shape (p,).
        steps: number N of SGD steps.
        schedules: the published schedules in our convention.
        seed: of the samples visited.
    """

    problem: Regression
    network: ReluNetwork
    start: Tensor
    steps: int
    schedules: tuple[Schedule, ...]
    seed: int

    def indices(self) -> np.ndarray:
        """The sample visited at each step, shape (1, steps): numpy's legacy choice without replacement, size 1."""
        draws, n = np.random.RandomState(self.seed), self.problem.n
        return np.array([[draws.choice(n, size=1, replace=False)[0] for _ in range(self.steps)]])

    @property
    def grid(self) -> Tensor:
        """The published evaluation steps; the last one, before N, is where final numbers are read."""
        return linear_grid(self.steps, points=151)

    @property
    def rank_inputs(self) -> Tensor:
        """The p inputs at which the Jacobian's rank is taken, shape (p, d).

        The first p held-out inputs, or for one input p uniform draws that follow those of the samples.
        """
        p, X = self.network.size, self.problem.X
        if self.problem.d > 1:
            return self.problem.X_test[:p]
        draws = np.random.RandomState(self.seed)
        for _ in range(self.steps):
            draws.choice(self.problem.n, size=1, replace=False)
        return torch.from_numpy(draws.uniform(float(X.min()), float(X.max()), p)).unsqueeze(1)


def two_layer(seed: int = 0) -> PublishedRun:
    """Teacher-student with 3 and 20 ReLUs in the plane, n = 15: constant η = 0.26, and 0.91 decayed at 10, 30, 50 %."""
    draws, generator = np.random.RandomState(seed + 1), torch.Generator().manual_seed(seed + 1)
    X, X_test = _sphere(draws, 15, 2), _sphere(draws, 1000, 2)
    teacher, student = ReluNetwork((2, 3, 1)), ReluNetwork((2, 20, 1))
    (w, _), (a, _) = teacher.split(_gaussian(teacher, (1.0, 1.0), generator))
    truth = teacher.join([(_unit_rows(w), None), (a.sign(), None)])
    start = _gaussian(student, (0.5, 0.0), torch.Generator().manual_seed(seed)).double()
    decayed = tuple(_decayed(0.91, at, by) for at, by in ((0.1, 2.0), (0.3, 4.0), (0.5, 5.0)))
    problem = taught(teacher, truth, X, X_test, "3 ReLU teachers").to(dtype=torch.float64)
    return PublishedRun(problem, student, start, _steps(4.15), (Schedule(0.26), *decayed), seed)


def multi_layer(seed: int = 5) -> PublishedRun:
    """Teacher 5-2-2-1, student 5-10-10-1, n = 50: η = 0.022, and 0.08 warmed up to 10, 30, 50 % and decayed there."""
    draws, generator = np.random.RandomState(seed + 1), torch.Generator().manual_seed(seed + 1)
    X, X_test = _sphere(draws, 50, 5), _sphere(draws, 1000, 5)
    teacher, student = ReluNetwork((5, 2, 2, 1), (True,) * 3), ReluNetwork((5, 10, 10, 1), (True,) * 3)
    truth = _gaussian(teacher, (1.0,) * 3, generator)
    start = _gaussian(student, (0.8,) * 3, torch.Generator().manual_seed(seed)).double()
    warmed = tuple(_decayed(0.08, at, by, Warmup(at, 6.0, 0.5)) for at, by in ((0.1, 3.5), (0.3, 2.5), (0.5, 5.0)))
    problem = taught(teacher, truth, X, X_test, "ReLU teacher").to(dtype=torch.float64)
    return PublishedRun(problem, student, start, _steps(4.0), (Schedule(0.022), *warmed), seed)


def one_dimensional(factor: float = 400.0, seed: int = 3) -> PublishedRun:
    """100 ReLUs with input biases on twelve points: η = 0.0004 warmed up to 2 or 50 % and decayed there.

    ``factor`` 400 is the published figure, 500 its over-regularised variant.
    """
    network = ReluNetwork((1, 100, 1), (True, False))
    start = _kinked(network, torch.Generator().manual_seed(seed))
    schedules = tuple(_decayed(0.0004, at, by, Warmup(at, factor * at)) for at, by in ((0.02, 2.5), (0.5, 3.0)))
    return PublishedRun(twelve_points(), network, start, _steps(4.5), schedules, seed)


def _decayed(step_size: float, at: float, by: float, warmup: Warmup | None = None) -> Schedule:
    return Schedule(step_size, ((at, by),), warmup=warmup, decay_at_once=True)


def _steps(power: float) -> int:
    return int(10**power) + 1


def _sphere(draws: np.random.RandomState, n: int, d: int) -> Tensor:
    return _unit_rows(torch.from_numpy(draws.standard_normal((n, d))).float())


def _unit_rows(points: Tensor) -> Tensor:
    return points / points.square().sum(1, keepdim=True).sqrt()


def _discarded(network: ReluNetwork, generator: torch.Generator) -> list[Tensor | None]:
    """torch's default weights, drawn and dropped as the published code does; its default biases are kept."""
    kept: list[Tensor | None] = []
    for rows, columns, biased in network.shapes:
        torch.empty(rows, columns).uniform_(generator=generator)
        bound = 1 / math.sqrt(columns)
        kept.append(torch.empty(rows).uniform_(-bound, bound, generator=generator) if biased else None)
    return kept


def _gaussian(network: ReluNetwork, scales: Sequence[float], generator: torch.Generator) -> Tensor:
    biases = _discarded(network, generator)
    weights = [
        scale * torch.randn(rows, columns, generator=generator)
        for scale, (rows, columns, _) in zip(scales, network.shapes, strict=True)
    ]
    return network.join(list(zip(weights, biases, strict=True)))


def _kinked(network: ReluNetwork, generator: torch.Generator) -> Tensor:
    _discarded(network, generator)
    (rows, columns, _), _ = network.shapes
    w = 2.5 * (2 * torch.rand(rows, columns, generator=generator).round() - 1)
    bias = 2.5 * torch.randn(rows, generator=generator)
    a = 4.0 * torch.randn(1, rows, generator=generator)
    return network.join([(w, bias), (a, None)]).double()
