"""The SDE integrated orthogonal to the bouncing directions, against SGD: what loss it keeps above the floor."""

from __future__ import annotations

import torch
from torch import Tensor

from nets.gradients import losses, sample_gradients, weighted_gradients
from nets.objective import Objective
from simulators.network import Network
from simulators.network_sde import ExactCovarianceSDE, run_sde
from simulators.noise import BrownianIncrements
from simulators.orthogonal import OrthogonalSDE, complement
from theory.bouncing import SOURCE
from theory.minibatch import Minibatch
from theory.prediction import Prediction
from theory.trajectory import Probe
from validation.bouncing_runs import Window
from validation.check import Check, Claim, Rival, judge
from validation.settings import RunSettings

ORTHOGONAL = Claim(
    "the SDE orthogonal to the bouncing directions keeps the loss of the complement alone",
    "dθ = P⊥(-∇L dt + √(η/B) S dW):  ⟨L⟩ - L(mean path) = ½ Σ_{ηλ ≤ 1} ηC_kk/(2 - ηλ_k)",
    "What SGD keeps besides comes from the bouncing directions; SGD's whole excess falsifies it.",
)
PATHS = {"quick": 16, "standard": 32, "paper": 64}
STEPS, LAST, EVERY = 90, 60, 6


def orthogonal_checks(objective: Objective, window: Window, settings: RunSettings, root: int) -> list[Check]:
    """Paths of the projected SDE, one Euler-Maruyama step an SGD step, from the replicas brought to the floor's place
    along the bouncing directions: slow directions are as wide as SGD's from the start."""
    setting, paths = window.setting, min(PATHS[settings.size], len(window.ends))
    bouncing = window.slip > 1
    E = torch.linalg.qr(window.directions[:, bouncing.to(window.directions.device)])[0]
    labels = torch.nn.functional.one_hot(objective.labels, window.outputs).to(objective.X)
    written = weighted_gradients(objective.net, objective.loss, objective.X)
    network = Network(objective.net.module_at(window.origin), objective.X, labels, gradients=written)
    sde = OrthogonalSDE(ExactCovarianceSDE(network, setting.step_size, Minibatch(setting.batch_size)), E)
    noise = BrownianIncrements(
        root, "orthogonal", paths, network.n, dtype=window.origin.dtype, device=window.origin.device
    )
    at = torch.arange(STEPS - LAST, STEPS, EVERY)
    probes = {"θ": Probe(lambda theta: theta.clone(), at)}
    start = window.origin + complement(window.ends - window.ends.mean(0), E)[:paths]
    run = run_sde(sde, start, setting.step_size, STEPS, noise, probes)
    theta = run["θ"].values
    excess = torch.stack([_above(objective, there) for there in theta]).mean(0).cpu()
    value, error = _expected(objective, window, theta[-1], bouncing)
    prediction = Prediction(
        "loss above the floor, complement only", torch.tensor(value), 0.0, 0.1, SOURCE, error,
        "H on the floor, C at the paths' ends",
    )  # fmt: skip
    rivals = [Rival("SGD, bouncing directions and all", float(window.excess.mean())), Rival("no noise", 0.0)]
    return [judge("bouncing", ORTHOGONAL, setting.label, prediction, excess, finite=run.finite.cpu(), rivals=rivals)]


def _above(objective: Objective, theta: Tensor) -> Tensor:
    """Each path's loss above that of the paths' mean, shape (paths,)."""
    paths = len(theta)
    return (losses(objective, theta) - objective.value(theta.mean(0))).double() * paths / (paths - 1)


def _expected(objective: Objective, window: Window, ends: Tensor, bouncing: Tensor) -> tuple[float, float]:
    """The discrete law's excess in the complement, with the noise at the paths' ends, and its standard error."""
    each = []
    for theta in ends:
        g = sample_gradients(objective, theta)
        g = (g - g.mean(0)) / (len(g) * window.setting.batch_size) ** 0.5
        noise = (g @ window.directions).square().sum(0).double().cpu()
        top = window.setting.law.excess_loss(window.curvature[~bouncing], noise[~bouncing])
        share = (g.square().sum().double().cpu() - noise.sum()) / (window.total_noise - window.noise.sum(1)).mean()
        each.append(float(top + window.rest * share))
    sample = torch.tensor(each, dtype=torch.float64)
    return float(sample.mean()), float(sample.std() / len(sample) ** 0.5)
