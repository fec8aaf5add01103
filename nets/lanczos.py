"""Extreme eigenpairs of an operator by Lanczos with full reorthogonalisation, thick restart and warm start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nets.curvature import Operator
from nets.mlp import init_generator

Which = Literal["largest", "smallest", "magnitude"]
PARALLEL = 2.0
"""Residuals of one Lanczos run are parallel: in the sum they may exceed their root mean square by as much."""


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
    guard: int = 1,
) -> Eigenpairs:
    """The ``k`` largest, smallest or largest-in-magnitude eigenpairs, until ‖A v - λv‖ ≤ tolerance · max|λ|.

    Lanczos with full reorthogonalisation, AQ = QT + r eᵀ: all residuals are parallel to r and cost nothing. A full
    basis is cut back to the wanted Ritz vectors and half as many again (thick restart). Memory: ``basis`` vectors of p
    numbers.

    A warm start begins from the sum of the vectors given. Its one product also tells how far they are from eigenvectors
    now: where that is within the tolerance, their span is tried first (Rayleigh-Ritz), which takes k products where the
    operator is the same, and grows by the worst residual until all are small. Elsewhere Lanczos goes on from the sum,
    which spares what a random vector needs to find the outliers: growing the span by residuals, one at a time or all at
    once, took no fewer products there. Pairs are then followed, not searched for: an eigenvalue that has overtaken the
    k-th since may be missed while the vectors given still are eigenvectors.

    Nor do small residuals from a random start exclude an eigenvalue in between of which it has next to nothing: the
    pairs after it are found first. Without a start, ``guard`` pairs beyond the k-th have to be as good, which gives it
    time.
    Source: Wu, Simon (2000).

    Args:
        start: columns of shape (p, j), e.g. eigenvectors found before; a random vector by default. Their span is tried
            where they are k or more.
        basis: size at which the basis is restarted, max(2k + 20, 40) by default.
        max_products: stop there, converged or not; 20 · basis by default.
        seed: of the random start.
        guard: pairs beyond the k-th that have to be found when there is no start; 0 spares some products.

    Raises:
        ValueError: an operator that gives NaN, k outside [1, p], a start that does not fit, a negative guard.
    """
    p = operator.p
    if guard < 0:
        raise ValueError(f"a guard of {guard} pairs is not usable: choose 0 or more.")
    if not 1 <= k <= p:
        raise ValueError(f"{k} eigenpairs of a {p} x {p} operator were asked for: choose between 1 and {p}.")
    size = min(p, max(2 * k + 20, 40) if basis is None else basis)
    if size < min(p, k + 2):
        raise ValueError(f"a basis of {size} vectors is too small for {k} eigenpairs: give at least {min(p, k + 2)}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance {tolerance} is not usable: choose a positive number.")
    budget = 20 * size if max_products is None else max_products
    space = _Space(operator, size, seed)
    given = None if start is None else _columns(operator, start)
    if given is None:
        space.extend(torch.randn(p, generator=init_generator(seed), dtype=operator.dtype).to(operator.device))
    else:
        space.extend(given.sum(1))
        off = space.rest - given @ (given.T @ space.rest)
        if max(k, 2) <= given.shape[1] < p and off.norm() <= PARALLEL * tolerance * space.image_size():
            return _followed(operator, given, space, k, which, tolerance, budget)
    sought = k if given is not None else min(k + guard, p if size == p else size - 2)
    while True:
        if space.count < min(sought, size) and space.products < budget:
            space.extend(space.rest)
            continue
        values, coordinates = space.ritz(which)
        wanted = min(k, space.count)
        norms = space.residuals(coordinates[:, : min(sought, space.count)])
        small = (norms <= tolerance * values.abs().max()).tolist()
        found = all(small) and space.count >= sought
        if found or space.products >= budget or space.count == p:
            vectors = space.Q[:, : space.count] @ coordinates[:, :wanted]
            converged = (all(small[:wanted]) and wanted == k) or space.count == p
            return Eigenpairs(values[:wanted], vectors, norms[:wanted], space.products, converged)
        if space.count == size:
            space.restart(values, coordinates, min(size - 1, sought + max(2, sought // 2)))
        space.extend(space.rest)


def _columns(operator: Operator, start: Tensor) -> Tensor:
    """An orthonormal basis of what was given, shape (p, j); orthonormal columns stay as they are."""
    if start.ndim not in (1, 2) or start.shape[0] != operator.p or not start.numel() or not torch.isfinite(start).all():
        raise ValueError(f"a start of shape {tuple(start.shape)} is not usable: give finite columns ({operator.p}, j).")
    Q, R = torch.linalg.qr(start.reshape(operator.p, -1).to(operator.dtype))
    return torch.where(R.diagonal() < 0, -Q, Q)


def _followed(
    operator: Operator, given: Tensor, space: _Space, k: int, which: Which, tolerance: float, budget: int
) -> Eigenpairs:
    """Rayleigh-Ritz on the span of ``given``, whose normalised sum ``space`` has multiplied already."""
    products = given.shape[1]
    turn = torch.eye(products, dtype=given.dtype, device=given.device)
    turn[:, 0] = 1.0
    Q = given @ torch.linalg.qr(turn).Q
    Q[:, 0] = space.Q[:, 0]  # up to its sign it was that already
    A, limit = torch.cat([space.image(), operator @ Q[:, 1:]], 1), products + space.Q.shape[1]
    while True:
        T = Q.T @ A
        if not torch.isfinite(T).all():
            raise ValueError(f"the {operator.name} gives NaN: look at the state before the run diverged.")
        values, coordinates = _ordered((T + T.T) / 2, which)
        vectors, images = Q @ coordinates[:, :k], A @ coordinates[:, :k]
        rest = images - vectors * values[:k]
        norms, scale = rest.norm(dim=0), values.abs().max()
        rounding = torch.finfo(T.dtype).eps * scale
        small = bool((norms <= tolerance * scale).all()) or Q.shape[1] == operator.p
        if small or products >= budget or bool(norms.max() <= rounding):
            return Eigenpairs(values[:k], vectors, norms.clamp_min(rounding), products, small)
        if Q.shape[1] >= limit:
            Q, A = vectors, images
        worst = rest[:, norms.argmax()]
        for _ in range(2):
            worst = worst - Q @ (Q.T @ worst)
        worst = (worst / worst.norm()).unsqueeze(1)
        Q, A, products = torch.cat([Q, worst], 1), torch.cat([A, operator @ worst], 1), products + 1


def _ordered(T: Tensor, which: Which) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a small matrix, most wanted first."""
    values, coordinates = torch.linalg.eigh(T)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    order = key.argsort()
    return values[order], coordinates[:, order]


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
        return _ordered(self._T[: self.count, : self.count], which)

    def image(self) -> Tensor:
        """A of the only basis vector so far, shape (p, 1)."""
        return self.Q[:, :1] * self._T[0, 0] + self.rest.unsqueeze(1)

    def image_size(self) -> Tensor:
        """Its norm."""
        return torch.hypot(self._T[0, 0], self.rest.norm())

    def residuals(self, coordinates: Tensor) -> Tensor:
        """‖Av - λv‖ of Ritz vectors, from r alone; never below rounding."""
        rounding = torch.finfo(coordinates.dtype).eps * self._scale()
        return (self.rest.norm() * coordinates[-1].abs()).clamp_min(rounding)

    def restart(self, values: Tensor, coordinates: Tensor, kept: int) -> None:
        """Keep only the most wanted Ritz vectors; A of them follows without products."""
        self.Q[:, :kept] = self.Q[:, : self.count] @ coordinates[:, :kept]
        self._T[:kept, :kept] = torch.diag(values[:kept])
        self.count = kept
