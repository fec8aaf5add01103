"""The claims on image networks: each function holds one of them against measured ensembles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from theory.prediction import AVPF, Prediction, Reference
from validation.check import Check, Claim, Rival, Verdict, judge
from validation.resnet_growth import Growth
from validation.resnet_runs import Course, Experiment
from validation.statistics import kendall_tau, mean

SUITE = "resnet"

SPARSITY = Claim(
    "sparsity coefficient of the last block: SVAG",
    "E[coefficient of SVAG with l steps of η/l] = E[coefficient of SGD],  same starts, data, network and schedule",
    "SVAG tends to SGD's SDE: told data, start and step sizes only, it has to end with as many distinct active units. "
    "What it misses is the finite step.",
)
COURSE = Claim(
    "sparsity coefficient along the run: SVAG",
    "the same after a quarter of the run",
    "Features are lost early, while the step is large; a law of the end alone could be right by chance.",
)
GAUSSIAN = Claim(
    "sparsity coefficient of the last block: Gaussian steps of SGD's size",
    "θ ← θ - η(∇L + C^½ ξ),  C the covariance of a minibatch gradient at θ:  E[coefficient] = E[coefficient of SGD]",
    "The SDE's Euler-Maruyama scheme at dt = η: of SGD it keeps drift, covariance and finite step, not the law of the "
    "noise. Where it holds and SVAG misses, what SVAG misses is the finite step.",
)
ORDER = Claim(
    "larger and longer large steps are sparser",
    "Kendall's τ between the order of the schedules and the fall of the coefficient, seed by seed",
    "Only the sign is predicted. Page's p-value of no trend is in the setting.",
)
GROWTH = Claim(
    "units of every layer grow at Itô's rate",
    "Spearman's correlation over units of Δ ln‖θ_j‖ with Σ_k η[-θ_j·(∇L + λθ_j) + (η/2)(tr C - 2θ̂_jᵀCθ̂_j)]/‖θ_j‖²",
    "Which units of a residual network with BatchNorm shrink and which grow. Expected: the correlation that the "
    "equation leaves after its martingale part and the sampling of its rates.",
)
SIGN = Claim(
    "which units shrink",
    "share of units whose ln‖θ_j‖ moves the way the rate says",
    "Expected as for the rank correlation. The table of units predicted and found to shrink is in the setting.",
)
CLAIMS = [SPARSITY, COURSE, GAUSSIAN, ORDER, GROWTH, SIGN]

GAUSSIAN_SOURCE = Reference("Li, Tai, E", 2017, "stochastic modified equations, Euler-Maruyama at dt = η")
SVAG_SOURCE = Reference("Li, Malladi, Arora", 2021, "SVAG, section 4")
ORDER_SOURCE = Reference(AVPF, 2023, "sparse features by large steps, deep networks")
GROWTH_SOURCE = Reference("ours", 2026, "Itô on ln‖θ_j‖")
ERROR = 0.1
"""Error stated for SVAG's sparsity, of the effect beyond the small step (of the small step's own: of the value): first
order in η, as for the SDEs of suite ``relu``."""
UNAMPLIFIED, ISOTROPIC, SMALL = "SVAG with the wrong scaling", "isotropic noise of equal power", "small step"
GAUSSIAN_STEPS, LIMIT = "Gaussian steps of SGD's size", "SVAG"


def sparsity_check(
    experiment: Experiment, cell: int, sgd: Course, svag: Course, l: int, claim: Claim, look: int,  # noqa: E741
    rivals: Mapping[str, Tensor], small: Tensor | None, expected: Verdict,
) -> Check:  # fmt: skip
    """SVAG against SGD at one look, seed by seed (they share their start).

    Args:
        rivals: coefficients of the same cell and look, (seeds,).
        small: those of the small step at equal training loss, (seeds,), where the effect is counted from; None for the
            small step itself.
    """
    setting = f"{experiment.schedules[cell].label}, l={l}"
    accuracy = float(sgd.fit[-1, cell, :, 2].nanmean())
    setting += f" (test accuracy {accuracy:.1%})" if claim is SPARSITY else f", step {int(sgd.steps[look])}"
    predicted, finite = svag.sparsity()[look, cell], sgd.finite[cell] & svag.finite[cell]
    prediction = Prediction("coefficient without duplicates", predicted, _null(small), ERROR, SVAG_SOURCE)
    return _coefficient(claim, setting, prediction, sgd.sparsity()[look, cell], finite, rivals, small, expected)


def alone_check(
    claim: Claim, source: Reference, setting: str, cell: int, sgd: Course, course: Course,
    rivals: Mapping[str, Tensor], small: Tensor, expected: Verdict,
) -> Check:  # fmt: skip
    """The same at the end, for a course that ran on this cell's schedule only."""
    predicted, finite = course.sparsity()[-1, 0], sgd.finite[cell] & course.finite[0]
    prediction = Prediction("coefficient without duplicates", predicted, _null(small), ERROR, source)
    return _coefficient(claim, setting, prediction, sgd.sparsity()[-1, cell], finite, rivals, small, expected)


