"""Suite ``collapse``, networks: invariant sets of any layer, what attracts to them, and counts of independent units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import sympy as sp
import torch
import xarray as xr
from scipy import stats
from torch import Tensor, nn

from nets.unit_layer import UnitLayer
from nets.units import hidden_layers
from theory.growth_rate import SOURCE
from theory.independent_neurons import (
    cluster_order,
    independent_count,
    linkage_count,
    normalized_distance,
    vanishing,
)
from theory.invariance_proof import Layer, prove_permutation_set, prove_sign_set
from theory.invariant_sets import permutation_set, sign_set
from theory.prediction import Prediction, Reference
from theory.sparsity import effective_rank
from theory.streams import named_generator, seed_of
from validation.check import Check, Claim, Rival, judge
from validation.near_sets import Release, Setting, release
from validation.settings import RunSettings
from validation.statistics import SIGMAS, Estimate, worst
from validation.suite import Progress
from validation.trained_units import Window, conv_network, departure, entries, growth_window, placed, train

SUITE = "collapse"
CKYG = Reference("Chen, Kunin, Yamamura, Ganguli", 2023, "invariant sets and attractivity")
EXACT = Reference("ours", 2026, "E ln‖x - ηg‖ over the samples")
COUNTING = Reference("Chen, Kunin, Yamamura, Ganguli", 2023, "Fig. 3, 4")

PROOF = Claim(
    "networks: invariant sets hold exactly",
    "∇ℓ_i(θ) ∈ T for θ ∈ {w_in = w_out = 0} if σ(0) = 0, and for θ ∈ {w_u = w_v} for any σ",
    "Proof steps that sympy confirms with σ undefined: dense, convolution, BatchNorm and LayerNorm; the only condition "
    "that it finds for the sign set is σ(0) = 0.",
)
INVARIANCE = Claim(
    "networks: a state on an invariant set stays on it under SGD",
    "distance to the set / distance moved = 0, with momentum, weight decay, minibatches and label noise",
    "Real SGD of a network with convolutions, BatchNorm and a dense layer, every hidden layer, both sets; to rounding.",
)
NEAR = Claim(
    "networks: growth rate next to an invariant set",
    "Δ ln‖x‖ beyond -∫x·∇L/‖x‖² dt is ∫(ηκ/2)(tr C - 2x̂ᵀC x̂)/‖x‖² dt, x a unit or the difference of two",
    "Released at a distance of 1e-4; noise along x collapses, noise across x repels. Error: what the SDE's expansion "
    "of one step drops.",
)
NEAR_MOMENTUM = Claim(
    "networks: growth rate next to an invariant set, with momentum",
    "the same with η/(1-μ) for η and weight decay -λ",
    "The heavy ball's noise counts 1/(1-μ) times; using η itself is a rival.",
)
EVERY_UNIT = Claim(
    "networks: growth of every unit of a trained layer",
    "slope over units of Δ ln‖θ_j‖ + ∫θ_j·∇L/‖θ_j‖² dt on ∫(η/2)(tr C - 2θ̂ᵀC θ̂)/‖θ_j‖² dt is 1",
    "SGD on digits with wrong labels, far from the sets; no noise has slope 0.",
)
RANKS = Claim(
    "networks: which units grow and which shrink",
    "rank correlation over units between predicted and realised mean Δ ln‖x‖",
    "Expected: that of the prediction with itself plus the measured scatter over seeds. Drift alone must rank worse.",
)
NEAR_EXACT = Claim(
    "networks: exact one-step growth next to an invariant set",
    "Δ ln‖x‖ beyond the drift is ∫E[ln‖x - ηg_i‖ - ln‖x‖ + ηx·g_i/‖x‖²]/η dt, the mean over samples",
    "The same runs without the small-step expansion and without a stated error.",
)
LARGE_STEPS = Claim(
    "networks: large noisy steps leave fewer independent units",
    "sign of the difference in the published count, small steps minus large, summed over a network's layers",
    "conv1, conv2 + BatchNorm, fc3 on digits with fresh label noise; only the sign is predicted.",
)
COUNT = Claim(
    "networks: compiled count of independent units is the published one",
    "pairs d_ij < 0.1 in lexicographic order, chains included",
    "An identity: share of layers on which the scan gives the number of the published loop over pairs.",
)

CLAIMS = [PROOF, INVARIANCE, NEAR, NEAR_EXACT, NEAR_MOMENTUM, EVERY_UNIT, RANKS, LARGE_STEPS, COUNT]

RELEASES = (
    Setting("sign"),
    Setting("sign", nn.ReLU, noise=3.0),
    Setting("pair", inputs=8),
)
HEAVY = Setting("sign", inputs=4, momentum=0.5, weight_decay=0.01, step_size=0.01, noise=4.0, steps=1000)
MORE_RELEASES = (Setting("sign", inputs=4), Setting("sign", nn.GELU, noise=4.0))
COUNTS = ["published", "average linkage", "vanishing", "effective rank"]  # the last: exponential of the entropy
STEP_SIZES = {"large steps, η=0.3": 0.3, "small steps, η=0.03": 0.03}
ACTIVATIONS = {"GELU": nn.GELU, "tanh": nn.Tanh, "ReLU": nn.ReLU}


def network_checks(settings: RunSettings, device: torch.device, progress: Progress) -> tuple[list[Check], xr.Dataset]:
    """All checks about networks, and their series. The networks are small: they run on the CPU whatever the device."""
    quick, seed = settings.size == "quick", seed_of(SUITE, "networks") % 2**31
    progress("invariant sets: proofs, and SGD that starts on them")
    checks = progress.kept("sets", lambda: [_proofs(), _invariance(8 if quick else 200, seed), _counts(seed)])
    runs = RELEASES if quick else RELEASES + MORE_RELEASES
    replicates = 16 * settings.replicates
    progress(f"SGD next to invariant sets, {len(runs) + 1} settings x {replicates} seeds")
    released = [
        (setting, progress.kept(f"release {setting.label}", partial(release, setting, replicates, seed)))
        for setting in (*runs, HEAVY)
    ]
    for setting, run in released:
        checks += [_heavy_check(setting, run)] if setting.momentum else _near_checks(setting, run)
    names = ["GELU"] if quick else list(ACTIVATIONS)
    progress(f"growth of every unit on digits, {', '.join(names)}")
    windows = {
        name: progress.kept(f"growth {name}", partial(growth_window, ACTIVATIONS[name], settings.replicates, seed))
        for name in names
    }
    for name, (units, pairs) in windows.items():
        checks += [_slope_check(units, f"units, 16-24-10 {name}"), _slope_check(pairs, f"pairs, 16-24-10 {name}")]
        checks.append(_rank_check(units, f"units, 16-24-10 {name}, {settings.replicates} seeds"))
    networks = 2 if quick else settings.replicates // 16
    progress(f"collapsed layers of convolutional networks, 2 step sizes x {networks} seeds")

    def layers() -> tuple[dict[Any, Any], np.ndarray]:
        similarities, counts = _similarities(250 if quick else 3000, networks, seed)
        return xr.Dataset(similarities).to_dict(data="array"), counts

    similarities, counts = progress.kept("collapsed layers", layers)
    checks.append(_steps_check(counts))
    series = xr.Dataset({**_course(released), **_growth_series(windows)})
    progress.close()
    return checks, series.merge(xr.Dataset.from_dict(similarities))


def _proofs() -> Check:
    sigma, facts = sp.Function("sigma"), []
    layers = [Layer(), Layer("conv", places=3), Layer(norm="batch"), Layer(norm="group", places=1)]
    for layer in layers:
        missing = prove_sign_set(sigma, layer).across
        facts.append(bool(missing) and all(part.subs(sigma(0), 0) == 0 for part in missing.values()))
        facts.append(prove_permutation_set(sigma, layer).holds)
    facts.append(prove_sign_set(sp.tanh).holds)
    facts.append(not prove_sign_set(lambda z: sp.log(1 + sp.exp(z))).holds)
    prediction = Prediction("share of proof steps confirmed", torch.tensor(1.0), 0.0, 0.0, CKYG)
    share = torch.tensor([sum(facts) / len(facts)])
    return judge(SUITE, PROOF, f"{len(facts)} facts, σ undefined", prediction, share, statistic=worst)


def _invariance(steps: int, seed: int) -> Check:
    """Both sets of every hidden layer; beside them a start off the set and a sign set of softplus."""
    module, found = conv_network(seed).double(), []
    for layer in hidden_layers(module).values():
        roles = layer.columns(dict(module.named_parameters()))
        for chosen in (sign_set(1, roles, layer.norm), permutation_set(0, 1, layer.units)):
            found.append(departure(placed(module, layer, chosen), layer, chosen, steps, seed))
    other = conv_network(seed, nn.Softplus).double()
    layer = hidden_layers(other)["fc3"]
    chosen = sign_set(1, layer.columns(dict(other.named_parameters())))
    unlike = departure(placed(other, layer, chosen), layer, chosen, steps, seed)
    beside = departure(module, layer, chosen, steps, seed)
    prediction = Prediction("distance to the set / distance moved", torch.tensor(0.0), 1.0, 1e-10, CKYG)
    rivals = [
        Rival("a start off the set ends on it", 0.0, torch.full((len(found),), beside)),
        Rival("σ(0) does not matter: softplus", 0.0, torch.full((len(found),), unlike)),
    ]
    setting = f"conv1, conv2 + BatchNorm, fc3; {steps} steps"
    return judge(SUITE, INVARIANCE, setting, prediction, torch.tensor(found), rivals=rivals, statistic=worst)


def _counts(seed: int) -> Check:
    draws, ours, published, joined = named_generator(seed, "counts"), [], [], []
    for _ in range(16):
        centres = draws.standard_normal((12, 9))[draws.integers(0, 12, 48)]
        w = centres + 0.35 * draws.random((48, 1)) * draws.standard_normal((48, 9))
        w = w * np.where(draws.random((48, 1)) < 0.1, 0.02, 1.0)
        ours.append(int(independent_count(torch.from_numpy(w))))
        published.append(published_count(w))
        joined.append(linkage_count(torch.from_numpy(w)))
    same, other = (torch.tensor(a) == torch.tensor(published) for a in (ours, joined))
    prediction = Prediction("share of layers with the published number", torch.tensor(1.0), 0.0, 0.0, COUNTING)
    rivals = [Rival("average linkage counts the same", 1.0, other.double().mean()[None].expand(16))]
    return judge(SUITE, COUNT, "48 units, 16 layers", prediction, same.double(), rivals=rivals, statistic=worst)


def published_count(w: np.ndarray, same: float = 0.1, vanished: float = 0.1, eps: float = 1e-8) -> int:
    """The published loop over pairs, literally: what ``independent_count`` must equal."""
    norms = np.linalg.norm(w, axis=-1)
    w = w[~(norms / norms.max() < vanished)]
    taken: set[int] = set()
    lists = defaultdict(list)
    for i, j in combinations(range(len(w)), 2):
        squares = np.linalg.norm(w[i]) ** 2 + np.linalg.norm(w[j]) ** 2 + eps
        if 2 * np.linalg.norm(w[i] - w[j]) ** 2 / squares < same and j not in taken:
            taken |= {i, j}
            lists[i].append(j)
    return len(lists) + sum(i not in taken for i in range(len(w)))


def _near_checks(setting: Setting, run: Release) -> list[Check]:
    """Δ ln‖x‖ less the drift's part, against the noise's part: the SDE's, and that of the exact step."""
    error = abs(float(run.dropped[run.finite].mean() / run.noise[run.finite].mean()))
    prediction = Prediction("Δ ln‖x‖ beyond the drift", run.noise, 0.0, error, SOURCE, given="visited states")
    rivals = [
        Rival("no noise", 0.0),
        Rival("half the noise", run.noise / 2),
        Rival("Itô read as Stratonovich", run.noise + run.trace / 2),
    ]
    beyond = run.change - run.drift
    checks = [judge(SUITE, NEAR, setting.label, prediction, beyond, finite=run.finite, rivals=rivals)]
    exact = run.noise + run.dropped
    prediction = Prediction("Δ ln‖x‖ beyond the drift", exact, 0.0, 0.0, EXACT, given="visited states")
    rivals = [Rival("no noise", 0.0), Rival("half the noise", exact / 2)]
    return [*checks, judge(SUITE, NEAR_EXACT, setting.label, prediction, beyond, finite=run.finite, rivals=rivals)]


