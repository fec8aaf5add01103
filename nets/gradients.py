"""Gradients of one loss at many parameters at once, or of every sample at one: written out where that is known.

Small fully connected networks run in a dozen matrix products (:mod:`nets.mlp_gradient`), small convolutional ones on a
CPU in compiled loops (:mod:`nets.convolutional_gradient`), all others under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nets.convolutional_gradient import ConvolutionalGradient, convolutional_gradient
from nets.mlp_gradient import DenseGradient, Gradients, dense_gradient
from nets.objective import FlatNet, Loss, Objective

WeightedGradients = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], Tensor]


def written_gradient(objective: Objective) -> DenseGradient | ConvolutionalGradient | None:
    """Gradients written out for the kind of network that it is, None where automatic differentiation is needed."""
    net, loss = objective.net, objective.loss
    return dense_gradient(net, loss) or convolutional_gradient(net, loss, objective.X)


def weighted_gradients(net: FlatNet, loss: Loss, X: Tensor) -> WeightedGradients | None:
    """∂/∂θ of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩ written out for networks like this and samples like X (n, …), else None.

    The form that :class:`simulators.network.Network` takes as ``gradients``.
    """
    found = dense_gradient(net, loss) or convolutional_gradient(net, loss, X)
    return None if found is None else found.weighted_gradient


def batched_gradients(objective: Objective) -> Gradients:
    """(θ (R, p), rows (R or 1, B) of the objective's samples, None for all) ↦ ∇L (R, p) and L (R,)."""
    written = written_gradient(objective)
    if written is not None:
        return written.on(objective.X, objective.labels)
    outputs = torch.func.vmap(objective.net.outputs)

    def by_autograd(theta: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(objective.n, device=theta.device).unsqueeze(0) if rows is None else rows
        rows = rows.expand(len(theta), -1)
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            losses = objective.loss.values(outputs(leaf, objective.X[rows]), objective.labels[rows]).mean(-1)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return gradient, losses.detach()

    return by_autograd


def losses(objective: Objective, theta: Tensor) -> Tensor:
    """L over the whole set of every row of θ, shape (runs,), without gradients; small networks together."""
    written = None if objective.net.buffers else written_gradient(objective)
    if written is None:
        return objective.values(theta)
    with torch.no_grad():
        parts = [
            written.losses(theta, X.unsqueeze(0), labels.unsqueeze(0)) * (len(X) / objective.n)
            for X, labels in objective.parts()
        ]
        return torch.stack(parts).sum(0)


def sample_gradients(objective: Objective, theta: Tensor) -> Tensor:
    """∇ℓ_i(θ) of every sample, shape (n, p), for one θ of shape (p,): slopes of the loss pulled back sample by sample.

    Memory n·p: for small networks; :func:`nets.curvature.gradient_covariance` forms nothing.
    """
    written = dense_gradient(objective.net, objective.loss)
    if written is not None:
        with torch.no_grad():
            return written.sample_gradients(theta, objective.X, objective.labels)
    with torch.enable_grad():
        outputs = objective.outputs(theta, objective.X).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(objective.loss.values(outputs, objective.labels).sum(), outputs)

    def value(at: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        return (objective.outputs(at, x.unsqueeze(0))[0] * slope).sum()

    return torch.func.vmap(torch.func.grad(value), (None, 0, 0))(theta, objective.X, slopes)
