"""Suite ``collapse``: noise that vanishes on an invariant set draws the state onto it, from one dimension up."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from validation import collapse_checks as claims
from validation import collapse_networks as networks
from validation.check import Check
from validation.collapse_linear import general, linear, toy
from validation.collapse_models import neuron, quartic
from validation.settings import RunSettings
from validation.suite import Outcome, Progress

CLAIMS = [*claims.CLAIMS, *networks.CLAIMS]
LEVELS = {"quick": 32, "standard": 100, "paper": 100}
NEURON_STEPS = {"quick": 20_000, "standard": 100_000, "paper": 100_000}


def run(settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """All checks of the suite; its ensembles run compiled on the CPU."""
    options, size, seeds = settings.collapse, settings.size, settings.replicates
    trajectories, steps = max(4 * seeds, 128) if size == "quick" else 1000, NEURON_STEPS[size]
    sweep, levels = f"50 noise levels x {trajectories} trajectories x {steps} steps", len(options.sigmas) + 1
    walkers = 8 * seeds if size == "quick" else 16 * seeds
    small = {
        "quartic-well": ("quartic well", partial(quartic, options, walkers, LEVELS[size])),
        "neuron": (f"single neuron, {sweep}", partial(neuron, options, trajectories, steps)),
        "teacher-student": (
            f"linear teacher and student, {levels} noise levels x {5 * seeds} seeds",
            partial(linear, options, 5 * seeds),
        ),
        "toy": (f"two-unit toy, {2 * seeds} seeds", partial(toy, options, 2 * seeds)),
        "linear-network": ("linear network with minibatches", partial(general, seeds)),
    }  # fmt: skip
    checks: list[Check] = []
    series: dict[str, Any] = {}
    for name, (label, work) in small.items():
        if name in options.experiments:
            progress(label)
            more, kept = progress.kept(name, work)
            checks, series = checks + more, series | kept
    parts = [dataset(series)]
    if "networks" in options.experiments:
        more, kept_networks = networks.network_checks(settings, device, progress)
        checks, parts = checks + more, [*parts, kept_networks]
    progress.close()
    return Outcome(checks, CLAIMS, xr.merge(parts))


def dataset(series: dict[str, Any]) -> xr.Dataset:
    """Variables are (dims, values), everything else is a coordinate."""
    variables = {name: value for name, value in series.items() if isinstance(value, tuple)}
    coordinates = {name: np.asarray(value) for name, value in series.items() if not isinstance(value, tuple)}
    return xr.Dataset(variables, coords=coordinates)
