"""The claims on bouncing directions: each function holds some of them against one window of replicas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from theory.bouncing import SOURCE, VARIANCE_SOURCE, gradient_descent_autocorrelation
from theory.prediction import Prediction, Reference
from validation.bouncing_runs import LAGS, Window, leave_one_out
from validation.check import Check, Claim, Rival, Verdict, judge

SUITE = "bouncing"
TOP, TOP_VARIANCES = 40, 20
FEWEST = 2  # directions that make a median or a mean
SLOW = 0.1  # ηλ below which the SDE is meant to hold
ERROR = 0.05
"""Stated by the linear laws: what curving walls of the valley change while ηλ is not within a few per cent of 2."""
FLAT = 0.06  # ηλ of the last direction below which what is orthogonal to all of them diffuses for a few steps
UNSTABLE = 1e3  # how many floors high a level is shown for which χ ≥ 1 predicts none
EDGE = 1.99  # ηλ to which the floor's curvature is clamped: beyond 2 the linear law has no stationary state
HESSIAN, VISITED = "H on the floor", "C at visited iterates"

AUTOCORRELATION = Claim(
    "displacements have autocorrelation μ - ηλ/2",
    "corr(d_k, d_{k+1}) = μ - ηλ/2 in every eigendirection;  slope of measured on predicted = 1",
    "Linear SGD, whatever the noise; white increments, the SDE's -(1 - e^{-ηλ})/2, or twice the slope falsify it.",
)
SPREAD = Claim(
    "the autocorrelation law explains every direction",
    "1 - R² = Σ(measured - predicted)² / Σ(measured - mean)² = 0 over the sharpest directions",
    "About the line of slope 1 itself, not a fitted one.",
)
DESCENT = Claim(
    "without noise displacements have autocorrelation 1 - ηλ",
    "Σ d_k d_{k+1} / Σ d_k² = 1 - ηλ of full-batch GD from the same states;  slope of measured on predicted = 1",
    "GD relaxes where SGD is kept up: at the same ηλ the two laws differ by a factor two; -ηλ/2 falsifies it.",
)
VARIANCE = Claim(
    "stationary variance of discrete SGD",
    "Var x = ηC(1+μ)/(λ(1-μ)(2(1+μ) - ηλ)),  median of measured over predicted in 20 directions",
    "The SDE's Var x = ηC/(2λ(1-μ)) falsifies it or is falsified.",
)
SDE_HOLDS = Claim(
    "the SDE's variance holds where ηλ < 0.1",
    "Var x = ηC/(2λ),  median of measured over predicted",
    "Orthogonal to the bouncing directions the SDE is right to ηλ/2.",
)
SDE_FAILS = Claim(
    "the SDE's variance is too small by 2/(2 - ηλ) where ηλ > 1",
    "Var x / (ηC/2λ) = 2/(2 - ηλ),  median over the bouncing directions",
    "Inside the bouncing subspace the SDE fails by a predicted factor.",
)
EXCESS = Claim(
    "loss above the valley floor",
    "⟨L⟩ - L(mean iterate) = ½ η tr[C(2I - ηH)^{-1}],  heavy ball ½ η/(1-μ) tr[C(2I - η/(1+μ) H)^{-1}]",
    "H on the floor, C where SGD goes; the SDE's ¼ η tr C falsifies it or is falsified. Fails close to ηλ = 2.",
)
LEVEL = Claim(
    "loss level from the floor alone",
    "⟨L⟩ = L_floor/(1 - χ),  χ = (η/(cB)) Σ λ/(2 - ηλ) for c outputs",
    "C = (2L/(cB))H: residuals alike in size and direction. Held to 5 % of the excess; misses are findings.",
)
WHITE = Claim(
    "increments are white",
    "corr(d_k, d_{k+1}) = 0, what an SDE's drift-free increments have, mean over directions",
    "True to ηλ/2 in the complement, false in the bouncing directions: where the SDE's noise is what it claims.",
)
SIDES = Claim(
    "bouncing directions change side as Gaussians of that autocorrelation do",
    "P(x_k x_{k+1} < 0) = arccos(1 - ηλ)/π, mean over the directions with ηλ > 1",
    "Above one half, for any bouncing direction; never and always falsify it.",
)
GAUSSIAN = Claim(
    "coordinates orthogonal to the bouncing directions are Gaussian",
    "excess kurtosis of x = 0, mean over the directions with ηλ < 0.2",
    "What noise of many small kicks gives; Laplace-distributed coordinates falsify it.",
)
DIFFUSION = Claim(
    "the complement diffuses",
    "E‖P⊥(θ_{k+m} - θ_k)‖² = η² tr(P⊥C) m, differences from the mean of the replicas, m = 4",
    "P⊥ orthogonal to all measured directions; saturation, as inside, falsifies it.",
)
SATURATION = Claim(
    "inside, displacements alternate with the lag",
    "E(x_{k+2} - x_k)² / E(x_{k+1} - x_k)² = 2 - ηλ < 1, median over the directions with ηλ > 1",
    "Diffusion (2) and the SDE (1 + e^{-ηλ}) falsify it.",
)

CLAIMS = [
    AUTOCORRELATION, SPREAD, DESCENT, VARIANCE, SDE_HOLDS, SDE_FAILS, EXCESS, LEVEL, WHITE, SIDES, GAUSSIAN,
    DIFFUSION, SATURATION,
]  # fmt: skip
LEVEL_SOURCE = Reference("valleydrift", 2026, "residual noise in c outputs, theory/bouncing.py")


def autocorrelations(window: Window) -> tuple[Tensor, Tensor]:
    """Σ_t d_t d_{t+1} and Σ_t d_t² of every replica and direction, shape (R, K)."""
    d = window.x.diff(dim=0)
    return (d[1:] * d[:-1]).sum(0), (d[1:].square() + d[:-1].square()).sum(0) / 2


def autocorrelation_checks(window: Window) -> list[Check]:
    """Slope and R² of the measured autocorrelations on the law's.

    Few replicas scatter, and their scatter alone makes 1 - R² positive (0.009 for 16 of them and 200 steps): leaving
    one out in turn removes it to order 1/R, for every network alike, and gives the error that is left.
    """
    law, curvature = window.setting.law, window.curvature[:TOP]
    products, squares = (part[:, :TOP] for part in autocorrelations(window))
    predicted = window.displacement_autocorrelation(curvature)
    centred = predicted - predicted.mean()

    def slope_of(values: Tensor) -> float:
        return float((values * centred).sum() / centred.square().sum())

    def slope(weights: Tensor) -> float:
        return slope_of((weights @ products) / (weights @ squares))

    def distance(to: Tensor) -> Callable[[Tensor], float]:
        def value(weights: Tensor) -> float:
            measured = (weights @ products) / (weights @ squares)
            return float((measured - to).square().sum() / (measured - measured.mean()).square().sum())

        return value

    runs = len(products)
    others = {
        "white increments: 0": torch.zeros_like(predicted),
        "the SDE's": law.sde_displacement_autocorrelation(curvature),
        "-ηλ": law.momentum - law.step_size * curvature,
        "-1 throughout": -torch.ones_like(predicted),
    }
    if law.momentum:
        others["no momentum"] = -law.step_size * curvature / 2
        others["a step of η/(1-μ)"] = -law.step_size * curvature / (1 - law.momentum) / 2
        slopes = {name: slope_of(values) for name, values in others.items() if name != "no momentum"}
    else:
        slopes = {name: slope_of(values) for name, values in others.items()}
    measured = leave_one_out(slope, runs)
    prediction = Prediction("slope", torch.tensor(1.0), 0.0, ERROR, SOURCE, given=HESSIAN)
    rivals = [Rival(name, value) for name, value in slopes.items()]
    checks = [_judged(window, AUTOCORRELATION, prediction, measured, rivals)]
    prediction = Prediction("1 - R²", torch.tensor(0.0), 1.0, 0.02, SOURCE, given=HESSIAN)
    rivals = [Rival(name, 0.0, leave_one_out(distance(values), runs)) for name, values in others.items()]
    return [*checks, _judged(window, SPREAD, prediction, leave_one_out(distance(predicted), runs), rivals)]


def descent_check(window: Window, x: Tensor) -> Check:
    """Slope of the autocorrelations of the replicas' descent without noise, x of shape (steps, R, K)."""
    d = x.diff(dim=0)[..., :TOP]
    products, squares = (d[1:] * d[:-1]).sum(0), d[:-1].square().sum(0)
    eta, curvature = window.setting.step_size, window.curvature[:TOP]
    predicted = gradient_descent_autocorrelation(eta, curvature)
    centred = predicted - predicted.mean()

    def slope(weights: Tensor) -> float:
        return float(((weights @ products) / (weights @ squares) * centred).sum() / centred.square().sum())

    prediction = Prediction("slope", torch.tensor(1.0), 0.0, ERROR, SOURCE, given=HESSIAN)
    rivals = [Rival("SGD's -ηλ/2", 0.5), Rival("-1 throughout", 0.0)]
    return _judged(window, DESCENT, prediction, leave_one_out(slope, len(products)), rivals)


