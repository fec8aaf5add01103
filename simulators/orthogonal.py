"""SGD's SDE orthogonal to given directions: dθ = P⊥(f dt + G dW), P⊥ = I - E Eᵀ, for any module.

E holds the bouncing directions, where ηλ > 1 and the SDE is known to fail. What is left moves along the valley floor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simulators.network_sde import NetworkSDE

Directions = Tensor | Callable[[float], Tensor]


def complement(v: Tensor, directions: Tensor) -> Tensor:
    """P⊥ v = v - E Eᵀ v for rows v (paths, p) and orthonormal columns E, (p, K) or each path's (paths, p, K)."""
    if directions.ndim == 2:
        return v - (v @ directions) @ directions.T
    return v - (directions @ (v.unsqueeze(1) @ directions).mT).squeeze(-1)


class OrthogonalSDE:
    """Another SDE's drift and noise, projected on the complement of E; for :func:`simulators.network_sde.run_sde`.

    Args:
        sde: an SDE of a network, e.g. :class:`simulators.network_sde.ExactCovarianceSDE`.
        directions: E, orthonormal columns of shape (p, K), K = 0 included; or (paths, p, K), each path's own, columns
            of zeros where a path has fewer; or a function of SDE time that returns either, for directions that are
            found anew along the run.
        follow_floor: leave the drift unprojected and only the noise projected: coordinates along E then relax to the
            floor and follow it when it moves, where the projected drift keeps them where they were.

    Raises:
        ValueError: directions that are not orthonormal columns.
    """

    noise_type = "general"
    sde_type = "ito"

    def __init__(self, sde: NetworkSDE, directions: Directions, follow_floor: bool = False) -> None:
        self.channels, self._sde, self._follow = sde.channels, sde, follow_floor
        self._fixed = None if callable(directions) else check_orthonormal(directions)
        self._moving = directions if callable(directions) else None

    def _directions(self, t: float) -> Tensor:
        if self._moving is not None:
            return check_orthonormal(self._moving(t))
        assert self._fixed is not None
        return self._fixed

    def f(self, t: float, y: Tensor) -> Tensor:
        """The projected drift, shape (paths, p)."""
        drift = self._sde.increment(t, y, 1.0, y.new_zeros(len(y), self.channels))
        return drift if self._follow else complement(drift, self._directions(t))

    def g_prod(self, t: float, y: Tensor, v: Tensor) -> Tensor:
        """P⊥ G v, shape (paths, p)."""
        return complement(self._sde.increment(t, y, 0.0, v), self._directions(t))

    def f_and_g_prod(self, t: float, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.f(t, y), self.g_prod(t, y, v)

    def increment(self, t: float, y: Tensor, h: float, v: Tensor) -> Tensor:
        """P⊥(f h + G v) in one backward pass; f h + P⊥ G v, in two, when the floor is followed."""
        if self._follow:
            return h * self.f(t, y) + self.g_prod(t, y, v)
        return complement(self._sde.increment(t, y, h, v), self._directions(t))


def check_orthonormal(directions: Tensor) -> Tensor:
    """The directions, if they are orthonormal columns (or zero, where each path has its own).

    Raises:
        ValueError: they are not.
    """
    if directions.ndim not in (2, 3) or directions.shape[-1] > directions.shape[-2]:
        raise ValueError(
            f"directions of shape {tuple(directions.shape)} are not columns: give (p, K) or (paths, p, K), K <= p."
        )
    gram = directions.mT @ directions
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    wanted = (lengths > 0).to(gram) if directions.ndim == 3 else torch.ones_like(lengths)
    off = float((gram - torch.diag_embed(wanted)).abs().max()) if gram.numel() else 0.0
    if not off <= 1e3 * torch.finfo(directions.dtype).eps ** 0.75:
        raise ValueError(f"the directions are off orthonormal by {off:.2g}: orthonormalise them, e.g. torch.linalg.qr.")
    return directions
