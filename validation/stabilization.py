"""Suite ``stabilization``: AVPF's Prop. 2, from its proof to runs of SGD."""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from nets.one_dimensional import sgd_path
from theory.prediction import Prediction
from theory.stabilization import (
    BAND_HIGH,
    BAND_LOW,
    SOURCE,
    absorbing_band,
    admissible_step_sizes,
    entry_bound,
    prove_band,
)
from theory.streams import seed_of
from validation.check import Check, Claim, Rival, judge
from validation.settings import RunSettings
from validation.statistics import worst
from validation.suite import Outcome, Progress

NAME = "stabilization"

PROOF = Claim(
    "Prop. 2 holds exactly",
    "f_c maps [ℓ, 1) into (1, h] and back for c in (1, 5/4), ℓ = 27/32·√(3/5), h = 3/2·√(3/5)",
    "The number of proof steps that sympy confirms in exact arithmetic.",
)
ALTERNATION = Claim(
    "SGD alternates sides of the minimum for ever",
    "sign(θ_{k+1} - θ*) = -sign(θ_k - θ*) at every step from some step on",
    "Share of steps that change side after the predicted entry; one step that does not falsifies it.",
)
BAND = Claim(
    "the iterate stays in the predicted band",
    "θ/θ* in [l_out, l_in] ∪ [r_in, r_out], the absorbing band of the draws' c",
    "Share of steps inside, after a burn-in; one step outside falsifies it.",
)
LEVEL = Claim(
    "the loss stays between two positive constants",
    "min over the band ≤ ¼(1 - (θ/θ*)²)² ≤ max over the band, in units of y²",
    "Share of runs that keep between the constants after a burn-in; one that does not falsifies it.",
)
ENTRY = Claim(
    "the band is entered as fast as predicted",
    "steps until θ/θ* ≥ ℓ, at most ⌈ln(ℓ/s₀)/ln(2 - ℓ²)⌉",
    "Share of runs that enter within the bound; one that is later falsifies it.",
)
CONTROL = Claim(
    "small steps do not bounce",
    "c < ½ at every draw: f_c'(1) = 1 - 2c > 0, θ approaches θ* from one side",
    "Control: the same count at a small step size must be 0.",
)
DIES_OUT = Claim(
    "below the interval bouncing dies out",
    "½ < c < 1 at every draw: |f_c'(1)| = 2c - 1 < 1, the loss vanishes",
    "Control: share of runs whose loss ends below 1e-20; the bouncing stabilises inside the interval only.",
)

CLAIMS = [PROOF, ALTERNATION, BAND, LEVEL, ENTRY, CONTROL, DIES_OUT]


