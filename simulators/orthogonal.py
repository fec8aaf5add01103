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
    """P⊥ v = v - E Eᵀ v for rows v of shape (paths, p) and orthonormal columns E of shape (p, K)."""
    return v - (v @ directions) @ directions.T


class OrthogonalSDE:
    """Another SDE's drift and noise, projected on the complement of E; for :func:`simulators.network_sde.run_sde`.

    Args:
        sde: an SDE of a network, e.g. :class:`simulators.network_sde.ExactCovarianceSDE`.
        directions: E, orthonormal columns of shape (p, K), K = 0 included; or a function of SDE time that returns them,
            for directions that are found anew along the run.
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
    """The directions, if they are orthonormal columns.

    Raises:
        ValueError: they are not.
    """
    if directions.ndim != 2 or directions.shape[1] > directions.shape[0]:
        raise ValueError(f"directions of shape {tuple(directions.shape)} are not columns: give shape (p, K), K <= p.")
    eye = torch.eye(directions.shape[1], dtype=directions.dtype, device=directions.device)
    off = float((directions.T @ directions - eye).abs().max()) if directions.shape[1] else 0.0
    if not off <= 1e3 * torch.finfo(directions.dtype).eps ** 0.75:
        raise ValueError(f"the directions are off orthonormal by {off:.2g}: orthonormalise them, e.g. torch.linalg.qr.")
    return directions
