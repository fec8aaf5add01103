"""The same runs through torchsde, with its known traps closed.

torchsde is given the equation in units of steps: one step lasts exactly 1.0 on a float64 clock, save times fall on
whole numbers, and increments come from :class:`~simulators.noise.BrownianIncrements`. That removes the endless
refinement of its Brownian tree, the float32 clock, the interpolated save times and the global seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simulators.integrate import check_run
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


class _WithDiffusion(_InUnitsOfSteps):
    """The same with G itself, which torchsde's Milstein and Runge-Kutta methods ask; never for general noise."""

    def g(self, k: Tensor, y: Tensor) -> Tensor:
        if self.noise_type == "diagonal":
            return self.g_prod(k, y, torch.ones_like(y))
        columns = torch.eye(self._sde.channels, dtype=y.dtype, device=y.device)
        return torch.stack([self.g_prod(k, y, column.expand(len(y), -1)) for column in columns], -1)


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
                "use a method with whole steps, e.g. method='euler'."
            )
        return self._noise(int(start))


LEVY_AREAS = {"srk": "space-time", "log_ode": "foster"}


def _brownian(method: str, noise: BrownianIncrements, y0: Tensor, steps: int):  # type: ignore[no-untyped-def]
    if method not in LEVY_AREAS:
        return _OnGrid(noise, y0)
    import torchsde

    return torchsde.BrownianInterval(
        0.0, float(steps), (noise.paths, noise.channels), dtype=y0.dtype, device=y0.device, dt=1.0,
        entropy=int(noise.seed) % 2**31, levy_area_approximation=LEVY_AREAS[method],
    )  # fmt: skip


def sdeint(
    sde: SDE,
    y0: Tensor,
    dt: float,
    steps: int,
    noise: BrownianIncrements,
    probes: Mapping[str, Probe] | None = None,
    method: str = "euler",
) -> Trajectory:
    """:func:`simulators.integrate.integrate`'s signature, integrated by ``torchsde.sdeint`` with ``method``.

    Methods with Lévy areas (``srk``, ``log_ode``) draw from torchsde's own Brownian motion, seeded from ``noise``:
    the law is the same, the path is not.

    Raises:
        ValueError: what :func:`~simulators.integrate.integrate` raises, or a method that does not fit the SDE.
    """
    import torchsde

    check_run(sde, y0, dt, steps, noise)
    recorder = Recorder(probes or {}, steps)
    stops = sorted({0, *recorder.stops, steps})
    states = [y0]
    if steps:
        clock = torch.tensor(stops, dtype=torch.float64)
        scaled = (_InUnitsOfSteps if sde.noise_type == "general" else _WithDiffusion)(sde, float(dt))
        brownian = _brownian(method, noise, y0, steps)
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
