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

    Rayleigh-Ritz on a growing orthonormal basis Q, extended by the worst wanted pair's residual. From one random
    vector all residuals are parallel and this is Lanczos with full reorthogonalisation; from eigenvectors of a nearby
    operator it starts with k products and spends more only on what has changed. When the basis is full it is cut back
    to the wanted Ritz vectors and half as many again (thick restart). Memory: 2 · basis vectors of p numbers.

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
    space = _Space(operator, size, seed)
    for column in _start(operator, start, k, seed).T:
        space.extend(column)
    while True:
        values, coordinates = space.ritz(which)
        wanted = min(k, space.count)
        residual = space.residuals(values[:wanted], coordinates[:, :wanted])
        norms = residual.norm(dim=0)
        scale = float(values.abs().max())
        small = bool((norms <= tolerance * scale).all()) and space.count >= k
        if small or space.products >= budget or space.count == p:
            vectors = space.Q[:, : space.count] @ coordinates[:, :wanted]
            return Eigenpairs(values[:wanted], vectors, norms, space.products, small or space.count == p)
        direction = residual[:, int(norms.argmax())]
        if space.count == size:
            space.restart(coordinates[:, : min(size - 1, k + max(2, k // 2))])
        space.extend(direction)


def _start(operator: Operator, start: Tensor | None, k: int, seed: int) -> Tensor:
    if start is None:
        return torch.randn(operator.p, 1, generator=init_generator(seed), dtype=operator.dtype).to(operator.device)
    start = start.unsqueeze(1) if start.ndim == 1 else start
    if start.ndim != 2 or start.shape[0] != operator.p or not start.shape[1] or not torch.isfinite(start).all():
        raise ValueError(f"a start of shape {tuple(start.shape)} is not usable: give finite columns ({operator.p}, j).")
    return start[:, :k].to(operator.dtype)


class _Space:
    """An orthonormal basis Q, its image AQ, and T = QᵀAQ; columns beyond ``count`` are unused."""

    def __init__(self, operator: Operator, size: int, seed: int) -> None:
        self._operator = operator
        self.Q = torch.empty(size, operator.p, dtype=operator.dtype, device=operator.device).T
        self._image = torch.empty_like(self.Q)
        self._T = torch.zeros(size, size, dtype=operator.dtype, device=operator.device)
        self._generator = init_generator(seed + 1)
        self.count, self.products = 0, 0

    def extend(self, direction: Tensor) -> None:
        """One more basis vector along ``direction``, or along a random one where nothing of it is new."""
        j = self.count
        Q = self.Q[:, :j]
        v, size = direction, float(direction.norm())
        for _ in range(20):
            for _ in range(2):
                v = v - Q @ (Q.T @ v)
            norm = float(v.norm())
            if norm > 100 * torch.finfo(v.dtype).eps * size:
                break
            v = torch.randn(len(v), generator=self._generator, dtype=v.dtype).to(v.device)
            size = float(v.norm())
        v = v / norm
        v = v - Q @ (Q.T @ v)
        self.Q[:, j] = v / v.norm()
        image = self._operator.product(self.Q[:, j])
        if not torch.isfinite(image).all():
            raise ValueError(f"the {self._operator.name} gives NaN: look at the state before the run diverged.")
        self._image[:, j] = image
        self._T[: j + 1, j] = self._T[j, : j + 1] = self.Q[:, : j + 1].T @ image
        self.count, self.products = j + 1, self.products + 1

    def ritz(self, which: Which) -> tuple[Tensor, Tensor]:
        """Ritz values and coordinates, most wanted first."""
        values, coordinates = torch.linalg.eigh(self._T[: self.count, : self.count])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort()
        return values[order], coordinates[:, order]

    def residuals(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """A v - λ v of the given Ritz pairs, shape (p, pairs)."""
        j = self.count
        return self._image[:, :j] @ coordinates - self.Q[:, :j] @ (coordinates * values)

    def restart(self, coordinates: Tensor) -> None:
        """Keep only these Ritz vectors; their images follow without products."""
        j, kept = self.count, coordinates.shape[1]
        Q, image = self.Q[:, :j] @ coordinates, self._image[:, :j] @ coordinates
        self.Q[:, :kept], self._image[:, :kept] = Q, image
        self._T[:kept, :kept] = Q.T @ image
        self.count = kept
