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
NARROW = 16  # outputs; products with so few columns are slow on CPUs, and a third of the time transposed
BENDS: dict[type[nn.Module], Slope] = {
    nn.Tanh: lambda slope, h: -2 * h * slope,
    nn.Sigmoid: lambda slope, h: (1 - 2 * h) * slope,
}
"""A slope times σ''/σ', which is a function of σ too; the others have none."""


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
            outer = torch.bmm if count > 1 else torch.mul
            gradient[:, layer.weight].view(shape).copy_(outer(delta.mT, below))
            if layer.bias is not None:
                gradient[:, layer.bias] = delta.sum(1)
            before = self.layers.index(layer) - 1
            if before >= 0:
                delta = torch.bmm(delta, theta[:, layer.weight].view(shape))
                delta = _pulled(self.layers[before].activation, delta, below)
        return gradient, losses.mean(-1)

    def losses(self, theta: Tensor, X: Tensor, labels: Tensor) -> Tensor:
        """L alone, shape (runs,), for the same arguments."""
        return self.loss.values(self._forward(theta, X)[-1], labels.expand(len(theta), -1)).mean(-1)

    def hessian_product(self, theta: Tensor, X: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ Σ_i ∇²ℓ_i(θ) v for v of shape (p,): both passes differentiated along v, in four products a layer.

        Args:
            theta: shape (p,).
            X: shape (n, ...); ``labels`` (n,).

        Source: Pearlmutter (1994), Eq. 10 to 12.
        """
        last = len(self.layers) - 1
        hidden = [h[0] for h in self._forward(theta.unsqueeze(0), X.unsqueeze(0))]
        outputs = hidden.pop()
        delta = _outer(self.loss, outputs, torch.eye(outputs.shape[1]).to(theta)[labels])[1]
        shares = None if self.loss is SQUARED else outputs.softmax(1)
        weights = [_matrix(layer, theta) for layer in self.layers]
        deltas, bends = [delta], list[Tensor | None]()
        for i in range(last, 0, -1):
            slope, activation = deltas[0] @ weights[i], self.layers[i - 1].activation
            bend = None if activation is None else BENDS.get(type(activation))
            bends.insert(0, None if bend is None else bend(slope, hidden[i]))
            deltas.insert(0, _pulled(activation, slope, hidden[i]))

        def product(v: Tensor) -> Tensor:
            out, along = torch.empty_like(v), list[Tensor]()  # how the inputs of the layers after the first change
            for i, layer in enumerate(self.layers):
                z = _affine(hidden[i], _matrix(layer, v), None if layer.bias is None else v[layer.bias])
                z = z + _affine(along[-1], weights[i], None) if along else z
                along.append(z if i == last else _pulled(layer.activation, z, hidden[i + 1]))
            change = along.pop()
            if shares is not None:
                change = shares * (change - (shares * change).sum(1, keepdim=True))
            for i in range(last, -1, -1):
                layer = self.layers[i]
                total = torch.mm(change.T, hidden[i], out=_matrix(layer, out))
                if layer.bias is not None:
                    torch.sum(change, 0, out=out[layer.bias])
                if i:
                    total.addmm_(deltas[i].T, along[i - 1])
                    change = (change @ weights[i]).addmm_(deltas[i], _matrix(layer, v))
                    change = _pulled(self.layers[i - 1].activation, change, hidden[i])
                    bend = bends[i - 1]
                    change = change if bend is None else change.addcmul_(bend, along[i - 1])
            return out

        return product

    def _forward(self, theta: Tensor, X: Tensor) -> list[Tensor]:
        """Inputs and what every layer gives, shapes (runs, B, width)."""
        runs = len(theta)
        hidden = [X.flatten(2).expand(runs, -1, -1)]
        for layer in self.layers:
            weight = theta[:, layer.weight].view(runs, layer.outputs, layer.inputs)
            z = _affine(hidden[-1], weight, None if layer.bias is None else theta[:, layer.bias])
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


def _affine(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hWᵀ + b for h (..., B, inputs), W (..., outputs, inputs) and b (..., outputs)."""
    if weight.shape[-2] < NARROW:
        z = (weight @ h.mT).mT
        return z if bias is None else z.add_(bias.unsqueeze(-2))
    if bias is None:
        return h @ weight.mT
    if h.ndim == 2:
        return torch.addmm(bias, h, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), h, weight.mT)


def _matrix(layer: _Layer, theta: Tensor) -> Tensor:
    return theta[layer.weight].view(layer.outputs, layer.inputs)


def _pulled(activation: nn.Module | None, slope: Tensor, h: Tensor) -> Tensor:
    return slope if activation is None else SLOPES[type(activation)](slope, h)


def _outer(loss: Loss, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample losses (runs, B) and their slopes in the outputs."""
    if loss is SQUARED:
        r = outputs - target
        return r.square().sum(-1) / 2, r
    logs = nn.functional.log_softmax(outputs, -1)
    return -(logs * target).sum(-1), logs.exp() - target
