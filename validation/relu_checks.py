"""The claims on ReLU networks: each function holds one of them against measured ensembles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nets.relu import sgd
from theory import relu
from theory.prediction import AVPF, Prediction, Reference
from theory.schedule import Schedule
from theory.trajectory import Probe
from validation.check import Check, Claim, Rival, Verdict, judge
from validation.relu_runs import Ensemble, Experiment
from validation.statistics import SIGMAS, Estimate, kendall_tau, mean, worst

SUITE = "relu"

BALANCE_STEP = Claim(
    "balance of adjacent layers, step by step",
    "Δ(‖in_j‖² - ‖out_j‖²) = η² ℓ'² (‖∇_in h‖² - ‖∇_out h‖²),  for every unit of every hidden layer",
    "An identity for SGD on any ReLU network: any gap beyond rounding falsifies it.",
)
BALANCE_LAW = Claim(
    "balance: SDE law given the residuals",
    "Δ Σ_j β_j = Σ_k η_k² Σ_j mean_i r_i² B(∇h_i)_j,  B(v)_j = ‖v_in,j‖² - ‖v_out,j‖²",
    "Gradient flow conserves β; noise of variance ηr_i²/n on each label moves it, along the path that SGD visits.",
)
BALANCE_LEVEL = Claim(
    "balance: SDE law at level δ",
    "Δ Σ_j β_j = Σ_k 2η_k² L(θ_k) Σ_j mean_i B(∇h_i)_j",
    "Label noise of equal strength on every sample; falsified where residuals and inputs go together.",
)
GROWTH = Claim(
    "units grow or shrink by Itô's rate",
    "Δ mean_j ln‖θ_j‖ - Σ_k mean_j ⟨θ_j, Δθ_j⟩/‖θ_j‖² = Σ_k η_k²/2 mean_j [tr M_jj - 2θ̂_jᵀM_jjθ̂_j]/‖θ_j‖²",
    "M = C + ∇L∇Lᵀ, one sample's second moment. Growth beyond the first order of each step, which is the pull and a "
    "martingale; it decides which units collapse.",
)
FEATURES = Claim(
    "features at the end: SDE given each run's δ",
    "E[observable of dθ = -∇L dt + √(2ηδ(t)/n) Φᵀ dW] = E[observable of SGD],  δ(k) = L(θ_k) of the same run",
    "The label-noise SDE is told how strong the noise was, not where it pushed.",
)
DISTRIBUTION = Claim(
    "distribution over seeds: SDE given each run's δ",
    "Kolmogorov-Smirnov distance between SGD's and the SDE's distribution of the sparsity coefficient is 0",
    "The whole distribution, not its mean; the allowance is the test's critical value at the suite's error rate.",
)
AB_INITIO = Claim(
    "features at the end: SDE alone",
    "E[observable of the SDE with δ = L(θ_t), or with SGD's own covariance] = E[observable of SGD]",
    "Data, start and step sizes only. Fails where the loss stabilises at the edge of stability: a finite-step effect.",
)
LEVEL = Claim(
    "loss level: SDE alone",
    "ln of the mean loss while the step is large, SDE with δ = L(θ_t) against SGD",
    "The level that the SDE sustains by itself; where it is too low, too little noise is left to make features sparse.",
)
COLUMNS = Claim(
    "noise shrinks columns of Φ",
    "mean_k ‖Φ_k(θ)‖/√n at the end, SDE given δ against SGD and gradient flow",
    "The conjecture behind sparse features, as a number: gradient flow and isotropic noise leave longer columns.",
)
ORDER = Claim(
    "longer large steps are sparser",
    "Kendall's τ between the length of the large-step phase and the fall of rank and sparsity, seed by seed",
    "10 % > 30 % > 50 % of the run; only the sign is predicted. Page's p-value of no trend is in the setting.",
)
CLAIMS = [
    BALANCE_STEP, BALANCE_LAW, BALANCE_LEVEL, GROWTH, FEATURES, DISTRIBUTION, AB_INITIO, LEVEL, COLUMNS, ORDER,
]  # fmt: skip

SDE_SOURCE = Reference(AVPF, 2023, "SDE of ReLU networks at a stabilised loss")
ORDER_SOURCE = Reference(AVPF, 2023, "sparse features by large steps")
ISOTROPIC, FLOW, HALF = "isotropic noise of equal power", "gradient flow", "half the noise"
ERROR = 0.1
"""Error stated for the SDE's observables, of the effect beyond gradient flow: δ held between records, Gaussian noise
for that of one sample, first order in η."""


def balance_steps(experiment: Experiment, eta: float, loss: relu.LossName, seeds: Sequence[int], root: int) -> Check:
    """The identity on every unit of every hidden layer in 100 steps of SGD."""
    network, problem, steps = experiment.network, experiment.problem, 100
    if loss == "logistic":
        problem = replace(problem, y=torch.where(problem.y > problem.y.median(), 1.0, -1.0).to(problem.y))
    index = np.random.default_rng(root).integers(0, problem.n, (len(seeds), steps))
    probes = {"theta": Probe(lambda theta: theta, torch.arange(steps + 1))}
    run = sgd(
        network, problem, experiment.start, [Schedule(eta)], steps, seeds=seeds, indices=index, probes=probes, loss=loss
    )
    visited = run["theta"].values[:, 0]  # (steps + 1, S, p)
    before = visited[:-1]
    X, y = (problem.X[torch.from_numpy(index.T)], problem.y[torch.from_numpy(index.T)])
    slope = relu.loss_slopes(network(before, X.unsqueeze(-2)).squeeze(-1), y, loss)
    rows = network.jacobian(before, X.unsqueeze(-2)).squeeze(-2)
    gap, size = (torch.zeros(len(seeds), dtype=torch.float64) for _ in range(2))
    for layer in range(1, experiment.hidden + 1):
        moved = relu.balance(network, visited, layer).diff(dim=0)
        law = eta**2 * slope.square().unsqueeze(-1) * relu.balance(network, rows, layer)
        scale = relu.neuron_norms(network, before, layer).square()
        gap = torch.maximum(gap, ((moved - law).abs() / scale).amax((0, 2)))
        size = torch.maximum(size, (moved.abs() / scale).amax((0, 2)))
    source = replace(relu.BALANCE_LAW, where="homogeneity of ReLU units (ours)")
    prediction = Prediction("largest gap / ‖θ_j‖²", torch.tensor(0.0), 1.0, 1e-12, source)
    rivals = [Rival("half the change", 0.0, size / 2), Rival("no change", 0.0, size)]
    setting = f"{experiment.name}, {loss} loss: η={eta:g}"
    return judge(SUITE, BALANCE_STEP, setting, prediction, gap, rivals=rivals, statistic=worst)


def path_laws(
    experiment: Experiment, eta: float, burn_in: int, steps: int, seeds: Sequence[int], root: int,
    homogeneous: Verdict = Verdict.AGREES,
) -> list[Check]:  # fmt: skip
    """Balance and growth over ``steps`` of SGD after a ``burn_in``, against their laws along the path.

    ``homogeneous`` is the verdict expected of the law that assumes equal noise on every sample.
    """
    network, problem, schedule = experiment.network, experiment.problem, [Schedule(eta)]
    begun = sgd(network, problem, experiment.start, schedule, burn_in, seeds=range(8), root_seed=root)
    theta = begun.final[0, int(begun.finite[0].int().argmax())]  # all runs leave one state: what differs is the draws
    layers = range(1, experiment.hidden + 1)

    def laws(theta: Tensor) -> Tensor:
        """Of a step, shape (S, 3): first layer's balance by residuals and by δ, mean growth by second moments."""
        r = network(theta, problem.X) - problem.y
        rows = network.jacobian(theta, problem.X)
        gradient = (r.unsqueeze(-2) @ rows).squeeze(-2) / problem.n
        b, growth = relu.balance(network, rows).sum(-1), []
        for layer in layers:
            pull, noise = relu.neuron_growth(network, problem, theta, layer)
            rho2 = relu.neuron_norms(network, theta, layer).square()
            own = gradient[..., network.unit_parameters(layer)].square().sum(-1) / rho2
            growth.append((noise + own / 2 - pull.square()).mean(-1))  # C + ∇L∇Lᵀ is the second moment
        by_residuals, by_level = (r.square() * b).mean(-1), r.square().mean(-1) * b.mean(-1)
        return torch.stack([by_residuals, by_level, torch.stack(growth).mean(0)], -1)

    def beyond(visited: Tensor) -> Tensor:
        """Δ mean_j ln‖θ_j‖ less its first order Σ_k ⟨θ_j, Δθ_j⟩/‖θ_j‖², which is the pull and a martingale."""
        parts = []
        for layer in layers:
            own = visited[..., network.unit_parameters(layer)]  # (steps + 1, S, units, weights)
            rho2 = own.square().sum(-1)
            first = ((own[:-1] * own.diff(dim=0)).sum(-1) / rho2[:-1]).sum(0)
            parts.append(((rho2[-1] / rho2[0]).log() / 2 - first).mean(-1))
        return torch.stack(parts).mean(0)

    after = sgd(
        network, problem, theta, schedule, steps, seeds=seeds, root_seed=root + 1,
        probes={"theta": Probe(lambda theta: theta, torch.arange(steps + 1))},
    )  # fmt: skip
    ok = after.finite[0]
    visited = after["theta"].values[:, 0]  # (steps + 1, S, p)
    residuals, level, noise = (EVERY * torch.stack([laws(at) for at in visited[:-1:EVERY]]).sum(0)).T
    setting = f"{experiment.name}: η={eta:g}, steps {burn_in} to {burn_in + steps}"
    moved = (relu.balance(network, visited[-1]) - relu.balance(network, visited[0])).sum(-1)
    checks = []
    for claim, observable, measured, law, error, given, verdict in (
        (BALANCE_LAW, "Δ Σ β", moved, residuals, BALANCE_ERROR, "r_i(k)²", Verdict.AGREES),
        (BALANCE_LEVEL, "Δ Σ β", moved, level, LEVEL_ERROR, "δ(k)", homogeneous),
        (GROWTH, "Δ mean ln‖θ_j‖ beyond first order", beyond(visited), noise, GROWTH_ERROR, "θ(k)", Verdict.AGREES),
    ):
        if claim is BALANCE_LEVEL and experiment.hidden > 1:
            continue  # too few seeds tell it from half the noise there
        source = relu.GROWTH_LAW if claim is GROWTH else relu.BALANCE_LAW
        prediction = Prediction(observable, eta**2 * law, 0.0, error, source, given=given)
        rivals = [Rival("no noise", 0.0), Rival(HALF, eta**2 * law / 2), Rival("opposite sign", -(eta**2) * law)]
        checks.append(judge(SUITE, claim, setting, prediction, measured, finite=ok, rivals=rivals, expected=verdict))
    return checks


