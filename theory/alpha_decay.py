"""The α-decay laws of the diagonal network: how fast label noise shrinks α = u² - v², coordinate by coordinate.

Curves are sampled at T recorded steps; ``weights`` (T,) says how many SGD steps each record stands for, ``eta`` and
``level`` have shape (T, ...) with matching trailing axes, and results have shape (..., d).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from theory.minibatch import Minibatch
from theory.prediction import AVPF, PPF, Reference
from theory.problem import Regression

SDE_LAW = Reference(PPF, 2021, "Itô's lemma on ln α; level δ as in " + AVPF + " (2023)")
FINITE_STEP_LAW = Reference("valleydrift", 2026, "finite-step law E[-ln|1 - sZ²|], README")


def exact_change(gradient_steps: Tensor) -> Tensor:
    """Exact discrete law: ln|α(k)| - ln|α(0)| = Σ_k ln|1 - g_k²|.

    Args:
        gradient_steps: g_k = (η_k/B) Σ_{i in batch} r_i x_i at the visited states, shape (K, ..., d).
    """
    return torch.log((1 - gradient_steps.square()).abs()).sum(0)


def sde_change(problem: Regression, power: Tensor, batch: Minibatch) -> Tensor:
    """SDE law with per-sample variances: Δ ln α_j = -κ (1/n) Σ_i P_i x_ij² with P_i = Σ_k η_k² r_ki², shape (..., d).

    Args:
        power: P, shape (..., n), r at the states visited by the run.
    """
    return -batch.variance_factor(problem.n) / problem.n * power @ problem.X.square()


def sde_change_next_order(problem: Regression, power: Tensor, power4: Tensor) -> Tensor:
    """What :func:`sde_change` gives up for B = 1, as a fraction of it, shape (...): -ln|1-g²| = g² + g⁴/2 + …

    ½ Σ_ij P4_i x_ij⁴ / Σ_ij P_i x_ij² with P4_i = Σ_k η_k⁴ r_ki⁴, shape (..., n).
    """
    return (power4 @ problem.X.pow(4)).sum(-1) / (2 * (power @ problem.X.square()).sum(-1))


def sde_change_at_level(problem: Regression, eta: Tensor, level: Tensor, weights: Tensor, batch: Minibatch) -> Tensor:
    """Homogeneous SDE law: Δ ln α_j = -2 κ m_j Σ_k η_k² δ_k with m_j = (1/n) Σ_i x_ij², shape (..., d).

    Source: Pesme et al. (2021), at the level δ of Andriushchenko et al. (2023).
    """
    clock = torch.einsum("t,t...->...", weights.to(eta), eta.square() * level)
    return -2 * batch.variance_factor(problem.n) * clock.unsqueeze(-1) * problem.mean_square


def next_order_fraction(problem: Regression, eta: Tensor, level: Tensor, weights: Tensor, batch: Minibatch) -> Tensor:
    """What the SDE law gives up, as a fraction of it, shape (...): -ln|1-g²| = g² + g⁴/2 + …

    For Gaussian residuals at level δ the second term over the first is 3η²δκx²; here averaged over the run, the
    samples and the coordinates: 3κ Σ η⁴δ² mean(x⁴) / (Σ η²δ mean(x²)).
    """
    first = torch.einsum("t,t...->...", weights.to(eta), eta.square() * level) * problem.X.square().mean()
    second = torch.einsum("t,t...->...", weights.to(eta), (eta.square() * level).square()) * problem.X.pow(4).mean()
    return 3 * batch.variance_factor(problem.n) * second / first


def finite_step_change(problem: Regression, eta: Tensor, level: Tensor, weights: Tensor, batch: Minibatch) -> Tensor:
    """Finite-step law: ln α_j falls per step by (1/n) Σ_i F(2η²δκ x_ij²), F = :func:`log_decrement`, shape (..., d).

    Residuals are taken as N(0, 2δ). For B > 1 the batch mean of x_ij² is replaced by m_j.
    """
    n = problem.n
    squares = problem.X.square() if batch.size == 1 else problem.mean_square.unsqueeze(0)
    q = eta.square() * level * batch.variance_factor(n)
    lost = ~torch.isfinite(q).all(0)
    q = q.nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-14)
    # F(q·2x²)/q is smooth in ln q: sum the records onto nodes first, so that the (n, d) average is done once a node.
    nodes = torch.linspace(-33.0, 12.0, 901, dtype=torch.float64, device=q.device)
    place = ((q.log() - nodes[0]) / (nodes[1] - nodes[0])).clamp(0, len(nodes) - 1.001)
    left = place.long()
    part = place - left
    mass = (weights.to(q).view(-1, *[1] * (q.ndim - 1)) * q).flatten(1)
    onto = torch.zeros(len(nodes), mass.shape[1], dtype=q.dtype, device=q.device)
    onto.scatter_add_(0, left.flatten(1), mass * (1 - part.flatten(1)))
    onto.scatter_add_(0, left.flatten(1) + 1, mass * part.flatten(1))
    used = torch.nonzero(onto.sum(1)).squeeze(1)
    per_node = [log_decrement(2 * nodes[k].exp() * squares).mean(0) / nodes[k].exp() for k in used]
    total = (onto[used].T @ torch.stack(per_node)).reshape(*q.shape[1:], problem.d)
    return torch.where(lost.unsqueeze(-1), torch.nan, -total)


def log_decrement(s: Tensor, log_s: Tensor | None = None) -> Tensor:
    """F(s) = E[-ln|1 - sZ²|] for Z ~ N(0, 1), s ≥ 0; F(s) = s + 3s²/2 + 5s³ + … for small s.

    Closed form: F(s) = -ln s + γ + ln 2 - 4 ∫₀^{1/√(2s)} D(x) dx with Dawson's function D (the Hilbert transform of
    the Gaussian). F(s)/s, which is smooth from 1 at s = 0 on, is interpolated by cubics in ln s (error below 1e-10).

    Args:
        log_s: ln s where it is at hand.
    """
    low, high, step, cubics = _table()
    log_s = s.clamp(min=np.exp(low)).log() if log_s is None else log_s
    if s.device.type == "cpu" and s.dtype == log_s.dtype == torch.float64 and s.shape == log_s.shape:
        out = torch.empty_like(s, memory_format=torch.contiguous_format)
        flat = (part.detach().contiguous().view(-1).numpy() for part in (s, log_s, out))
        _look_up(*flat, low, high, step, cubics)
        return out
    log_s = log_s.clamp(min=low)
    place = ((log_s - low) / step).nan_to_num_(0.0).clamp_(0, len(cubics) - 1)
    left = place.long()
    p, rows = place.sub_(left), torch.as_tensor(cubics, dtype=s.dtype, device=s.device)
    c = rows.index_select(0, left.flatten()).view(*s.shape, 4)
    ratio = torch.addcmul(c[..., 2], p, c[..., 3])
    for power in (1, 0):
        ratio = torch.addcmul(c[..., power], p, ratio)
    # Beyond the table F only falls with -ln s.
    return ratio.mul_(s.clamp(max=np.exp(high))).sub_((log_s - high).clamp_(min=0))


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _look_up(s, log_s, out, low, high, step, cubics):  # type: ignore[no-untyped-def]
    """F(s) number by number."""
    last, largest = len(cubics) - 1, np.exp(high)
    for i in range(len(s)):
        if np.isnan(s[i]) or np.isnan(log_s[i]):
            out[i] = np.nan
            continue
        at = max(log_s[i], low)
        place = min((at - low) / step, float(last))
        left = int(place)
        p = place - left
        ratio = cubics[left, 0] + p * (cubics[left, 1] + p * (cubics[left, 2] + p * cubics[left, 3]))
        out[i] = ratio * min(s[i], largest) - max(at - high, 0.0)


@lru_cache(maxsize=1)
def _table() -> tuple[float, float, float, np.ndarray]:
    """Ends and spacing of an even grid of ln s, and the cubic from each node that meets F/s and its slope, (nodes, 4).

    The Dawson integral is summed by Gauss-Legendre quadrature cell by cell; at small s, where it cancels, F's series.
    """
    from scipy.special import dawsn

    log_s = np.linspace(np.log(1e-11), np.log(1e12), 16385)
    step, s = log_s[1] - log_s[0], np.exp(log_s)
    ends = np.sqrt(0.5 / s)
    edges = np.concatenate([[0.0], ends[::-1]])
    points, mass = np.polynomial.legendre.leggauss(12)
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    cells = (dawsn(middle[:, None] + half[:, None] * points) @ mass) * half
    values = (-log_s + np.euler_gamma + np.log(2.0) - 4 * np.cumsum(cells)[::-1]) / s
    slopes = (-1 + 2 * ends * dawsn(ends)) / s - values
    small = s < 1e-4
    values = np.where(small, 1 + s * (1.5 + s * (5 + s * 26.25)), values)
    slopes = step * np.where(small, s * (1.5 + s * (10 + s * 78.75)), slopes)
    rise, (m0, m1) = np.diff(values), (slopes[:-1], slopes[1:])
    cubics = np.stack([values[:-1], m0, 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise], 1)
    return float(log_s[0]), float(log_s[-2]), float(step), cubics
