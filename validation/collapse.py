"""Suite ``collapse``: noise that vanishes on an invariant set draws the state onto it, from one dimension up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from validation import collapse_checks as claims
from validation import collapse_networks as networks
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
    trajectories = max(4 * seeds, 128) if size == "quick" else 1000
    progress("quartic well")
    checks, series = quartic(options, 16 * seeds, LEVELS[size])
    progress(f"single neuron, 50 noise levels x {trajectories} trajectories x {NEURON_STEPS[size]} steps")
    parts = [neuron(options, trajectories, NEURON_STEPS[size])]
    progress(f"linear teacher and student, {len(options.sigmas) + 1} noise levels x {5 * seeds} seeds")
    parts.append(linear(options, 5 * seeds))
    progress(f"two-unit toy, {2 * seeds} seeds")
    parts.append(toy(options, 2 * seeds))
    progress("linear network with minibatches")
    parts.append(general(seeds))
    for more, kept in parts:
        checks, series = checks + more, series | kept
    more_checks, more_series = networks.network_checks(settings, device, progress)
    progress.close()
    return Outcome(checks + more_checks, CLAIMS, xr.merge([dataset(series), more_series]))


def dataset(series: dict[str, Any]) -> xr.Dataset:
    """Variables are (dims, values), everything else is a coordinate."""
    variables = {name: value for name, value in series.items() if isinstance(value, tuple)}
    coordinates = {name: np.asarray(value) for name, value in series.items() if not isinstance(value, tuple)}
    return xr.Dataset(variables, coords=coordinates)