def _heavy_check(setting: Setting, run: Release) -> Check:
    """The same with momentum; stated error: what the expansion of a plain step of η/(1-μ) drops."""
    error = abs(float(run.dropped[run.finite].mean() / run.noise[run.finite].mean()))
    prediction = Prediction("Δ ln‖x‖ beyond the drift", run.noise, 0.0, error, SOURCE, given="visited states")
    rivals = [
        Rival("no noise", 0.0),
        Rival("half the noise, as η in place of η/(1-μ)", run.noise * (1 - setting.momentum)),
        Rival("Itô read as Stratonovich", run.noise + run.trace / 2),
    ]
    beyond = run.change - run.drift
    return judge(SUITE, NEAR_MOMENTUM, setting.label, prediction, beyond, finite=run.finite, rivals=rivals)


def _slope_check(window: Window, setting: str) -> Check:
    """Slope over units of what drift leaves unexplained on the noise term."""
    axis = window.noise.mean(0)

    def slope(part: Tensor) -> Tensor:
        return part @ axis / axis.square().sum()

    predicted = slope(window.noise)
    error = abs(float((slope(window.exact - window.drift) - predicted).mean() / predicted.mean()))
    prediction = Prediction("slope over units", predicted, 0.0, error, SOURCE, given="visited states")
    rivals = [Rival("no noise", 0.0), Rival("half the noise", predicted / 2)]
    return judge(SUITE, EVERY_UNIT, setting, prediction, slope(window.realised - window.drift), rivals=rivals)


