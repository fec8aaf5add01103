"""Claims on the sharpest directions of a small network on digits, of the suite ``bouncing``.

λ₁ along training over step and batch size, steps along e₁ and across it, and Nudged-SGD. Data, networks and grids are
fixed here; seeds count initial weights and minibatches together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from nets.curvature import hessian
from nets.gradients import losses
from nets.images import ImageSet, digits
from nets.lanczos import eigenpairs
from nets.mlp import mlp
from nets.nudged import Directions, Nudge, RandomDirections, sharpest_of
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Loss, Objective
from nets.sharp_directions import TopEigenvalues, cross_section, losses_after, minibatch_gradients, step_parts
from nets.training import train
from theory.minibatch import Minibatch
from theory.prediction import Prediction, Reference
from theory.schedule import Schedule
from theory.streams import seed_of
from theory.trajectory import Probe, Trajectory
from validation.check import Check, Claim, Rival, Verdict, judge
from validation.settings import RunSettings
from validation.statistics import kendall_tau
from validation.suite import Progress

SUITE = "bouncing"
JKBFBS = "Jastrzębski, Kenton, Ballas, Fischer, Bengio, Storkey"

RISE = Claim(
    "λ₁ rises early in training",
    "Kendall's τ between time and λ₁ over the first 20 units of SDE time is positive",
    "Only the sign is predicted; constant or falling sharpness falsifies it.",
)
PEAK = Claim(
    "λ₁ peaks lower for larger steps and smaller batches",
    "Kendall's τ between the order of the step sizes (or batch sizes) and the fall (or rise) of max λ₁",
    "The same seeds and numbers of steps for every setting; only the sign is predicted. Fails with cross-entropy here.",
)
STEP = Claim(
    "a step along e₁ does not reduce the loss",
    "E[L(θ - cη⟨g,e₁⟩e₁) - L(θ)] = (c² - c) η E⟨∇L,e₁⟩² where ⟨θ,e₁⟩ is stationary",
    "In units of what gradient flow would gain in the time of a step: 0 at c = 1. Descent (-c) falsifies it.",
)
COMPLEMENT = Claim(
    "the same step without the bouncing directions reduces the loss",
    "E[L(θ - ηP⊥g) - L(θ)] = E[-η⟨∇L,P⊥g⟩ + ½η²⟨P⊥g,HP⊥g⟩] < 0,  P⊥ = I - EEᵀ",
    "Second-order expansion with the visited Hessian; no change of the loss falsifies it.",
)
NUDGE = Claim(
    "Nudged-SGD with γ < 1 is faster and sharper",
    "Kendall's τ between the fall of γ and the fall of L, or the rise of λ₁, at equal η and steps",
    "Runs of one seed share weights and minibatches; only the sign is predicted.",
)
CONTROL = Claim(
    "nudging a random subspace does nothing",
    "random directions over SGD at the end: ln L unchanged, ln λ₁ higher by (1-γ)K/p",
    "As many directions and the same γ; the effect of the sharpest ones has to be rejected.",
)
CLAIMS = [RISE, PEAK, STEP, COMPLEMENT, NUDGE, CONTROL]

STEP_SIZES, BATCH_SIZES = (0.1, 0.2, 0.3, 0.4), (4, 16, 128)
LOOKS = (0, 10, 20, 30, 40, 50, 75, 100, 150, 200, 400, 600, 1000, 1500)
ENTROPY_STEP_SIZES = (0.25, 0.5, 1.0, 1.5)
EARLY = 20.0
GAMMAS = (1.0, 0.5, 0.01)
TOP = 5
SIGN_ONLY = 1.0
Part = Callable[["Setup"], tuple[list[Check], xr.Dataset]]
LAST = 4
"""Looks averaged at the end of a nudged run, so that one swing of the loss does not decide."""


@dataclass(frozen=True, eq=False)
class Setup:
    """Digits, a 64-32-10 tanh network with squared loss from half-sized weights, and S seeds of both."""

    data: ImageSet
    training: Objective
    evaluation: Objective
    starts: Tensor
    seeds: range
    root: int

    @property
    def label(self) -> str:
        """What the tables call it."""
        return f"{self.data.name}, 64-32-10 tanh"

    def with_loss(self, loss: Loss) -> Setup:
        """The same with another loss."""
        training = Objective(self.training.net, self.data.train_x, self.data.train_y, loss)
        return replace(
            self, training=training, evaluation=training.on(torch.arange(self.evaluation.n, device=self.starts.device))
        )

    def run(self, etas: list[float], batch: int, steps: int, **options: object) -> Trajectory:
        """Train all seeds at each step size."""
        return train(
            self.training, self.starts, [Schedule(eta) for eta in etas], steps, seeds=self.seeds,
            batch=Minibatch(batch), root_seed=self.root, **options,  # type: ignore[arg-type]
        )  # fmt: skip


def setup(seeds: int, device: torch.device, root: int) -> Setup:
    """Curvature is looked at on the first 400 training images; single precision, like the suite's other networks."""
    data = digits(seed=root % 2**31).to(device, torch.float32)
    nets = [mlp(gain=0.5, seed=root + seed).to(device, torch.float32) for seed in range(seeds)]
    training = Objective(nets[0], data.train_x, data.train_y, SQUARED)
    evaluation = training.on(torch.arange(400, device=device))
    return Setup(data, training, evaluation, torch.stack([FlatNet(net).theta for net in nets]), range(seeds), root)


