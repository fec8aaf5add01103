"""The claims on diagonal networks that use nothing measured: the SDE with its own loss, and the mean-field closure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simulators.diagonal import integrate_diagonal
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from theory.closure import SOURCE as CLOSURE_SOURCE
from theory.closure import ClosureCurve
from theory.diagonal import DiagonalState
from theory.diagonal_sde import DiagonalSDE, IsotropicDiagonalSDE, to_logs
from theory.minibatch import Minibatch
from theory.prediction import AVPF, Prediction, Reference
from theory.problem import Regression
from theory.sde import ExactCovariance
from theory.trajectory import Probe, Trajectory
from validation.check import Check, Claim, Rival, Verdict, judge
from validation.statistics import median

SUITE = "diagonal"
SUBSTEPS = 4  # integration steps per SGD step
WANTED_LEVEL, WANTED_ALPHA = 0.10, 0.05  # what a useful closure would reach

SDE_AB_INITIO = Claim(
    "ln α ab initio: SDE with its own loss",
    "dθ = -∇L dt + √η S(θ) dW, no measured input",
    "Falsified where the SDE's own loss leaves SGD's: at step sizes where the loss stabilises.",
)
SDE_LEVEL = Claim(
    "loss level ab initio: SDE with its own loss",
    "(1/T) ∫ L(θ_t) dt of dθ = -∇L dt + √η S(θ) dW",
    "The loss the SDE keeps up by itself, over the whole run; what drives the decay of α.",
)
CLOSURE_ALPHA = Claim(
    "ln α ab initio: mean-field closure",
    "A, B, M iterated from data, initialisation and η",
    "Held to 5 % of the effect, what a useful closure would reach; misses are findings.",
)
CLOSURE_LEVEL = Claim(
    "loss level ab initio: mean-field closure",
    "δ = (‖m‖² + tr M)/2n, averaged over the second half of the run",
    "Held to 10 % of the level, what a useful closure would reach; misses are findings.",
)
SOURCE = Reference(AVPF, 2023, "SDE section, exact covariance")


def simulate(problem: Regression, start: DiagonalState, eta: float, steps: int, paths: int, seed: int) -> Trajectory:
    """The exact-covariance SDE with its own loss, ``SUBSTEPS`` Euler steps per SGD step.

    Series: ``ln alpha`` (mean change), ``loss`` (mean over the run), and ``orders``: the variation of ln α and the
    two terms of first order in η that the SDE gives up.
    """
    sde = DiagonalSDE(problem, ExactCovariance(eta))
    y0 = to_logs(start).to(problem.X).expand(paths, -1)
    every = torch.arange(0, steps) * SUBSTEPS

    def orders(y: Tensor) -> Tensor:
        """Per SGD step, mean over coordinates: variance law, missing drift², next order ½E g⁴; shape (paths, 3)."""
        r = sde.residual(y)
        law = r.square() @ problem.X.square() / problem.n
        drift2 = (r @ problem.X / problem.n).square()
        quartic = eta**2 * r.pow(4) @ problem.X.pow(4) / problem.n / 2
        return torch.stack([law.mean(-1), drift2.mean(-1), quartic.mean(-1)], -1)

    last = torch.tensor([steps * SUBSTEPS])
    probes = {
        "loss": Probe(lambda y: sde.residual(y).square().mean(-1) / 2, every, weights=y0.new_full((steps,), 1 / steps)),
        "ln alpha": Probe(lambda y: (y - y0).sum(-1) / problem.d, last),
        "orders": Probe(orders, every[::4], weights=y0.new_ones(len(every[::4]))),  # only their ratios matter
    }
    noise = BrownianIncrements(seed, f"sde {eta}", paths, problem.n, dtype=y0.dtype, device=y0.device)
    return integrate_diagonal(problem, ExactCovariance(eta), y0, eta / SUBSTEPS, steps * SUBSTEPS, noise, probes)


def isotropic(problem: Regression, start: DiagonalState, eta: float, steps: int, paths: int, seed: int) -> Tensor:
    """Mean Δ ln|α| per path when noise of the same power hits every parameter alike, shape (paths,)."""
    theta0 = torch.cat([start.u, start.v]).to(problem.X).expand(paths, -1)
    sde = IsotropicDiagonalSDE(problem, eta, Minibatch())
    noise = BrownianIncrements(seed, f"isotropic {eta}", paths, 2 * problem.d, dtype=theta0.dtype, device=theta0.device)
    u, v = integrate(sde, theta0, eta, steps, noise).final.chunk(2, -1)
    return (u.square() - v.square()).abs().log().mean(-1) - start.log_alpha.mean()


@dataclass(frozen=True, eq=False)
class Measured:
    """SGD's side: mean Δ ln|α| and mean loss of the run per seed, and GD's mean loss at the same η."""

    change: Tensor
    loss: Tensor
    finite: Tensor
    quiet_loss: float


def sde_checks(
    problem: Regression, eta: float, sgd: Measured, sde: Trajectory, isotropic_change: Tensor | None, expected: Verdict
) -> list[Check]:
    """Δ ln α and the run's mean loss, SDE against SGD; medians, because the SDE's means need not exist.

    The stated error is first order in η along the SDE's own path: the squared drift it leaves out and ½E g⁴.
    """
    ok = sde.finite
    law, drift2, quartic = sde["orders"].values[-1][ok].median(0).values
    error = float((drift2 + quartic) / law)
    setting = f"{problem.name}: η={eta:g}"
    alpha = median(sde["ln alpha"].values[-1][ok].cpu().numpy())
    rivals = [Rival("no noise", 0.0), Rival("half the noise", alpha.value / 2), Rival("Itô read as Stratonovich", 0.0)]
    if isotropic_change is not None:
        spread = median(isotropic_change.cpu().numpy())
        rivals.append(Rival("isotropic noise of equal power", spread.value, standard_error=spread.standard_error))
    prediction = Prediction(
        "median Δ ln α", torch.tensor(alpha.value), 0.0, error, SOURCE, standard_error=alpha.standard_error
    )
    checks = [
        judge(
            SUITE, SDE_AB_INITIO, setting, prediction, sgd.change, finite=sgd.finite, rivals=rivals, statistic=median,
            expected=expected,
        )
    ]  # fmt: skip
    level = median(sde["loss"].values[-1][ok].cpu().numpy())
    prediction = Prediction(
        "median of the run's mean loss", torch.tensor(level.value), sgd.quiet_loss, error, SOURCE,
        standard_error=level.standard_error,
    )  # fmt: skip
    rivals = [Rival("no noise (GD at the same η)", sgd.quiet_loss)]
    checks.append(
        judge(
            SUITE, SDE_LEVEL, setting, prediction, sgd.loss, finite=sgd.finite, rivals=rivals, statistic=median,
            expected=expected,
        )
    )  # fmt: skip
    return checks


def closure_checks(
    problem: Regression, etas: list[float], closure: ClosureCurve, start: DiagonalState, change: Tensor, level: Tensor,
    finite: Tensor, expected: dict[float, tuple[Verdict, Verdict]],
) -> list[Check]:  # fmt: skip
    """The closure's Δ ln α and level against SGD's means, shape (etas, S) each."""
    half = closure.steps >= closure.steps[-1] // 2
    checks = []
    for c, eta in enumerate(etas):
        setting = f"{problem.name}: η={eta:g}, {int(closure.steps[-1])} steps"
        alpha_verdict, level_verdict = expected.get(eta, (Verdict.AGREES, Verdict.AGREES))
        value = (closure.log_alpha[-1, c] - start.log_alpha).mean()
        prediction = Prediction("mean Δ ln α", value, 0.0, WANTED_ALPHA, CLOSURE_SOURCE)
        rivals = [Rival("no noise", 0.0), Rival("half the constant", value / 2)]
        checks.append(
            judge(
                SUITE, CLOSURE_ALPHA, setting, prediction, change[c], finite=finite[c], rivals=rivals,
                expected=alpha_verdict,
            )
        )  # fmt: skip
        value = closure.level[half, c].mean()
        prediction = Prediction("loss, second half, median of runs", value, 0.0, WANTED_LEVEL, CLOSURE_SOURCE)
        checks.append(
            judge(
                SUITE, CLOSURE_LEVEL, setting, prediction, level[c], finite=finite[c], rivals=[Rival("no noise", 0.0)],
                expected=level_verdict, statistic=median,
            )
        )  # fmt: skip
    return checks
