"""A module and a loss as functions of one flat parameter vector θ, on resident data.

L(θ) = (1/n) Σ_i ℓ_i(θ). Training works on rows (runs, p) of such vectors, curvature on one of them, so nothing here
depends on how a module is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


@dataclass(frozen=True)
class Loss:
    """A loss per sample: ``values(outputs (n, classes), labels (n,) int64)`` of shape (n,).

    The two below also take targets of shape (n, classes) in place of labels, e.g. noisy or soft ones.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]


def _squared(outputs: Tensor, labels: Tensor) -> Tensor:
    soft = labels.is_floating_point()
    target = labels.to(outputs) if soft else nn.functional.one_hot(labels, outputs.shape[-1]).to(outputs)
    return (outputs - target).square().sum(-1) / 2


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    logs = nn.functional.log_softmax(outputs, -1)
    if labels.is_floating_point():
        return -(labels.to(logs) * logs).sum(-1)
    return -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def class_rows(y: Tensor, outputs: int, like: Tensor) -> Tensor:
    """Targets of shape (..., B, outputs) from class numbers (..., B); targets as they are. In the dtype of ``like``."""
    if y.is_floating_point():
        return y.reshape(*y.shape[:2], outputs).to(like)
    return like.new_zeros(*y.shape, outputs).scatter_(-1, y.unsqueeze(-1), 1.0)


SQUARED = Loss("squared", _squared)  # ½‖h(x) - onehot(y)‖²
CROSS_ENTROPY = Loss("cross-entropy", _cross_entropy)  # -Σ_c y_c ln softmax(h(x))_c