def sharpness_checks(settings: RunSettings, device: torch.device, progress: Progress) -> tuple[list[Check], xr.Dataset]:
    """All checks of this module and the series behind them."""
    seeds = settings.seeds or {"quick": 8, "standard": 16, "paper": 64}[settings.size]
    world = setup(seeds, device, seed_of(SUITE, "sharpness"))
    checks, parts = [], []
    for label, part in (
        (f"λ₁ over {len(STEP_SIZES)} step sizes and {len(BATCH_SIZES)} batch sizes, {seeds} seeds", _curves),
        ("steps along and across the bouncing directions", _steps),
        (f"Nudged-SGD, {len(GAMMAS)} γ and a control", _nudged),
    ):
        progress(label)
        found, series = progress.kept(label, partial(_plain, part, world))
        checks += found
        parts.append(xr.Dataset.from_dict(series))
    progress.close()
    return checks, xr.merge(parts)


def _plain(part: Part, world: Setup) -> tuple[list[Check], dict[Any, Any]]:
    """A part's checks and series, the series as arrays."""
    checks, series = part(world)
    return checks, series.to_dict(data="array")


def _order(
    claim: Claim, setting: str, observable: str, values: Tensor, finite: Tensor, where: str,
    expected: Verdict = Verdict.AGREES,
) -> Check:  # fmt: skip
    """values (settings, seeds) against "rises along the settings", seed by seed."""
    tau = torch.from_numpy(kendall_tau(values.T.nan_to_num().cpu().numpy()))
    prediction = Prediction(observable, torch.tensor(1.0), 0.0, SIGN_ONLY, Reference(JKBFBS, 2019, where))
    rivals = [Rival("no order", 0.0), Rival("reverse order", -1.0)]
    return judge(SUITE, claim, setting, prediction, tau, finite=finite, rivals=rivals, expected=expected)


