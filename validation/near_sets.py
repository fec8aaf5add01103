"""Real SGD of small networks released next to an invariant set, with the growth rate predicted along every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nets.sgd import sgd
from nets.units import hidden_layers
from simulators.network import Network
from simulators.sample_gradients import sample_gradients
from theory.growth_rate import Dynamics, GrowthRate, one_step_growth, pair_growth, sign_growth
from theory.problem import Regression
from theory.schedule import Schedule, effective_step_size
from theory.streams import named_generator
from theory.trajectory import Probe, Trajectory

AFTER = 1 << 20  # seeds of the runs that follow the burn-in begin here
NEAR = 1e-4  # distance to the set at the start: gradients across it are linear in it


@dataclass(frozen=True)
class Setting:
    """A one-hidden-layer network, the set it is released at, and how SGD steps. Labels carry ±``noise`` for ever."""

    kind: str  # "sign" or "pair"
    activation: type[nn.Module] = nn.Tanh
    inputs: int = 1
    step_size: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    noise: float = 2.5
    steps: int = 800
    width: int = 6
    points: int = 8

    @property
    def label(self) -> str:
        """For tables."""
        extra = f", μ={self.momentum:g}" if self.momentum else ""
        extra += f", λ={self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.kind} set, {self.activation.__name__}, {self.inputs} inputs, η={self.step_size:g}{extra}"


@dataclass(frozen=True, eq=False)
class Release:
    """What a release measured and what was predicted along it, per seed, shape (S,); all changes of ln‖x‖.

    Attributes:
        change: realised.
        drift, noise, trace: the terms of :class:`theory.growth_rate.GrowthRate`, integrated along the run.
        dropped: exact expected change of every single step minus drift + noise, integrated; with momentum that of a
            plain step of η/(1-μ), which has the same order.
        course: ln‖x‖ at recorded steps, shape (T, S).
        steps: those steps, shape (T,).
    """

    change: Tensor
    drift: Tensor
    noise: Tensor
    trace: Tensor
    dropped: Tensor
    finite: Tensor
    course: Tensor
    steps: Tensor


def problem(setting: Setting, root_seed: int) -> tuple[nn.Module, Regression]:
    """A network and a teacher's data, every point twice, with labels y + noise and y - noise."""
    generator = named_generator(root_seed, "near sets", setting.inputs)
    X = torch.from_numpy(generator.standard_normal((setting.points, setting.inputs)))
    teacher = torch.from_numpy(generator.standard_normal((setting.inputs, 3)))
    y = torch.tanh(X @ teacher) @ torch.tensor([1.0, -1.0, 0.5], dtype=X.dtype)
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(
            nn.Linear(setting.inputs, setting.width, bias=False),
            setting.activation(),
            nn.Linear(setting.width, 1, bias=False),
        ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(0.7 * generator.standard_normal(parameter.shape)))
    twice = torch.cat([X, X]), torch.cat([y + setting.noise, y - setting.noise])
    return module, Regression(*twice, X[:0], y[:0])


def release(setting: Setting, seeds: int, root_seed: int, burn_in: int = 100, every: int = 20) -> Release:
    """Burn in, put unit 0 next to its sign set (or to unit 1), let SGD with one sample a step go on.

    Rates are taken from all per-sample gradients at every ``every``-th step of every run.
    """
    module, data = problem(setting, root_seed)
    network = Network(module, data.X, data.y)
    index = hidden_layers(module)["0"].index(module)
    pairs = torch.tensor([[0, 1]])

    activation, width = setting.activation(), setting.width

    def model(theta: Tensor, X: Tensor) -> Tensor:  # network.outputs, written out
        return activation(X @ theta[:-width].view(width, -1).T) @ theta[-width:]

    def run(start: Tensor, steps: int, first: int, probes: dict[str, Probe]) -> Trajectory:
        return sgd(
            model, data, start, [Schedule(setting.step_size)], steps, seeds=range(first, first + seeds),
            momentum=setting.momentum, weight_decay=setting.weight_decay, root_seed=root_seed, probes=probes,
        )  # fmt: skip

    start = run(network.theta, burn_in, 0, {}).final
    offset = torch.from_numpy(named_generator(root_seed, "release").standard_normal((seeds, index.shape[1])))
    offset *= NEAR / offset.norm(dim=1, keepdim=True)
    start[0, :, index[0]] = offset if setting.kind == "sign" else start[0][:, index[1]] + 2**0.5 * offset
    at = torch.arange(0, setting.steps + 1, every)
    states = run(start, setting.steps, AFTER, {"θ": Probe(lambda theta: theta, at)})
    theta = states["θ"].values[:, 0]
    dynamics = Dynamics(setting.step_size, momentum=setting.momentum, weight_decay=setting.weight_decay)
    clock = effective_step_size(setting.step_size, setting.momentum)

    def rates(state: Tensor) -> tuple[GrowthRate, Tensor]:
        gradients, vectors = sample_gradients(network, state)[..., index[:2]], state[:, index[:2]]
        if setting.kind == "pair":
            across = (vectors[:, :1] - vectors[:, 1:]) / 2**0.5
            normal = (gradients[..., :1, :] - gradients[..., 1:, :]) / 2**0.5
            rate = pair_growth(vectors, gradients, pairs, dynamics)
        else:
            across, normal = vectors[:, :1], gradients[..., :1, :]
            rate = sign_growth(across, normal, dynamics)
        return rate, one_step_growth(across, normal, clock, setting.weight_decay) - rate.value

    def norm(state: Tensor) -> Tensor:
        x = state[..., index[0]] if setting.kind == "sign" else (state[..., index[0]] - state[..., index[1]]) / 2**0.5
        return x.norm(dim=-1).log()

    along = [rates(state) for state in theta[:-1]]

    def integrated(terms: list[Tensor]) -> Tensor:
        return every * clock * torch.stack(terms).sum(0)[:, 0]

    course, noise = norm(theta), integrated([rate.noise for rate, _ in along])
    return Release(
        change=course[-1] - course[0],
        drift=integrated([rate.drift for rate, _ in along]),
        noise=noise,
        trace=integrated([rate.trace for rate, _ in along]),
        dropped=integrated([left_out for _, left_out in along]),
        finite=states.finite[0] & torch.isfinite(noise),
        course=course,
        steps=at,
    )
