"""Each measured quantity defined once: pure functions of tensors, for simulated and real runs alike.

Leading axes of the arguments are batch axes (schedules, seeds, times); results keep them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


def half_mse(w: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """L = (1/2n) Σ_i (⟨w, x_i⟩ - y_i)² of linear predictors ``w`` (..., d), shape (...)."""
    return (w @ X.T - y).square().mean(-1) / 2


class HalfMSE:
    """:func:`half_mse` on given data, for many predictors: where X has more rows than columns, from its QR factor.

    With [X y] = Q [R c; 0 ρ], ‖Xw - y‖² = ‖Rw - c‖² + ρ²: the same number to rounding from d + 1 rows instead of n.
    """

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self._data = X, y

    @cached_property
    def _factor(self) -> tuple[Tensor, Tensor]:
        """Rows and targets with the same sum of squares."""
        X, y = self._data
        if len(X) <= X.shape[1] + 1:
            return X, y
        factor = torch.linalg.qr(torch.cat([X, y.unsqueeze(1)], 1), mode="r").R
        return factor[:, :-1].contiguous(), factor[:, -1].contiguous()

    def __call__(self, w: Tensor) -> Tensor:
        """L of predictors ``w`` (..., d), shape (...)."""
        X, y = self._factor
        r = (w @ X.T).sub_(y)
        return r.square_().sum(-1) / (2 * len(self._data[0]))


def l1_norm(w: Tensor) -> Tensor:
    """‖w‖₁, shape (...)."""
    return torch.linalg.vector_norm(w, ord=1, dim=-1)


def support_size(w: Tensor, threshold: float = 1e-50) -> Tensor:
    """ℓ0: the number of entries with |w_j| > ``threshold``, shape (...), float.

    AVPF's threshold 1e-50 works because coordinates outside the support decay geometrically under label noise.
    """
    return (w.abs() > threshold).sum(-1).to(w.dtype)


def balancedness(u: Tensor, v: Tensor) -> Tensor:
    """‖|u| - |v|‖₂, shape (...)."""
    return torch.linalg.vector_norm(u.abs() - v.abs(), dim=-1)


def jacobian_rank(u: Tensor, v: Tensor, X: Tensor, threshold: float = 1e-4) -> Tensor:
    """#{σ_i / σ_1 > threshold} of the Jacobian [X diag(v), X diag(u)] of h(x) = ⟨u∘v, x⟩, shape (...), float.

    The Jacobian's singular values are those of X diag(√(u² + v²)), which is what is decomposed (half the columns).
    AVPF's figures use threshold 1e-15 on the first 2d held-out inputs.
    """
    singular = torch.linalg.svdvals(X * (u.square() + v.square()).sqrt().unsqueeze(-2))
    return (singular > threshold * singular[..., :1]).sum(-1).to(u.dtype)


def diagonal_hessian(u: Tensor, v: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Hessian of the half-MSE in (u, v), shape (..., 2d, 2d).

    With C = XᵀX/n and g = Xᵀ(X(u∘v) - y)/n the blocks are vCv, vCu + diag(g) and uCu; the block (∂u, ∂v) is
    diag(v) C diag(u) + diag(g), its transpose the block (∂v, ∂u).
    """
    C = X.T @ X / X.shape[0]
    g = ((u * v) @ X.T - y) @ X / X.shape[0]
    uu = v.unsqueeze(-1) * C * v.unsqueeze(-2)
    uv = v.unsqueeze(-1) * C * u.unsqueeze(-2) + torch.diag_embed(g)
    vv = u.unsqueeze(-1) * C * u.unsqueeze(-2)
    return torch.cat([torch.cat([uu, uv], -1), torch.cat([uv.transpose(-1, -2), vv], -1)], -2)


def hessian_spectrum(u: Tensor, v: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Eigenvalues of :func:`diagonal_hessian` in descending order, shape (..., 2d)."""
    return torch.linalg.eigvalsh(diagonal_hessian(u, v, X, y)).flip(-1)


def sharpness(u: Tensor, v: Tensor, X: Tensor, y: Tensor) -> Tensor:
    """Largest eigenvalue of the training loss's Hessian, shape (...)."""
    return hessian_spectrum(u, v, X, y)[..., 0]
