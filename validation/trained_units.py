"""Networks on scikit-learn's digits: growth of every unit against its prediction, states on sets, collapsed layers."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nets.unit_layer import UnitLayer
from nets.units import hidden_layers, unit_vectors
from simulators.network import CROSS_ENTROPY, Network
from simulators.sample_gradients import sample_gradients
from simulators.svag import run_svag
from theory.growth_rate import Dynamics, GrowthRate, one_step_growth, pair_growth, sign_growth
from theory.invariant_sets import InvariantSet, PermutationSet, distance
from theory.streams import named_generator
from theory.trajectory import Probe


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1], float64, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).unsqueeze(1) / 8 - 1, torch.from_numpy(data.target.astype(np.int64))


def initialised(module: nn.Module, root_seed: int) -> nn.Module:
    """Weights N(0, 1/fan-in), biases 0, scales 1, from a stream of their own."""
    draws = named_generator(root_seed, "initial weights")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                spread = parameter[0].numel() ** -0.5
                parameter.copy_(spread * torch.from_numpy(draws.standard_normal(parameter.shape)))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


@dataclass(frozen=True, eq=False)
class Window:
    """Realised changes of ln‖x‖ over a window and what was predicted along it, each of shape (seeds, components).

    ``exact`` is the expected change of every single step, of which drift + noise is the SDE's approximation.
    """

    realised: Tensor
    drift: Tensor
    noise: Tensor
    exact: Tensor


def growth_window(
    activation: type[nn.Module], seeds: int, root_seed: int, *, step_size: float = 0.3, steps: int = 480,
    every: int = 60, burn_in: int = 1000, samples: int = 128, width: int = 24, wrong: float = 0.3,
) -> tuple[Window, Window]:  # fmt: skip
    """A 16-width-10 network on noisy digits, B = 1: burn in, then ``seeds`` runs from there; units and pairs.

    Images are pooled to 4 × 4 and a share ``wrong`` of the labels is redrawn once. Rates come from the per-sample
    gradients of all samples, once in every ``every`` steps of every run. Pairs are (0, 1), (1, 2), …
    """
    draws = named_generator(root_seed, "growth window")
    X, y = digits()
    pick = torch.from_numpy(draws.permutation(len(X))[:samples])
    X, y = nn.functional.avg_pool2d(X[pick], 2).flatten(1), y[pick]
    redrawn = torch.from_numpy(draws.random(samples) < wrong)
    y = torch.where(redrawn, torch.from_numpy(draws.integers(0, 10, samples)), y)
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(nn.Linear(16, width), activation(), nn.Linear(width, 10)).double()
    network = Network(initialised(module, root_seed), (X - X.mean(0)) / X.std(), y, CROSS_ENTROPY)
    index = hidden_layers(module)["0"].index(module)
    pairs = torch.stack([torch.arange(width - 1), torch.arange(1, width)], 1)
    start = run_svag(network, network.theta, step_size, 1, burn_in, root_seed).final
    # The runs part for ``every`` steps before the window opens; rates are taken in the middle of every interval.
    at = torch.cat([torch.tensor([every]), torch.arange(every + every // 2, steps + every, every)])
    probes = {"θ": Probe(lambda theta: theta, torch.cat([at, torch.tensor([every + steps])]))}
    run = run_svag(network, start.expand(seeds, -1).clone(), step_size, 1, every + steps, root_seed + 1, probes=probes)
    theta, dynamics = run["θ"].values, Dynamics(step_size)
    elapsed, units, between = every * step_size, list[_Rates](), list[_Rates]()
    for state in theta[1:-1]:
        gradients, vectors = sample_gradients(network, state)[..., index], state[:, index]
        apart, normal = vectors[:, pairs[:, 0]] - vectors[:, pairs[:, 1]], gradients[..., pairs[:, 0], :]
        normal = normal - gradients[..., pairs[:, 1], :]
        units.append((sign_growth(vectors, gradients, dynamics), one_step_growth(vectors, gradients, step_size)))
        between.append((pair_growth(vectors, gradients, pairs, dynamics), one_step_growth(apart, normal, step_size)))
    first, last = theta[0][:, index], theta[-1][:, index]
    apart, ended = (end[:, pairs[:, 0]] - end[:, pairs[:, 1]] for end in (first, last))
    return _window(first, last, units, elapsed), _window(apart, ended, between, elapsed)


_Rates = tuple[GrowthRate, Tensor]


def _window(first: Tensor, last: Tensor, rates: list[_Rates], elapsed: float) -> Window:
    realised = last.norm(dim=-1).log() - first.norm(dim=-1).log()
    drift, noise = (elapsed * torch.stack([getattr(r, name) for r, _ in rates]).sum(0) for name in ("drift", "noise"))
    return Window(realised, drift, noise, elapsed * torch.stack([exact for _, exact in rates]).sum(0))


def conv_network(root_seed: int, activation: type[nn.Module] = nn.GELU) -> nn.Module:
    """conv1 (16) - conv2 (32) with BatchNorm - fc3 (32) - 10 classes, for 8 × 8 images."""
    with torch.random.fork_rng(devices=[]):
        layers = OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, 2, 1), act1=activation(),
            conv2=nn.Conv2d(16, 32, 3, 1, 1), bn2=nn.BatchNorm2d(32), act2=activation(),
            flat=nn.Flatten(), fc3=nn.Linear(512, 32), act3=activation(), out=nn.Linear(32, 10),
        )  # fmt: skip
        return initialised(nn.Sequential(layers), root_seed)


def train(
    module: nn.Module, steps: int, step_size: float, root_seed: int, *, batch: int = 16, momentum: float = 0.9,
    weight_decay: float = 5e-3, wrong: float = 0.2,
) -> nn.Module:  # fmt: skip
    """SGD with momentum on digits, in place; each label is another class with probability ``wrong``, fresh each time.

    Source: Chen et al. (2023), on label noise.
    """
    X, y = digits()
    dtype = next(module.parameters()).dtype
    X, draws = X.to(dtype), named_generator(root_seed, "training")
    optimizer = torch.optim.SGD(module.parameters(), step_size, momentum=momentum, weight_decay=weight_decay)
    for _ in range(steps):
        rows = torch.from_numpy(draws.integers(0, len(X), batch))
        shift = torch.from_numpy(draws.integers(1, 10, batch) * (draws.random(batch) < wrong))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X[rows]), (y[rows] + shift) % 10).backward()
        optimizer.step()
    return module


def placed(module: nn.Module, layer: UnitLayer, chosen: InvariantSet) -> nn.Module:
    """A copy of the module with one layer projected on a set; a pair shares its running statistics too."""
    module = copy.deepcopy(module)
    layer.write(module, chosen.project(entries(module, layer)))
    if isinstance(chosen, PermutationSet):
        buffers = dict(module.named_buffers())
        for name in layer.statistics:
            rows = buffers[name].view(layer.units, -1)
            rows[chosen.first] = rows[chosen.second]
    return module


def entries(module: nn.Module, layer: UnitLayer) -> Tensor:
    """The layer's unit vectors, detached."""
    return unit_vectors(module, layers={layer.name: layer})[layer.name]


def departure(module: nn.Module, layer: UnitLayer, chosen: InvariantSet, steps: int, root_seed: int) -> float:
    """Distance from a set after real SGD that starts at ``module``, as a share of how far the layer has moved."""
    end = train(copy.deepcopy(module), steps, 0.05, root_seed)
    moved = (entries(end, layer) - entries(module, layer)).norm()
    return float(distance(chosen, entries(end, layer)) / moved)