def variance_checks(window: Window, expected: Verdict = Verdict.AGREES) -> list[Check]:
    """The stationary variance of the sharpest directions."""
    law, noise = window.setting.law, window.noise.mean(0)
    squares = window.x.square().mean(0)
    predicted, at_sde = window.variance(window.curvature, noise), law.sde_variance(window.curvature, noise)
    rank = torch.arange(len(predicted))
    # Reshuffling spares the sharpest directions, so its law is tried on the next ones.
    top = (rank >= TOP_VARIANCES) & (rank < TOP) if window.setting.reshuffled else rank < TOP_VARIANCES
    rivals = [("the SDE", at_sde), ("half the constant", predicted / 2)]
    if window.setting.reshuffled:
        rivals.append(("independent minibatches", law.variance(window.curvature, noise)))
    if law.momentum:
        rivals.append(("no momentum", at_sde * (1 - law.momentum)))
    given = f"{HESSIAN}, {VISITED}"
    prediction = Prediction(
        "Var x over predicted", torch.tensor(1.0), 0.0, ERROR, VARIANCE_SOURCE, _noise_error(window, top), given
    )
    others = [Rival(name, _median(values / predicted, top)) for name, values in rivals]
    return [_judged(window, VARIANCE, prediction, _median_ratio(squares, predicted, top), others, expected)]


