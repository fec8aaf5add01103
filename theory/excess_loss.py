"""The loss that SGD keeps above the valley floor, ½ η tr[C(2I - ηH)^{-1}], for any network and without any matrix.

H is known by its products; the noise covariance C by vectors v with E vvᵀ = C: all centred per-sample gradients (then
the trace is exact), or a few random combinations of them, one backward pass each (then it is Hutchinson's estimate).
(2I - ηH)^{-1} v is found by conjugate gradients. Heavy ball: ½ η/(1-μ) tr[C(2I - η/(1+μ) H)^{-1}].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theory.bouncing import LinearSGD

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TopDirections:
    """Directions treated exactly, the sharpest ones: eigenvalues (K,), orthonormal eigenvectors (p, K), C_kk (K,)."""

    curvature: Tensor
    vectors: Tensor
    noise: Tensor


@dataclass(frozen=True)
class ExcessLoss:
    """The predicted excess and how well the trace is known.

    Attributes:
        value: top + rest.
        top: the part of the directions given.
        rest: that of their complement.
        standard_error: of ``rest``, from the spread over random vectors; means nothing for exhaustive ones.
        products: Hessian-vector products spent.
        residual: largest relative residual of the linear solves.
    """

    value: float
    top: float
    rest: float
    standard_error: float
    products: int
    residual: float


def excess_loss(
    law: LinearSGD,
    product: Product,
    noise: Tensor,
    *,
    top: TopDirections | None = None,
    total_noise: float | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 500,
) -> ExcessLoss:
    """½ η/(1-μ) tr[C(2I - sH)^{-1}], s = η/(1+μ), of SGD whose minibatch gradients have covariance C.

    The mean of vᵀ(2I - sH)^{-1}v over the columns v. Directions in ``top`` are projected out of it and added exactly.
    Given tr C, only the part ½ s vᵀH(2I - sH)^{-1}v that differs from ½‖v‖² is estimated.

    Args:
        product: V ↦ HV for V of shape (p, m).
        noise: columns v with mean over columns (or expectation) of vvᵀ equal to C, shape (p, m).
        top: the sharpest directions; each given one takes its term out of the estimate's variance.
        total_noise: tr C.
        tolerance: of ‖v - (2I - sH)x‖/‖v‖; the error of the trace is about its square.

    Raises:
        ValueError: shapes that do not fit, NaN, or a direction with ηλ ≥ 2(1+μ): then there is no stationary level.
    """
    if noise.ndim != 2 or not noise.shape[1] or not torch.isfinite(noise).all():
        raise ValueError(f"noise of shape {tuple(noise.shape)} is not usable: give finite columns of shape (p, m).")
    scale, mu = law.step_size / (1 + law.momentum), law.momentum
    factor = law.step_size / (2 * (1 - mu))
    first, known = 0.0, 0.0
    if top is not None:
        if top.vectors.shape != (noise.shape[0], len(top.curvature)) or top.noise.shape != top.curvature.shape:
            raise ValueError(
                f"top directions of shapes {tuple(top.curvature.shape)}, {tuple(top.vectors.shape)} and "
                f"{tuple(top.noise.shape)} do not fit {noise.shape[0]} parameters: give (K,), (p, K) and (K,)."
            )
        if not bool((scale * top.curvature < 2).all()):
            raise ValueError(_unstable(float(scale * top.curvature.max()), mu))
        noise = noise - top.vectors @ (top.vectors.T @ noise)
        first, known = float(law.excess_loss(top.curvature, top.noise)), float(top.noise.sum())
    solved, iterations, residual = _solve(product, noise, scale, mu, top, tolerance, max_iterations)
    forms = factor * (noise * solved).sum(0)
    if total_noise is not None:
        forms = forms - factor / 2 * noise.square().sum(0) + factor / 2 * (total_noise - known)
    rest, spread = float(forms.mean()), float(forms.std()) if len(forms) > 1 else float("inf")
    error = spread / len(forms) ** 0.5
    return ExcessLoss(first + rest, first, rest, error, iterations * noise.shape[1], residual)


def noise_probes(
    weighted_gradient: Callable[[Tensor], Tensor], n: int, count: int, generator: np.random.Generator, like: Tensor
) -> Tensor:
    """Random vectors v = n^{-1/2} Σ_i (ε_i - mean ε) ∇ℓ_i, shape (p, count): E vvᵀ is one sample's covariance.

    Args:
        weighted_gradient: w of shape (n,) ↦ Σ_i w_i ∇ℓ_i of shape (p,), one backward pass.
        generator: of the signs ε.
        like: a tensor of the wanted dtype and device.
    """
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], (count, n))).to(like)
    weights = (signs - signs.mean(1, keepdim=True)) / n**0.5
    return torch.stack([weighted_gradient(row) for row in weights], 1)


def _unstable(slip: float, momentum: float) -> str:
    return (
        f"a direction has η λ/(1+μ) = {slip:.4g}, and beyond 2 there is no stationary level: choose a smaller step"
        + (" or less momentum." if momentum else ".")
    )


def _solve(
    product: Product, b: Tensor, scale: float, mu: float, top: TopDirections | None, tolerance: float, limit: int
) -> tuple[Tensor, int, float]:
    """(2I - sH) x = b column by column with conjugate gradients, kept in the complement of ``top``."""

    def apply(v: Tensor) -> Tensor:
        image = 2 * v - scale * product(v)
        return image if top is None else image - top.vectors @ (top.vectors.T @ image)

    size = b.norm(dim=0).clamp(min=torch.finfo(b.dtype).tiny)
    x, r, iterations = b / 2, b - apply(b / 2), 1  # 2I is the operator but for few directions
    p, power = r, r.square().sum(0)
    while float((power.sqrt() / size).max()) > tolerance:
        if iterations > limit:
            raise ValueError(
                f"conjugate gradients stand at {float((power.sqrt() / size).max()):.1e} after {limit} iterations: a "
                "direction is close to instability, give more top directions or a larger tolerance."
            )
        image = apply(p)
        curvature = (p * image).sum(0)
        active = power > 0
        if not torch.isfinite(image).all():
            raise ValueError("the Hessian products are not finite: look at the state before the run diverged.")
        if bool((curvature[active] <= 0).any()):
            worst = (curvature / p.square().sum(0))[active].min()
            raise ValueError(_unstable(2 - float(worst), mu))
        step = torch.where(active, power / curvature, 0.0)
        x, r = x + step * p, r - step * image
        fresh = r.square().sum(0)
        p = r + torch.where(active, fresh / power, 0.0) * p
        power, iterations = fresh, iterations + 1
    return x, iterations, float((power.sqrt() / size).max())
