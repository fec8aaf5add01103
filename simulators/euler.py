"""Batched Euler-Maruyama for any SDE in product form, on an integer clock."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simulators.noise import BrownianIncrements
from theory.sde import SDE
from theory.trajectory import Probe, Recorder, Trajectory


def euler_maruyama(
    sde: SDE,
    y0: Tensor,
    dt: float | Tensor,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
) -> Trajectory:
    """y ← y + f dt + G √dt ξ, ``steps`` times.

    Args:
        y0: start, shape (paths, dim); its dtype and device are those of the run.
        dt: step in SDE time, a number or one value per step, shape (steps,).
        noise: increments of shape (paths, channels).
        probes: what to record; steps count integration steps.

    Returns:
        a trajectory with batch axis ``path``; a path that stops being finite is NaN from its first bad step on.

    Raises:
        ValueError: a start of the wrong shape or not finite, a step size that is not positive.
    """
    check_run(sde, y0, dt, steps, noise)
    recorder = Recorder(probes or {}, steps)
    sizes = dt.tolist() if isinstance(dt, Tensor) else None
    bad = torch.full((len(y0),), -1, dtype=torch.int64, device=y0.device)
    y, last_finite, t = y0.clone(), y0, 0.0
    for k in range(steps):
        recorder.record(k, y)
        h = sizes[k] if sizes else float(dt)
        drift, kick = sde.f_and_g_prod(t, y, noise(k) * h**0.5)
        y = y + drift * h + kick
        ok = torch.isfinite(y).all(1)
        bad = torch.where((bad < 0) & ~ok, k + 1, bad)
        last_finite = torch.where(ok.unsqueeze(1), y, last_finite)
        t = t + h if sizes else (k + 1) * h
    recorder.record(steps, y)
    return Trajectory(recorder.series(bad), last_finite, bad, ("path",))


def check_run(sde: SDE, y0: Tensor, dt: float | Tensor, steps: int, noise: BrownianIncrements) -> None:
    """One sentence on what is wrong with the arguments of a run, if anything is."""
    if y0.ndim != 2 or y0.shape[0] != noise.paths:
        raise ValueError(f"the start has shape {tuple(y0.shape)}: give (paths, dim) with {noise.paths} paths.")
    if sde.channels != noise.channels:
        raise ValueError(
            f"the SDE has {sde.channels} noise channels and the increments {noise.channels}: give them the same."
        )
    if not torch.isfinite(y0).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    if isinstance(dt, Tensor) and dt.shape != (steps,):
        raise ValueError(f"step sizes of shape {tuple(dt.shape)} were given for {steps} steps: give one each.")
    sizes = torch.as_tensor(dt)
    if steps < 0 or not bool(((sizes > 0) & torch.isfinite(sizes)).all()):
        raise ValueError("the step dt has to be positive and finite, and the number of steps not negative.")
