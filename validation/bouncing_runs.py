"""What the suite ``bouncing`` measures: replicas of SGD that leave one trained state, in a Hessian eigenbasis.

Replicas share their past and drift alike, so their mean is the valley floor and what is left of each is the law's x:
nothing is detrended, slow directions keep their variance, and the window can be short enough for a fixed basis. The
basis belongs to the replicas' mean where the window begins. (Taken in the middle, at the end, or at the mean over the
window, it gave the same slopes to 0.5 % and variances to 1 % below ηλ = 1.9.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nets.curvature import Operator, hessian
from nets.gradients import losses, sample_gradients
from nets.lanczos import eigenpairs
from nets.objective import Objective
from nets.replicas import Draws, Epochs, replicas
from nets.training import Batches
from theory.bouncing import LinearSGD, ReshuffledSGD
from theory.excess_loss import TopDirections, excess_loss
from theory.minibatch import Minibatch
from theory.streams import named_generator, seed_of

VISITED = 24  # iterates at which the noise covariance is taken
PROBES = 1  # random noise vectors at each of them
TRACES = 16  # random vectors for tr H in the complement
SNAPSHOTS = 12  # times at which the loss is looked at
LAGS = (1, 2, 4, 8)
STARTS = 4  # windows in which displacements over LAGS are measured


@dataclass(frozen=True)
class Setting:
    """One cell: SGD of this step size, batch size and momentum; ``reshuffled``: a fresh order of the data an epoch."""

    network: str
    step_size: float
    batch_size: int
    momentum: float = 0.0
    reshuffled: bool = False

    @property
    def law(self) -> LinearSGD:
        """The law of its eigendirections if minibatches are independent."""
        return LinearSGD(self.step_size, self.momentum)

    @property
    def label(self) -> str:
        """Short text for tables and legends."""
        more = (f", μ={self.momentum:g}" if self.momentum else "") + (", reshuffled" if self.reshuffled else "")
        return f"{self.network}: η={self.step_size:g}, B={self.batch_size}{more}"


@dataclass(frozen=True, eq=False)
class Window:
    """What R replicas did in T steps; float64 on the CPU, deviations from the replicas' mean scaled to be unbiased.

    Attributes:
        n: training samples.
        outputs: c of the network.
        curvature: λ of the K sharpest directions on the floor, shape (K,).
        x: coordinates along them, shape (T, R, K).
        noise: C_kk of a minibatch gradient at J visited iterates, shape (J, K).
        floor_noise: C_kk on the floor, shape (K,).
        total_noise: tr C at the visited iterates, shape (J,).
        excess: each replica's loss above that of the replicas' mean, mean over snapshots, shape (R,).
        floor: the loss of their mean.
        rest: ½ η tr[C(2I - ηH)^{-1}] in the complement of the K directions, or the heavy ball's, and
        rest_error: its standard error.
        trace: tr H.
        moved: ‖P⊥(θ_{m} - θ_0)‖² over LAGS in the complement, differences from the replicas' mean, (lags, R).
        finite: which replicas stayed finite, one entry for each that set out.
        origin: the replicas' mean where the window begins, shape (p,), with
        directions: the eigenvectors there, shape (p, K), and
        ends: the replicas late in it, shape (R, p); in the dtype and on the device of the run.
    """

    setting: Setting
    n: int
    outputs: int
    curvature: Tensor
    x: Tensor
    noise: Tensor
    floor_noise: Tensor
    total_noise: Tensor
    excess: Tensor
    floor: float
    rest: float
    rest_error: float
    trace: float
    moved: Tensor
    finite: Tensor
    origin: Tensor
    directions: Tensor
    ends: Tensor

    @property
    def slip(self) -> Tensor:
        """ηλ on the floor, shape (K,)."""
        return self.setting.step_size * self.curvature

    @property
    def reshuffled(self) -> ReshuffledSGD:
        """The law of a reshuffled setting."""
        return ReshuffledSGD(self.setting.step_size, self.n // self.setting.batch_size)

    def displacement_autocorrelation(self, curvature: Tensor) -> Tensor:
        """The setting's law at lag 1, shape (K,)."""
        law = self.reshuffled if self.setting.reshuffled else self.setting.law
        return law.displacement_autocorrelation(curvature)

    def variance(self, curvature: Tensor, noise: Tensor) -> Tensor:
        """The setting's stationary variances under noise C_kk at visited iterates, shape (K,).

        What an epoch cancels is the noise that a sample makes at every visit, the floor's; what the bouncing adds to
        it differs from visit to visit and is independent.
        """
        if not self.setting.reshuffled:
            return self.setting.law.variance(curvature, noise)
        constant = torch.minimum(self.floor_noise, noise)
        added = self.setting.law.variance(curvature, noise - constant)
        return self.reshuffled.variance(curvature, constant) + added