def _curves(world: Setup) -> tuple[list[Check], xr.Dataset]:
    """λ₁ along training over η at B = 32 and over B at η = 0.2."""
    at, steps = torch.tensor(LOOKS), LOOKS[-1]

    def probes(looks: Tensor) -> dict[str, Probe]:
        return {"λ": Probe(TopEigenvalues(world.evaluation, tolerance=0.02), looks)}  # warm starts are one run's

    over_eta = world.run(list(STEP_SIZES), 32, steps, probes=probes(at))
    sparse = at[(at == 0) | (at >= EARLY / 0.2)]
    over_batch = [world.run([0.2], batch, steps, probes=probes(sparse)) for batch in BATCH_SIZES]
    curves = over_eta["λ"].values[..., 0]  # (looks, step sizes, seeds)
    batch_curves = torch.cat([run["λ"].values[..., 0] for run in over_batch], 1)
    checks = []
    for e, eta in enumerate(STEP_SIZES):
        early = curves[at <= EARLY / eta, e]
        setting = f"{world.label}, η={eta:g}, B=32"
        checks.append(_order(RISE, setting, "τ of λ₁ over time", early, over_eta.finite[e], "section 3.1"))
    peaks, batch_peaks = curves.nan_to_num().amax(0), batch_curves.nan_to_num().amax(0)
    setting = f"{world.label}, η={STEP_SIZES[0]:g} … {STEP_SIZES[-1]:g}, B=32"
    checks.append(_order(PEAK, setting, "τ of max λ₁, falling", -peaks, over_eta.finite.all(0), "section 3.1"))
    finite = torch.cat([run.finite for run in over_batch]).all(0)
    setting = f"{world.label}, η=0.2, B={BATCH_SIZES[0]} … {BATCH_SIZES[-1]}"
    checks.append(_order(PEAK, setting, "τ of max λ₁, rising", batch_peaks, finite, "section 3.1"))
    entropy = world.with_loss(CROSS_ENTROPY)
    looks = torch.tensor([0, 20, 30, 40, 50, 75, 100, 150])
    top = TopEigenvalues(entropy.evaluation, tolerance=0.02)
    run = entropy.run(list(ENTROPY_STEP_SIZES), 32, 150, probes={"λ": Probe(top, looks)})
    entropy_peaks = run["λ"].values[..., 0].nan_to_num().amax(0)
    setting = f"{world.label}, cross-entropy, η={ENTROPY_STEP_SIZES[0]:g} … {ENTROPY_STEP_SIZES[-1]:g}, B=32"
    checks.append(_order(PEAK, setting, "τ of max λ₁, falling", -entropy_peaks, run.finite.all(0), "section 3.1",
                         # The early rise ends by itself near 2.5, below 2/η, and large steps overshoot it.
                         expected=Verdict.DISAGREES))  # fmt: skip
    dims = ("bouncing_look", "bouncing_eta", "bouncing_seed")
    series = xr.Dataset(
        {
            "bouncing lambda_1 over eta": (dims, curves.cpu().numpy()),
            "bouncing lambda_1 over B": (
                ("bouncing_sparse_look", "bouncing_batch", "bouncing_seed"),
                batch_curves.cpu().numpy(),
            ),
            "bouncing peak lambda_1, cross-entropy": (
                ("bouncing_entropy_eta", "bouncing_seed"),
                entropy_peaks.cpu().numpy(),
            ),
        },
        coords={
            "bouncing_entropy_eta": list(ENTROPY_STEP_SIZES),
            "bouncing_look": list(LOOKS),
            "bouncing_sparse_look": sparse.tolist(),
            "bouncing_eta": list(STEP_SIZES),
            "bouncing_batch": list(BATCH_SIZES),
        },
    )
    return checks, series


def _steps(world: Setup) -> tuple[list[Check], xr.Dataset]:
    """Mean change of the loss after parts of SGD's step, over states of a window and minibatches at each."""
    eta, batch, steps, multiples = 0.2, 128, 800, (0.5, 1.0, 2.0)
    at = torch.arange(200, steps + 1, 100)
    run = world.run([eta], batch, steps, probes={"θ": Probe(lambda state: state.theta.clone(), at)})
    kept, sections = list[list[Tensor]](), list[Tensor]()
    for seed in world.seeds:
        rows = []
        for t, theta in enumerate(run["θ"].values[:, 0, seed]):
            H = hessian(world.training, theta)
            top = eigenpairs(H, 10, tolerance=1e-2)
            g = minibatch_gradients(world.training, theta, Minibatch(batch), 4, seed, world.root + t)
            E = top.vectors[:, eta * top.values > 1]
            parts, before = step_parts(g, E, singly=1), world.training.value(theta)
            along = losses_after(world.training, theta, parts["along"][:, 0], eta, multiples).mean(0)
            rest = losses_after(world.training, theta, parts["complement"], eta, (1.0,)).mean()
            mean = world.training.gradient(theta)
            second = [-eta * (mean @ x) + eta**2 / 2 * (x @ (H @ x)) for x in parts["complement"]]
            rows.append((
                along - before, eta * (mean @ E[:, 0]).square(), rest - before, torch.stack(second).mean(),
                before, eta * top.values[0],
            ))  # fmt: skip
        section = cross_section(world.training, theta, E[:, 0], eta, g)
        sections.append(section.losses / before)
        kept.append([torch.stack(column).mean(0) for column in zip(*rows, strict=True)])
    changes, gains, across, expected, level, bounces = (torch.stack(column) for column in zip(*kept, strict=True))
    change = changes / gains.unsqueeze(1)  # (seeds, multiples)
    setting = f"{world.label}, η={eta:g}, B={batch}, steps {int(at[0])} to {steps}"
    source = Reference("ours, after " + JKBFBS, 2019, "section 4.1")
    checks = []
    for c, measured in zip(multiples, change.T, strict=True):
        value = torch.tensor(c**2 - c)
        prediction = Prediction("change / gradient flow's gain", value, -c, ANHARMONIC, source, given="the states")
        rivals = [Rival("descent: first order", -c), *([Rival("no change", 0.0)] if c != 1 else [])]
        checks.append(judge(SUITE, STEP, f"{setting}, c={c:g}", prediction, measured, rivals=rivals))
    prediction = Prediction(
        "change / |second order|", torch.tensor(-1.0), 0.0, ANHARMONIC, source, given="states, H, ∇L"
    )
    rivals = [Rival("no change", 0.0), Rival("the loss grows", 1.0)]
    checks.append(judge(SUITE, COMPLEMENT, setting, prediction, across / expected.abs(), rivals=rivals))
    offsets = section.offsets.tolist()
    series = xr.Dataset(
        {
            "bouncing step change": (("bouncing_seed", "bouncing_multiple"), change.cpu().numpy()),
            "bouncing step complement": (("bouncing_seed",), (across / level).cpu().numpy()),
            "bouncing step eta lambda_1": (("bouncing_seed",), bounces.cpu().numpy()),
            "bouncing cross-section": (("bouncing_seed", "bouncing_offset"), torch.stack(sections).cpu().numpy()),
        },
        coords={"bouncing_multiple": list(multiples), "bouncing_offset": offsets},
    )
    return checks, series