def _rank_check(window: Window, setting: str) -> Check:
    """Rank correlation of ensemble means, with the bootstrap's standard error over seeds."""
    realised, law, drift = (part.numpy() for part in (window.realised, window.drift + window.noise, window.drift))
    seeds, draws = len(law), np.random.default_rng(0)
    again = [draws.integers(0, seeds, seeds) for _ in range(400)]
    scatter = (realised - law) - (realised - law).mean(0)
    if_right = [_correlation(law, law + (seeds / (seeds - 1)) ** 0.5 * scatter[rows]) for rows in again]
    error = float(np.std([_correlation(law[rows], realised[rows]) for rows in again]))
    expected, spread = float(np.mean(if_right)), float(np.std(if_right))
    prediction = Prediction(
        "rank correlation", torch.tensor(expected), 0.0, 0.0, SOURCE, standard_error=spread, given="visited states"
    )
    alone = Rival("drift alone", expected, torch.tensor([_correlation(drift, realised)]), spread)

    def one_number(gap: np.ndarray) -> Estimate:
        return Estimate(float(gap[0]), error, SIGMAS * error)

    measured = torch.tensor([_correlation(law, realised)])
    return judge(SUITE, RANKS, setting, prediction, measured, rivals=[alone], statistic=one_number)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.spearmanr(a.mean(0), b.mean(0)).statistic)