def draws_of(setting: Setting, n: int, seeds: int, stream: str, root: int) -> Draws:
    """The minibatches of a setting."""
    seed = seed_of("bouncing", stream, setting.label, root)
    if setting.reshuffled:
        return Epochs(n, setting.batch_size, range(seeds), seed)
    return Batches(n, Minibatch(setting.batch_size), range(seeds), seed)


def trained(objective: Objective, settings: list[Setting], steps: int, root: int) -> list[tuple[Tensor, Tensor]]:
    """θ and m of every setting after ``steps`` steps from the network's own start; all visit the same minibatches."""
    runs = len(settings)
    draws = draws_of(settings[0], objective.n, 1, "training", root)
    start = objective.net.theta.expand(runs, -1)
    theta, mass = replicas(
        objective, start, torch.zeros_like(start), torch.tensor([s.step_size for s in settings]), steps,
        lambda k: draws(k).expand(runs, -1), torch.tensor([s.momentum for s in settings]),
    )  # fmt: skip
    return list(zip(theta, mass, strict=True))


def observe(
    objective: Objective, setting: Setting, state: tuple[Tensor, Tensor], runs: int, burn_in: int, steps: int, K: int,
    root: int,
) -> Window:  # fmt: skip
    """``runs`` replicas from ``state``, watched for ``steps`` steps after ``burn_in`` steps.

    Raises:
        ValueError: fewer than two replicas stay finite.
    """
    draws = draws_of(setting, objective.n, runs, "replicas", root)
    theta, mass = (part.expand(runs, -1) for part in state)
    theta, mass = replicas(objective, theta, mass, setting.step_size, burn_in, draws, setting.momentum)
    alive = survivors(theta, setting)
    origin = theta[alive].mean(0)
    E = eigenpairs(hessian(objective, origin), K, tolerance=1e-3).vectors
    record = _Record(origin, E, runs, steps)
    theta, _ = replicas(
        objective, theta, mass, setting.step_size, steps, lambda k: draws(burn_in + k), setting.momentum, record
    )
    return _analysed(objective, setting, record, alive & torch.isfinite(theta).all(1))


def survivors(theta: Tensor, setting: Setting) -> Tensor:
    """Which replicas of θ, (runs, p), are finite.

    Raises:
        ValueError: fewer than two are.
    """
    alive = torch.isfinite(theta).all(1)
    if int(alive.sum()) < 2:
        raise ValueError(f"{setting.label} diverged: choose a smaller step size.")
    return alive


def descended(objective: Objective, window: Window, steps: int = 6) -> Tensor:
    """The same coordinates when the replicas go on without noise, by full-batch steps, shape (steps, R, K)."""
    ends, kept, every = window.ends, list[Tensor](), torch.arange(objective.n).expand(len(window.ends), -1)

    def watch(_: int, theta: Tensor) -> None:
        kept.append(((theta - theta.mean(0)) @ window.directions).double().cpu())

    replicas(objective, ends, torch.zeros_like(ends), window.setting.step_size, steps, lambda _: every, 0.0, watch)
    return torch.stack(kept)


