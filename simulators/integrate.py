"""Batched fixed-step integration of any SDE in product form, on an integer clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from simulators.noise import BrownianIncrements
from simulators.schemes import EulerMaruyama, Scheme
from theory.sde import SDE
from theory.trajectory import Probe, Recorder, Trajectory

MOST_STEPS = 10**9


def integrate(
    sde: SDE,
    y0: Tensor,
    dt: float | Tensor,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    scheme: Scheme | None = None,
    first_step: int = 0,
) -> Trajectory:
    """Integrate dy = f dt + G dW from step ``first_step`` to ``steps``.

    Steps are counted, so time never drifts and records fall exactly on steps. The increment of a step depends on the
    step alone: a run stopped after k steps and continued with ``y0`` its final state and ``first_step=k`` equals the
    uninterrupted one bit for bit.

    Args:
        y0: state at ``first_step``, shape (paths, dim); its dtype and device are those of the run.
        dt: step in SDE time, a number or one value per step, shape (steps,).
        noise: increments of shape (paths, channels × scheme's normals), in the dtype and on the device of y0.
        probes: what to record; k means "after k steps".
        scheme: Euler-Maruyama by default (stochastic Heun for Stratonovich equations).

    Returns:
        a trajectory with batch axis ``path``; a path that stops being finite is NaN from its first bad step on, and
        its final state is the last finite one.

    Raises:
        ValueError: arguments that do not fit, each with a sentence on what to do.
    """
    scheme = scheme or (EulerMaruyama() if sde.sde_type == "ito" else _default_stratonovich())
    check_scheme(sde, scheme)
    check_run(sde, y0, dt, steps, noise, scheme.normals)
    sizes = dt.double().cpu() if isinstance(dt, Tensor) else None
    times = torch.cat([torch.zeros(1), sizes.cumsum(0)]).tolist() if sizes is not None else None
    each = sizes.tolist() if sizes is not None else None

    def update(k: int, y: Tensor) -> Tensor:
        h = each[k] if each else float(dt)
        return scheme.step(sde, times[k] if times else k * h, y, h, noise(k))

    return iterate(update, y0, steps, probes or {}, first_step)


def iterate(
    update: Callable[[int, Tensor], Tensor], y0: Tensor, steps: int, probes: Mapping[str, Probe], first_step: int = 0
) -> Trajectory:
    """y_{k+1} = update(k, y_k) for k = first_step … steps - 1, recorded, every path's first bad step dated.

    Raises:
        ValueError: a start that is no finite (paths, dim) tensor, steps that do not count up, an update that changes
            the shape.
    """
    if y0.ndim != 2 or not torch.isfinite(y0).all():
        raise ValueError(
            f"the start of shape {tuple(y0.shape)} is not usable: give a finite one of shape (paths, dim)."
        )
    if not 0 <= first_step <= steps:
        raise ValueError(f"first_step {first_step} is not a step of the run: choose it between 0 and {steps}.")
    recorder = Recorder(probes, steps, first_step)
    bad = torch.full((len(y0),), -1, dtype=torch.int64, device=y0.device)
    y, last_finite, over, on_host = y0.clone(), y0, False, y0.device.type == "cpu"
    for k in range(first_step, steps):
        recorder.record(k, y)
        if over:
            continue
        before, y = y, update(k, y)
        if k == first_step and y.shape != y0.shape:
            raise ValueError(
                f"states of shape {tuple(y0.shape)} turn into {tuple(y.shape)}: "
                "let f and g_prod return the state's shape."
            )
        # One number says that all is well; a device is not asked for it, which would make it wait.
        if on_host and math.isfinite(y.sum()):
            continue
        ok = torch.isfinite(y).all(1)
        last_finite = torch.where(((bad < 0) & ~ok).unsqueeze(1), before, last_finite)
        bad = torch.where((bad < 0) & ~ok, k + 1, bad)
        over = k % 64 == 0 and bool((bad >= 0).all())  # asked rarely, for the same reason
    recorder.record(steps, y)
    final = torch.where((bad < 0).unsqueeze(1), y, last_finite)
    return Trajectory(recorder.series(bad), final, bad, ("path",))


def steps_at(times: Sequence[float], dt: float) -> Tensor:
    """The steps on which SDE times fall, int64, for use in a :class:`~theory.trajectory.Probe`.

    Raises:
        ValueError: a time that is not a whole number of steps (interpolating would give the wrong variance).
    """
    exact = torch.tensor(list(times), dtype=torch.float64) / dt
    whole = exact.round()
    off = (exact - whole).abs() > 1e-9 * exact.abs().clamp(min=1.0)
    if off.any():
        time = float(torch.tensor(list(times))[off][0])
        raise ValueError(f"time {time:g} is not a multiple of dt {dt:g}: choose save times on the step grid.")
    return whole.long()


def check_scheme(sde: SDE, scheme: Scheme) -> None:
    """One sentence when a scheme is not made for an equation."""
    name = type(scheme).__name__
    if sde.sde_type != scheme.sde_type:
        raise ValueError(
            f"{name} is for {scheme.sde_type} equations and this one is {sde.sde_type}: choose "
            + ("EulerMaruyama, Milstein or Platen." if sde.sde_type == "ito" else "StochasticHeun or NinomiyaNinomiya.")
        )
    if sde.noise_type not in scheme.noise_types:
        raise ValueError(
            f"{name} takes {', '.join(scheme.noise_types)} noise and this equation's is {sde.noise_type}: "
            + ("choose EulerMaruyama." if sde.sde_type == "ito" else "choose StochasticHeun.")
        )


def check_run(
    sde: SDE, y0: Tensor, dt: float | Tensor, steps: int, noise: BrownianIncrements, normals: int = 1
) -> None:
    """One sentence on what is wrong with the arguments of a run, if anything is."""
    if y0.ndim != 2 or y0.shape[0] != noise.paths:
        raise ValueError(f"the start has shape {tuple(y0.shape)}: give (paths, dim) with {noise.paths} paths.")
    if sde.channels * normals != noise.channels:
        raise ValueError(
            f"the SDE needs {sde.channels * normals} normals a step and path, and the increments have "
            f"{noise.channels} channels: give them the same."
        )
    if not torch.isfinite(y0).all():
        raise ValueError("the start has NaN or infinite entries: give a finite one.")
    if isinstance(dt, Tensor) and dt.shape != (steps,):
        raise ValueError(f"step sizes of shape {tuple(dt.shape)} were given for {steps} steps: give one each.")
    sizes = torch.as_tensor(dt)
    if steps < 0 or not bool(((sizes > 0) & torch.isfinite(sizes)).all()):
        raise ValueError("the step dt has to be positive and finite, and the number of steps not negative.")
    if steps > MOST_STEPS:
        raise ValueError(f"{steps:.3g} steps would not end in a lifetime: choose a larger dt, at most 1e9 steps.")


def _default_stratonovich() -> Scheme:
    from simulators.schemes import StochasticHeun

    return StochasticHeun()
