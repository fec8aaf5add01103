"""Ensembles of one image network: SGD, SVAG, Gaussian steps and the rivals, from the same starts on the same schedules.

SGD runs in ``nets.training``, everything else in ``simulators``: they share the data, the starts and the network, not
the draws. All runs of an ensemble go side by side; BatchNorm normalises by the minibatch while they train, and its
statistics are estimated on the training set before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from nets.averaging import estimate_statistics, has_batch_norm
from nets.batch_statistics import on_batch_statistics
from nets.convolutional_evaluation import convolutional_evaluation
from nets.features import DivergedError, features_of
from nets.gradients import weighted_gradients
from nets.image_training import loss_and_accuracy, loss_and_hits
from nets.images import ImageSet
from nets.measures import COLUMNS, block_table, measured_subset, measures_of, table_of
from nets.objective import CROSS_ENTROPY, FlatNet, Objective
from nets.resnet import BasicBlock
from nets.training import TrainingState, train
from nets.units import hidden_layers
from simulators.estimated_noise import run_gaussian, run_isotropic
from simulators.network import CROSS_ENTROPY as CLASSES
from simulators.network import Network
from simulators.svag import run_svag
from theory.minibatch import Minibatch
from theory.schedule import Schedule, stack_step_sizes
from theory.trajectory import Probe, Trajectory

SPARSITY, PLAIN, DISTINCT, INDEPENDENT = 2, 1, 3, 4  # columns of a block table
INPUTS, GROUPS, GAUSSIANS, STATISTICS = 512, 4, 8, 256
"""Images on which activations are looked at (and a pass holds), minibatches of the isotropic rival and of a Gaussian
step, images a pass for BatchNorm."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A network on images with a schedule a cell.

    Attributes:
        build: seed ↦ the network with its initial weights.
        schedules: of the cells.
        steps: SGD steps.
        batch: minibatch size, drawn with replacement.
        seeds: runs of every cell; all cells start from the same weights of a seed.
        looks: how often along a run it is measured.
        root: root seed of all draws.
    """

    images: ImageSet
    build: Callable[[int], nn.Module]
    schedules: tuple[Schedule, ...]
    steps: int
    batch: int
    seeds: int
    looks: int
    root: int

    def only(self, *cells: int) -> Experiment:
        """The same with some of its schedules."""
        return replace(self, schedules=tuple(self.schedules[c] for c in cells))

    def grid(self) -> Tensor:
        """SGD steps after which runs are measured, (looks,), the last one ``steps``."""
        return torch.linspace(0, self.steps, self.looks + 1).round().long()[1:]

    @cached_property
    def starts(self) -> Tensor:
        """Initial θ of every seed, shape (seeds, p)."""
        return torch.stack([FlatNet(self.build(seed)).theta for seed in range(self.seeds)]).to(self.device)

    def paths(self) -> Tensor:
        """Initial θ of every run, cells x seeds one after the other, shape (cells·seeds, p)."""
        return self.starts.repeat(len(self.schedules), 1)

    def sizes(self) -> Tensor:
        """η of every SGD step of every run, shape (cells·seeds, steps)."""
        return stack_step_sizes(self.schedules, self.steps).repeat_interleave(self.seeds, 0)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.images.train_x.device

    @cached_property
    def network(self) -> Network:
        """For the simulators."""
        module = on_batch_statistics(self.build(0)).to(self.device)
        x, y = self.images.train_x, self.images.train_y
        gradients = weighted_gradients(FlatNet(module), CROSS_ENTROPY, x)
        return Network(module, x, y, CLASSES, batch_statistics=has_batch_norm(module), gradients=gradients)


@dataclass(frozen=True, eq=False)
class Course:
    """What an ensemble went through.

    Attributes:
        steps: SGD steps of the looks, (looks,).
        blocks: measures of every block, (looks, cells, seeds, blocks, :data:`nets.measures.COLUMNS`); NaN of a diverged
            run.
        fit: training loss, test loss and test accuracy, (looks, cells, seeds, 3).
        finite: which runs stayed finite, (cells, seeds).
        theta: where they ended, (cells, seeds, p).
    """

    steps: Tensor
    blocks: Tensor
    fit: Tensor
    finite: Tensor
    theta: Tensor

    def sparsity(self) -> Tensor:
        """Coefficient of the last block without duplicates, (looks, cells, seeds)."""
        return self.blocks[..., -1, SPARSITY]


class Measure:
    """θ (runs, p) ↦ blocks and fit of every run; in compiled loops where they know the network."""

    def __init__(self, experiment: Experiment) -> None:
        self._images, self._module = experiment.images, experiment.build(0).to(experiment.device)
        self._inputs = measured_subset(self._images.train_x, INPUTS)
        self._layers, self.names = hidden_layers(self._module, "published"), residual_blocks(self._module)
        self._compiled = convolutional_evaluation(self._module, self._inputs, self.names)

    def __call__(self, theta: Tensor) -> Tensor:
        """Shape (runs, blocks·columns + 3)."""
        return torch.stack([self._of(row) for row in theta])

    def _of(self, row: Tensor) -> Tensor:
        images, finite = self._images, bool(torch.isfinite(row).all())
        vector_to_parameters(row, self._module.parameters())
        sets = (images.train_x, images.train_y), (images.test_x, images.test_y)
        if self._compiled is not None and finite:
            theta = row.unsqueeze(0)
            statistics = self._compiled.statistics(theta, images.train_x, STATISTICS)
            table = self._table(self._compiled.blocks(theta, statistics, self._inputs))
            outputs = (self._compiled.outputs(theta, statistics, x)[0] for x, _ in sets)
            train, test = (loss_and_hits(h, y, CROSS_ENTROPY) / len(y) for h, (_, y) in zip(outputs, sets, strict=True))
        else:
            if has_batch_norm(self._module) and finite:
                estimate_statistics(self._module, images.train_x, min(STATISTICS, images.n))
            self._module.eval()
            table = block_table(self._module, self._inputs, self.names, layers=self._layers)
            train, test = (loss_and_accuracy(self._module, x, y, CROSS_ENTROPY, INPUTS) for x, y in sets)
        return torch.cat([table.reshape(-1), train[:1].cpu(), test.cpu()])

    def _table(self, blocks: dict[str, Tensor]) -> Tensor:
        try:
            features = {name: features_of(name, out[0]) for name, out in blocks.items()}
        except DivergedError:
            return torch.full((len(blocks), len(COLUMNS)), torch.nan, dtype=torch.float64)
        return table_of(measures_of(self._module, features, layers=self._layers))


def residual_blocks(module: nn.Module) -> tuple[str, ...]:
    """The network's residual blocks by name, or the parts called block1, block2, …"""
    children = dict(module.named_children())
    numbered = tuple(name for name in children if name.startswith("block") and name[5:].isdigit())
    return numbered or tuple(name for name, part in children.items() if isinstance(part, BasicBlock))


