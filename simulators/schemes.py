"""Fixed-step schemes. Each takes one step from y at time t over h with standard normals ξ, noise in product form.

| scheme | equation | noise | strong | weak |
|---|---|---|---|---|
| :class:`EulerMaruyama` | Itô | any | 1/2 (additive: 1) | 1 |
| :class:`Milstein` | Itô | diagonal, scalar, additive | 1 | 1 |
| :class:`Platen` | Itô | diagonal, scalar, additive | 1/2 | 2 |
| :class:`StochasticHeun` | Stratonovich | any | 1/2 (commutative: 1) | 1 |
| :class:`NinomiyaNinomiya` | Stratonovich | any | - | 2 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from theory.sde import SDE

ANY = ("diagonal", "scalar", "additive", "general")
COMMUTATIVE = ("diagonal", "scalar", "additive")


class Scheme(Protocol):
    """What :func:`simulators.integrate.integrate` steps with.

    Attributes:
        sde_type, noise_types: what it is made for.
        normals: standard normals a channel and step.
    """

    sde_type: ClassVar[str]
    noise_types: ClassVar[tuple[str, ...]]
    normals: ClassVar[int]

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EulerMaruyama:
    """y + f h + G √h ξ."""

    sde_type: ClassVar[str] = "ito"
    noise_types: ClassVar[tuple[str, ...]] = ANY
    normals: ClassVar[int] = 1

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step."""
        drift, kick = sde.f_and_g_prod(t, y, xi * h**0.5)
        return y + drift * h + kick


@dataclass(frozen=True)
class Milstein:
    """y + f h + g ΔW + ½ (∂g) g (ΔW² - h); (∂g) g by one forward-mode derivative.

    Diagonal noise: g_j may depend on y_j only. Source: Kloeden and Platen (1992), Eq. 10.3.1.
    """

    sde_type: ClassVar[str] = "ito"
    noise_types: ClassVar[tuple[str, ...]] = COMMUTATIVE
    normals: ClassVar[int] = 1

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step."""
        ones = torch.ones_like(xi)
        f, g = sde.f_and_g_prod(t, y, ones)
        gg: Tensor = torch.func.jvp(lambda at: sde.g_prod(t, at, ones), (y,), (g,))[1]
        dW = xi * h**0.5
        return y + f * h + g * dW + 0.5 * gg * (dW.square() - h)


@dataclass(frozen=True)
class Platen:
    """Explicit scheme of weak order 2 for Itô equations with diagonal, scalar or additive noise.

    ȳ = y + f h + g ΔW, y± = y + f h ± g √h:
    y + ½(f(ȳ) + f) h + ¼(g(y+) + g(y-) + 2g) ΔW + ¼(g(y+) - g(y-))(ΔW² - h)/√h.
    Diagonal noise: g_j may depend on y_j only. Source: Kloeden and Platen (1992), Eq. 15.1.1.
    """

    sde_type: ClassVar[str] = "ito"
    noise_types: ClassVar[tuple[str, ...]] = COMMUTATIVE
    normals: ClassVar[int] = 1

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step."""
        root, ones = h**0.5, torch.ones_like(xi)
        dW = xi * root
        f, g = sde.f_and_g_prod(t, y, ones)
        moved = y + f * h
        plus, minus = sde.g_prod(t + h, moved + g * root, ones), sde.g_prod(t + h, moved - g * root, ones)
        drift = (sde.f(t + h, moved + g * dW) + f) * (h / 2)
        return y + drift + (plus + minus + 2 * g) / 4 * dW + (plus - minus) / (4 * root) * (dW.square() - h)


@dataclass(frozen=True)
class StochasticHeun:
    """Trapezoidal predictor-corrector, which converges to the Stratonovich solution: y + ½(k(y) + k(y + k(y)))."""

    sde_type: ClassVar[str] = "stratonovich"
    noise_types: ClassVar[tuple[str, ...]] = ANY
    normals: ClassVar[int] = 1

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step."""
        dW = xi * h**0.5
        drift, kick = sde.f_and_g_prod(t, y, dW)
        drift2, kick2 = sde.f_and_g_prod(t + h, y + drift * h + kick, dW)
        return y + (drift + drift2) * (h / 2) + (kick + kick2) / 2


@dataclass(frozen=True)
class NinomiyaNinomiya:
    """Weak order 2 for Stratonovich equations with any noise: flow for unit time along Z₁, then along Z₂.

    Z₁ = G √h S₁, Z₂ = f h + G √h S₂ with Gaussian S of variances ½, 3/2 and covariance -½ in every channel, each
    flow by a fifth-order Runge-Kutta method (product form: six products a flow, whatever the number of channels).
    f and G are taken at the time where the step begins: for equations that do not depend on time.
    Source: Ninomiya and Ninomiya (2009) with u = ½.
    """

    sde_type: ClassVar[str] = "stratonovich"
    noise_types: ClassVar[tuple[str, ...]] = ANY
    normals: ClassVar[int] = 2

    def step(self, sde: SDE, t: float, y: Tensor, h: float, xi: Tensor) -> Tensor:
        """One step; ξ holds two normals a channel, shape (paths, 2·channels)."""
        one, two = (xi * h**0.5).chunk(2, -1)
        first = one * 0.5**0.5
        second = two - first  # variance 1 + ½, covariance -½ with the first

        def along_second(at: Tensor) -> Tensor:
            drift, kick = sde.f_and_g_prod(t, at, second)
            return drift * h + kick

        return _flow(along_second, _flow(lambda at: sde.g_prod(t, at, first), y))


# Butcher's fifth-order method in six stages.
_STAGES = (
    (1 / 4,),
    (1 / 8, 1 / 8),
    (0.0, -1 / 2, 1.0),
    (3 / 16, 0.0, 0.0, 9 / 16),
    (-3 / 7, 2 / 7, 12 / 7, -12 / 7, 8 / 7),
)
_WEIGHTS = (7 / 90, 0.0, 32 / 90, 12 / 90, 32 / 90, 7 / 90)


def _flow(field, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """y(1) of y' = field(y)."""
    slopes = [field(y)]
    for stage in _STAGES:
        slopes.append(field(y + sum(c * k for c, k in zip(stage, slopes, strict=True) if c)))
    return y + sum(c * k for c, k in zip(_WEIGHTS, slopes, strict=True) if c)
