"""The same runs through torchsde, with its known traps closed.

torchsde is given the equation in units of steps: one step lasts exactly 1.0 on a float64 clock, save times fall on
whole numbers, and increments come from :class:`~simulators.noise.BrownianIncrements`. That removes the endless
refinement of its Brownian tree, the float32 clock, the interpolated save times and the global seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simulators.euler import check_run
from simulators.noise import BrownianIncrements
from theory.sde import SDE
from theory.trajectory import Probe, Recorder, Trajectory


class _InUnitsOfSteps:
    """dy = f(kh, y) h dk + G(kh, y) √h dW_k."""

    def __init__(self, sde: SDE, dt: float) -> None:
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type
        self._sde, self._dt = sde, dt

    def f(self, k: Tensor, y: Tensor) -> Tensor:
        return self._sde.f(float(k) * self._dt, y) * self._dt

    def g_prod(self, k: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._sde.g_prod(float(k) * self._dt, y, v * self._dt**0.5)

    def f_and_g_prod(self, k: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drift, kick = self._sde.f_and_g_prod(float(k) * self._dt, y, v * self._dt**0.5)
        return drift * self._dt, kick


class _OnGrid:
    """The Brownian motion torchsde asks: whole steps only."""

    levy_area_approximation = "none"

    def __init__(self, noise: BrownianIncrements, y0: Tensor) -> None:
        self.shape, self.dtype, self.device = (noise.paths, noise.channels), y0.dtype, y0.device
        self._noise = noise

    def __call__(self, ta: Tensor, tb: Tensor, return_U: bool = False, return_A: bool = False) -> Tensor:
        start, end = float(ta), float(tb)
        if return_U or return_A or start != int(start) or end != start + 1:
            raise ValueError(
                f"an increment over [{start}, {end}] was asked of a Brownian motion kept on whole steps: "
                "use a fixed-step method without Lévy areas, e.g. method='euler'."
            )
        return self._noise(int(start))


def sdeint(
    sde: SDE,
    y0: Tensor,
    dt: float,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    method: str = "euler",
) -> Trajectory:
    """:func:`simulators.euler.euler_maruyama`'s signature, integrated by ``torchsde.sdeint`` with ``method``.

    Raises:
        ValueError: what :func:`~simulators.euler.euler_maruyama` raises, or a method that does not fit the SDE.
    """
    import torchsde

    check_run(sde, y0, dt, steps, noise)
    recorder = Recorder(probes or {}, steps)
    stops = sorted({0, *recorder.stops, steps})
    states = [y0]
    if steps:
        clock = torch.tensor(stops, dtype=torch.float64)
        scaled, brownian = _InUnitsOfSteps(sde, float(dt)), _OnGrid(noise, y0)
        # Its argument check draws from the global generator: give it a copy.
        with torch.random.fork_rng(devices=[y0.device] if y0.is_cuda else []):
            states = list(torchsde.sdeint(scaled, y0, clock, bm=brownian, method=method, dt=1.0))
    # torchsde does not say when a path broke: all that is known is the first recorded step at which it was broken.
    broken = torch.stack([~torch.isfinite(y).all(1) for y in states])
    where = torch.tensor(stops, device=y0.device)[broken.int().argmax(0)]
    for step, y in zip(stops, states, strict=True):
        recorder.record(step, y)
    first_bad_step = torch.where(broken.any(0), where, -1)
    return Trajectory(recorder.series(first_bad_step), states[-1], first_bad_step, ("path",))