def sde_checks(window: Window) -> list[Check]:
    """Where the SDE's variance holds and by what factor it fails."""
    checks, given = [], f"{HESSIAN}, {VISITED}"
    squares = window.x.square().mean(0)
    predicted = window.variance(window.curvature, window.noise.mean(0))
    at_sde = window.setting.law.sde_variance(window.curvature, window.noise.mean(0))
    slow, bouncing = (window.slip < SLOW) & (window.slip > 0), (window.slip > 1) & (window.slip < 1.9)
    if int(slow.sum()) >= FEWEST:
        prediction = Prediction(
            "Var x over the SDE's", torch.tensor(1.0), 0.0, SLOW / 2, VARIANCE_SOURCE, _noise_error(window, slow), given
        )
        others = [Rival("half the constant", 0.5), Rival("twice the constant", 2.0)]
        checks.append(_judged(window, SDE_HOLDS, prediction, _median_ratio(squares, at_sde, slow), others))
    if int(bouncing.sum()) >= FEWEST:
        factor = torch.tensor(_median(predicted / at_sde, bouncing))
        error = float(factor) * _noise_error(window, bouncing)
        prediction = Prediction("Var x over the SDE's", factor, 1.0, ERROR, VARIANCE_SOURCE, error, given)
        measured = _median_ratio(squares, at_sde, bouncing)
        checks.append(_judged(window, SDE_FAILS, prediction, measured, [Rival("the SDE", 1.0)]))
    return checks


