"""Stochastic dynamics of one large module in place: memory for its parameters and one momentum, BatchNorm allowed.

:func:`simulators.svag.run_svag` runs many paths of a small network; this runs one path of a large one, on the module's
device, and leaves the data to the caller: ``draw`` may augment images and disturb labels as real SGD does. What is
stepped along is an estimate of the gradient: SVAG's, whose steps turn into SGD's SDE, or that of a rival.

Where BatchNorm normalises by the minibatch, minibatches pass through the module one after the other, so that each is
normalised by itself as in SGD; running statistics mix them and are to be estimated anew before an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simulators.estimated_noise import isotropic_gradient
from simulators.noise import BrownianIncrements
from simulators.svag import amplitudes

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, m) ↦ inputs and targets of the step's m-th minibatch, independent of the others; for runs that can be resumed
a function of the two numbers alone."""
MeanLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) ↦ the mean loss, a scalar."""
GradientEstimate = Callable[[int], tuple[Tensor, list[Tensor]]]
"""Step ↦ a loss and the gradient, a tensor for every trainable parameter."""


class Minibatches:
    """Losses of a module on independent minibatches.

    Args:
        module: in the mode it is in.
        autocast: lower precision of the passes (e.g. ``torch.bfloat16``); parameters and sums keep theirs.

    Raises:
        ValueError: a module without trainable parameters.
    """

    def __init__(self, module: nn.Module, loss: MeanLoss, draw: Draw, autocast: torch.dtype | None = None) -> None:
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the module has no trainable parameter: set requires_grad on some.")
        self._module, self._loss, self._draw, self._autocast = module, loss, draw, autocast
        self._apart = any(isinstance(part, _BatchNorm) and part.training for part in module.modules())

    def gradient(self, step: int, weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
        """Σ_m w_m ∇L_m in one backward pass, with Σ_m w_m L_m."""
        draws = [self._draw(step, m) for m in range(len(weights))]
        with torch.autocast(self.parameters[0].device.type, self._autocast, enabled=self._autocast is not None):
            if self._apart or len(draws) == 1:
                outputs = [self._module(x) for x, _ in draws]
            else:
                outputs = list(self._module(torch.cat([x for x, _ in draws])).split([len(x) for x, _ in draws]))
            losses = [self._loss(h, y) for h, (_, y) in zip(outputs, draws, strict=True)]
        total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
        return total.detach(), list(torch.autograd.grad(total, self.parameters))

    def alone(self, step: int, m: int) -> tuple[Tensor, list[Tensor]]:
        """∇L_m and L_m."""
        x, y = self._draw(step, m)
        with torch.autocast(self.parameters[0].device.type, self._autocast, enabled=self._autocast is not None):
            loss = self._loss(self._module(x), y)
        return loss.detach(), list(torch.autograd.grad(loss, self.parameters))


def svag(minibatches: Minibatches, l: int) -> GradientEstimate:  # noqa: E741
    """(1+√(2l-1))/2 ∇L₀ + (1-√(2l-1))/2 ∇L₁: l times the noise of a minibatch; SGD itself for l = 1.

    Source: Li, Malladi, Arora (2021), section 4.
    """
    weights = amplitudes(l)[: 1 if l == 1 else 2]
    return lambda step: minibatches.gradient(step, weights)


def isotropic(minibatches: Minibatches, groups: int, noise: BrownianIncrements) -> GradientEstimate:
    """:func:`simulators.estimated_noise.isotropic_gradient` of M minibatch gradients (a rival).

    Args:
        groups: M ≥ 2; a step costs M gradients.
        noise: increments ξ with one path and a channel per parameter.

    Raises:
        ValueError: noise of another size; at the first step, fewer than two groups.
    """
    p = sum(parameter.numel() for parameter in minibatches.parameters)
    if (noise.paths, noise.channels) != (1, p):
        raise ValueError(f"noise of {noise.paths} paths and {noise.channels} channels does not fit: give 1 and {p}.")

    def estimate(step: int) -> tuple[Tensor, list[Tensor]]:
        found = [minibatches.alone(step, m) for m in range(groups)]
        flat = torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for _, gradient in found])
        total = isotropic_gradient(flat, noise(step)[0].to(flat))
        parts = total.split([parameter.numel() for parameter in minibatches.parameters])
        shaped = [part.view_as(q) for part, q in zip(parts, minibatches.parameters, strict=True)]
        return torch.stack([loss for loss, _ in found]).mean(), shaped

    return estimate


class ModuleDynamics:
    """θ ← θ - (η/l)(g + λθ) on a module's own parameters; with momentum as in :mod:`simulators.svag`.

    Args:
        parameters: trained in place.
        gradient: the estimate g of every step.
        step_sizes: η of every SGD step, shape (K,); step k uses that of SGD step k // l.
        l: steps per SGD step.
        momentum: μ, and
        weight_decay: λ, over all parameters.

    Raises:
        ValueError: l below 1, unusable step sizes, momentum or weight decay.
    """

    def __init__(
        self, parameters: Sequence[Tensor], gradient: GradientEstimate, step_sizes: Tensor, l: int = 1, *,  # noqa: E741
        momentum: float = 0.0, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        amplitudes(l)  # says so when l is not usable
        if step_sizes.ndim != 1 or not bool(((step_sizes > 0) & torch.isfinite(step_sizes)).all()):
            raise ValueError(
                f"step sizes of shape {tuple(step_sizes.shape)} are not usable: give (K,) positive numbers."
            )
        if not (0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise ValueError(
                f"momentum {momentum} with weight decay {weight_decay} is not usable: choose [0, 1) and >= 0."
            )
        self.parameters, self._gradient, self.l = list(parameters), gradient, l
        self._sizes = step_sizes.double().tolist()
        self._momentum, self._decay = momentum, weight_decay
        self._mass = [torch.zeros_like(p) for p in self.parameters] if momentum else []
        self._bad = torch.full((), -1, dtype=torch.int64, device=self.parameters[0].device)
        self.step = 0

    @property
    def steps(self) -> int:
        """Steps for which there are step sizes."""
        return self.l * len(self._sizes)

    @property
    def first_bad_step(self) -> int:
        """The step whose loss was not finite, -1 while all were; asking makes the host wait for the device."""
        return int(self._bad)

    def advance(self, steps: int) -> None:
        """Do so many steps; the device is not waited for.

        Raises:
            ValueError: more steps than there are step sizes for.
        """
        if not 0 <= steps <= self.steps - self.step:
            raise ValueError(f"{steps} steps after {self.step} were asked for: there are step sizes for {self.steps}.")
        for k in range(self.step, self.step + steps):
            loss, gradient = self._gradient(k)
            self._move(gradient, self._sizes[k // self.l] / self.l)
            self._bad = torch.where((self._bad < 0) & ~torch.isfinite(loss), k, self._bad)
        self.step += steps

    @torch.no_grad()
    def _move(self, gradient: list[Tensor], size: float) -> None:
        if self._decay:
            torch._foreach_add_(gradient, self.parameters, alpha=self._decay)
        if self._mass:
            torch._foreach_mul_(self._mass, 1 - (1 - self._momentum) / self.l)
            torch._foreach_add_(self._mass, gradient, alpha=1 / self.l)
        torch._foreach_add_(self.parameters, self._mass or gradient, alpha=-size)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on besides its module's own state: step, first bad step and momentum."""
        return {"step": self.step, "bad": self._bad, "mass": self._mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a run with the same arguments, its module restored by the caller.

        Raises:
            ValueError: a state with another number of momenta.
        """
        if len(state["mass"]) != len(self._mass):
            raise ValueError(f"the state has {len(state['mass'])} momenta and this run {len(self._mass)}: use its own.")
        with torch.no_grad():
            for own, saved in zip(self._mass, state["mass"], strict=True):
                own.copy_(saved)
        self.step, self._bad = int(state["step"]), state["bad"].to(self._bad)
