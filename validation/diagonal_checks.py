"""The claims on diagonal networks: each function holds one of them against a measured ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nets.diagonal import gd, sgd
from theory import alpha_decay
from theory.diagonal import DiagonalState
from theory.end_point import SOURCE as END_POINT_SOURCE
from theory.end_point import end_point, end_points
from theory.minibatch import Minibatch
from theory.noisy_labels import label_noise
from theory.prediction import AVPF, Prediction, Reference
from theory.problem import Regression
from theory.schedule import Schedule
from theory.trajectory import Trajectory
from validation.check import Check, Claim, Rival, Verdict, judge
from validation.statistics import kendall_tau, median, worst

SUITE = "diagonal"
PER_SAMPLE = Minibatch()

NOISY_LABELS = Claim(
    "SGD step = GD step on noisy labels",
    "θ - η∇ℓ_{i_t}(θ) = θ - η∇L(θ; y + ξ),  ξ_i = r_i(1 - n·1[i = i_t])",
    "An identity: any gap beyond rounding falsifies it.",
)
EXACT_LAW = Claim(
    "α decays by the exact discrete law",
    "ln|α_j(k)| = ln|α_j(0)| + Σ ln|1 - g_kj²|,  g_k the step's weighted input η r x",
    "An identity for SGD and GD alike: any gap beyond rounding falsifies it.",
)
SDE_LAW = Claim(
    "ln α: SDE law, per-sample variances",
    "Δ ln α_j = -Σ_k η_k² (1/n) Σ_i r_ki² x_ij²",
    "Itô's correction of the exact-covariance SDE; another constant, or additive noise, falsifies it.",
)
LEVEL_LAW = Claim(
    "ln α: SDE law at level δ",
    "Δ ln α_j = -2 m_j Σ_k η_k² L(θ_k),  m_j = (1/n) Σ_i x_ij²",
    "Label noise of equal strength on every sample; falsified where residuals and inputs are far from homogeneous.",
)
FINITE_STEP_LAW = Claim(
    "ln α: finite-step law at level δ",
    "Δ ln α_j = -Σ_k (1/n) Σ_i F(2η_k²L(θ_k)x_ij²),  F(s) = E[-ln|1 - sZ²|]",
    "The level-δ law without the small-step expansion, for Gaussian residuals.",
)
COORDINATES = Claim(
    "coordinates decay in proportion to their noise",
    "slope over j of Δ ln α_j on the ensemble's mean of -Σ_k η_k² (1/n) Σ_i r_ki² x_ij² is 1",
    "The decay differs from coordinate to coordinate as predicted; uniform decay has slope 0.",
)
END_POINT = Claim(
    "end point from the realised α",
    "w_∞ = argmin {φ_α(w) : Xw = y} at each run's final α",
    "Distance to SGD's end point, in units of the distance between SGD's and gradient flow's end points.",
)
END_POINT_LEVEL = Claim(
    "end point from δ alone",
    "w_∞ = argmin {φ_α(w) : Xw = y},  α from the finite-step law at the measured L(θ_k)",
    "The same distance with a predicted α. At small η one run's sampling noise is as large as the effect.",
)
END_POINT_PROGRESS = Claim(
    "ensemble moves to the predicted end point",
    "⟨mean w_SGD - w_GF, e⟩/‖e‖² = 1,  e = predicted w_∞ - w_GF",
    "How far the ensemble has gone along the predicted displacement from gradient flow's end point.",
)
ORDER = Claim(
    "larger and longer large steps are sparser",
    "Kendall's τ between the order of the schedules and the fall of ℓ1, ℓ0 or test loss",
    "Schedules ordered by accumulated noise Σ η²; only the sign is predicted.",
)

GD_KEEPS_ALPHA = Claim(
    "GD keeps α (no noise, no decay)",
    "Δ ln α = 0 for full-batch gradient descent",
    "What the SDE says of GD, held to 1 % of a unit of ln α. At large steps bouncing alone decays α: a finding.",
)
GD_ERROR = 0.01

ISOTROPIC = "isotropic noise of equal power"


@dataclass(frozen=True, eq=False)
class Cell:
    """One schedule of a measured ensemble. S seeds, T recorded steps.

    Attributes:
        eta, weights: step size at, and number of steps behind, each record, shape (T,).
        level: training loss, shape (T, S).
        power: Σ η² r_i² over the run, shape (S, n).
        remainder: Σ E[-ln|1 - g²| - g²], what the SDE's expansion drops along the run, shape (S, d).
        isotropic: Σ η² L ‖Φ‖²/(n·2d): half the variance isotropic noise would add to each parameter, shape (S,).
        finite_step_law: Δ ln|α| by the finite-step law at the measured level, shape (S, d).
    """

    problem: Regression
    setting: str
    start: DiagonalState
    final: DiagonalState
    finite: Tensor
    eta: Tensor
    weights: Tensor
    level: Tensor
    power: Tensor
    remainder: Tensor
    isotropic: Tensor
    finite_step_law: Tensor

    @property
    def change(self) -> Tensor:
        """Measured Δ ln|α|, shape (S, d)."""
        return self.final.log_alpha - self.start.log_alpha

    @property
    def eta_column(self) -> Tensor:
        """η at each record, shape (T, 1), to go with ``level``."""
        return self.eta.unsqueeze(1)


def alpha_checks(cell: Cell, homogeneous: Verdict = Verdict.AGREES) -> list[Check]:
    """The three α-decay laws against the mean over coordinates, and the per-coordinate slope.

    The SDE laws state as their error the orders that the small-step expansion -ln|1-g²| = g² + … drops, evaluated at
    the visited states; the law at level δ claims besides that residuals and inputs are homogeneous.

    ``homogeneous`` is the verdict expected of the laws that assume equal noise on every sample.
    """
    problem, change = cell.problem, cell.change
    at_level = (problem, cell.eta_column, cell.level, cell.weights, PER_SAMPLE)
    per_sample = alpha_decay.sde_change(problem, cell.power, PER_SAMPLE)
    dropped = abs(_mean_of(cell.remainder.mean(-1) / per_sample.mean(-1), cell))
    homogeneous_law = alpha_decay.sde_change_at_level(*at_level)
    level_dropped = abs(_mean_of(cell.remainder.mean(-1) / homogeneous_law.mean(-1), cell))
    sources = alpha_decay.SDE_LAW, alpha_decay.FINITE_STEP_LAW
    laws = [
        (SDE_LAW, per_sample, dropped, "r_i(k)²", sources[0], Verdict.AGREES),
        (LEVEL_LAW, homogeneous_law, level_dropped, "δ(k)", sources[0], homogeneous),
        (FINITE_STEP_LAW, cell.finite_step_law, 0.05, "δ(k)", sources[1], homogeneous),
    ]  # fmt: skip
    measured = change.mean(-1)
    checks = []
    for claim, law, error, given, source, expected in laws:
        value = law.mean(-1)
        prediction = Prediction("mean Δ ln α", value, null=0.0, error=error, source=source, given=given)
        rivals = [
            Rival("no noise", 0.0),
            Rival("half the constant", value / 2),
            Rival("Itô read as Stratonovich", 0.0),
            Rival(ISOTROPIC, isotropic_change(cell)),
        ]
        checks.append(
            judge(
                SUITE, claim, cell.setting, prediction, measured, finite=cell.finite, rivals=rivals, expected=expected
            )
        )
    slope, predicted_slope, slope_error = _coordinate_slopes(cell, per_sample)
    prediction = Prediction("slope", predicted_slope, 0.0, slope_error, alpha_decay.SDE_LAW, given="r_i(k)²")
    rivals = [Rival("uniform decay", 0.0), Rival("half the constant", predicted_slope / 2)]
    checks.append(judge(SUITE, COORDINATES, cell.setting, prediction, slope, finite=cell.finite, rivals=rivals))
    return checks


def _coordinate_slopes(cell: Cell, law: Tensor) -> tuple[Tensor, Tensor, float]:
    """Slopes over j of each run's Δ ln α_j and of its law on the ensemble's mean law, (S,), and the dropped orders'.

    Each run is projected on the mean law of the *other* runs, so that its own draws do not enter both sides. The
    predicted slopes average to 1; measured minus predicted is a martingale's end, of mean zero.
    """
    ok, runs = cell.finite, int(cell.finite.sum())
    if runs < 2:
        nothing = torch.full_like(law[:, 0], torch.nan)
        return nothing, nothing, 0.0
    total = torch.where(ok.unsqueeze(1), law, 0.0).sum(0)
    others = (total - law) / (runs - 1)
    direction = others - others.mean(-1, keepdim=True)
    expected = (law * direction).sum(-1)[ok].mean()
    error = abs(float((cell.remainder * direction).sum(-1)[ok].mean() / expected))
    return (cell.change * direction).sum(-1) / expected, (law * direction).sum(-1) / expected, error


def isotropic_change(cell: Cell) -> Tensor:
    """Mean Δ ln|α| if noise of the same total power hit every parameter alike, drift ignored, shape (S,).

    a and b would walk away from a(0), b(0) with variance 4·``isotropic`` each: E ln|1 + σZ/a| = -F(σ²/a²)/2.
    """
    variance = (4 * cell.isotropic).unsqueeze(1)
    a2, b2 = (2 * cell.start.log_a).exp(), (2 * cell.start.log_b).exp()
    return -(alpha_decay.log_decrement(variance / a2) + alpha_decay.log_decrement(variance / b2)).mean(-1) / 2


def end_point_checks(cell: Cell, allowed: float, allowed_from_level: float | None, half: bool) -> list[Check]:
    """SGD's end point against the predicted interpolator, run by run and for the ensemble.

    Args:
        allowed: stated error of the prediction from the realised α; ``allowed_from_level`` of the one from δ, when
            a single run can show it.
        half: whether half the decay leads somewhere else (at very small α it does not).
    """
    problem, alpha0 = cell.problem, cell.start.log_alpha
    flow = end_point(problem, alpha0, cell.start.z).w
    unit = torch.linalg.vector_norm(cell.final.w - flow, dim=-1)

    def solve(change: Tensor) -> Tensor:
        """Predicted end points of all runs, shape (S, d), NaN where a run diverged."""
        w = torch.full_like(cell.final.w, torch.nan)
        w[cell.finite] = end_points(problem, alpha0 + change[cell.finite], cell.start.z)
        return w

    def distance(w: Tensor) -> Tensor:
        return torch.linalg.vector_norm(cell.final.w - w, dim=-1) / unit

    def compare(claim: Claim, w: Tensor, error: float, given: str, rivals: list[Rival]) -> Check:
        prediction = Prediction("relative distance", torch.tensor(0.0), 1.0, error, END_POINT_SOURCE, given=given)
        return judge(
            SUITE, claim, cell.setting, prediction, distance(w), finite=cell.finite, rivals=rivals, statistic=median
        )  # fmt: skip

    from_flow = [Rival("gradient flow's end point", 0.0, torch.ones_like(unit))]
    half_way = [Rival("half the decay", 0.0, distance(solve(cell.change / 2)))] if half else []
    checks = [compare(END_POINT, solve(cell.change), allowed, "α(end)", from_flow + half_way)]
    if allowed_from_level is not None:
        checks.append(compare(END_POINT_LEVEL, solve(cell.finite_step_law), allowed_from_level, "δ(k)", from_flow))
    return checks


def end_point_progress(cell: Cell) -> list[Check]:
    """The ensemble's mean displacement from gradient flow's end point along the one predicted, run by run.

    Each run's own law predicts its end point; both are projected on the displacement that the mean law predicts.
    """
    problem, alpha0, z0, ok = cell.problem, cell.start.log_alpha, cell.start.z, cell.finite
    if ok.sum() < 2:
        return []
    change = alpha_decay.sde_change(problem, cell.power, PER_SAMPLE)
    flow, mean_change = end_point(problem, alpha0, z0).w, change[ok].mean(0)
    direction = end_point(problem, alpha0 + mean_change, z0).w - flow
    direction = direction / direction.square().sum()

    def progress(shrunk: float) -> Tensor:
        """Predicted progress of every run with a share of its decay, NaN where it diverged."""
        found = torch.full_like(cell.final.w[:, 0], torch.nan)
        found[ok] = (end_points(problem, alpha0 + shrunk * change[ok], z0) - flow) @ direction
        return found

    measured = (cell.final.w - flow) @ direction
    dropped = abs(_mean_of(cell.remainder.mean(-1) / change.mean(-1), cell))
    given = "r_i(k)²"
    prediction = Prediction("progress along the prediction", progress(1.0), 0.0, dropped, END_POINT_SOURCE, given=given)
    rivals = [Rival("no noise", 0.0), Rival("half the constant", progress(0.5))]
    return [judge(SUITE, END_POINT_PROGRESS, cell.setting, prediction, measured, finite=ok, rivals=rivals)]


def order_checks(problem: Regression, labels: Sequence[str], falling: dict[str, Tensor], finite: Tensor) -> list[Check]:
    """Each quantity of shape (schedules, S) against "falls along the schedules", seed by seed."""
    everywhere = finite.all(0)
    checks = []
    source = Reference(AVPF, 2023, "loss stabilisation and sparse features")
    for name, values in falling.items():
        tau = torch.from_numpy(kendall_tau(-values.T.nan_to_num().cpu().numpy()))
        prediction = Prediction(f"τ of {name}", torch.tensor(1.0), 0.0, 1.0, source)
        rivals = [Rival("no order", 0.0), Rival("reverse order", -1.0)]
        setting = f"{problem.name}: {labels[0]} … {labels[-1]} ({len(labels)} schedules)"
        checks.append(judge(SUITE, ORDER, setting, prediction, tau, finite=everywhere, rivals=rivals))
    return checks


def noisy_label_check(problem: Regression, start: DiagonalState, seeds: Sequence[int], root_seed: int) -> Check:
    """One SGD step from each of several visited states against the GD step on the noisy labels."""
    eta = Schedule(0.1)
    visited = sgd(problem, start, [eta], 50, seeds=seeds, root_seed=root_seed, engine="literal").final
    index = np.random.default_rng(root_seed).integers(0, problem.n, (len(seeds), 1))
    stepped = sgd(problem, visited, [eta], 1, seeds=seeds, indices=index, engine="literal").final
    gap, short, flipped = [], [], []
    for row in range(len(seeds)):
        here = DiagonalState.from_uv(visited.u[0, row], visited.v[0, row])
        xi = label_noise(problem.X @ here.w - problem.y, torch.tensor(int(index[row, 0]), device=problem.X.device))

        def distance(noise: Tensor, here: DiagonalState = here, row: int = row) -> Tensor:
            noisy = Regression(problem.X, problem.y + noise, problem.X_test, problem.y_test)
            other = gd(noisy, here, [eta], 1, engine="literal").final
            after = torch.cat([stepped.u[0, row], stepped.v[0, row]])
            step = torch.cat([stepped.u[0, row] - here.u, stepped.v[0, row] - here.v])
            return (torch.cat([other.u[0, 0], other.v[0, 0]]) - after).norm() / step.norm()

        gap.append(distance(xi))
        short.append(distance(xi / problem.n))
        flipped.append(distance(-xi))
    prediction = Prediction("gap / step", torch.tensor(0.0), 1.0, 1e-11, Reference(AVPF, 2023, "Prop. 1"))
    rivals = [
        Rival("noise smaller by n", 0.0, torch.stack(short)),
        Rival("opposite noise", 0.0, torch.stack(flipped)),
    ]
    return judge(SUITE, NOISY_LABELS, problem.name, prediction, torch.stack(gap), rivals=rivals, statistic=worst)


def exact_law_check(
    problem: Regression, eta: float, visited: Tensor, inputs: Tensor, run: Trajectory, change: Tensor, label: str
) -> Check:
    """Σ ln|1 - g²| along the visited predictors against ln|u² - v²| of the literal recursion.

    Args:
        visited: w_k before each step, shape (K, S, d).
        inputs: batch weights of each step, shape (K, S, n), rows summing to 1.
        change: measured Δ ln|α|, shape (S, d).
    """
    residual = visited @ problem.X.T - problem.y
    g = eta * (inputs * residual) @ problem.X
    exact = alpha_decay.exact_change(g).mean(-1)
    prediction = Prediction("mean Δ ln α", exact, 0.0, 1e-8, alpha_decay.SDE_LAW, given="visited states")
    rivals = [Rival("-Σ g² (no higher orders)", -g.square().sum(0).mean(-1)), Rival("no decay", 0.0)]
    finite = run.finite.reshape(-1)
    return judge(
        SUITE, EXACT_LAW, f"{problem.name}: {label}", prediction, change.mean(-1), finite=finite, rivals=rivals,
        statistic=worst,
    )  # fmt: skip


def gd_checks(
    problem: Regression, start: DiagonalState, final: DiagonalState, finite: Tensor, schedule: Schedule
) -> list[Check]:
    """Gradient descent has no noise: the SDE predicts that α stays, and with it gradient flow's end point.

    Known: large steps decay α without any noise, and move z out of the row space of X by terms of third order that
    have one sign in every step, so that the end point is not the one of the realised α either.
    """
    change = (final.log_alpha - start.log_alpha).mean(-1)
    flow = end_point(problem, start.log_alpha, start.z).w
    unit = torch.linalg.vector_norm(final.w - flow, dim=-1)
    setting = f"{problem.name}: GD {schedule.label}"
    prediction = Prediction("mean Δ ln α", torch.tensor(0.0), -1.0, GD_ERROR, alpha_decay.SDE_LAW)
    expected = Verdict.AGREES if schedule.step_size < 1 else Verdict.DISAGREES
    checks = [
        judge(SUITE, GD_KEEPS_ALPHA, setting, prediction, change, finite=finite, expected=expected, statistic=worst)
    ]
    if schedule.step_size >= 1 and bool(finite.all()):
        reached = end_point(problem, final.log_alpha[0], start.z).w
        distance = torch.linalg.vector_norm(final.w - reached, dim=-1) / unit
        prediction = Prediction("relative distance", torch.tensor(0.0), 1.0, 0.17, END_POINT_SOURCE, given="α(end)")
        rivals = [Rival("gradient flow's end point", 0.0, torch.ones_like(unit))]
        checks.append(
            judge(
                SUITE, END_POINT, setting, prediction, distance, finite=finite, rivals=rivals, statistic=worst,
                expected=Verdict.DISAGREES,
            )
        )  # fmt: skip
    return checks


def _mean_of(fraction: Tensor, cell: Cell) -> float:
    kept = fraction[cell.finite]
    return float(kept.mean()) if len(kept) else 0.0