ANHARMONIC = 0.1
"""Stated error of laws that expand the loss to second order around the visited states."""


def _nudged(world: Setup) -> tuple[list[Check], xr.Dataset]:
    """SGD, Nudged-SGD and its control side by side; loss on all training images, λ₁ on the evaluation set."""
    eta, batch, steps, refresh = 0.3, 32, 1000, 100
    at = torch.tensor([0, 100, 200, 400, 600, 850, 900, 950, steps])
    sharpest = sharpest_of(world.evaluation, TOP)
    labels = [*(f"γ={gamma:g}" for gamma in GAMMAS), f"γ={GAMMAS[-1]:g}, random directions"]
    directions: list[Directions] = [*[sharpest] * len(GAMMAS), RandomDirections(TOP, world.root % 2**31)]
    probes = {
        "λ": Probe(TopEigenvalues(world.evaluation), at),
        "L": Probe(lambda state: losses(world.training, state.theta.flatten(0, 1)).view(state.theta.shape[:2]), at),
    }
    nudge = Nudge(directions, [*GAMMAS, GAMMAS[-1]], refresh)
    run = world.run([eta] * len(labels), batch, steps, probes=probes, direction=nudge)
    loss, sharp = run["L"].values, run["λ"].values[..., 0]
    level, top = loss[-LAST:].log().mean(0), sharp[-LAST:].log().mean(0)  # (runs, seeds)
    setting = f"{world.label}, η={eta:g}, B={batch}, K={TOP}, {steps} steps"
    finite, count = run.finite.all(0), len(GAMMAS)
    checks = [
        _order(NUDGE, setting, "τ of L, falling with γ", -level[:count], finite, "section 5"),
        _order(NUDGE, setting, "τ of λ₁, rising as γ falls", top[:count], finite, "section 5"),
    ]
    # Random directions take (1-γ)K/p of every step away: a step size as much smaller, and λ₁ stabilises at about 2/η.
    smaller = (1 - GAMMAS[-1]) * TOP / world.training.p
    for name, values, value in (("ln L", level, 0.0), ("ln λ₁", top, smaller)):
        effect = (values[count - 1] - values[0])[finite]
        source = Reference(JKBFBS, 2019, "section 5")
        prediction = Prediction(f"{name}, random minus SGD", torch.tensor(value), float(effect.mean()), smaller, source)
        error = float(effect.std() / len(effect) ** 0.5)
        rivals = [Rival("as with the sharpest directions", effect.mean(), standard_error=error)]
        measured = values[count] - values[0]
        checks.append(judge(SUITE, CONTROL, setting, prediction, measured, finite=finite, rivals=rivals))
    dims = ("bouncing_nudged_step", "bouncing_nudge", "bouncing_seed")
    series = xr.Dataset(
        {
            "bouncing nudged loss": (dims, loss.cpu().numpy()),
            "bouncing nudged lambda_1": (dims, sharp.cpu().numpy()),
        },
        coords={"bouncing_nudged_step": at.tolist(), "bouncing_nudge": labels},
    )
    return checks, series