def sgd_course(experiment: Experiment, measure: Measure) -> Course:
    """Real SGD."""
    net = FlatNet(on_batch_statistics(experiment.build(0)).to(experiment.device))
    objective = Objective(net, experiment.images.train_x, experiment.images.train_y, CROSS_ENTROPY)

    def look(state: TrainingState) -> Tensor:
        return measure(state.theta.flatten(0, 1)).unflatten(0, state.theta.shape[:2])

    run = train(
        objective, experiment.starts, experiment.schedules, experiment.steps, seeds=range(experiment.seeds),
        batch=Minibatch(experiment.batch), probes={"look": Probe(look, experiment.grid())},
        root_seed=experiment.root, together=True,
    )  # fmt: skip
    return _course(experiment, run["look"].values, run.finite, run.final.theta, len(measure.names))


def svag_course(experiment: Experiment, measure: Measure, l: int, amplified: bool = True) -> Course:  # noqa: E741
    """SVAG, or l plain steps of size η/l for each of SGD's: the wrong scaling, with 1/l of the noise (a rival)."""
    sizes, probes = experiment.sizes(), {"look": Probe(measure, experiment.grid() * l)}
    # l plain steps of η/l are SVAG with l = 1 on a schedule of l times as many steps.
    run = run_svag(
        experiment.network, experiment.paths(), sizes if amplified else sizes.repeat_interleave(l, 1) / l,
        l if amplified else 1, experiment.steps * l, experiment.root + l, Minibatch(experiment.batch), probes,
    )  # fmt: skip
    return _paths(experiment, run, len(measure.names))


def isotropic_course(experiment: Experiment, measure: Measure) -> Course:
    """Noise of SGD's power in all directions (a rival)."""
    run = run_isotropic(
        experiment.network, experiment.paths(), experiment.sizes(), experiment.steps, experiment.root,
        Minibatch(experiment.batch), GROUPS, {"look": Probe(measure, experiment.grid())},
    )  # fmt: skip
    return _paths(experiment, run, len(measure.names))


def gaussian_course(experiment: Experiment, measure: Measure) -> Course:
    """Gaussian noise of SGD's covariance, in steps as large as SGD's."""
    run = run_gaussian(
        experiment.network, experiment.paths(), experiment.sizes(), experiment.steps, experiment.root,
        Minibatch(experiment.batch), GAUSSIANS, {"look": Probe(measure, experiment.grid())},
    )  # fmt: skip
    return _paths(experiment, run, len(measure.names))


def _paths(experiment: Experiment, run: Trajectory, blocks: int) -> Course:
    cells = (len(experiment.schedules), experiment.seeds)
    looks, theta = run["look"].values.unflatten(1, cells), run.final.unflatten(0, cells)
    return _course(experiment, looks, run.finite.view(cells), theta, blocks)


def _course(experiment: Experiment, looks: Tensor, finite: Tensor, theta: Tensor, blocks: int) -> Course:
    tables = looks[..., :-3].unflatten(-1, (blocks, -1))
    return Course(experiment.grid(), tables, looks[..., -3:], finite.cpu(), theta)
