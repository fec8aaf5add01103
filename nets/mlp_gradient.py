"""Back-propagation through fully connected networks written out: many small networks at once, a dozen calls a step.

The same numbers as automatic differentiation (a test holds them together), without its overhead, which for networks
of a few thousand parameters is most of a step. On a CPU small networks on minibatches run in the compiled loops of
:mod:`nets.mlp_compiled`, everything else in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nets import compiled_elements as elements
from nets.mlp_compiled import BLOCK, LAYER, gradients, padded, values
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Loss, class_rows
from theory.lanes import LANES
from theory.threads import share

Slope = Callable[[Tensor, Tensor], Tensor]
SLOPES: dict[type[nn.Module], Slope] = {
    nn.Tanh: torch.ops.aten.tanh_backward,
    nn.ReLU: lambda slope, h: torch.ops.aten.threshold_backward(slope, h, 0),
    nn.Sigmoid: torch.ops.aten.sigmoid_backward,
    nn.Identity: lambda slope, h: slope,
}
"""A slope times σ', which is a function of σ, in one pass over both."""
FUNCTIONS = {nn.Tanh: elements.TANH, nn.ReLU: elements.RELU, nn.Sigmoid: elements.SIGMOID}
LOSSES = {SQUARED: elements.SQUARED, CROSS_ENTROPY: elements.CROSS_ENTROPY}
PARAMETERS = {torch.float32: 20_000, torch.float64: 4_000}  # beyond which torch's products are as fast as the loops
SAMPLES = range(4, 2049)  # a minibatch has, where loops pay
GRAIN = 2_000_000  # multiplications for which it pays to wake another thread
NARROW = 16  # outputs; products with so few columns are slow on CPUs, and a third of the time transposed


@dataclass(frozen=True)
class _Layer:
    """Where weight and bias of one layer lie in θ, and what follows the layer."""

    weight: slice
    bias: slice | None
    outputs: int
    inputs: int
    activation: nn.Module | None


