"""Hessian products of fully connected networks written out, in compiled loops where networks and sets are small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nets.mlp_compiled import padded
from nets.mlp_gradient import (
    DenseGradient,
    Slope,
    affine,
    loss_and_slopes,
    matrix,
    pulled,
    table,
)
from nets.mlp_hessian_compiled import CURVED, prepare, product
from nets.objective import SQUARED

Product = Callable[[Tensor], Tensor]
BENDS: dict[type[nn.Module], Slope] = {
    nn.Tanh: lambda slope, h: -2 * h * slope,
    nn.Sigmoid: lambda slope, h: (1 - 2 * h) * slope,
}
"""A slope times σ''/σ', which is a function of σ; the others have none."""


@dataclass(frozen=True, eq=False)
class _Passes:
    """A forward and a backward pass: inputs of the layers, slopes in what they give before σ, and, but for the first,
    in their inputs; softmax of the outputs for cross-entropy."""

    inputs: list[Tensor]
    slopes: list[Tensor]
    pulled: list[Tensor]
    shares: Tensor | None


def hessian_product(net: DenseGradient, theta: Tensor, X: Tensor, labels: Tensor) -> Product:
    """v ↦ Σ_i ∇²ℓ_i(θ) v for v of shape (p,): both passes differentiated along v, in four products a layer.

    Args:
        theta: shape (p,).
        X: shape (n, ...); ``labels`` (n,).

    Source: Pearlmutter (1994), Eq. 10 to 12.
    """
    passes = _passes(net, theta, X, labels)
    if net.compiles(theta.unsqueeze(0), len(X)):
        return _in_loops(net, theta, passes)
    return _in_products(net, theta, passes)


def _passes(net: DenseGradient, theta: Tensor, X: Tensor, labels: Tensor) -> _Passes:
    inputs = [h[0] for h in net.forward(theta.unsqueeze(0), X.flatten(1).unsqueeze(0))]
    outputs = inputs.pop()
    slopes = [loss_and_slopes(net.loss, outputs, net.targets_of(labels.unsqueeze(0), theta)[0])[1]]
    back = list[Tensor]()
    for i in range(len(net.layers) - 1, 0, -1):
        back.insert(0, slopes[0] @ matrix(net.layers[i], theta))
        slopes.insert(0, pulled(net.layers[i - 1].activation, back[0], inputs[i]))
    return _Passes(inputs, slopes, back, None if net.loss is SQUARED else outputs.softmax(1))


def _in_products(net: DenseGradient, theta: Tensor, passes: _Passes) -> Product:
    layers, hidden, last = net.layers, passes.inputs, len(net.layers) - 1
    weights, bends = [matrix(layer, theta) for layer in layers], list[Tensor | None]()
    for layer, slope, h in zip(layers[:-1], passes.pulled, hidden[1:], strict=True):
        bend = BENDS.get(type(layer.activation)) if layer.activation else None
        bends.append(None if bend is None else bend(slope, h))

    def times(v: Tensor) -> Tensor:
        out, along = torch.empty_like(v), list[Tensor]()  # how the inputs of the layers after the first change
        for i, layer in enumerate(layers):
            z = affine(hidden[i], matrix(layer, v), None if layer.bias is None else v[layer.bias])
            z = z + affine(along[-1], weights[i], None) if along else z
            along.append(z if i == last else pulled(layer.activation, z, hidden[i + 1]))
        change, shares = along.pop(), passes.shares
        if shares is not None:
            change = shares * (change - (shares * change).sum(1, keepdim=True))
        for i in range(last, -1, -1):
            layer = layers[i]
            total = torch.mm(change.T, hidden[i], out=matrix(layer, out))
            if layer.bias is not None:
                torch.sum(change, 0, out=out[layer.bias])
            if i:
                total.addmm_(passes.slopes[i].T, along[i - 1])
                change = (change @ weights[i]).addmm_(passes.slopes[i], matrix(layer, v))
                change = pulled(layers[i - 1].activation, change, hidden[i])
                bend = bends[i - 1]
                change = change if bend is None else change.addcmul_(bend, along[i - 1])
        return out

    return times


def _in_loops(net: DenseGradient, theta: Tensor, passes: _Passes) -> Product:
    n = len(passes.inputs[0])

    def places(i: int, new: Callable[[int, int], int]) -> dict[str, int]:
        layer = net.layers[i]
        inputs, outputs = layer.inputs, layer.outputs
        sizes = {
            "x": (n, inputs), "x_along": (n, inputs), "slope": (n, outputs), "slope_along": (n, outputs),
            "pulled": (n, inputs), "kernel": (inputs, outputs), "turned": (outputs, inputs),
            "kernel_along": (inputs, outputs), "turned_along": (outputs, inputs), "shift_along": (1, outputs),
            "sums": (outputs, inputs),
        }  # fmt: skip
        return {name: new(*size) for name, size in sizes.items()}

    layers, size = table(net.layers, CURVED, places)
    a = theta.new_zeros(size)
    for layer, record, x, slope in zip(net.layers, layers, passes.inputs, passes.slopes, strict=True):
        _rows(a, record["x"], n, layer.inputs).copy_(x)
        _rows(a, record["slope"], n, layer.outputs).copy_(slope)
    for layer, record, back in zip(net.layers[1:], layers[1:], passes.pulled, strict=True):
        _rows(a, record["pulled"], n, layer.inputs).copy_(back)
    shares = theta.new_empty(0, 0) if passes.shares is None else passes.shares
    buffers, softmax = a.numpy(), shares.contiguous().numpy()
    prepare(buffers, theta.contiguous().numpy(), layers)

    def times(v: Tensor) -> Tensor:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        product(buffers, v.contiguous().numpy(), layers, n, softmax, out.numpy())
        return out

    return times


def _rows(a: Tensor, place: int, count: int, numbers: int) -> Tensor:
    """Where buffers hold a row of numbers a sample."""
    return a[place : place + count * padded(numbers)].view(count, -1)[:, :numbers]