class _Record:
    """Collects, while replicas run, what :class:`Window` is made of."""

    def __init__(self, origin: Tensor, E: Tensor, runs: int, steps: int) -> None:
        self.origin, self.E, self.snapshots = origin, E, list[Tensor]()
        self.x = torch.empty(steps, runs, E.shape[1], dtype=torch.float64)
        self.moved = list[Tensor]()
        self._every, self._stride, self._from = max(steps // SNAPSHOTS, 1), max(steps // STARTS, max(LAGS) + 1), origin

    def __call__(self, k: int, theta: Tensor) -> None:
        self.x[k] = ((theta - self.origin) @ self.E).double().cpu()
        if k % self._every == self._every // 2:
            self.snapshots.append(theta.clone())
        if k % self._stride == 0:
            self._from = theta.clone()
        elif k % self._stride in LAGS:
            d = theta - self._from
            d = d - d.nanmean(0)  # what the replicas share is drift
            self.moved.append((d - (d @ self.E) @ self.E.T).square().sum(1).double().cpu())


def _analysed(objective: Objective, setting: Setting, record: _Record, finite: Tensor) -> Window:
    runs, E = int(finite.sum()), record.E
    unbiased = runs / (runs - 1)
    x = record.x[:, finite.cpu()]
    excess, floor = list[Tensor](), list[Tensor]()
    for snapshot in record.snapshots:
        there = snapshot[finite]
        floor.append(objective.value(there.mean(0)).double())
        excess.append((losses(objective, there).double() - floor[-1]) * unbiased)
    generator = named_generator(0, "bouncing", "visited", setting.label)
    places = [record.snapshots[j % len(record.snapshots)][finite] for j in range(VISITED)]
    visited = [there[int(generator.integers(runs))] for there in places]
    kappa = Minibatch(setting.batch_size, not setting.reshuffled).variance_factor(objective.n)
    noise, total, probes = list[Tensor](), list[Tensor](), list[Tensor]()
    for at in visited:
        g = sample_gradients(objective, at)
        signs = torch.from_numpy(generator.choice([-1.0, 1.0], (PROBES, len(g)))).to(g)
        mean, *kicks = torch.cat([torch.ones_like(signs[:1]), signs - signs.mean(1, keepdim=True)]) @ g / len(g)
        along = g @ E - mean @ E
        noise.append(along.square().mean(0).double() * kappa)
        total.append((torch.dot(g.view(-1), g.view(-1)).double() / len(g) - mean.square().sum().double()) * kappa)
        probes.append(torch.stack(kicks, 1) * (kappa * len(g)) ** 0.5)
    along = sample_gradients(objective, record.origin) @ E
    floor_noise = (along - along.mean(0)).square().mean(0).double().cpu() * kappa
    H = hessian(objective, record.origin)
    curvature = ((H @ E) * E).sum(0).double().cpu()
    # The K directions' own terms do not enter the rest; at most 1.9 of ηλ keeps them from being refused.
    held = curvature.clamp(max=1.9 * (1 + setting.momentum) / setting.step_size)
    top = TopDirections(held.to(E), E, torch.stack(noise).mean(0).to(E))
    rest = excess_loss(
        setting.law, lambda v: H @ v, torch.cat(probes, 1), top=top, total_noise=float(torch.stack(total).mean())
    )
    return Window(
        setting, objective.n, objective.outputs(record.origin, objective.X[:1]).shape[1], curvature,
        (x - x.mean(1, keepdim=True)) * unbiased**0.5, torch.stack(noise).cpu(), floor_noise,
        torch.stack(total).cpu(),
        torch.stack(excess).mean(0).cpu(), float(torch.stack(floor).mean()), rest.rest, rest.standard_error,
        float(curvature.sum()) + _trace_of_complement(H, E, generator.choice([-1.0, 1.0], (len(E), TRACES))),
        _over_lags(record.moved)[:, finite.cpu()] * unbiased, finite.cpu(), record.origin, E,
        record.snapshots[-1][finite],
    )  # fmt: skip


def _trace_of_complement(H: Operator, E: Tensor, signs: object) -> float:
    """tr P⊥H by Hutchinson."""
    v = torch.as_tensor(signs).to(E)
    v = v - E @ (E.T @ v)
    return float((v * (H @ v)).sum(0).mean())


def _over_lags(moved: list[Tensor]) -> Tensor:
    """Mean over the windows, shape (lags, R)."""
    whole = len(moved) // len(LAGS)
    return torch.stack(moved[: whole * len(LAGS)]).view(whole, len(LAGS), -1).mean(0)


def leave_one_out(statistic: Callable[[Tensor], float], replicates: int) -> Tensor:
    """Jackknife pseudo-values of a statistic of the mean over replicates, shape (R,): their mean has its bias removed.

    Args:
        statistic: weights over the replicates, shape (R,), summing to 1 ↦ the statistic.
    """
    even = torch.full((replicates,), 1 / replicates, dtype=torch.float64)
    whole, rows = statistic(even), []
    for r in range(replicates):
        weights = torch.full((replicates,), 1 / (replicates - 1), dtype=torch.float64)
        weights[r] = 0.0
        rows.append(replicates * whole - (replicates - 1) * statistic(weights))
    return torch.tensor(rows, dtype=torch.float64)