def excess_check(window: Window, expected: Verdict = Verdict.AGREES) -> Check:
    """The loss above the floor."""
    law, (value, error), stated = window.setting.law, expected_excess(window), ERROR
    if window.setting.reshuffled:  # the complement's part is between nothing and that of independent minibatches
        value, stated = value - window.rest / 2, ERROR + window.rest / 2 / value
    rivals = [
        Rival("the SDE", float(law.sde_excess_loss(window.total_noise.unsqueeze(1)).mean())),
        Rival("no noise", 0.0),
    ]
    prediction = Prediction(
        "loss above the floor", torch.tensor(value), 0.0, stated, SOURCE, error, f"{HESSIAN}, {VISITED}"
    )
    return _judged(window, EXCESS, prediction, window.excess, rivals, expected)


def expected_excess(window: Window) -> tuple[float, float]:
    """The law's loss above the floor, and its standard error from the noise's estimate."""
    setting = window.setting
    held = window.curvature.clamp(max=EDGE * (1 + setting.momentum) / setting.step_size)
    each = torch.stack([(held * window.variance(held, noise)).sum() / 2 for noise in window.noise])
    error = (each.var() / len(each) + window.rest_error**2) ** 0.5
    return float(each.mean()) + window.rest, float(error)


def level_check(window: Window, expected: Verdict) -> Check:
    """L_floor/(1 - χ), its rival one output instead of c (the formula for scalar networks)."""
    setting, law, floor = window.setting, window.setting.law, window.floor
    rest = window.trace - float(window.curvature.sum())

    def level(outputs: int) -> float:
        top = float(law.loss_amplification(window.curvature, setting.batch_size, outputs))
        chi = top + law.step_size * rest / (2 * outputs * setting.batch_size * (1 - law.momentum))
        return floor / (1 - chi) if chi < 1 else UNSTABLE * floor

    sde = law.step_size * window.trace / (2 * window.outputs * setting.batch_size * (1 - law.momentum))
    rivals = [Rival("no noise", floor), Rival("the SDE's χ", floor / (1 - sde)), Rival("one output", level(1))]
    prediction = Prediction(
        "mean loss", torch.tensor(level(window.outputs)), floor, ERROR, LEVEL_SOURCE, given="H and L on the floor"
    )
    return _judged(window, LEVEL, prediction, floor + window.excess, rivals, expected)


def inside_and_outside_checks(window: Window) -> list[Check]:
    """Whiteness, alternation and displacements over lags, in the bouncing directions and their complement."""
    law, bouncing = window.setting.law, window.slip > 1
    products, squares = autocorrelations(window)
    scale = squares.mean(0)
    checks = []
    for where, name, verdict in _sides(window, SLOW):
        white = (products[:, where] / scale[where]).mean(1)
        prediction = Prediction(f"autocorrelation, {name}", torch.tensor(0.0), -0.5, 0.1, SOURCE)
        checks.append(_judged(window, WHITE, prediction, white, [Rival("bouncing", -0.5)], verdict))
    x = window.x[..., bouncing]
    sides = (x[1:] * x[:-1] < 0).double().mean((0, 2))
    value = law.alternation(window.curvature[bouncing]).mean()
    prediction = Prediction("share of steps that change side", value, 0.0, ERROR, SOURCE, given=HESSIAN)
    rivals = [Rival("never", 0.0), Rival("always", 1.0)]
    checks.append(_judged(window, SIDES, prediction, sides, rivals))
    one, two = ((x[m:] - x[:-m]).square().mean(0) for m in (1, 2))
    slip, everywhere = window.slip[bouncing], torch.ones(x.shape[2], dtype=torch.bool)

    def ratio(weights: Tensor) -> float:
        return _median((weights @ two) / (weights @ one), everywhere)

    prediction = Prediction("MSD(2)/MSD(1)", (2 - slip).quantile(0.5), 2.0, ERROR, SOURCE, given=HESSIAN)
    rivals = [Rival("diffusion", 2.0), Rival("the SDE", float((1 + (-slip).exp()).quantile(0.5)))]
    return [*checks, _judged(window, SATURATION, prediction, leave_one_out(ratio, len(one)), rivals)]