def _course(released: list[tuple[Setting, Release]]) -> dict[str, xr.DataArray]:
    """Mean ln‖x‖ over seeds along the releases, and the mean predicted from drift and noise at the end."""
    labels = [setting.label for setting, _ in released]
    share = np.linspace(0, 1, len(released[0][1].steps))
    course = [
        np.interp(share, run.steps / run.steps[-1], run.course.mean(1) - run.course[0].mean()) for _, run in released
    ]
    ends = [[float(part.mean()) for part in (run.change, run.drift + run.noise, run.drift)] for _, run in released]
    at = {
        "collapse_release": labels,
        "collapse_share_of_run": share,
        "collapse_end": ["realised", "predicted", "drift"],
    }
    return {
        "collapse release course": _array(course, ("collapse_release", "collapse_share_of_run"), at),
        "collapse release end": _array(ends, ("collapse_release", "collapse_end"), at),
    }


def _growth_series(windows: dict[str, tuple[Window, Window]]) -> dict[str, xr.DataArray]:
    """Ensemble means over the window by unit: realised, predicted, drift alone."""
    units = [window for window, _ in windows.values()]
    means = [[part.mean(0).numpy() for part in (w.realised, w.drift + w.noise, w.drift)] for w in units]
    at = {"collapse_activation": list(windows), "collapse_end": ["realised", "predicted", "drift"]}
    dims = ("collapse_activation", "collapse_end", "collapse_unit")
    return {"collapse unit growth": _array(means, dims, at)}


