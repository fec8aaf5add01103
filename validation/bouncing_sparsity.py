"""Is it the dynamics orthogonal to the bouncing directions that makes features sparse? Active units, noise by noise.

From states early in training, ReLU networks go on by SGD; by Euler-Maruyama steps of its SDE, one an SGD step, with
the noise of all directions or only of those orthogonal to the bouncing ones; and without noise. Orthogonally the drift
stays whole, so that paths follow the valley floor; the bouncing directions are found anew every block of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nets.curvature import hessian
from nets.features import block_features
from nets.gradients import weighted_gradients
from nets.lanczos import eigenpairs
from nets.objective import Objective
from nets.replicas import replicas
from simulators.network import Network
from simulators.network_sde import ExactCovarianceSDE, run_sde
from simulators.noise import BrownianIncrements
from simulators.orthogonal import OrthogonalSDE
from theory.minibatch import Minibatch
from theory.prediction import Prediction, Reference
from validation.bouncing_checks import SUITE
from validation.bouncing_runs import Setting, draws_of
from validation.check import Check, Claim, Rival, Verdict, judge

SOURCE = Reference(
    "Andriushchenko, Varre, Pillaud-Vivien, Flammarion", 2023, "sparse features by large steps, sections 1 and 4"
)
ERROR = 0.1  # of the effect, as for every sparsity coefficient
FINER = 4  # steps without noise for each of SGD's

ALL = Claim(
    "Gaussian noise of SGD's covariance makes features as sparse as SGD",
    "θ ← θ - η∇L + (η/√B) S ξ:  share of active hidden units = SGD's, effect counted from gradient flow",
    "Steps as large as SGD's; only the law of the noise is another. Fewer directions, or no noise, falsify it.",
)
COMPLEMENT = Claim(
    "the dynamics orthogonal to the bouncing directions makes features as sparse as SGD",
    "θ ← θ - η∇L + P⊥(η/√B) S ξ,  P⊥ orthogonal to {ηλ > 1}:  share of active hidden units = SGD's",
    "The paper's picture, taken literally; falsified where the noise along the bouncing directions matters as well.",
)
CLAIMS = [ALL, COMPLEMENT]


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of positive hidden activations at the end, one for each path: float64, (paths,); NaN if it diverged.

    Attributes:
        sgd, all, complement, quiet: with SGD's noise, Gaussian noise of all directions, of the orthogonal ones, none;
            the entries of one path set out from the same state.
        bouncing: how many directions bounced, on average.
    """

    setting: Setting
    steps: int
    sgd: Tensor
    all: Tensor
    complement: Tensor
    quiet: Tensor
    bouncing: float


def active_share(objective: Objective, theta: Tensor, layer: str) -> Tensor:
    """Share of positive activations of ``layer`` over all units and inputs, for every row of θ, shape (paths,)."""
    shares = []
    for row in theta:
        if not torch.isfinite(row).all():
            shares.append(torch.tensor(torch.nan, dtype=torch.float64))
            continue
        features = block_features(objective.net.module_at(row), objective.X, (layer,))[layer]
        shares.append(features.positive.double().cpu())
    return torch.stack(shares)


def compare(
    objective: Objective, setting: Setting, layer: str, early: int, steps: int, paths: int, root: int,
    block: int = 50, most: int = 12,
) -> Shares:  # fmt: skip
    """``steps`` steps after ``early`` steps of SGD, independent for every path, on squared loss.

    Args:
        block: steps for which a path's bouncing directions are kept.
        layer: whose activations are counted, by the module's name.
        most: so many of the sharpest directions are looked at; those with ηλ > 1 bounce.
    """
    draws, eta = draws_of(setting, objective.n, paths, "sparsity", root), setting.step_size
    start = objective.net.theta.expand(paths, -1)
    rest = torch.zeros_like(start)
    start, _ = replicas(objective, start, rest, eta, early, draws)
    sgd, _ = replicas(objective, start, rest, eta, steps, lambda k: draws(early + k))
    everything = torch.arange(objective.n).expand(paths, -1)
    quiet, _ = replicas(objective, start, rest, eta / FINER, steps * FINER, lambda _: everything)
    labels = torch.nn.functional.one_hot(objective.labels, objective.outputs(start[0], objective.X[:1]).shape[1])
    written = weighted_gradients(objective.net, objective.loss, objective.X)
    network = Network(objective.net.module_at(start[0]), objective.X, labels.to(objective.X), gradients=written)
    exact = ExactCovarianceSDE(network, eta, Minibatch(setting.batch_size))

    def noise(stream: str) -> BrownianIncrements:
        return BrownianIncrements(root, stream, paths, network.n, dtype=start.dtype, device=start.device)

    run = run_sde(exact, start, eta, steps, noise("all directions"))
    everywhere = torch.where(run.finite.unsqueeze(1), run.final, torch.nan)
    outside, increments, bouncing = start, noise("orthogonal directions"), list[float]()
    sharpest: list[Tensor | None] = [None] * paths
    kept = torch.ones(paths, dtype=torch.bool, device=start.device)
    for first in range(0, steps, block):
        each = [_sharpest(objective, theta, most, at) for theta, at in zip(outside, sharpest, strict=True)]
        sharpest = [vectors for _, vectors in each]
        curvature = torch.stack([values for values, _ in each])
        bounces = eta * curvature > 1
        bouncing.append(float(bounces.sum(1).double().mean()))
        sde = OrthogonalSDE(exact, torch.stack([v for _, v in each]) * bounces.unsqueeze(1), follow_floor=True)
        run = run_sde(sde, outside, eta, min(first + block, steps), increments, first_step=first)
        outside, kept = run.final, kept & run.finite & ~curvature.isnan().any(1)
    outside = torch.where(kept.unsqueeze(1), outside, torch.nan)
    with_sgd, with_all, with_complement, without = (
        active_share(objective, theta, layer) for theta in (sgd, everywhere, outside, quiet)
    )
    mean = sum(bouncing) / len(bouncing)
    return Shares(setting, steps, with_sgd, with_all, with_complement, without, mean)


def _sharpest(objective: Objective, theta: Tensor, most: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, (most,), and their eigenvectors, (p, most), of H at one θ; NaN and zeros without any."""
    try:
        found = eigenpairs(hessian(objective, theta), most, start=start, tolerance=5e-2)
    except ValueError:  # θ or H is not finite: the path is lost from here on, and counted
        return theta.new_full((most,), torch.nan), theta.new_zeros(len(theta), most)
    return found.values, found.vectors


def sparsity_checks(shares: Shares) -> list[Check]:
    """SGD against the noise of all directions, and of those orthogonal to the bouncing ones."""
    setting = f"{shares.setting.label}, {shares.steps} steps, {shares.bouncing:.1f} directions bounce"
    quiet = Rival("no noise", shares.quiet)
    checks = []
    # Known: the noise along the bouncing directions, a few of thousands, makes about half of the effect.
    for claim, predicted, rivals, expected in (
        (ALL, shares.all, [quiet, Rival("orthogonal directions only", shares.complement)], Verdict.AGREES),
        (COMPLEMENT, shares.complement, [quiet], Verdict.DISAGREES),
    ):
        prediction = Prediction("share of active units", predicted, float(shares.quiet.nanmean()), ERROR, SOURCE)
        finite = torch.isfinite(shares.sgd) & torch.isfinite(predicted)
        checks.append(
            judge(SUITE, claim, setting, prediction, shares.sgd, finite=finite, rivals=rivals, expected=expected)
        )
    return checks