def gaussian_check(window: Window) -> Check:
    """Kurtosis of the coordinates in the complement."""
    outside = (window.slip < 2 * SLOW) & (window.slip > 0)
    x = window.x[..., outside] / window.x[..., outside].square().mean((0, 1)).sqrt()
    prediction = Prediction(f"excess kurtosis, ηλ < {2 * SLOW:g}", torch.tensor(0.0), 3.0, ERROR, SOURCE)
    return _judged(window, GAUSSIAN, prediction, x.pow(4).mean((0, 2)) - 3, [Rival("Laplace", 3.0)])


def diffusion_check(window: Window, lag: int = 4) -> Check:
    """Growth of the displacement orthogonal to all measured directions."""
    complement = window.total_noise - window.noise.sum(1)
    unit = window.setting.step_size**2 * float(complement.mean())
    error = float(complement.std() / complement.mean()) / len(complement) ** 0.5
    # Over m steps curvature takes the fraction mηλ/2 of the growth away.
    stated = lag * float(window.slip[-1]) / 2
    prediction = Prediction(
        f"‖P⊥Δθ‖² over {lag} steps, over η² tr P⊥C m", torch.tensor(1.0), 0.0, stated, SOURCE, error, VISITED
    )
    rivals = [Rival("no noise", 0.0), Rival("saturated after a step", 1 / lag)]
    return _judged(window, DIFFUSION, prediction, window.moved[LAGS.index(lag)] / (unit * lag), rivals)


def _sides(window: Window, slow: float) -> list[tuple[Tensor, str, Verdict]]:
    """The complement, where the SDE's picture is expected to hold, and the bouncing directions, where not."""
    outside, inside = (window.slip < slow) & (window.slip > 0), window.slip > 1
    found = [(outside, f"ηλ < {slow:g}", Verdict.AGREES), (inside, "ηλ > 1", Verdict.DISAGREES)]
    return [side for side in found if int(side[0].sum()) >= FEWEST]


def _judged(
    window: Window, claim: Claim, prediction: Prediction, measured: Tensor, rivals: list[Rival],
    expected: Verdict = Verdict.AGREES,
) -> Check:  # fmt: skip
    """The check, with replicas that diverged counted."""
    finite = window.finite
    full = [
        Rival(r.name, r.value, None if r.measured is None else scattered(r.measured, finite), r.standard_error)
        for r in rivals
    ]
    return judge(
        SUITE, claim, window.setting.label, prediction, scattered(measured, finite), finite=finite, rivals=full,
        expected=expected,
    )  # fmt: skip


def scattered(values: Tensor, finite: Tensor) -> Tensor:
    """Values of the finite replicas as one entry for each that set out, NaN for those that diverged."""
    sample = torch.full((len(finite),), torch.nan, dtype=torch.float64)
    sample[finite] = values
    return sample


def _median(values: Tensor, where: Tensor) -> float:
    return float(values[where].quantile(0.5))


def _median_ratio(squares: Tensor, predicted: Tensor, where: Tensor) -> Tensor:
    """Pseudo-values of the median over directions of measured over predicted variance."""
    return leave_one_out(lambda weights: _median((weights @ squares) / predicted, where), len(squares))


def _noise_error(window: Window, where: Tensor) -> float:
    """Relative standard error of C_kk, mean over the directions meant, as if their errors were one."""
    noise = window.noise[:, where]
    return float((noise / noise.mean(0)).mean(1).std() / len(noise) ** 0.5)