EVERY = 6
"""The laws' sums over steps take one state in so many."""
BALANCE_ERROR, LEVEL_ERROR, GROWTH_ERROR = 0.03, 0.0, 0.1
"""Stated of the effect: the target; none, for homogeneity is the claim; the third order of the logarithm."""
POWER = 2.0
"""A rival is named where it lies this many times the sampling allowance away from the theory."""


def mean_of(values: Tensor, finite: Tensor) -> Estimate:
    """Mean of the finite runs with its standard error."""
    return mean(values[finite].numpy())


def scattered(values: Tensor, rows: Tensor, replicates: int) -> Tensor:
    """One entry per replicate of SGD from those of the paths that follow some of them, NaN elsewhere."""
    full = torch.full((replicates,), torch.nan, dtype=values.dtype)
    full[rows] = values
    return full


def compare_features(
    claim: Claim, experiment: Experiment, schedule: Schedule, observable: str, real: Ensemble, simulated: Ensemble,
    rivals: Mapping[str, Ensemble], flow: float, *, given: bool, dropped: float = 0.0,
    expected: Verdict = Verdict.AGREES, note: str = "",
) -> Check:  # fmt: skip
    """A final measure of SGD against the SDE's: run by run when each path was given a run's δ, else mean by mean.

    Args:
        flow: what gradient flow ends with, the null.
        dropped: by how much finite steps alone move the measure, allowed besides ``ERROR`` of the effect.
    """
    measured, finite = real.final[observable], real.finite
    estimate = mean_of(simulated.final[observable], simulated.finite)
    effect = abs(estimate.value - flow)
    error = ERROR + (dropped / effect if effect else 0.0)
    if given:
        rows = torch.nonzero(finite).flatten()
        value = scattered(simulated.final[observable], rows, len(finite))
        finite = finite & scattered(simulated.finite.double(), rows, len(finite)).eq(1)
        own, uses = 0.0, "δ(k) of each run"
    else:
        value, own, uses = torch.tensor(estimate.value), estimate.standard_error, ""
    prediction = Prediction(observable, value, flow, error, SDE_SOURCE, standard_error=own, given=uses)
    fared = []
    for name, ensemble in rivals.items():
        other = mean_of(ensemble.final[observable], ensemble.finite)
        spread = other.standard_error if len(ensemble.finite) > 1 else 0.0
        # Rivals that predict the same within what these ensembles can tell are left out, whatever SGD does.
        noise = np.hypot(2**0.5 * estimate.standard_error, spread)
        if abs(other.value - estimate.value) > POWER * SIGMAS * noise + error * (effect + abs(other.value - flow)):
            fared.append(Rival(name, other.value, standard_error=spread))
    return judge(
        SUITE, claim, experiment.setting(schedule) + note, prediction, measured, finite=finite, rivals=fared,
        expected=expected,
    )  # fmt: skip


