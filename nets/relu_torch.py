"""A ReLU network's SGD step by step in torch: any device and precision; the readable twin of the compiled loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from theory.problem import Regression
from theory.relu_network import ReluNetwork

OVERFLOW = 1e100


class LiteralEngine:
    """θ ← θ - η ∇(1/B) Σ ℓ(h(θ, x_i), y_i) by backpropagation on a flat batch of replicates.

    ℓ(h, y) is ½(h - y)², or ln(1 + e^{-yh}) with ``logistic``. Replicate k runs schedule k // seeds on the draws of
    seed k % seeds.
    """

    def __init__(
        self, network: ReluNetwork, problem: Regression, theta: Tensor, logistic: bool, averaging: float
    ) -> None:
        self._network, self._problem, self._logistic, self._averaging = network, problem, logistic, averaging
        self._theta, self._average = theta, theta
        self.bad = torch.full(theta.shape[:1], -1, dtype=torch.int64, device=theta.device)

    def advance(
        self, index: np.ndarray, shift: np.ndarray, eta: np.ndarray, shift_scale: np.ndarray, first_step: int
    ) -> None:
        """Take the steps of one block.

        index and shift have shape (seeds, steps, B), shift is empty without label noise; eta and shift_scale, by which
        shifts are multiplied, have shape (schedules, steps).
        """
        schedules, device = len(eta), self._theta.device
        rows = torch.from_numpy(index.astype(np.int64)).to(device).repeat(schedules, 1, 1)
        sizes, scales, shifts = (torch.from_numpy(part).to(self._theta) for part in (eta, shift_scale, shift))
        limit = min(OVERFLOW, torch.finfo(self._theta.dtype).max ** 0.5)
        for k in range(index.shape[1]):
            x, y = self._problem.X[rows[:, k]], self._problem.y[rows[:, k]]
            if shift.size:
                y = y + (scales[:, None, k, None] * shifts[:, k]).flatten(0, 1)
            theta = self._theta.detach().requires_grad_()
            h = self._network(theta, x)
            losses = torch.nn.functional.softplus(-y * h) if self._logistic else (h - y).square() / 2
            (gradient,) = torch.autograd.grad(losses.mean(1).sum(), theta)
            new = self._theta - sizes[:, k].repeat_interleave(len(index)).unsqueeze(1) * gradient
            broken = ~(torch.isfinite(new).all(1) & ((h if self._logistic else h - y).abs() < limit).all(1))
            self.bad = torch.where((self.bad < 0) & broken, first_step + k, self.bad)
            self._theta = torch.where((self.bad >= 0).unsqueeze(1), self._theta, new).detach()
            blend = self._averaging * self._average + (1 - self._averaging) * self._theta
            self._average = torch.where((self.bad >= 0).unsqueeze(1), self._average, blend)

    def state(self) -> Tensor:
        """The current θ, shape (replicates, p), or its running average when one is kept."""
        return self._average if self._averaging else self._theta
