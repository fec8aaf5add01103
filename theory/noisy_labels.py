"""One SGD step is a gradient-descent step on noisy labels (AVPF, Prop. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def label_noise(residual: Tensor, index: Tensor) -> Tensor:
    """ξ_i = r_i (1 - n·1[i = i_t]): full-batch gradient descent on y + ξ equals SGD on sample i_t (B = 1).

    Args:
        residual: r = h(X) - y, shape (..., n).
        index: the sample drawn, shape (...), int64.

    Returns:
        ξ, shape (..., n).

    Source: Andriushchenko et al. (2023), Prop. 1.
    """
    n = residual.shape[-1]
    drawn = torch.zeros_like(residual).scatter_(-1, index.unsqueeze(-1), 1.0)
    return residual * (1.0 - n * drawn)


def label_noise_covariance(residual: Tensor) -> Tensor:
    """E ξξᵀ = n diag(r²) - r rᵀ, shape (..., n, n); its trace is E‖ξ‖² = 2n(n-1)L."""
    n = residual.shape[-1]
    return n * torch.diag_embed(residual.square()) - residual.unsqueeze(-1) * residual.unsqueeze(-2)
