"""Loss stabilisation in one dimension (AVPF, Prop. 2), proved with exact arithmetic.

h(x) = θ²x, per-sample loss ¼(y - θ²x)², y = θ*²x. SGD on s = θ/θ* reads s⁺ = f_c(s) = s(1 + c(1 - s²)) with
c = ηx²θ*² of the drawn sample. For c in (1, 5/4) at every draw the iterate alternates sides of s = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from theory.prediction import AVPF, Reference

SOURCE = Reference(AVPF, 2023, "Prop. 2")

C_LOW, C_HIGH = sp.Integer(1), sp.Rational(5, 4)
BAND_LOW = sp.Rational(27, 32) * sp.sqrt(sp.Rational(3, 5))  # f_{5/4}(BAND_HIGH) = 0.6535…
BAND_HIGH = sp.Rational(3, 2) * sp.sqrt(sp.Rational(3, 5))  # max f_{5/4} = 1.1618…


def step_map(s: Tensor, c: Tensor | float) -> Tensor:
    """s⁺ = s(1 + c(1 - s²))."""
    return s * (1 + c * (1 - s.square()))


def admissible_step_sizes(x: Tensor, theta_star: float) -> tuple[float, float]:
    """The interval of η for which every draw has c in (1, 5/4): ((θ* x_min)⁻², 1.25 (θ* x_max)⁻²).

    Raises:
        ValueError: an empty interval, i.e. x_max² ≥ 1.25 x_min².
    """
    low = float((theta_star * x.abs().min()) ** -2)
    high = float(1.25 * (theta_star * x.abs().max()) ** -2)
    if not low < high:
        raise ValueError(
            f"no step size keeps every draw in (1, 5/4): |x| ranges over a factor {(high / 1.25 / low) ** -0.5:.3g}, "
            "choose inputs within a factor √1.25 of each other."
        )
    return low, high


def prove_band() -> dict[str, bool]:
    """Prove Prop. 2 with sympy, each step a named fact that must come out true.

    Write L = [ℓ, 1) and R = (1, h] with ℓ = 27/32·√(3/5), h = 3/2·√(3/5). For every c in [1, 5/4], f_c(L) ⊂ R and,
    for c < 5/4 or s < h, f_c(R) ⊂ L; hence an orbit in L ∪ R alternates sides for ever and stays in [ℓ, h].
    """
    s, c = sp.symbols("s c", positive=True)
    f = s * (1 + c * (1 - s**2))
    top, one = f.subs(c, C_HIGH), f.subs(c, C_LOW)
    golden = (sp.sqrt(5) - 1) / 2
    peak = [root for root in sp.solve(sp.diff(top, s), s) if root > 0]
    return {
        # f is increasing in c left of 1 and decreasing right of it, so c = 1 and c = 5/4 are the extreme cases.
        "monotone in c": sp.expand(sp.diff(f, c) - s * (1 - s**2)) == 0,
        # f_1(s) - 1 = (1 - s)(s - g)(s - g') with g = (√5 - 1)/2 and g' < 0: above 1 on (g, 1), below 1 beyond 1.
        "f_1 crosses 1 at the golden ratio": sp.expand(one - 1 - (1 - s) * (s**2 + s - 1)) == 0
        and sp.simplify(golden**2 + golden - 1) == 0,
        "L lies above the golden ratio": bool(golden < BAND_LOW),
        "peak of f_{5/4}": peak == [sp.sqrt(sp.Rational(3, 5))] and sp.simplify(top.subs(s, peak[0]) - BAND_HIGH) == 0,
        # Right of its peak f_{5/4} falls, so its least value on R is at h.
        "f_{5/4} falls on R": bool(peak[0] < 1),
        "lowest image of R": sp.simplify(top.subs(s, BAND_HIGH) - BAND_LOW) == 0,
        "images stay positive": bool(sp.Rational(9, 5) > BAND_HIGH**2),
        # Below L every step multiplies s by at least 1 + (1 - ℓ²) > 1 and cannot jump past h: L ∪ R is reached.
        "growth below L": bool(1 + (1 - BAND_LOW**2) > 1),
    }


@dataclass(frozen=True)
class Band:
    """Absorbing band of s for draws c in [c_low, c_high]: left side [l_out, l_in] < 1 < right side [r_in, r_out]."""

    l_out: float
    l_in: float
    r_in: float
    r_out: float

    @property
    def loss_low(self) -> float:
        """Smallest ¼(1 - s²)² in the band, in units of y²: the loss never falls below it."""
        return min((1 - self.l_in**2) ** 2, (1 - self.r_in**2) ** 2) / 4

    @property
    def loss_high(self) -> float:
        """Largest ¼(1 - s²)² in the band, in units of y²."""
        return max((1 - self.l_out**2) ** 2, (1 - self.r_out**2) ** 2) / 4


def two_cycle(c: float) -> tuple[float, float]:
    """The two points between which constant c > 1 alternates: s± = ½(√(1 + 3/c) ± √(1 - 1/c))."""
    middle, half = (1 + 3 / c) ** 0.5 / 2, (1 - 1 / c) ** 0.5 / 2
    return middle - half, middle + half


def absorbing_band(c_low: float, c_high: float) -> Band:
    """The band that orbits end in when every draw has c in [c_low, c_high] ⊂ (1, 5/4].

    Outer edges: the images of the peak, r_out = f_{c_high}(peak) and l_out = f_{c_high}(r_out), shrunk to the
    fixed point of s ↦ hull of images. Inner edges: s = 1 repels every draw at least as strongly as c_low does.

    Raises:
        ValueError: c outside (1, 5/4].
    """
    if not 1 < c_low <= c_high <= 1.25:
        raise ValueError(f"c in [{c_low:.4g}, {c_high:.4g}] is outside (1, 5/4]: choose an admissible step size.")

    def f(s: float, c: float) -> float:
        return s * (1 + c * (1 - s * s))

    peak = ((1 + c_high) / (3 * c_high)) ** 0.5
    l_out, l_in, r_in, r_out = float(BAND_LOW), 1.0 - 1e-9, 1.0 + 1e-9, float(BAND_HIGH)
    for _ in range(100_000):
        old = (l_out, l_in, r_in, r_out)
        r_out = f(peak, c_high) if l_out <= peak <= l_in else max(f(l_out, c_high), f(l_in, c_high))
        r_in = min(f(l_out, c_low), f(l_in, c_low))
        l_out, l_in = f(r_out, c_high), f(r_in, c_low)
        if max(abs(new - was) for new, was in zip((l_out, l_in, r_in, r_out), old, strict=True)) < 1e-15:
            break
    return Band(l_out, l_in, r_in, r_out)


def entry_bound(s0: float) -> int:
    """Steps after which an orbit from s0 in (0, 1) is in the band, whatever the draws: it grows by 2 - ℓ² a step."""
    low = float(BAND_LOW)
    if s0 >= low:
        return 0
    return int(-(-torch.log(torch.tensor(low / s0)).item() // torch.log(torch.tensor(2 - low**2)).item()))
