"""Back-propagation through small convolutional networks in compiled loops: many networks at once, on a CPU.

The same numbers as automatic differentiation to rounding (a test holds them together). Under ``torch.func.vmap``
convolutions with a kernel a network become grouped ones, for which CPU libraries have no fast path where channels are
few; here one network's minibatch goes forward and back in cache. What it costs is in ``benchmarks/gradients.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nets.compiled_elements import CROSS_ENTROPY, SQUARED
from nets.convolutional_compiled import gradients, values
from nets.convolutional_plan import Held, Plan, UnknownModuleError, plan
from nets.objective import CROSS_ENTROPY as CLASSES
from nets.objective import SQUARED as TARGETS
from nets.objective import FlatNet, Loss, class_rows
from theory.threads import share

LOSSES = {"squared": SQUARED, "cross-entropy": CROSS_ENTROPY}
PARAMETERS = 20_000  # beyond which layers are wide enough for torch
GRAIN = 2_000_000  # multiplications for which it pays to wake another thread


class ConvolutionalGradient:
    """Gradients of a loss of one architecture: convolutions, BatchNorm on batch statistics, GroupNorm, sums, and such.

    Args:
        module: its trained parameters, one after the other, are θ.
        loss: "squared", ½‖h - y‖², or "cross-entropy".

    Raises:
        ValueError: another loss, an operation that the loops do not know, buffers.
    """

    def __init__(self, module: nn.Module, loss: str) -> None:
        if loss not in LOSSES:
            raise ValueError(f"there is no compiled loss '{loss}': choose from {', '.join(LOSSES)}.")
        self._module, self._loss = copy.deepcopy(module), LOSSES[loss]
        self._places, self._p = dict[str, int](), 0
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                raise UnknownModuleError(f"'{name}' is not trained.")
            self._places[name], self._p = self._p, self._p + parameter.numel()
        self._plans: dict[tuple[int, ...], Plan] = {}

    def __call__(self, theta: Tensor, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """∇L, shape (R, p), and L, shape (R,), each on its own samples.

        Args:
            theta: shape (R, p).
            X: shape (R, B, channels, height, width), or (1, B, …) for samples that all share; ``labels`` (R or 1, B).
        """
        weights = theta.new_full(X.shape[1:2], 1 / max(X.shape[1], 1))
        gradient, losses = self._both(theta, X, labels, weights, None)
        return gradient, losses.mean(-1)

    def on(self, X: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """The same on minibatches of one set X (n, …): (θ, rows (R or 1, B), None for all) ↦ ∇L and L."""

        def on_rows(theta: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            pick = torch.arange(len(X)).unsqueeze(0) if rows is None else rows
            return self(theta, X[pick], labels[pick])

        return on_rows

    def weighted_gradient(
        self, theta: Tensor, X: Tensor, y: Tensor, weights: Tensor | None, slopes: Tensor | None = None,
        minibatches: int = 1,
    ) -> Tensor:  # fmt: skip
        """∂/∂θ of Σ_i w_i ℓ_i(θ) + Σ_i ⟨s_i, h_θ(x_i)⟩, shape (R, p).

        Args:
            y: class numbers, shape (R or 1, B), or targets, shape (R or 1, B, outputs).
            weights: w of either sign, shape (R, B); 0 where None.
            slopes: s, shape (R, B, outputs); 0 where None.
            minibatches: so many of equal size, one after the other; BatchNorm normalises each by itself.
        """
        weights = theta.new_zeros(X.shape[1]) if weights is None else weights
        return self._both(theta, X, y, weights, slopes, minibatches)[0]

    def _both(
        self, theta: Tensor, X: Tensor, y: Tensor, weights: Tensor, slopes: Tensor | None, minibatches: int = 1
    ) -> tuple[Tensor, Tensor]:
        (R, B), made = self._sizes(theta, X, y), self._plan(X, minibatches)
        gradient, losses = torch.zeros_like(theta), theta.new_empty(R, B)
        slopes = theta.new_empty(R, 0, 0) if slopes is None else slopes.reshape(R, B, made.outputs)
        target = class_rows(y, made.outputs, theta)
        parts = (theta, _flat(X), target, weights.expand(R, B), slopes)
        arrays = [part.contiguous().numpy() for part in parts]
        _run(gradients, made, (*arrays, *_loops(made), self._loss, gradient.numpy(), losses.numpy()), R, B)
        return gradient, losses

    def losses(self, theta: Tensor, X: Tensor, labels: Tensor) -> Tensor:
        """L alone, shape (R,), for the arguments of a call."""
        found = self.outputs(theta, X)
        target = class_rows(labels, found.shape[-1], found)
        if self._loss == SQUARED:
            return (found - target).square().sum(-1).mean(-1) / 2
        return -(nn.functional.log_softmax(found, -1) * target).sum(-1).mean(-1)

    def outputs(self, theta: Tensor, X: Tensor) -> Tensor:
        """h_θ(X), shape (R, B, outputs)."""
        self._sizes(theta, X)
        made = self._plan(X)
        (found,) = passes(made, theta, X, [made.end])
        return found

    def knows(self, X: Tensor) -> bool:
        """Whether the loops run on samples of this shape, (R, B, …), device and precision."""
        if X.device.type != "cpu" or X.dtype not in (torch.float32, torch.float64) or X.ndim != 5:
            return False
        try:
            self._plan(X)
        except UnknownModuleError:
            return False
        return True

    def _sizes(self, theta: Tensor, X: Tensor, y: Tensor | None = None) -> tuple[int, int]:
        """R and B of arguments that fit: the loops check nothing."""
        fit = theta.ndim == 2 and theta.shape[1] == self._p and X.ndim == 5 and len(X) in (1, len(theta)) and X.numel()
        if not fit or (y is not None and (len(y) not in (1, len(theta)) or y.shape[1:2] != X.shape[1:2])):
            shapes = ", ".join(str(tuple(part.shape)) for part in (theta, X, y) if part is not None)
            raise ValueError(
                f"θ, samples and labels of shapes {shapes} do not fit: give (R, {self._p}), (R or 1, B, channels, "
                "height, width) and (R or 1, B)."
            )
        if X.dtype != theta.dtype or X.device.type != "cpu" or theta.device.type != "cpu":
            raise ValueError("compiled gradients take θ and samples of one precision on the CPU: convert one.")
        return len(theta), X.shape[1]

    def _plan(self, X: Tensor, minibatches: int = 1) -> Plan:
        images, *shape = X.shape[1:]
        if images % minibatches:
            raise ValueError(f"{images} samples do not make {minibatches} minibatches of equal size: give as many.")
        key = (minibatches, images, *shape)
        if key not in self._plans:
            channels, height, width = shape
            size = (channels, height, width)
            self._plans[key] = plan(self._module, self._places, images, size, spans=minibatches)
        return self._plans[key]


def passes(made: Plan, theta: Tensor, X: Tensor, held: Sequence[Held]) -> list[Tensor]:
    """What passes of networks θ (R, p) on X (R or 1, B, …) leave in these places, each (R, rows, channels)."""
    lengths, (R, B) = [one.rows * one.stored for one in held], (len(theta), X.shape[1])
    spans = np.array([(one.place, length) for one, length in zip(held, lengths, strict=True)])
    out = theta.new_empty(R, sum(lengths))
    arrays = [part.contiguous().numpy() for part in (theta, _flat(X))]
    _run(values, made, (*arrays, *_loops(made), B, spans, out.numpy()), R, B)
    parts = zip(out.split(lengths, 1), held, strict=True)
    return [part.view(R, one.rows, one.stored)[..., : one.channels] for part, one in parts]


def _loops(made: Plan) -> tuple[Any, ...]:
    return made.operations, made.starts, made.products, made.size


def _run(loop: Callable[..., None], made: Plan, arguments: tuple[Any, ...], R: int, B: int) -> None:
    """As many of the allowed threads as the work is worth; numbers do not depend on how many."""
    work = R * B * int((made.operations["taps"] * made.operations["y_pixels"]).sum()) * 64
    share(loop, arguments, min(R, work // GRAIN))


def convolutional_gradient(net: FlatNet, loss: Loss, X: Tensor) -> ConvolutionalGradient | None:
    """The compiled gradient of a small network on samples X (n, …), if the loops know it, else None."""
    if loss not in (TARGETS, CLASSES) or net.p > PARAMETERS:
        return None
    try:
        found = ConvolutionalGradient(net.module, loss.name)
    except UnknownModuleError:
        return None
    return found if found.knows(X[:1].unsqueeze(0)) else None


def _flat(X: Tensor) -> Tensor:
    """(R, B, C, H, W) ↦ (R, B·pixels·C), channels last."""
    return X.flatten(3).mT.flatten(1)
