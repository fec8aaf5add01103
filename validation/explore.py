"""The command ``valleydrift explore``: simulate a built-in SDE, with plots of paths, quantiles and stationary law."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from validation.settings import SettingsError, option

SchemeName = Literal["euler-maruyama", "milstein", "platen"]
FILES = ("exploration.json", "exploration.csv", "exploration.png")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Exploration:
    """Common to all explorations."""

    paths: int = option(2000, "simulated paths")
    time: float = option(10.0, "SDE time")
    dt: float = option(0.01, "integration step")
    start: float = option(1.0, "initial value")
    scheme: SchemeName = option("milstein", "integration scheme")
    seed: int = option(0, "root seed of the noise")
    out: str = option("exploration", "output folder")

    def __post_init__(self) -> None:
        for name in ("paths", "time", "dt"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} {getattr(self, name):g} is not usable: choose a positive number.")
        if self.paths < 2:
            raise SettingsError("one path shows no spread: choose --paths 2 or more.")


@dataclass(frozen=True)
class QuarticWell(Exploration):
    """dy = (mu y - y^3) dt + zeta y dW."""

    mu: float = option(1.5, "depth of the well")
    zeta: float = option(1.0, "multiplicative noise")


@dataclass(frozen=True)
class OrnsteinUhlenbeck(Exploration):
    """dy = -rate y dt + sigma dW."""

    rate: float = option(1.0, "pull towards 0")
    sigma: float = option(1.0, "additive noise")


@dataclass(frozen=True)
class GeometricBrownianMotion(Exploration):
    """dy = mu y dt + sigma y dW."""

    mu: float = option(0.1, "growth")
    sigma: float = option(0.5, "multiplicative noise")


@dataclass(frozen=True)
class Logistic(Exploration):
    """dy = 2 y (s - y) dt + sigma y dW."""

    s: float = option(1.0, "singular value of the teacher")
    sigma: float = option(1.0, "multiplicative noise")


@dataclass(frozen=True)
class DiagonalNetwork(Exploration):
    """Exact-covariance SDE of a diagonal linear network on Gaussian data; y = mean ln alpha."""

    start: float = option(0.1, "u = this, v = 0 at the start")
    time: float = option(100.0, "SDE time; one SGD step lasts the step size")
    dt: float = option(0.05, "integration step")
    paths: int = option(64, "simulated paths")
    scheme: SchemeName = option("euler-maruyama", "integration scheme")
    n: int = option(40, "training samples")
    d: int = option(60, "features")
    nonzero: int = option(6, "non-zero coordinates of the truth")
    step_size: float = option(0.1, "step size of the SGD it stands for")
    batch_size: int = option(1, "its batch size")


EXPLORATIONS: Mapping[str, type[Exploration]] = {
    "quartic-well": QuarticWell,
    "ornstein-uhlenbeck": OrnsteinUhlenbeck,
    "geometric-brownian-motion": GeometricBrownianMotion,
    "logistic": Logistic,
    "diagonal": DiagonalNetwork,
}


def explore(name: str, settings: Exploration) -> str:
    """Simulate, write ``exploration.csv``, ``exploration.json`` and ``exploration.png``, and say what was found.

    Raises:
        SettingsError: settings that cannot be used, each with one sentence.
    """
    import torch

    from simulators.integrate import integrate
    from simulators.noise import BrownianIncrements
    from simulators.schemes import EulerMaruyama, Milstein, Platen, Scheme
    from theory.trajectory import Probe
    from validation import store

    folder = store.prepare(settings.out)
    steps = round(settings.time / settings.dt)
    try:
        sde, y0, observe, facts = _problem(name, settings)
        schemes: dict[str, Scheme] = {"euler-maruyama": EulerMaruyama(), "milstein": Milstein(), "platen": Platen()}
        scheme = schemes[settings.scheme]
        noise = BrownianIncrements(settings.seed, name, settings.paths, sde.channels)
        at = torch.linspace(0, steps, min(steps, 400) + 1).round().long().unique()
        run = integrate(sde, y0, settings.dt, steps, noise, {"y": Probe(observe, at)}, scheme)
    except ValueError as fault:
        raise SettingsError(str(fault)) from fault
    values = run["y"].values.numpy()
    times = (at * settings.dt).numpy()
    diverged = int((~run.finite).sum())
    summary = facts | {"mean at the end": _mean(values[-1]), "diverged paths": diverged}
    store.set_aside(folder, FILES)
    origin = store.provenance(dataclasses.asdict(settings), torch.device("cpu"), 0.0)
    store.write_text(folder / "exploration.json", json.dumps({"provenance": origin, "found": summary}, indent=1) + "\n")
    _write_csv(folder / "exploration.csv", times, values)
    _draw(folder / "exploration.png", name, settings, times, values)
    lines = [f"{key}: {value}" for key, value in summary.items()]
    return "\n".join([*lines, f"figure: {folder / 'exploration.png'}"])


def _problem(name: str, settings: Exploration) -> tuple[Any, Any, Callable[[Any], Any], dict[str, Any]]:
    """The SDE, its start, what is shown of a state, and what theory says of it."""
    import torch

    if isinstance(settings, DiagonalNetwork):
        from theory.diagonal import DiagonalState
        from theory.diagonal_sde import DiagonalSDE, to_logs
        from theory.minibatch import Minibatch
        from theory.problem import gaussian_sparse
        from theory.sde import ExactCovariance

        problem = gaussian_sparse(settings.n, settings.d, settings.nonzero)
        u = torch.full((settings.d,), settings.start, dtype=torch.float64)
        y0 = to_logs(DiagonalState.from_uv(u, torch.zeros_like(u))).repeat(settings.paths, 1)
        covariance = ExactCovariance(settings.step_size, Minibatch(settings.batch_size))
        return DiagonalSDE(problem, covariance), y0, lambda y: y.sum(-1) / settings.d, {"shown": "mean ln α"}
    model = _model(name)
    y0 = torch.full((settings.paths, 1), settings.start, dtype=torch.float64)
    facts: dict[str, Any] = {"drift": str(model.drift), "diffusion": str(model.diffusion)}
    values = _parameters(settings)
    if model.diffusion.subs(model.variable, 0) == 0:
        exponent = model.lyapunov_exponent(0)
        facts["Lyapunov exponent at 0"] = float(exponent.subs({s: values[s.name] for s in exponent.free_symbols}))
    return model.to_sde(**values), y0, lambda y: y[:, 0], facts


def _model(name: str) -> Any:
    from theory import one_dimensional

    return getattr(one_dimensional, name.replace("-", "_"))()


def _parameters(settings: Exploration) -> dict[str, float]:
    common = {field.name for field in dataclasses.fields(Exploration)}
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name not in common}


def _mean(final: Any) -> str:
    import numpy as np

    final = final[np.isfinite(final)]
    if not len(final):
        return "no path stayed finite"
    return f"{final.mean():.6g} ± {final.std(ddof=1) / len(final) ** 0.5:.2g}" if len(final) > 1 else f"{final[0]:.6g}"


def _write_csv(path: Path, times: Any, values: Any) -> None:
    import numpy as np

    from validation.store import replacing

    table = np.nanquantile(values, QUANTILES, axis=1)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time", *(f"quantile {q}" for q in QUANTILES)])
        writer.writerows(zip(times, *table, strict=True))


def _draw(path: Path, name: str, settings: Exploration, times: Any, values: Any) -> None:
    """Twenty paths, the quantile fan, and the values at the end with the stationary density where there is one."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from validation.figures import STYLE
    from validation.store import replacing

    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.plot(times, values[:, :20], lw=0.6, alpha=0.8)
        left.set_title(f"20 of {settings.paths} paths", loc="left", fontsize=9)
        low, quarter, median, three, high = np.nanquantile(values, QUANTILES, axis=1)
        middle.fill_between(times, low, high, color="#56B4E9", alpha=0.3, lw=0, label="5-95 %")
        middle.fill_between(times, quarter, three, color="#0072B2", alpha=0.4, lw=0, label="25-75 %")
        middle.plot(times, median, color="black", lw=1.2, label="median")
        middle.legend(frameon=False, fontsize=7)
        middle.set_title("quantiles", loc="left", fontsize=9)
        final = values[-1][np.isfinite(values[-1])]
        if len(final):
            right.hist(final, bins=60, density=True, color="#BBBBBB")
            _density(right, name, settings, final)
        right.set_title(f"at time {settings.time:g}", loc="left", fontsize=9)
        for axis in (left, middle):
            axis.set_xlabel("SDE time")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)


def _density(axis: Any, name: str, settings: Exploration, final: Any) -> None:
    """The stationary density, where the equation has one."""
    import numpy as np
    import sympy as sp

    if isinstance(settings, DiagonalNetwork):
        return
    model, values = _model(name), _parameters(settings)
    symbols = model.drift.free_symbols | model.diffusion.free_symbols
    numbers = {symbol: sp.Float(values[symbol.name]) for symbol in symbols if symbol.name in values}
    model = dataclasses.replace(model, drift=model.drift.subs(numbers), diffusion=model.diffusion.subs(numbers))
    one_sided = model.diffusion.subs(model.variable, 0) == 0  # paths never cross 0
    try:
        low = 0 if one_sided and settings.start > 0 else -sp.oo
        high = 0 if one_sided and settings.start < 0 else sp.oo
        density = model.normalise(low, high)
    except (ValueError, NotImplementedError):
        return  # collapsing or growing for ever: there is none
    grid = np.linspace(final.min(), final.max(), 400)
    axis.plot(grid, sp.lambdify(model.variable, density, "numpy")(grid + 1e-12), color="#D55E00", lw=1.4)
