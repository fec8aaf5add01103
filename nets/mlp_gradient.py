"""Back-propagation through fully connected networks written out: many small networks at once, a dozen calls a step.

The same numbers as automatic differentiation (a test holds them together), without its overhead, which for networks
of a few thousand parameters is most of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Loss

Slope = Callable[[Tensor, Tensor], Tensor]
SLOPES: dict[type[nn.Module], Slope] = {
    nn.Tanh: torch.ops.aten.tanh_backward,
    nn.ReLU: lambda slope, h: torch.ops.aten.threshold_backward(slope, h, 0),
    nn.Sigmoid: torch.ops.aten.sigmoid_backward,
    nn.Identity: lambda slope, h: slope,
}
"""A slope times σ', which is a function of σ, in one pass over both."""


@dataclass(frozen=True)
class _Layer:
    """Where weight and bias of one layer lie in θ, and what follows the layer."""

    weight: slice
    bias: slice | None
    outputs: int
    inputs: int
    activation: nn.Module | None


@dataclass(frozen=True)
class DenseGradient:
    """Gradients of one loss of one fully connected architecture."""

    layers: tuple[_Layer, ...]
    loss: Loss

    def __call__(self, theta: Tensor, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """∇L, shape (runs, p), and L, shape (runs,), each on its own samples.

        Args:
            theta: shape (runs, p).
            X: shape (runs, B, ...), or (1, B, ...) for samples that all runs share; ``labels`` (runs or 1, B).
        """
        runs, count, hidden = len(theta), labels.shape[1], self._forward(theta, X)
        target = torch.eye(hidden[-1].shape[-1], dtype=theta.dtype, device=theta.device)[labels]
        losses, delta = _outer(self.loss, hidden.pop(), target)
        delta, gradient = delta / count, torch.empty_like(theta)
        for layer, below in zip(reversed(self.layers), reversed(hidden), strict=True):
            shape = (runs, layer.outputs, layer.inputs)
            gradient[:, layer.weight].view(shape).copy_(torch.bmm(delta.mT, below))
            if layer.bias is not None:
                gradient[:, layer.bias] = delta.sum(1)
            before = self.layers.index(layer) - 1
            if before >= 0:
                delta = torch.bmm(delta, theta[:, layer.weight].view(shape))
                activation = self.layers[before].activation
                delta = delta if activation is None else SLOPES[type(activation)](delta, below)
        return gradient, losses.mean(-1)

    def losses(self, theta: Tensor, X: Tensor, labels: Tensor) -> Tensor:
        """L alone, shape (runs,), for the same arguments."""
        return self.loss.values(self._forward(theta, X)[-1], labels.expand(len(theta), -1)).mean(-1)

    def _forward(self, theta: Tensor, X: Tensor) -> list[Tensor]:
        """Inputs and what every layer gives, shapes (runs, B, width)."""
        runs = len(theta)
        hidden = [X.flatten(2).expand(runs, -1, -1)]
        for layer in self.layers:
            weight = theta[:, layer.weight].view(runs, layer.outputs, layer.inputs).mT
            bias = None if layer.bias is None else theta[:, layer.bias].unsqueeze(1)
            z = torch.bmm(hidden[-1], weight) if bias is None else torch.baddbmm(bias, hidden[-1], weight)
            hidden.append(z if layer.activation is None else layer.activation(z))
        return hidden


def dense_gradient(net: FlatNet, loss: Loss) -> DenseGradient | None:
    """The written-out gradient of a network that is Flatten and Linear layers with known activations, else None."""
    parts = list(net.module) if isinstance(net.module, nn.Sequential) else []
    if loss not in (SQUARED, CROSS_ENTROPY) or not parts or not isinstance(parts[0], nn.Flatten):
        return None
    layers, at = list[_Layer](), 0
    for part, after in zip(parts[1:], [*parts[2:], None], strict=True):
        if isinstance(part, nn.Linear):
            if not all(p.requires_grad for p in part.parameters()):
                return None
            end = at + part.weight.numel()
            bias = None if part.bias is None else slice(end, end + part.out_features)
            activation = after if type(after) in SLOPES else None
            layers.append(_Layer(slice(at, end), bias, part.out_features, part.in_features, activation))
            at = end + (0 if bias is None else part.out_features)
        elif type(part) not in SLOPES or not layers or layers[-1].activation is not part:
            return None
    if not layers or at != net.p or layers[-1].activation is not None:
        return None
    return DenseGradient(tuple(layers), loss)


def _outer(loss: Loss, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample losses (runs, B) and their slopes in the outputs."""
    if loss is SQUARED:
        r = outputs - target
        return r.square().sum(-1) / 2, r
    logs = nn.functional.log_softmax(outputs, -1)
    return -(logs * target).sum(-1), logs.exp() - target
