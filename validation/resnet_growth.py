"""Which units of a residual network grow, and which shrink: Itô's rate of ln‖θ_j‖ against real SGD over a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nets.batch_statistics import on_batch_statistics
from nets.objective import CROSS_ENTROPY, FlatNet, Objective
from nets.training import train
from nets.units import hidden_layers
from theory.growth_rate import Dynamics, GrowthRate, unit_growth
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.streams import named_generator
from theory.trajectory import Probe
from validation.resnet_runs import Experiment

INTERVALS = 40  # in which the window is cut; rates are taken in the middle of each
TOGETHER = 4  # replicas whose mean is one measurement
DRAWS = 200  # of the martingale part, for the correlation to expect
MINIBATCHES = 18  # whose gradients tell a rate; many moments count for more than many gradients at each
ENDLESS = 10**9  # minibatches that could be drawn


@dataclass(frozen=True)
class Window:
    """Where and how long units are watched.

    Attributes:
        burn_in: SGD steps of the one run whose end all replicas share.
        apart: steps in which they part, before the window.
        steps: of the window.
        replicas: runs.
        weight_decay: λ of SGD.
    """

    burn_in: int
    apart: int
    steps: int
    replicas: int
    weight_decay: float = 0.0


@dataclass(frozen=True, eq=False)
class Growth:
    """Changes of ln‖θ_j‖ over a window; every array (replicas, units), the units of all layers one after the other.

    Attributes:
        layers: the layer of each unit, (units,).
        realised: by SGD.
        drift, noise: the two terms of the rate, summed along SGD's path.
        ahead: the whole rate at the state that all replicas share, times the window's length.
        variance: of ln‖θ_j‖, by the martingale part of the same equation.
        error: sampling variance of the sum, from the scatter of the rate between the moments at which it was taken.
    """

    layers: np.ndarray
    realised: np.ndarray
    drift: np.ndarray
    noise: np.ndarray
    ahead: np.ndarray
    variance: np.ndarray
    error: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """∫ rate dt along the path."""
        return self.drift + self.noise

    def correlation(self, predicted: np.ndarray) -> np.ndarray:
        """Spearman's rank correlation over units, of means over :data:`TOGETHER` replicas at a time, (groups,)."""
        return _rank_correlation(_grouped(predicted), _grouped(self.realised))

    def signs(self, predicted: np.ndarray) -> np.ndarray:
        """The share of units that move the way that was predicted, of the same means, (groups,)."""
        return _same_sign(_grouped(predicted), _grouped(self.realised))

    def expected(self, root: int) -> tuple[np.ndarray, np.ndarray]:
        """Both if the equation held: normal martingale parts, and rates that were sampled as these were.

        The rates' own scatter over units is what the sampled ones have, less the sampling variance, on average over
        groups.
        """
        predicted = _grouped(self.predicted)
        apart, sampling = (_grouped(part) / TOGETHER for part in (self.variance, self.error))
        middle = predicted.mean(1, keepdims=True)
        shrunk = max(1 - sampling.mean() / predicted.var(1).mean(), 0.0) ** 0.5
        true = middle + shrunk * (predicted - middle)
        first, second = named_generator(root, "martingale").standard_normal((2, DRAWS, *predicted.shape))
        rates, outcomes = true + sampling**0.5 * first, true + apart**0.5 * second
        return _rank_correlation(rates, outcomes).mean(0), _same_sign(rates, outcomes).mean(0)

    def table(self) -> np.ndarray:
        """Units that on average were predicted to (shrink, grow) x found to (shrink, grow), (2, 2)."""
        shrinks, shrank = self.predicted.mean(0) < 0, self.realised.mean(0) < 0
        pairs = [(shrinks & shrank), (shrinks & ~shrank), (~shrinks & shrank), (~shrinks & ~shrank)]
        return np.array([int(pair.sum()) for pair in pairs]).reshape(2, 2)


