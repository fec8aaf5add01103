"""A ReLU network's SGD step by step in torch: any device and precision.

:class:`LiteralEngine` is the readable twin of the compiled loop; :class:`ReplayedEngine` is the same step on tensors
that stay in place, so that a GPU replays a recorded graph of many steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.device import Repeated
from theory.problem import Regression
from theory.relu_network import ReluNetwork

OVERFLOW = 1e100
MOST_STEPS = 1024  # of a block that lies on the device


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
            gradient, size = _gradient(self._network, self._theta, x, y, self._logistic)
            new = self._theta - sizes[:, k].repeat_interleave(len(index)).unsqueeze(1) * gradient
            broken = ~(torch.isfinite(new).all(1) & (size < limit))
            self.bad = torch.where((self.bad < 0) & broken, first_step + k, self.bad)
            self._theta = torch.where((self.bad >= 0).unsqueeze(1), self._theta, new)
            blend = self._averaging * self._average + (1 - self._averaging) * self._theta
            self._average = torch.where((self.bad >= 0).unsqueeze(1), self._average, blend)

    def state(self) -> Tensor:
        """The current θ, shape (replicates, p), or its running average when one is kept."""
        return self._average if self._averaging else self._theta


class ReplayedEngine:
    """The same steps on tensors that stay in place: a GPU replays a graph of many, other devices take them one by one.

    Indices may be arrays, or tensors that lie on the device already.
    """

    def __init__(
        self, network: ReluNetwork, problem: Regression, theta: Tensor, logistic: bool, averaging: float
    ) -> None:
        self._network, self._problem, self._logistic, self._averaging = network, problem, logistic, averaging
        self._theta, self._average = theta.clone(), theta.clone()
        self.bad = torch.full(theta.shape[:1], -1, dtype=torch.int64, device=theta.device)
        self._limit = min(OVERFLOW, torch.finfo(theta.dtype).max ** 0.5)
        self._block: list[Tensor] = []  # indices, step sizes, and with label noise shifts and their scales
        self._place, self._now = (torch.zeros(1, dtype=torch.int64, device=theta.device) for _ in range(2))
        self._repeat = Repeated(self._step, theta.device)

    def advance(self, index: Any, shift: np.ndarray, eta: np.ndarray, shift_scale: np.ndarray, first_step: int) -> None:
        """Take the steps of one block, at most 1024, as for :class:`LiteralEngine`."""
        device, steps = self._theta.device, index.shape[1]
        given = [torch.as_tensor(index, device=device).long()]
        parts = (eta, shift, shift_scale) if shift.size else (eta,)
        given += [torch.as_tensor(part).to(self._theta) for part in parts]
        if not self._block:
            self._block = [part.new_zeros(len(part), MOST_STEPS, *part.shape[2:]) for part in given]
        for held, part in zip(self._block, given, strict=True):
            held[:, :steps] = part
        self._place.zero_()
        self._now.fill_(first_step)
        self._repeat(steps)

    def _step(self) -> None:
        """One step of every replicate, in place."""
        index, eta, *noise = (part.index_select(1, self._place).squeeze(1) for part in self._block)
        seeds, schedules = len(index), len(eta)
        rows = index.repeat(schedules, 1)
        x, y = self._problem.X[rows], self._problem.y[rows]
        if noise:
            shift, scale = noise
            y = y + (scale[:, None, None] * shift).flatten(0, 1)
        gradient, size = _gradient(self._network, self._theta, x, y, self._logistic)
        sizes = eta.unsqueeze(1).expand(-1, seeds).reshape(-1, 1)
        new = self._theta - sizes * gradient
        broken = ~(torch.isfinite(new).all(1) & (size < self._limit))
        self.bad.copy_(torch.where((self.bad < 0) & broken, self._now, self.bad))
        stays = (self.bad >= 0).unsqueeze(1)
        self._theta.copy_(torch.where(stays, self._theta, new))
        if self._averaging:
            blend = self._averaging * self._average + (1 - self._averaging) * self._theta
            self._average.copy_(torch.where(stays, self._average, blend))
        self._place.add_(1)
        self._now.add_(1)

    def state(self) -> Tensor:
        """The current θ, shape (replicates, p), or its running average when one is kept: a copy."""
        return (self._average if self._averaging else self._theta).clone()


def _gradient(network: ReluNetwork, theta: Tensor, x: Tensor, y: Tensor, logistic: bool) -> tuple[Tensor, Tensor]:
    """∇(1/B) Σ ℓ(h(θ, x_i), y_i), (replicates, p), and the largest |residual| (with ``logistic`` |output|)."""
    with torch.enable_grad():
        at = theta.detach().requires_grad_()
        h = network(at, x)
        losses = torch.nn.functional.softplus(-y * h) if logistic else (h - y).square() / 2
        (gradient,) = torch.autograd.grad(losses.mean(1).sum(), at)
    return gradient, (h if logistic else h - y).detach().abs().amax(1)
