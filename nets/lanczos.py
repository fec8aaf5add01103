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

    From one vector this is Lanczos with full reorthogonalisation and thick restart: AQ = QT + r eᵀ, so all residuals
    are parallel to r and cost nothing. From several columns, eigenvectors of a nearby operator, it is Rayleigh-Ritz on
    them, k products, extended by the worst wanted pair's residual: more is spent only on what has changed. A full
    basis is cut back to the wanted Ritz vectors and half as many again. Memory: ``basis`` vectors of p numbers, twice
    that from several columns.
    Source: Wu, Simon (2000), thick restart; Davidson (1975) without preconditioner.

    Args:
        start: warm start, columns of shape (p, j), e.g. eigenvectors found before; a random vector by default.
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
    first = _start(operator, start, k, seed)
    space = _Space(operator, size, seed, krylov=first.shape[1] == 1)
    for column in first.T:
        space.extend(column)
    while True:
        values, coordinates = space.ritz(which)
        wanted = min(k, space.count)
        norms, direction = space.residuals(values[:wanted], coordinates[:, :wanted])
        small = bool((norms <= tolerance * values.abs().max()).all()) and space.count >= k
        if small or space.products >= budget or space.count == p:
            vectors = space.Q[:, : space.count] @ coordinates[:, :wanted]
            return Eigenpairs(values[:wanted], vectors, norms, space.products, small or space.count == p)
        if space.count == size:
            space.restart(values, coordinates, min(size - 1, k + max(2, k // 2)))
        space.extend(direction, orthogonal=space.krylov)


def _start(operator: Operator, start: Tensor | None, k: int, seed: int) -> Tensor:
    if start is None:
        return torch.randn(operator.p, 1, generator=init_generator(seed), dtype=operator.dtype).to(operator.device)
    start = start.unsqueeze(1) if start.ndim == 1 else start
    if start.ndim != 2 or start.shape[0] != operator.p or not start.shape[1] or not torch.isfinite(start).all():
        raise ValueError(f"a start of shape {tuple(start.shape)} is not usable: give finite columns ({operator.p}, j).")
    return start[:, :k].to(operator.dtype)


class _Space:
    """An orthonormal basis Q and T = QᵀAQ; columns beyond ``count`` are unused.

    A Krylov space has AQ = QT + r eᵀ, e the last unit vector, and keeps r; any other keeps the images AQ.
    """

    def __init__(self, operator: Operator, size: int, seed: int, krylov: bool) -> None:
        self._operator, self.krylov = operator, krylov
        self.Q = torch.empty(size, operator.p, dtype=operator.dtype, device=operator.device).T
        self._image = torch.empty_like(self.Q) if not krylov else self.Q[:, :0]
        self._T = torch.zeros(size, size, dtype=operator.dtype, device=operator.device)
        self._rest = self.Q[:, 0]
        self._generator = init_generator(seed + 1)
        self.count, self.products = 0, 0

    def extend(self, direction: Tensor, orthogonal: bool = False) -> None:
        """One more basis vector along ``direction``, or along a random one where nothing of it is new."""
        j = self.count
        self.Q[:, j] = self._new(direction, orthogonal)
        image = self._operator.product(self.Q[:, j])
        Q = self.Q[:, : j + 1]
        column = Q.T @ image
        if not torch.isfinite(column).all():
            raise ValueError(f"the {self._operator.name} gives NaN: look at the state before the run diverged.")
        self._T[: j + 1, j] = self._T[j, : j + 1] = column
        if self.krylov:
            rest = image - Q @ column
            self._rest = rest - Q @ (Q.T @ rest)
        else:
            self._image[:, j] = image
        self.count, self.products = j + 1, self.products + 1

    def _new(self, direction: Tensor, orthogonal: bool) -> Tensor:
        Q, v, scale = self.Q[:, : self.count], direction, 1.0
        # What is left of a vector after projection counts as new when it is above rounding of what was projected.
        floor = 100 * torch.finfo(v.dtype).eps
        if self.count:
            scale = float(self._T[: self.count, : self.count].abs().amax())
        for attempt in range(20):
            if attempt or not orthogonal:
                for _ in range(2):
                    v = v - Q @ (Q.T @ v)
            size = float(v.norm())
            if size > floor * scale:
                return v / size
            v = torch.randn(len(v), generator=self._generator, dtype=v.dtype).to(v.device)
            scale = float(v.norm())
        raise ValueError(f"no direction is left outside a basis of {self.count} vectors: ask for fewer eigenpairs.")

    def ritz(self, which: Which) -> tuple[Tensor, Tensor]:
        """Ritz values and coordinates, most wanted first."""
        values, coordinates = torch.linalg.eigh(self._T[: self.count, : self.count])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort()
        return values[order], coordinates[:, order]

    def residuals(self, values: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """‖Av - λv‖ of the given Ritz pairs, and the direction in which to go on."""
        j = self.count
        if self.krylov:
            rounding = torch.finfo(values.dtype).eps * self._T[:j, :j].abs().amax()
            return (self._rest.norm() * coordinates[-1].abs()).clamp_min(rounding), self._rest
        residual = self._image[:, :j] @ coordinates - self.Q[:, :j] @ (coordinates * values)
        norms = residual.norm(dim=0)
        return norms, residual[:, int(norms.argmax())]

    def restart(self, values: Tensor, coordinates: Tensor, kept: int) -> None:
        """Keep only the most wanted Ritz vectors; their images, and r, follow without products."""
        j, coordinates = self.count, coordinates[:, :kept]
        for whole in [self.Q] if self.krylov else [self.Q, self._image]:
            whole[:, :kept] = whole[:, :j] @ coordinates
        self._T[:kept, :kept] = torch.diag(values[:kept])
        self.count = kept
