"""Suite ``bouncing``: directions in which SGD jumps from wall to wall, the dynamics orthogonal to them, sharpness."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import xarray as xr
from torch import Tensor, nn

from nets.images import digits
from nets.mlp import mlp
from nets.objective import SQUARED, FlatNet, Objective
from nets.resnet import resnet
from theory.problem import gaussian_sparse
from theory.streams import seed_of
from validation import bouncing_checks as claims
from validation import bouncing_moving as moving
from validation import bouncing_sparsity as sparsity
from validation.bouncing_diagonal import observe_diagonal
from validation.bouncing_orthogonal import ORTHOGONAL, orthogonal_checks
from validation.bouncing_runs import Setting, Window, descended, observe, trained
from validation.bouncing_series import dataset
from validation.check import Check, Verdict
from validation.settings import RunSettings
from validation.sharpness import CLAIMS as SHARPNESS_CLAIMS
from validation.sharpness import sharpness_checks
from validation.suite import Outcome, Progress

CLAIMS = [*claims.CLAIMS, moving.MOVING, ORTHOGONAL, *sparsity.CLAIMS, *SHARPNESS_CLAIMS]
FLOAT = torch.float32  # of the image networks: sampling errors are 1e-2, and steps cost half

MOMENTUM = Setting("MLP", 0.2, 32, momentum=0.5)
SMALL_BATCH = Setting("MLP", 0.2, 8)
EDGE = Setting("MLP", 0.4, 128)  # ηλ within a per cent or two of 2
RELU = Setting("ReLU MLP", 0.4, 32)
TURNING = Setting("MLP", 0.2, 32)  # early, while the sharpest directions turn away
SPARSE = Setting("ReLU MLP", 0.4, 16)  # early, while units fall silent
RESNET = Setting("tanh ResNet", 0.08, 32)  # ηλ₁ just below 1.5
DIAGONAL = Setting("diagonal", 2.0, 80)


def run(settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """All checks of the suite."""
    options, root = settings.bouncing, seed_of(claims.SUITE) % 2**63
    known = {"mlp": mlp_windows, "residual-network": residual_windows, "diagonal": diagonal_window}
    found = [
        each
        for name, work in known.items()
        if name in options.experiments
        for each in work(settings, device, progress, root)
    ]
    checks, series = [check for _, part in found for check in part], list[xr.Dataset]()
    if found:
        series.append(dataset([window for window, _ in found]))
    if "mlp" in options.experiments:
        turning = progress.kept("moving basis", lambda: turning_valley(settings, device, progress, root))
        checks, series = checks + moving.moving_checks(turning), [*series, moving.dataset(turning)]
        shares = progress.kept("sparse features", lambda: sparse_features(settings, device, progress, root))
        checks += sparsity.sparsity_checks(shares)
    if "sharpness" in options.experiments:
        sharpness, curves = sharpness_checks(settings, device, progress)
        checks, series = checks + sharpness, [*series, curves]
    progress.close()
    return Outcome(checks, CLAIMS, xr.merge(series))


Found = list[tuple[Window, list[Check]]]
"""Windows, and what is claimed of each."""


def residual_windows(settings: RunSettings, device: torch.device, progress: Progress, root: int) -> Found:
    """A small residual network on digits, without BatchNorm."""
    options = settings.bouncing
    progress(f"{RESNET.label}, no BatchNorm")
    build = partial(resnet, (4, 8), activation=nn.Tanh, dtype=FLOAT)
    objective = digits_objective(build, options.resnet_images, device)

    def residual() -> Window:
        (state,) = trained(objective, [RESNET], options.resnet_steps, root)
        return observe(objective, RESNET, state, settings.replicates, 100, 200, 24, root)

    window = progress.kept("residual network", residual)
    return [(window, resnet_checks(window))]


def diagonal_window(settings: RunSettings, device: torch.device, progress: Progress, root: int) -> Found:
    """A diagonal network with label noise on sparse data."""
    progress("diagonal network with label noise")
    problem = gaussian_sparse(80, 200, 20).to(device)
    runs, directions = 4 * settings.replicates, settings.bouncing.directions
    window = progress.kept(
        "diagonal", lambda: observe_diagonal(problem, DIAGONAL, 3000, runs, 200, 400, directions, root)
    )
    return [(window, diagonal_checks(window))]


def digits_objective(build: Callable[[], nn.Module], images: int, device: torch.device) -> Objective:
    """Squared loss to one-hot labels of a network on the digits."""
    data = digits(images, dtype=FLOAT).to(device)
    return Objective(FlatNet(build().to(device)), data.train_x, data.train_y, SQUARED)


def mlp_windows(settings: RunSettings, device: torch.device, progress: Progress, root: int) -> Found:
    """64-32-10 networks on digits: over (η, B), with momentum, with reshuffled epochs, close to ηλ = 2, with ReLU."""
    options, runs, found = settings.bouncing, 3 * settings.replicates // 2, Found()
    objective = digits_objective(lambda: mlp(dtype=FLOAT), options.images, device)
    plain = [Setting("MLP", eta, 32) for eta in options.step_sizes]
    middle = len(plain) // 2
    shuffled = Setting("MLP", plain[middle].step_size, 32, reshuffled=True)

    def look(at: Objective, setting: Setting, state: tuple[Tensor, Tensor]) -> None:
        window = progress.kept(
            f"window {len(found)}",
            lambda: observe(at, setting, state, runs, options.burn_in, options.window, options.directions, root),
        )
        found.append((window, mlp_checks(window)))

    progress(f"digits MLP, {len(plain) + 2} settings at B=32 x {runs} replicas")
    states = progress.kept("trained", lambda: trained(objective, [*plain, MOMENTUM], options.steps, root))
    for setting, state in zip([*plain, MOMENTUM, shuffled], [*states, states[middle]], strict=True):
        look(objective, setting, state)
    progress(f"SDE in the complement of the bouncing directions, and GD, {plain[middle].label}")
    window, checks = found[middle]
    checks += progress.kept("orthogonal SDE", lambda: orthogonal_checks(objective, window, settings, root))
    checks.append(claims.descent_check(window, descended(objective, window)))
    rectified = digits_objective(lambda: mlp(activation=nn.ReLU, dtype=FLOAT), options.images, device)
    for at, setting in ((objective, SMALL_BATCH), (objective, EDGE), (rectified, RELU)):
        progress(f"digits {setting.label}")
        (state,) = progress.kept(f"trained {setting.label}", partial(trained, at, [setting], options.steps, root))
        look(at, setting, state)
    return found


def turning_valley(settings: RunSettings, device: torch.device, progress: Progress, root: int) -> moving.Following:
    """The same MLP from its first hundred steps on."""
    progress(f"moving basis, {TURNING.label}, {settings.replicates} replicas")
    objective = digits_objective(lambda: mlp(dtype=FLOAT), settings.bouncing.images, device)
    (state,) = trained(objective, [TURNING], 100, root)
    return moving.follow(objective, TURNING, state, settings.replicates, 24, 25, 20, root)


def sparse_features(settings: RunSettings, device: torch.device, progress: Progress, root: int) -> sparsity.Shares:
    """A ReLU MLP on few digits, whose noise is large."""
    progress(f"active units, noise of all and of orthogonal directions, {SPARSE.label}, {settings.replicates} paths")
    objective = digits_objective(lambda: mlp(activation=nn.ReLU, dtype=FLOAT), 64, device)
    return sparsity.compare(objective, SPARSE, "2", 200, 200, settings.replicates, root)


def mlp_checks(window: Window) -> list[Check]:
    """What is claimed of a window of an MLP."""
    setting = window.setting
    plain = not (setting.momentum or setting.reshuffled)
    checks = claims.autocorrelation_checks(window)
    if setting == EDGE:
        # Known: within a per cent of ηλ = 2 the walls bend within one bounce, and the linear law's level is too high.
        return [*checks, claims.excess_check(window, Verdict.DISAGREES)]
    checks += [*claims.variance_checks(window), claims.excess_check(window)]
    if plain:
        checks += claims.sde_checks(window)
    if setting == SMALL_BATCH:
        checks += [claims.level_check(window, Verdict.AGREES), claims.gaussian_check(window)]
    elif setting.network == "MLP" and plain and setting.step_size >= 0.1:
        # Known: residuals are larger along the sharp directions than elsewhere, and the level is above the law's.
        checks.append(claims.level_check(window, Verdict.DISAGREES))
        checks += claims.inside_and_outside_checks(window)
    if plain and float(window.slip[-1]) < claims.FLAT:
        checks.append(claims.diffusion_check(window))
    return checks


def resnet_checks(window: Window) -> list[Check]:
    """What is claimed of a residual network."""
    checks = claims.autocorrelation_checks(window)
    return [*checks, *claims.sde_checks(window), claims.excess_check(window)]


def diagonal_checks(window: Window) -> list[Check]:
    """What is claimed of the diagonal network."""
    checks = claims.autocorrelation_checks(window)
    return [*checks, *claims.variance_checks(window), *claims.sde_checks(window), claims.excess_check(window)]
