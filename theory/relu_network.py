"""Fully connected ReLU networks as flat parameter vectors: the layout θ ↔ weights, and what is computed from both.

Leading axes of θ are batch axes (schedules, seeds, times); results keep them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReluNetwork:
    """h(x) = W_L (… (W_2 (W_1 x + b_1)₊ + b_2)₊ …) + b_L with one output, θ = (W_1, b_1, W_2, b_2, …) row by row.

    An instance is a model h(θ, X) for every loop and SDE that takes one; W_l has shape (widths[l], widths[l-1]).

    >>> network = ReluNetwork((2, 3, 1))
    >>> network.size
    9
    >>> theta = torch.tensor([1.0, 0, 0, 1, -1, 0, 2, 3, 4])
    >>> network(theta, torch.tensor([[1.0, -1.0], [-2.0, 1.0]]))
    tensor([ 2., 11.])

    Attributes:
        widths: number of inputs, of units of each hidden layer, and 1.
        biases: whether each of the L weight layers has a bias; empty for none at all.

    Raises:
        ValueError: no hidden layer, a width below 1, more than one output, not one bias flag per weight layer.
    """

    widths: tuple[int, ...]
    biases: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or min(self.widths) < 1 or self.widths[-1] != 1:
            raise ValueError(
                f"widths {self.widths} are no network: give inputs, one or more hidden widths, and 1 output, "
                "e.g. (2, 20, 1)."
            )
        if self.biases and len(self.biases) != self.depth:
            raise ValueError(f"{len(self.biases)} bias flags for {self.depth} weight layers: give one each, or none.")

    @property
    def depth(self) -> int:
        """L, the number of weight layers; there are L - 1 hidden layers."""
        return len(self.widths) - 1

    @property
    def size(self) -> int:
        """p, the number of parameters."""
        return sum(rows * (columns + bias) for rows, columns, bias in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, int, bool]]:
        """(outputs, inputs, has a bias) of each weight layer."""
        return list(zip(self.widths[1:], self.widths[:-1], self.biases or (False,) * self.depth, strict=True))

    def split(self, theta: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """(W_l, b_l or None) of each weight layer, shapes (..., outputs, inputs) and (..., outputs): views of θ.

        Raises:
            ValueError: θ of another size.
        """
        if theta.shape[-1] != self.size:
            raise ValueError(f"θ has {theta.shape[-1]} entries where the network {self.widths} has {self.size}.")
        parts, at = [], 0
        for rows, columns, biased in self.shapes:
            weight = theta[..., at : at + rows * columns].reshape(*theta.shape[:-1], rows, columns)
            at += rows * columns
            parts.append((weight, theta[..., at : at + rows] if biased else None))
            at += rows * biased
        return parts

    def join(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """θ of the weights and biases: the inverse of :meth:`split`, shape (..., p)."""
        flat = [piece for weight, bias in parts for piece in (weight.flatten(-2), bias) if piece is not None]
        return torch.cat(flat, -1)

    def __call__(self, theta: Tensor, X: Tensor) -> Tensor:
        """h(θ, X), shape (..., n), for θ (..., p) and X (n, d) or (..., n, d)."""
        return self._layers(theta, X)[-1].squeeze(-1)

    def preactivations(self, theta: Tensor, X: Tensor, layer: int = 1) -> Tensor:
        """What enters the ReLUs of hidden layer ``layer`` = 1 … L-1, shape (..., n, units)."""
        return self._layers(theta, X)[self._hidden(layer) - 1]

    def activations(self, theta: Tensor, X: Tensor, layer: int = 1) -> Tensor:
        """What leaves the ReLUs of hidden layer ``layer`` = 1 … L-1, shape (..., n, units)."""
        return torch.relu(self.preactivations(theta, X, layer))

    def contributions(self, theta: Tensor, X: Tensor) -> Tensor:
        """What each unit of the last hidden layer adds to the output, (..., n, units): h without the bias, in sum."""
        outer, _ = self.split(theta)[-1]
        return self.activations(theta, X, self.depth - 1) * outer

    def jacobian(self, theta: Tensor, X: Tensor) -> Tensor:
        """Φ(θ) with rows ∇_θ h(θ, x_i), shape (..., n, p), one backward pass for all samples and replicates."""
        layers, parts = self._layers(theta, X), self.split(theta)
        below, blocks = [X, *(torch.relu(z) for z in layers[:-1])], []
        delta = torch.ones_like(layers[-1])  # ∂h/∂z of the layer at hand, (..., n, units)
        for level in range(self.depth - 1, -1, -1):
            weight, bias = parts[level]
            if bias is not None:
                blocks.append(delta)
            blocks.append((delta.unsqueeze(-1) * below[level].unsqueeze(-2)).flatten(-2))
            if level:
                delta = (delta @ weight) * (layers[level - 1] > 0)
        return torch.cat(blocks[::-1], -1)

    def unit_parameters(self, layer: int = 1) -> Tensor:
        """Positions in θ of all weights into and out of each unit of hidden layer ``layer``, bias included.

        Shape (units, inputs + bias + outputs), int64: row j of W_l, entry j of b_l, column j of W_{l+1}.
        """
        self._hidden(layer)
        (weight, bias), (above, _) = self.split(torch.arange(self.size))[layer - 1 : layer + 1]
        inner = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
        return torch.cat([inner, above.T], 1)

    def _layers(self, theta: Tensor, X: Tensor) -> list[Tensor]:
        """What enters each layer's nonlinearity, (..., n, units); the last is the output."""
        inner, layers = X, []
        for weight, bias in self.split(theta):
            z = inner @ weight.transpose(-1, -2)
            layers.append(z if bias is None else z + bias.unsqueeze(-2))
            inner = torch.relu(layers[-1])
        return layers

    def _hidden(self, layer: int) -> int:
        if not 1 <= layer < self.depth:
            raise ValueError(f"there is no hidden layer {layer}: choose between 1 and {self.depth - 1}.")
        return layer
