"""Per-sample gradients of any module: (paths, samples, p) numbers at once, for statistics that need them one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from simulators.network import Network


def sample_gradients(network: Network, theta: Tensor, rows: Tensor | slice | None = None) -> Tensor:
    """∇ℓ_i(θ) of every path and sample, without weight decay, shape (paths, m, p), by ``torch.func``.

    Args:
        theta: states, shape (paths, p).
        rows: the samples meant, int64 of shape (m,); all n by default. m · p numbers a path have to fit in memory.

    Raises:
        ValueError: states of the wrong shape.
    """
    if theta.ndim != 2 or theta.shape[1] != network.p:
        raise ValueError(f"states of shape {tuple(theta.shape)} are not usable: give (paths, {network.p}).")
    X, y = (data if rows is None else data[rows] for data in (network.X, network.y))

    def loss(parameters: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return network.loss.values(network.outputs(parameters, x.unsqueeze(0)), target.unsqueeze(0)).sum()

    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return torch.func.vmap(of_samples, (0, None, None))(theta.detach(), X, y)
