"""SVAG of one large module in place: memory for its parameters, one momentum and one backward pass, BatchNorm allowed.

:func:`simulators.svag.run_svag` runs many paths of a small network; this runs one path of a large one, on the module's
device, and leaves the data to the caller: ``draw`` may augment images and disturb labels as real SGD does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simulators.svag import amplitudes

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
MeanLoss = Callable[[Tensor, Tensor], Tensor]


class ModuleSVAG:
    """θ ← θ - (η/l) g, g = (1+√(2l-1))/2 g₁ + (1-√(2l-1))/2 g₂ + λθ, on a module's own parameters.

    With momentum as in :mod:`simulators.svag`. Both gradients come from one backward pass. Where BatchNorm normalises
    by the minibatch, the two minibatches pass through the module one after the other, so that each is normalised by
    itself as in SGD; its running statistics mix both and are to be estimated anew before an evaluation.

    Args:
        module: trained in place, in the mode it is in.
        loss: (outputs, targets) ↦ the mean loss, a scalar.
        draw: (SVAG step, 0 or 1) ↦ inputs and targets of that minibatch, independent of each other and, for a run that
            can be resumed, a function of the two numbers alone. For l = 1 only minibatch 0 is drawn.
        step_sizes: η of every SGD step, shape (K,); SVAG step k uses that of SGD step k // l.
        l: SVAG steps per SGD step; 1 is SGD.
        momentum: μ, and
        weight_decay: λ, over all parameters.
        autocast: lower precision of the passes (e.g. ``torch.bfloat16``); parameters and sums keep theirs.

    Raises:
        ValueError: l below 1, unusable step sizes, momentum or weight decay, a module without trainable parameters.

    Source: Li, Malladi, Arora (2021), section 4.
    """

    def __init__(
        self, module: nn.Module, loss: MeanLoss, draw: Draw, step_sizes: Tensor, l: int = 1, *,  # noqa: E741
        momentum: float = 0.0, weight_decay: float = 0.0, autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._amplitudes, self.l = amplitudes(l), l
        if step_sizes.ndim != 1 or not bool(((step_sizes > 0) & torch.isfinite(step_sizes)).all()):
            raise ValueError(
                f"step sizes of shape {tuple(step_sizes.shape)} are not usable: give (K,) positive numbers."
            )
        if not (0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise ValueError(
                f"momentum {momentum} with weight decay {weight_decay} is not usable: choose [0, 1) and >= 0."
            )
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the module has no trainable parameter: set requires_grad on some.")
        self.module, self._loss, self._draw = module, loss, draw
        self._sizes = step_sizes.double().tolist()
        self._momentum, self._decay, self._autocast = momentum, weight_decay, autocast
        self._apart = any(isinstance(part, _BatchNorm) and part.training for part in module.modules())
        self._mass = [torch.zeros_like(p) for p in self.parameters] if momentum else []
        device = self.parameters[0].device
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.step = 0

    @property
    def steps(self) -> int:
        """SVAG steps for which there are step sizes."""
        return self.l * len(self._sizes)

    @property
    def first_bad_step(self) -> int:
        """The SVAG step whose loss was not finite, -1 while all were; asking makes the host wait for the device."""
        return int(self._bad)

    def advance(self, steps: int) -> None:
        """Do so many SVAG steps; the device is not waited for.

        Raises:
            ValueError: more steps than there are step sizes for.
        """
        if not 0 <= steps <= self.steps - self.step:
            raise ValueError(
                f"{steps} SVAG steps after {self.step} were asked for: there are step sizes for {self.steps}."
            )
        for k in range(self.step, self.step + steps):
            loss = self._weighted_loss(k)
            gradients = list(torch.autograd.grad(loss, self.parameters))
            self._move(gradients, self._sizes[k // self.l] / self.l)
            self._bad = torch.where((self._bad < 0) & ~torch.isfinite(loss.detach()), k, self._bad)
        self.step += steps

    def _weighted_loss(self, k: int) -> Tensor:
        draws = [self._draw(k, which) for which in range(1 if self.l == 1 else 2)]
        with torch.autocast(self.parameters[0].device.type, self._autocast, enabled=self._autocast is not None):
            if self._apart or len(draws) == 1:
                losses = [self._loss(self.module(x), y) for x, y in draws]
            else:
                parts = self.module(torch.cat([x for x, _ in draws])).split([len(x) for x, _ in draws])
                losses = [self._loss(outputs, y) for outputs, (_, y) in zip(parts, draws, strict=True)]
        terms = [weight * part for weight, part in zip(self._amplitudes, losses, strict=False)]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _move(self, gradients: list[Tensor], size: float) -> None:
        if self._decay:
            torch._foreach_add_(gradients, self.parameters, alpha=self._decay)
        if self._mass:
            torch._foreach_mul_(self._mass, 1 - (1 - self._momentum) / self.l)
            torch._foreach_add_(self._mass, gradients, alpha=1 / self.l)
        torch._foreach_add_(self.parameters, self._mass or gradients, alpha=-size)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on: step, first bad step, momentum and the module's own state."""
        return {"step": self.step, "bad": self._bad, "mass": self._mass, "module": self.module.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a run with the same arguments.

        Raises:
            ValueError: a state with another number of momenta.
        """
        if len(state["mass"]) != len(self._mass):
            raise ValueError(f"the state has {len(state['mass'])} momenta and this run {len(self._mass)}: use its own.")
        self.module.load_state_dict(state["module"])
        with torch.no_grad():
            for own, saved in zip(self._mass, state["mass"], strict=True):
                own.copy_(saved)
        self.step, self._bad = int(state["step"]), state["bad"].to(self._bad)