def run(settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """All checks of the suite."""
    options = settings.stabilization
    seeds, star = range(settings.replicates), options.theta_star
    generator = torch.Generator().manual_seed(seed_of(NAME) % 2**31)
    x = 1 + options.spread * torch.rand(options.samples, generator=generator, dtype=torch.float64)
    x[0], x[-1] = 1.0, 1 + options.spread  # both edges of the interval are drawn
    x = x.to(device)
    low, high = admissible_step_sizes(x, star)
    inside = [low + share * (high - low) for share in (0.25, 0.5, 0.9)]
    etas = [0.4 * low, 0.8 * low, *inside]

    progress("proof of Prop. 2 in exact arithmetic")
    facts = prove_band()
    checks = [_proof_check(facts)]
    progress(f"SGD in one dimension, {len(etas)} step sizes x {len(seeds)} seeds")
    path = sgd_path(x, star, options.start * star, etas, options.steps, seeds, seed_of(NAME)) / star
    entered = entry_bound(options.start)
    side = path > 1
    for e, eta in enumerate(etas):
        s, setting = path[:, e], f"one dimension, η={eta:.4g}"
        changes = (side[entered + 1 :, e] != side[entered:-1, e]).double().mean(0)
        if eta < low:
            checks.append(_control(s, setting, bounces=eta > low / 2))
            continue
        c = eta * x.square() * star**2
        checks += _bouncing_checks(s, changes, float(c.min()), float(c.max()), entered, setting)
    progress.close()
    names = [f"{eta:.4g}" for eta in etas]
    kept = path[:2001].cpu().numpy()
    series = xr.Dataset(
        {"stabilization theta": (("stabilization_step", "eta", "seed"), kept)},
        coords={"stabilization_step": range(len(kept)), "eta": names},
    )
    return Outcome(checks, CLAIMS, series)


def _proof_check(facts: dict[str, bool]) -> Check:
    prediction = Prediction("share of proof steps confirmed", torch.tensor(1.0), 0.0, 0.0, SOURCE)
    share = torch.tensor([sum(facts.values()) / len(facts)])
    return judge(NAME, PROOF, f"{len(facts)} facts", prediction, share, statistic=worst)


def _control(s: Tensor, setting: str, bounces: bool) -> Check:
    """Below the interval: no alternation at all, or alternation that dies out."""
    if bounces:
        gone = ((1 - s[-1].square()).square() / 4 < 1e-20).double()
        prediction = Prediction("share of runs whose loss vanishes", torch.tensor(1.0), 0.0, 0.0, SOURCE)
        return judge(NAME, DIES_OUT, setting, prediction, gone, rivals=[Rival("stabilisation", 0.0)], statistic=worst)
    side = s > 1
    changes = (side[1:] != side[:-1]).double().mean(0)
    prediction = Prediction("share of steps that change side", torch.tensor(0.0), 1.0, 0.0, SOURCE)
    rivals = [Rival("alternation", 1.0), Rival("either side at random", 0.5)]
    return judge(NAME, CONTROL, setting, prediction, changes, rivals=rivals, statistic=worst)


def _bouncing_checks(
    s: Tensor, changes: Tensor, c_low: float, c_high: float, entered: int, setting: str
) -> list[Check]:
    band = absorbing_band(c_low, c_high)
    start = len(s) // 2
    tail, finite = s[start:], torch.isfinite(s[-1])

    def share_inside(l_out: float, l_in: float, r_in: float, r_out: float) -> Tensor:
        slack = 1e-12
        left = (tail >= l_out - slack) & (tail <= l_in + slack)
        right = (tail >= r_in - slack) & (tail <= r_out + slack)
        return (left | right).double().mean(0)

    checks = []
    prediction = Prediction("share of steps that change side", torch.tensor(1.0), 0.0, 0.0, SOURCE)
    rivals = [Rival("gradient flow: never", 0.0), Rival("either side at random", 0.5)]
    checks.append(judge(NAME, ALTERNATION, setting, prediction, changes, finite=finite, rivals=rivals, statistic=worst))
    prediction = Prediction("share of steps inside", torch.tensor(1.0), 0.0, 0.0, SOURCE)
    widths = [(band.l_in - band.l_out) / 4, (band.r_out - band.r_in) / 4]
    narrow = (band.l_out + widths[0], band.l_in - widths[0], band.r_in + widths[1], band.r_out - widths[1])
    rivals = [Rival("a band half as wide", 1.0, share_inside(*narrow))]
    inside = share_inside(band.l_out, band.l_in, band.r_in, band.r_out)
    checks.append(judge(NAME, BAND, setting, prediction, inside, finite=finite, rivals=rivals, statistic=worst))
    loss = (1 - tail.square()).square() / 4
    lowest, highest = loss.amin(0), loss.amax(0)
    slack = 1e-12

    def share_between(low: float, high: float) -> Tensor:
        return ((lowest >= low - slack) & (highest <= high + slack)).double()

    prediction = Prediction("share of runs between", torch.tensor(1.0), 0.0, 0.0, SOURCE)
    rivals = [
        Rival("a floor four times as high", 1.0, share_between(4 * band.loss_low, band.loss_high)),
        Rival("the loss vanishes", 1.0, (lowest < 1e-3 * band.loss_low).double()),
    ]
    between = share_between(band.loss_low, band.loss_high)
    checks.append(judge(NAME, LEVEL, setting, prediction, between, finite=finite, rivals=rivals, statistic=worst))
    first = ((s >= float(BAND_LOW)) & (s <= float(BAND_HIGH) + slack)).double().argmax(0)
    prediction = Prediction("share of runs in time", torch.tensor(1.0), 0.0, 0.0, SOURCE)
    rivals = [Rival("in half the time", 1.0, (first <= entered / 2).double())]
    in_time = (first <= entered).double()
    checks.append(judge(NAME, ENTRY, setting, prediction, in_time, finite=finite, rivals=rivals, statistic=worst))
    return checks