def _null(small: Tensor | None) -> float:
    return 0.0 if small is None else float(small.nanmean())


def _coefficient(
    claim: Claim, setting: str, prediction: Prediction, measured: Tensor, finite: Tensor, rivals: Mapping[str, Tensor],
    small: Tensor | None, expected: Verdict,
) -> Check:  # fmt: skip
    others = dict(rivals) if small is None else {**rivals, SMALL: small}
    held = [Rival(name, value) for name, value in others.items()]
    return judge(SUITE, claim, setting, prediction, measured, finite=finite, rivals=held, expected=expected)


def at_equal_loss(course: Course, small: int, loss: Tensor) -> Tensor:
    """The small step's coefficient at its first look with a training loss below ``loss`` (seeds,), else its last."""
    losses, values = course.fit[:, small, :, 0], course.sparsity()[:, small]
    below = losses <= loss
    first = torch.where(below.any(0), below.double().argmax(0), len(losses) - 1)
    return values.gather(0, first.unsqueeze(0))[0]


def order_check(experiment: Experiment, cells: tuple[int, ...], sgd: Course) -> Check:
    """Whether the coefficient falls from cell to cell."""
    values = torch.stack([sgd.sparsity()[-1, c] for c in cells], 1)
    finite = torch.stack([sgd.finite[c] for c in cells]).all(0)
    tau = torch.from_numpy(kendall_tau(-values.nan_to_num().numpy()))
    p = stats.page_trend_test(-values[finite].numpy()).pvalue if int(finite.sum()) > 2 else float("nan")
    prediction = Prediction("τ of the coefficient", torch.tensor(1.0), 0.0, 1.0, ORDER_SOURCE)
    setting = " > ".join(experiment.schedules[c].label for c in cells) + f" (p = {p:.1g})"
    rivals = [Rival("no order", 0.0), Rival("reverse order", -1.0)]
    return judge(SUITE, ORDER, setting, prediction, tau, finite=finite, rivals=rivals)


def growth_checks(experiment: Experiment, found: Growth, root: int, expected: Verdict) -> list[Check]:
    """Rank correlation and signs, over groups of replicas."""
    correlation, share = (mean(part) for part in found.expected(root))
    ahead = found.correlation(np.broadcast_to(found.ahead, found.realised.shape)).mean()
    setting = f"{experiment.schedules[0].label}, {found.realised.shape[1]} units"
    flow = torch.from_numpy(found.correlation(found.drift))
    rank = judge(
        SUITE, GROWTH, f"{setting}; {ahead:.2f} from the first state alone",
        Prediction(
            "rank correlation", torch.tensor(correlation.value), 0.0, 0.0, GROWTH_SOURCE, correlation.standard_error
        ),
        torch.from_numpy(found.correlation(found.predicted)),
        rivals=[
            Rival("gradient flow: no noise term", correlation.value, flow, correlation.standard_error),
            Rival("no relation", 0.0),
        ],
        expected=expected,
    )  # fmt: skip
    (both, only), (missed, _) = found.table().tolist()
    table = f"shrinking on average: {both + only} predicted, {both + missed} found, {both} of them both"
    decay = torch.from_numpy(found.signs(-np.ones_like(found.realised)))
    sign = judge(
        SUITE, SIGN, f"{setting}; {table}",
        Prediction("share of units", torch.tensor(share.value), 0.5, 0.0, GROWTH_SOURCE, share.standard_error),
        torch.from_numpy(found.signs(found.predicted)),
        rivals=[Rival("weight decay alone: all shrink", 1.0, measured=decay), Rival("a coin", 0.5)],
        expected=expected,
    )  # fmt: skip
    return [rank, sign]
