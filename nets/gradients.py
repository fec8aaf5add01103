"""Gradients of one loss at many parameters at once, or of every sample at one: written out where that is known.

Small fully connected networks run in a dozen matrix products (:mod:`nets.mlp_gradient`), small convolutional ones on a
CPU in compiled loops (:mod:`nets.convolutional_gradient`), all others under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nets.convolutional_gradient import ConvolutionalGradient, convolutional_gradient
from nets.mlp_gradient import DenseGradient, dense_gradient
from nets.objective import Objective

Gradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def written_gradient(objective: Objective) -> DenseGradient | ConvolutionalGradient | None:
    """Gradients written out for the kind of network that it is, None where automatic differentiation is needed."""
    dense = dense_gradient(objective.net, objective.loss)
    return dense or convolutional_gradient(objective.net, objective.loss, objective.X)


def batched_gradients(objective: Objective) -> Gradients:
    """(θ (runs, p), X (runs, B, …), labels (runs, B)) ↦ ∇L (runs, p) and L (runs,) on each run's own samples."""
    written = written_gradient(objective)
    if written is not None:
        return written
    outputs = torch.func.vmap(objective.net.outputs)

    def by_autograd(theta: Tensor, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            losses = objective.loss.values(outputs(leaf, X), labels).mean(-1)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return gradient, losses.detach()

    return by_autograd


def losses(objective: Objective, theta: Tensor) -> Tensor:
    """L over the whole set of every row of θ, shape (runs,), without gradients; small networks together."""
    written = dense_gradient(objective.net, objective.loss)
    if written is None:
        return objective.values(theta)
    with torch.no_grad():
        return written.losses(theta, objective.X.unsqueeze(0), objective.labels.unsqueeze(0))


def sample_gradients(objective: Objective, theta: Tensor) -> Tensor:
    """∇ℓ_i(θ) of every sample, shape (n, p), for one θ of shape (p,): slopes of the loss pulled back sample by sample.

    Memory n·p: for small networks; :func:`nets.curvature.gradient_covariance` forms nothing.
    """
    written = dense_gradient(objective.net, objective.loss)
    if written is not None:
        return written(theta.expand(objective.n, -1), objective.X.unsqueeze(1), objective.labels.unsqueeze(1))[0]
    with torch.enable_grad():
        outputs = objective.outputs(theta, objective.X).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(objective.loss.values(outputs, objective.labels).sum(), outputs)

    def value(at: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        return (objective.outputs(at, x.unsqueeze(0))[0] * slope).sum()

    return torch.func.vmap(torch.func.grad(value), (None, 0, 0))(theta, objective.X, slopes)