def compare_level(
    experiment: Experiment, schedule: Schedule, real: Ensemble, simulated: Ensemble, quiet: float, expected: Verdict
) -> Check:
    """ln of the mean loss in the large-step phase, SDE with its own loss against SGD."""
    eta = schedule.step_sizes(experiment.steps)
    estimate = mean_of(simulated.level(eta), simulated.finite)
    prediction = Prediction(
        "ln mean loss at large steps", torch.tensor(estimate.value), quiet, 0.0, SDE_SOURCE,
        standard_error=estimate.standard_error,
    )  # fmt: skip
    return judge(
        SUITE, LEVEL, experiment.setting(schedule), prediction, real.level(eta), finite=real.finite,
        rivals=[Rival("no noise", quiet)], expected=expected,
    )  # fmt: skip


def compare_distribution(
    experiment: Experiment, schedule: Schedule, observable: str, real: Ensemble, simulated: Ensemble,
    rivals: Mapping[str, Ensemble], expected: Verdict = Verdict.AGREES,
) -> Check:  # fmt: skip
    """Kolmogorov-Smirnov distance between two samples; quantiles 10, 50, 90 % of both stand in the setting."""
    sample = real.final[observable][real.finite].numpy()

    def distance(other: Ensemble) -> tuple[float, int]:
        values = other.final[observable][other.finite].numpy()
        return float(stats.ks_2samp(sample, values).statistic), len(values)

    distance_to_sde, paths = distance(simulated)
    tail = stats.norm.sf(SIGMAS) * 2
    critical = float(np.sqrt(-np.log(tail / 2) / 2 * (1 / len(sample) + 1 / paths)))
    quantiles = " / ".join(
        " ".join(f"{value:.3g}" for value in np.quantile(values, [0.1, 0.5, 0.9]))
        for values in (simulated.final[observable][simulated.finite].numpy(), sample)
    )
    prediction = Prediction(
        f"KS distance of {observable}", torch.tensor(0.0), 1.0, 0.0, SDE_SOURCE, given="δ(k) of each run"
    )
    told_apart = {
        name: other for name, other in rivals.items()
        if stats.ks_2samp(*(e.final[observable][e.finite].numpy() for e in (simulated, other))).statistic > 2 * critical
    }  # fmt: skip
    against = [Rival(name, 0.0, torch.tensor([distance(other)[0]])) for name, other in told_apart.items()]
    check = judge(
        SUITE, DISTRIBUTION, f"{experiment.setting(schedule)} (quantiles: {quantiles})", prediction,
        torch.tensor([distance_to_sde]), rivals=against, expected=expected,
        statistic=lambda gap: Estimate(float(gap[0]), critical / SIGMAS, critical),
    )  # fmt: skip
    return replace(check, seeds=len(real.finite), diverged=int((~real.finite).sum()))


def order_check(
    experiment: Experiment, schedules: Sequence[Schedule], real: Sequence[Ensemble], observable: str
) -> Check:
    """Whether a measure falls along schedules with ever longer large-step phases, on seeds finite in all of them."""
    values = torch.stack([ensemble.final[observable] for ensemble in real], 1)
    finite = torch.stack([ensemble.finite for ensemble in real]).all(0)
    tau = torch.from_numpy(kendall_tau(-values.nan_to_num().numpy()))
    p = stats.page_trend_test(-values[finite].numpy()).pvalue if int(finite.sum()) > 2 else float("nan")
    fractions = " > ".join(f"{schedule.decays[0][0]:.0%}" for schedule in schedules)
    prediction = Prediction(f"τ of {observable}", torch.tensor(1.0), 0.0, 1.0, ORDER_SOURCE)
    rivals = [Rival("no order", 0.0), Rival("reverse order", -1.0)]
    setting = f"{experiment.name}: {fractions} (p = {p:.1g})"
    return judge(SUITE, ORDER, setting, prediction, tau, finite=finite, rivals=rivals)