class FlatNet:
    """A module's outputs as a function of θ ∈ R^p, the trainable parameters one after the other.

    A copy of the module is used: the one given keeps its parameters, buffers and mode.

    Attributes:
        theta: the module's own parameters, shape (p,).
        buffers: its running statistics by name; empty without BatchNorm.

    Raises:
        ValueError: no trainable parameter, several dtypes or devices, or active dropout (a second noise).
    """

    def __init__(self, module: nn.Module) -> None:
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("the module has no trainable parameter: set requires_grad on some.")
        if len({(p.dtype, p.device) for p in trained.values()}) > 1:
            raise ValueError("the parameters have several dtypes or devices: move the module to one with .to(...).")
        for name, part in module.named_modules():
            if isinstance(part, _DropoutNd) and part.p > 0:
                raise ValueError(f"'{name or 'the module'}' is a dropout, a second noise: set its p to 0.")
        self._eval, self._train = copy.deepcopy(module).eval(), copy.deepcopy(module).train()
        self._shapes = {name: p.shape for name, p in trained.items()}
        self._sizes = [p.numel() for p in trained.values()]
        self.p = sum(self._sizes)
        self.theta = torch.cat([p.detach().reshape(-1) for p in trained.values()])
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        self.has_batch_norm = any(isinstance(part, _BatchNorm) for part in module.modules())

    @property
    def module(self) -> nn.Module:
        """The copy in eval mode, to look at."""
        return self._eval

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """The parameters by name, as views of θ of shape (p,)."""
        parts = zip(self._shapes.items(), theta.split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def outputs(
        self, theta: Tensor, X: Tensor, buffers: Mapping[str, Tensor] | None = None, training: bool = False
    ) -> Tensor:
        """h_θ(X), shape (n, classes), for one θ of shape (p,).

        Args:
            buffers: running statistics, the module's own by default; updated in place with ``training``.
            training: BatchNorm normalises by the statistics of X itself instead of the running ones.
        """
        state = {**(self.buffers if buffers is None else buffers), **self.unflatten(theta)}
        return torch.func.functional_call(self._train if training else self._eval, state, (X,))

    def module_at(self, theta: Tensor, buffers: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A fresh copy of the module, in eval mode, with parameters θ of shape (p,)."""
        module = copy.deepcopy(self._eval)
        state = {**(self.buffers if buffers is None else buffers), **self.unflatten(theta.detach())}
        module.load_state_dict(state, strict=False)
        return module


class Objective:
    """L(θ) = (1/n) Σ_i ℓ_i(θ) of a network on a fixed set of samples.

    BatchNorm is in eval mode (running statistics, so samples are independent) unless ``batch_statistics``: then L is
    the loss of the whole set normalised by its own statistics, and per-sample losses mean nothing.

    Args:
        net: the network, or a module.
        X: inputs, shape (n, ...), and
        labels: int64 class numbers, shape (n,); both on the parameters' device.
        loss: :data:`SQUARED` or :data:`CROSS_ENTROPY`, or one's own.
        buffers: running statistics to use, the network's own by default.
        batch_statistics: BatchNorm in train mode.
        chunk: at most so many samples a pass; all at once by default.

    Raises:
        ValueError: data that do not fit the module, NaN inputs, labels that are no class, unusable chunks.
    """

    def __init__(
        self, net: FlatNet | nn.Module, X: Tensor, labels: Tensor, loss: Loss = CROSS_ENTROPY, *,
        buffers: Mapping[str, Tensor] | None = None, batch_statistics: bool = False, chunk: int | None = None,
    ) -> None:  # fmt: skip
        self.net = net if isinstance(net, FlatNet) else FlatNet(net)
        self.X, self.labels, self.loss, self.n = X, labels, loss, len(X)
        # Evaluations never update running statistics: batch statistics work on copies.
        self._buffers = {name: b.clone() for name, b in (self.net.buffers if buffers is None else buffers).items()}
        self.batch_statistics = batch_statistics
        self._chunk = len(X) if chunk is None else chunk
        theta = self.net.theta
        if X.device != theta.device or labels.device != theta.device:
            raise ValueError(
                f"data on {X.device}, {labels.device} and parameters on {theta.device}: move them together."
            )
        if X.is_floating_point() and X.dtype != theta.dtype:
            raise ValueError(f"X is {X.dtype} and the parameters are {theta.dtype}: convert one of them.")
        if labels.dtype != torch.int64 or labels.shape != X.shape[:1] or not len(X):
            raise ValueError(
                f"labels of {labels.dtype} and shape {tuple(labels.shape)} do not fit inputs {tuple(X.shape)}: "
                "give one int64 class number per input."
            )
        if not torch.isfinite(X).all():
            raise ValueError("the inputs X have NaN or infinite entries: remove those samples.")
        if self._chunk < 1:
            raise ValueError(f"chunks of {chunk} samples were asked for: give 1 or more.")
        if batch_statistics and self.net.has_batch_norm and self._chunk < self.n:
            raise ValueError("batch statistics of a set in chunks are not the set's: leave chunk out or use eval mode.")
        with torch.no_grad():
            shape = self.outputs(theta, X[:2]).shape
        if len(shape) != 2 or shape[0] != len(X[:2]):
            raise ValueError(f"the module maps {len(X[:2])} inputs to shape {tuple(shape)}: return (inputs, classes).")
        if int(labels.min()) < 0 or int(labels.max()) >= shape[1]:
            raise ValueError(
                f"labels run from {int(labels.min())} to {int(labels.max())} and the module has {shape[1]} outputs: "
                f"number classes 0 to {shape[1] - 1}."
            )

    @property
    def p(self) -> int:
        """Number of parameters."""
        return self.net.p

    def outputs(self, theta: Tensor, X: Tensor) -> Tensor:
        """h_θ(X), shape (n, classes), for θ of shape (p,)."""
        return self.net.outputs(theta, X, self._buffers, self.batch_statistics and self.net.has_batch_norm)

    def at_buffers(self, buffers: Mapping[str, Tensor]) -> Objective:
        """The same objective with other running statistics."""
        return self._with(self.X, self.labels, buffers) if buffers else self

    def on(self, rows: Tensor) -> Objective:
        """The loss of these samples alone (indices, repeated ones count twice)."""
        return self._with(self.X[rows], self.labels[rows], self._buffers)

    def _with(self, X: Tensor, labels: Tensor, buffers: Mapping[str, Tensor]) -> Objective:
        other = copy.copy(self)
        other.X, other.labels, other.n = X, labels, len(X)
        other._buffers = {name: b.clone() for name, b in buffers.items()}
        return other

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels, chunk by chunk."""
        for first in range(0, self.n, self._chunk):
            rows = slice(first, first + self._chunk)
            yield self.X[rows], self.labels[rows]

    def value(self, theta: Tensor) -> Tensor:
        """L(θ), a scalar, for θ of shape (p,)."""
        with torch.no_grad():
            parts = [self.loss.values(self.outputs(theta, X), labels).sum() for X, labels in self.parts()]
            return torch.stack(parts).sum() / self.n

    def values(self, thetas: Tensor) -> Tensor:
        """L of every θ, shape (...), for ``thetas`` of shape (..., p)."""
        rows = thetas.reshape(-1, self.p)
        return torch.stack([self.value(theta) for theta in rows]).view(thetas.shape[:-1])

    def accuracy(self, theta: Tensor) -> Tensor:
        """Share of samples whose largest output is their class, a scalar."""
        with torch.no_grad():
            right = [(self.outputs(theta, X).argmax(1) == labels).sum() for X, labels in self.parts()]
            return torch.stack(right).sum().to(theta.dtype) / self.n

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), shape (p,)."""
        total = torch.zeros_like(theta)
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            for X, labels in self.parts():
                total += torch.autograd.grad(self.loss.values(self.outputs(leaf, X), labels).sum(), leaf)[0]
        return total / self.n