Gradients = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(θ (R, p), rows (R or 1, B) of a set, or None for all) ↦ ∇L (R, p) and L (R,), each on its own samples."""


@dataclass(frozen=True)
class DenseGradient:
    """Gradients of one loss of one fully connected architecture."""

    layers: tuple[_Layer, ...]
    loss: Loss
    _tables: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, theta: Tensor, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """∇L, shape (R, p), and L, shape (R,), each on its own samples.

        Args:
            theta: shape (R, p).
            X: shape (R, B, ...), or (1, B, ...) for samples that all share; ``labels`` (R or 1, B).
        """
        weights = theta.new_full((1, labels.shape[1]), 1 / labels.shape[1])
        gradient, losses = self._both(theta, X.flatten(2), self.targets_of(labels, theta), weights)
        return gradient, losses.mean(-1)

    def on(self, X: Tensor, labels: Tensor) -> Gradients:
        """The same on minibatches of one set X (n, ...), labels (n,)."""
        flat, targets = X.flatten(1).contiguous(), self.targets_of(labels.unsqueeze(0), X)[0]
        everything = torch.arange(len(X), device=X.device).unsqueeze(0)

        def on_rows(theta: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            rows = everything if rows is None else rows
            weights = theta.new_full((1, rows.shape[1]), 1 / rows.shape[1])
            if self.compiles(theta, rows.shape[1]):
                gradient, losses = self._loops(theta, flat, targets, rows, weights, None)
            else:
                gradient, losses = self._products(theta, flat[rows], targets[rows], weights, None)
            return gradient, losses.mean(-1)

        return on_rows

    def weighted_gradient(
        self, theta: Tensor, X: Tensor, y: Tensor, weights: Tensor | None, slopes: Tensor | None = None,
        minibatches: int = 1,
    ) -> Tensor:  # fmt: skip
        """∂/∂θ of Σ_i w_i ℓ_i(θ) + Σ_i ⟨s_i, h_θ(x_i)⟩, shape (R, p), the form of :class:`simulators.network.Network`.

        Args:
            X: shape (R, B, ...), or (1, B, ...).
            y: class numbers, shape (R or 1, B), or targets, shape (R or 1, B, outputs).
            weights: w of either sign, shape (R, B); 0 where None.
            slopes: s, shape (R, B, outputs); 0 where None.
            minibatches: without a meaning here, where no sample knows of another.
        """
        weights = theta.new_zeros(1, X.shape[1]) if weights is None else weights
        return self._both(theta, X.flatten(2), self.targets_of(y, theta), weights, slopes)[0]

    def losses(self, theta: Tensor, X: Tensor, labels: Tensor) -> Tensor:
        """L alone, shape (R,), for the arguments of a call."""
        if len(X) > 1 or len(labels) > 1 or not self.compiles(theta, min(X.shape[1], BLOCK)):
            return self.loss.values(self.forward(theta, X.flatten(2))[-1], labels.expand(len(theta), -1)).mean(-1)
        total, (layers, size) = theta.new_empty(len(theta)), self._table(BLOCK)
        target = self.targets_of(labels, theta)[0]
        self._fitting(theta, X[0].flatten(1), target, torch.arange(X.shape[1]).unsqueeze(0))
        arrays = [part.contiguous().numpy() for part in (theta, X[0].flatten(1), target)]
        work = theta.numel() * X.shape[1]
        share(values, (*arrays, layers, size, LOSSES[self.loss], total.numpy()), min(len(theta), work // GRAIN))
        return total / X.shape[1]

    def sample_gradients(self, theta: Tensor, X: Tensor, labels: Tensor) -> Tensor:
        """∇ℓ_i of every sample, shape (n, p), at one θ of shape (p,)."""
        hidden = self.forward(theta.unsqueeze(0), X.flatten(1).unsqueeze(0))
        delta = loss_and_slopes(self.loss, hidden.pop()[0], self.targets_of(labels.unsqueeze(0), theta)[0])[1]
        gradient = theta.new_empty(len(X), len(theta))
        for i in range(len(self.layers) - 1, -1, -1):
            layer, below = self.layers[i], hidden[i][0]
            shape = (len(X), layer.outputs, layer.inputs)
            torch.mul(delta.unsqueeze(2), below.unsqueeze(1), out=gradient[:, layer.weight].view(shape))
            if layer.bias is not None:
                gradient[:, layer.bias] = delta
            if i:
                delta = pulled(self.layers[i - 1].activation, delta @ matrix(layer, theta), below)
        return gradient

    def targets_of(self, y: Tensor, like: Tensor) -> Tensor:
        """Class numbers (..., B) as rows of the unit matrix; targets as they are, a row a sample."""
        return class_rows(y, self.layers[-1].outputs, like)

    def _both(
        self, theta: Tensor, X: Tensor, target: Tensor, weights: Tensor, slopes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """∂/∂θ of Σ_i w_i ℓ_i + ⟨s_i, h_i⟩, (R, p), and ℓ, (R, B), for X (R or 1, B, inputs) and such targets."""
        if not self.compiles(theta, X.shape[1]):
            return self._products(theta, X, target, weights, slopes)
        sets, count = max(len(X), len(target)), X.shape[1]
        flat, targets = (part.expand(sets, -1, -1).flatten(0, 1) for part in (X, target))
        return self._loops(theta, flat, targets, torch.arange(sets * count).view(sets, count), weights, slopes)

    def _products(
        self, theta: Tensor, X: Tensor, target: Tensor, weights: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden = self.forward(theta, X)
        losses, delta = loss_and_slopes(self.loss, hidden.pop(), target)
        delta, gradient = delta * weights.unsqueeze(-1), torch.empty_like(theta)
        delta = delta if slopes is None else delta + slopes.reshape(delta.shape)
        for i in range(len(self.layers) - 1, -1, -1):
            layer, below = self.layers[i], hidden[i]
            shape = (len(theta), layer.outputs, layer.inputs)
            outer = torch.bmm if X.shape[1] > 1 else torch.mul
            gradient[:, layer.weight].view(shape).copy_(outer(delta.mT, below))
            if layer.bias is not None:
                gradient[:, layer.bias] = delta.sum(1)
            if i:
                delta = torch.bmm(delta, theta[:, layer.weight].view(shape))
                delta = pulled(self.layers[i - 1].activation, delta, below)
        return gradient, losses

    def compiles(self, theta: Tensor, count: int) -> bool:
        """Whether the loops know this precision and device, and pay; it does not depend on how many networks run."""
        return theta.device.type == "cpu" and theta.shape[1] <= PARAMETERS.get(theta.dtype, 0) and count in SAMPLES

    def _loops(
        self, theta: Tensor, X: Tensor, targets: Tensor, rows: Tensor, weights: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (R, p), B = theta.shape, rows.shape[1]
        self._fitting(theta, X, targets, rows)
        if weights.shape not in ((1, B), (R, B)):
            raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit: give ({R}, {B}).")
        layers, size = self._table(B)
        gradient, losses = theta.new_empty(R, p), theta.new_empty(R, B)
        slopes = theta.new_empty(1, 0, 0) if slopes is None else slopes.reshape(R, B, -1)
        arrays = [part.contiguous().numpy() for part in (theta, X, targets, rows, weights, slopes)]
        loop = (*arrays, layers, size, LOSSES[self.loss], gradient.numpy(), losses.numpy())
        share(gradients, loop, min(R, R * B * 3 * p // GRAIN))
        return gradient, losses

    def _fitting(self, theta: Tensor, X: Tensor, targets: Tensor, rows: Tensor) -> None:
        """The loops check nothing."""
        fits = X.shape[1] == self.layers[0].inputs and theta.shape[1] == self.parameters
        fits = fits and X.dtype == targets.dtype == theta.dtype and len(X) == len(targets)
        least, most = rows.aminmax()
        if not fits or len(rows) not in (1, len(theta)) or least < 0 or most >= len(X):
            raise ValueError(
                f"θ {tuple(theta.shape)}, {len(X)} samples of {X.shape[1]} inputs and rows {tuple(rows.shape)} do not "
                f"fit: give θ (R, {self.parameters}) and (R or 1, B) numbers of samples of {self.layers[0].inputs} "
                "inputs, all in one precision."
            )

    @property
    def parameters(self) -> int:
        last = self.layers[-1]
        return last.weight.stop if last.bias is None else last.bias.stop

    def _table(self, count: int) -> tuple[np.ndarray, int]:
        """What the loops need to know of the layers for minibatches of so many samples, and the size of buffers."""
        if count not in self._tables:
            below = list[int]()

            def places(i: int, new: Callable[[int, int], int]) -> dict[str, int]:
                inputs, outputs = self.layers[i].inputs, self.layers[i].outputs
                x = below.pop() if below else new(count, inputs)
                below.append(new(count, outputs))
                return {
                    "x": x, "y": below[0], "slope": new(count, outputs), "kernel": new(inputs, outputs),
                    "turned": new(outputs, inputs), "shift": new(1, outputs),
                }  # fmt: skip

            self._tables[count] = table(self.layers, LAYER, places)
        return self._tables[count]

    def forward(self, theta: Tensor, X: Tensor) -> list[Tensor]:
        """Inputs and what every layer gives, shapes (R, B, width)."""
        runs = len(theta)
        hidden = [X.expand(runs, -1, -1)]
        for layer in self.layers:
            weight = theta[:, layer.weight].view(runs, layer.outputs, layer.inputs)
            z = affine(hidden[-1], weight, None if layer.bias is None else theta[:, layer.bias])
            hidden.append(z if layer.activation is None else layer.activation(z))
        return hidden


def table(
    layers: Sequence[_Layer], kind: np.dtype, places: Callable[[int, Callable[[int, int], int]], dict[str, int]]
) -> tuple[np.ndarray, int]:
    """Records of the layers for compiled loops, and how many numbers their buffers hold; the last 64 are a tile.

    Args:
        places: number of a layer, and what gives room for rows of numbers ↦ fields of its record.
    """
    size, records = 0, list[tuple[int, ...]]()

    def new(rows: int, numbers: int) -> int:
        nonlocal size
        place, size = size, size + padded(rows) * padded(numbers)
        return place

    for i, layer in enumerate(layers):
        fields = {
            "weight": layer.weight.start, "bias": -1 if layer.bias is None else layer.bias.start,
            "inputs": layer.inputs, "outputs": layer.outputs, "function": FUNCTIONS.get(type(layer.activation), -1),
            **places(i, new),
        }  # fmt: skip
        records.append(tuple(fields[name] for name in kind.names or ()))
    return np.array(records, dtype=kind), size + LANES * LANES


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


def affine(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hWᵀ + b for h (..., B, inputs), W (..., outputs, inputs) and b (..., outputs)."""
    if weight.shape[-2] < NARROW:
        z = (weight @ h.mT).mT
        return z if bias is None else z.add_(bias.unsqueeze(-2))
    if bias is None:
        return h @ weight.mT
    if h.ndim == 2:
        return torch.addmm(bias, h, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), h, weight.mT)


def matrix(layer: _Layer, theta: Tensor) -> Tensor:
    return theta[layer.weight].view(layer.outputs, layer.inputs)


def pulled(activation: nn.Module | None, slope: Tensor, h: Tensor) -> Tensor:
    return slope if activation is None else SLOPES[type(activation)](slope, h)


def loss_and_slopes(loss: Loss, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample losses (runs, B) and their slopes in the outputs."""
    if loss is SQUARED:
        r = outputs - target
        return r.square().sum(-1) / 2, r
    logs = nn.functional.log_softmax(outputs, -1)
    return -(logs * target).sum(-1), logs.exp() - target
