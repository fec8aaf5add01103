"""Extreme eigenpairs of an operator by Lanczos with full reorthogonalisation, thick restart and warm start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nets.curvature import Operator
from nets.mlp import init_generator

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """K eigenpairs, in the order of ``which``.

    Attributes:
        values: shape (K,).
        vectors: orthonormal columns, shape (p, K).
        residuals: ‖A v_k - λ_k v_k‖, shape (K,); λ_k is within that distance of an eigenvalue.
        products: how many products with the operator it took.
        converged: whether all residuals are below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


@torch.no_grad()
def eigenpairs(
    operator: Operator,
    k: int,
    which: Which = "largest",
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    basis: int | None = None,
    max_products: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The ``k`` largest, smallest or largest-in-magnitude eigenpairs, until ‖A v - λv‖ ≤ tolerance · max|λ|.

    Lanczos with full reorthogonalisation, AQ = QT + r eᵀ: all residuals are parallel to r and cost nothing. A full
    basis is cut back to the wanted Ritz vectors and half as many again (thick restart). Memory: ``basis`` vectors of p
    numbers. A warm start begins from the sum of the vectors given: where the operator is the same that takes k
    products, where it has moved it saves what a random vector needs to find the outliers. (Rayleigh-Ritz on the
    vectors themselves and the worst residual's direction takes more products than a cold start at tight tolerances.)
    Source: Wu, Simon (2000).

    Args:
        start: columns of shape (p, j), e.g. eigenvectors found before; a random vector by default.
        basis: size at which the basis is restarted, max(2k + 20, 40) by default.
        max_products: stop there, converged or not; 20 · basis by default.
        seed: of the random start.

    Raises:
        ValueError: an operator that gives NaN, k outside [1, p], a start that does not fit.
    """
    p = operator.p
    if not 1 <= k <= p:
        raise ValueError(f"{k} eigenpairs of a {p} x {p} operator were asked for: choose between 1 and {p}.")
    size = min(p, max(2 * k + 20, 40) if basis is None else basis)
    if size < min(p, k + 2):
        raise ValueError(f"a basis of {size} vectors is too small for {k} eigenpairs: give at least {min(p, k + 2)}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} is not usable: choose a positive number.")
    budget = 20 * size if max_products is None else max_products
    space = _Space(operator, size, seed)
    space.extend(_start(operator, start, seed))
    while True:
        values, coordinates = space.ritz(which)
        wanted = min(k, space.count)
        norms = space.residuals(coordinates[:, :wanted])
        small = bool((norms <= tolerance * values.abs().max()).all()) and space.count >= k
        if small or space.products >= budget or space.count == p:
            vectors = space.Q[:, : space.count] @ coordinates[:, :wanted]
            return Eigenpairs(values[:wanted], vectors, norms, space.products, small or space.count == p)
        if space.count == size:
            space.restart(values, coordinates, min(size - 1, k + max(2, k // 2)))
        space.extend(space.rest)


def _start(operator: Operator, start: Tensor | None, seed: int) -> Tensor:
    if start is None:
        return torch.randn(operator.p, generator=init_generator(seed), dtype=operator.dtype).to(operator.device)
    if start.ndim not in (1, 2) or start.shape[0] != operator.p or not start.numel() or not torch.isfinite(start).all():
        raise ValueError(f"a start of shape {tuple(start.shape)} is not usable: give finite columns ({operator.p}, j).")
    return start.reshape(operator.p, -1).sum(1).to(operator.dtype)


class _Space:
    """An orthonormal basis Q, T = QᵀAQ, and ``rest``, the r of AQ = QT + r eᵀ; columns beyond ``count`` are unused."""

    def __init__(self, operator: Operator, size: int, seed: int) -> None:
        self._operator = operator
        self.Q = torch.empty(size, operator.p, dtype=operator.dtype, device=operator.device).T
        self._T = torch.zeros(size, size, dtype=operator.dtype, device=operator.device)
        self.rest = self.Q[:, 0]
        self._generator = init_generator(seed + 1)
        self.count, self.products = 0, 0

    def extend(self, direction: Tensor) -> None:
        """One more basis vector along ``direction``, or along a random one where that is only rounding."""
        j = self.count
        self.Q[:, j] = self._new(direction)
        image = self._operator.product(self.Q[:, j])
        Q = self.Q[:, : j + 1]
        column = Q.T @ image
        if not torch.isfinite(column).all():
            raise ValueError(f"the {self._operator.name} gives NaN: look at the state before the run diverged.")
        self._T[: j + 1, j] = self._T[j, : j + 1] = column
        rest = image - Q @ column
        self.rest = rest - Q @ (Q.T @ rest)
        self.count, self.products = j + 1, self.products + 1

    def _new(self, v: Tensor) -> Tensor:
        """v, already orthogonal to the basis, at unit length."""
        Q, size = self.Q[:, : self.count], float(v.norm())
        rounding = 10 * torch.finfo(v.dtype).eps
        if size > (rounding * float(self._scale()) if self.count else 0):
            return v / size
        v = torch.randn(len(v), generator=self._generator, dtype=v.dtype).to(v.device)
        for _ in range(3):
            v = v - Q @ (Q.T @ v)
            v = v / v.norm()
        return v

    def _scale(self) -> Tensor:
        return self._T[: self.count, : self.count].abs().amax()

    def ritz(self, which: Which) -> tuple[Tensor, Tensor]:
        """Ritz values and coordinates, most wanted first."""
        values, coordinates = torch.linalg.eigh(self._T[: self.count, : self.count])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort()
        return values[order], coordinates[:, order]

    def residuals(self, coordinates: Tensor) -> Tensor:
        """‖Av - λv‖ of Ritz vectors, from r alone; never below rounding."""
        rounding = torch.finfo(coordinates.dtype).eps * self._scale()
        return (self.rest.norm() * coordinates[-1].abs()).clamp_min(rounding)

    def restart(self, values: Tensor, coordinates: Tensor, kept: int) -> None:
        """Keep only the most wanted Ritz vectors; A of them follows without products."""
        self.Q[:, :kept] = self.Q[:, : self.count] @ coordinates[:, :kept]
        self._T[:kept, :kept] = torch.diag(values[:kept])
        self.count = kept