def _similarities(steps: int, networks: int, seed: int) -> tuple[dict[str, xr.DataArray], np.ndarray]:
    """Counts by step size, network, layer, and the first network's distances by layer, ordered by cluster."""
    layers = hidden_layers(conv_network(seed), "published")
    found: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    counts = np.zeros((len(STEP_SIZES), networks, len(layers), 4))
    for s, step_size in enumerate(STEP_SIZES.values()):
        for k in range(networks):
            module = train(conv_network(seed + k), steps, step_size, seed + k)
            for row, (name, layer) in enumerate(layers.items()):
                vectors = entries(module, layer)
                rank = effective_rank(torch.linalg.svdvals(vectors), exponential=True)
                counts[s, k, row] = independent_count(vectors), linkage_count(vectors), vanishing(vectors).sum(), rank
                if k == 0:
                    found[name].append(_ordered(module, layer))
    at = {"collapse_steps": list(STEP_SIZES), "collapse_side": ["in", "out"]}
    series = {
        f"collapse distance {name}": _array(
            both, ("collapse_steps", "collapse_side", f"collapse_{name}", f"collapse_{name}_other"), at
        )
        for name, both in found.items()
    }
    at |= {"collapse_layer": list(layers), "collapse_count": COUNTS}
    dims = ("collapse_steps", "collapse_network", "collapse_layer", "collapse_count")
    return series | {"collapse counts": _array(counts, dims, at)}, counts


def _ordered(module: nn.Module, layer: UnitLayer) -> np.ndarray:
    """Distances between incoming and between outgoing weights, (2, units, units), in the order of the clusters.

    The order is that of the published heat-maps: average linkage of whole units into as many clusters as the published
    count finds, vanishing units included, largest first. Source: Chen et al. (2023), Fig. 3.
    """
    vectors, parameters = entries(module, layer), {name: p.detach() for name, p in module.named_parameters()}
    order = cluster_order(normalized_distance(vectors), int(independent_count(vectors, vanished=0.0)))
    sides = [layer.vectors(parameters, roles)[order] for roles in (("incoming", "bias"), ("outgoing",))]
    return np.stack([normalized_distance(side).numpy() for side in sides])


def _steps_check(counts: np.ndarray) -> Check:
    """The published count at small steps against that at large ones, network by network."""
    large, small = counts[:, :, :, 0].sum(2)
    prediction = Prediction("sign of the difference", torch.tensor(1.0), 0.0, 1.0, COUNTING)
    rivals = [Rival("no order", 0.0), Rival("reverse order", -1.0)]
    signs = torch.from_numpy(np.sign(small - large))
    return judge(SUITE, LARGE_STEPS, " against ".join(STEP_SIZES), prediction, signs, rivals=rivals)


def _array(values: object, dims: tuple[str, ...], at: Mapping[str, Any]) -> xr.DataArray:
    return xr.DataArray(np.asarray(values), dims=dims, coords={dim: at[dim] for dim in dims if dim in at})