def _grouped(values: np.ndarray) -> np.ndarray:
    """Means over consecutive groups of replicas, (groups, units)."""
    groups = len(values) // TOGETHER
    return values[: groups * TOGETHER].reshape(groups, TOGETHER, -1).mean(1)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's, along the last axis."""
    ranks = [stats.rankdata(values, axis=-1) for values in (first, second)]
    a, b = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    return np.asarray((a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)))


def _same_sign(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(((first < 0) == (second < 0)).mean(-1))


def growth(experiment: Experiment, window: Window) -> Growth:
    """SGD of the experiment's one cell, with rates from minibatch gradients at states along the window.

    The gradients belong to the minibatches of one epoch (BatchNorm on their own statistics): each is one sample of the
    gradient noise, and their mean is the gradient but for what BatchNorm makes of one partition or another.
    """
    module = on_batch_statistics(experiment.build(0)).to(experiment.device)
    objective = Objective(FlatNet(module), experiment.images.train_x, experiment.images.train_y, CROSS_ENTROPY)
    (eta,) = (schedule.step_size for schedule in experiment.schedules)
    batch, decay, constant = Minibatch(experiment.batch), window.weight_decay, [Schedule(eta)]
    shared = train(
        objective, experiment.starts[0], constant, window.burn_in, seeds=[0], batch=batch,
        weight_decay=decay, together=True, root_seed=experiment.root,
    ).final.theta[0, 0]  # fmt: skip
    edges = torch.linspace(window.apart, window.apart + window.steps, 2 * INTERVALS + 1).round().long()
    run = train(
        objective, shared, constant, window.apart + window.steps, seeds=range(1, window.replicas + 1), batch=batch,
        weight_decay=decay, together=True, root_seed=experiment.root,
        probes={"theta": Probe(lambda state: state.theta, edges)},
    )  # fmt: skip
    visited, units = run["theta"].values[:, 0], hidden_layers(module)
    index = {name: layer.index(module).to(experiment.device) for name, layer in units.items()}
    parts = [_rates(experiment, state, index, eta, decay, at) for at, state in enumerate(visited[1::2])]
    start = _rates(experiment, shared.unsqueeze(0), index, eta, decay, INTERVALS)
    first, last = (
        _array(torch.cat([state[:, rows].norm(dim=-1).log() for rows in index.values()], 1))
        for state in visited[[0, -1]]
    )
    elapsed = window.steps * eta

    def total(term: str) -> np.ndarray:
        return elapsed * np.mean([_array(getattr(rate, term)) for rate in parts], 0)

    rates = elapsed * np.stack([_array(rate.value) for rate in parts])
    return Growth(
        np.concatenate([[name] * layer.units for name, layer in units.items()]), last - first,
        total("drift"), total("noise"), elapsed * _array(start.value), total("along"),
        rates.var(0, ddof=1) / INTERVALS,
    )  # fmt: skip


def _rates(
    experiment: Experiment, state: Tensor, index: dict[str, Tensor], eta: float, decay: float, at: int
) -> GrowthRate:
    """Rates of every unit at states (replicas, p), terms (replicas, units); each from minibatches of its own."""
    network, size = experiment.network, experiment.batch
    chosen = min(MINIBATCHES, network.n // size)
    generators = (named_generator(experiment.root, "rates", at, replica) for replica in range(len(state)))
    orders = np.stack([generator.permutation(network.n)[: chosen * size] for generator in generators])
    rows = torch.from_numpy(orders).view(-1, size).to(state.device)
    weights = torch.full(rows.shape, 1 / size, dtype=state.dtype, device=state.device)
    gradients = network.weighted_gradient(state.repeat_interleave(chosen, 0), weights, rows=rows)
    gradients = gradients.view(len(state), chosen, -1)
    dynamics = Dynamics(eta, Minibatch(), weight_decay=decay, samples=ENDLESS)
    return unit_growth(state, gradients, [unit for at in index.values() for unit in at], dynamics)


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
