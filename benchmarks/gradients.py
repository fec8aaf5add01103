"""Gradients of many small networks at once, and Hessian products: compiled loops against automatic differentiation.

Usage: python benchmarks/gradients.py [--rounds 7] [--calls 10]

Every network has parameters and a minibatch of its own. Peers: ``torch.func.vmap`` over the networks with one backward
pass, and a loop over networks with a backward pass each. All have one thread. Gradients are compared in float64 (in
float32 a rounding error can put a ReLU on its other side), then the clock starts, in float32. A Hessian product is
compared with one more backward pass through a graph that is kept. Writes benchmarks/results/gradients.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import torch
from measure import in_turn, row, save
from torch import Tensor, nn

from nets.batch_statistics import on_batch_statistics
from nets.convolutional_gradient import ConvolutionalGradient
from nets.curvature import hessian
from nets.mlp import mlp
from nets.mlp_gradient import dense_gradient
from nets.objective import CROSS_ENTROPY, FlatNet, Objective
from nets.resnet import resnet

Build = Callable[[torch.dtype], nn.Module]


def residual(**options: Any) -> Build:
    """A residual network on batch statistics."""
    return lambda dtype: on_batch_statistics(resnet(**options, dtype=dtype))


def connected(*widths: int) -> Build:
    """A fully connected tanh network."""
    return lambda dtype: mlp(widths, dtype=dtype)


CASES: tuple[tuple[str, Build, int, int], ...] = (
    ("residual networks, BatchNorm", residual(norm="batch"), 64, 8),
    ("residual networks, BatchNorm", residual(norm="batch"), 8, 8),
    ("residual networks, GroupNorm", residual(norm="group"), 32, 16),
    ("residual networks, no norm, tanh", residual(widths=(4, 8), activation=nn.Tanh), 32, 32),
    ("fully connected networks, 64-32-10", connected(64, 32, 10), 64, 32),
    ("fully connected networks, 64-32-10", connected(64, 32, 10), 4, 32),
    ("fully connected networks, 64-64-64-10", connected(64, 64, 64, 10), 32, 32),
)
PRODUCTS = (("64-32-10", connected(64, 32, 10), 400), ("64-64-64-10", connected(64, 64, 64, 10), 400))


def ways(build: Build, runs: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same gradients found by each side, ours under the empty name."""
    module = build(dtype)
    net, generator = FlatNet(module), torch.Generator().manual_seed(0)
    theta = net.theta + 0.1 * torch.randn(runs, net.p, generator=generator).to(dtype)
    X = torch.randn(runs, batch, 1, 8, 8, generator=generator).to(dtype)
    labels = torch.randint(0, 10, (runs, batch), generator=generator)
    compiled = dense_gradient(net, CROSS_ENTROPY) or ConvolutionalGradient(module, CROSS_ENTROPY.name)

    def under_vmap() -> Tensor:
        leaf = theta.clone().requires_grad_()
        losses = CROSS_ENTROPY.values(torch.func.vmap(net.outputs)(leaf, X), labels).mean(-1)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    def one_by_one() -> Tensor:
        rows = []
        for state, x, y in zip(theta, X, labels, strict=True):
            leaf = state.clone().requires_grad_()
            rows.append(torch.autograd.grad(CROSS_ENTROPY.values(net.outputs(leaf, x), y).mean(), leaf)[0])
        return torch.stack(rows)

    return {"torch.func.vmap": under_vmap, "loop over networks": one_by_one, "": lambda: compiled(theta, X, labels)[0]}


def products(build: Build, samples: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same Hessian product by each side, from what is built once."""
    net, generator = FlatNet(build(dtype)), torch.Generator().manual_seed(0)
    X, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((samples, 1, 8, 8), (net.p,)))
    labels = torch.randint(0, 10, (samples,), generator=generator)
    leaf, ours = net.theta.clone().requires_grad_(), hessian(Objective(net, X, labels, CROSS_ENTROPY), net.theta)
    loss = CROSS_ENTROPY.values(net.outputs(leaf, X), labels).mean()
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return {
        "backward pass through the kept graph": lambda: torch.autograd.grad(gradient, leaf, v, retain_graph=True)[0],
        "": lambda: ours @ v,
    }


def compare(name: str, build: Build, runs: int, batch: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Rows of one network's gradients."""
    work = f"gradients of {runs} {name}, on {batch} images each"
    return rows(work, lambda dtype: ways(build, runs, batch, dtype), rounds, calls, runs, "network")


def rows(
    work: str, sides: Callable[[torch.dtype], dict[str, Callable[[], Tensor]]], rounds: int, calls: int, each_call: int,
    unit: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every side against ours, results compared first."""
    exact = {way: run() for way, run in sides(torch.float64).items()}
    for way, gradient in exact.items():
        gap = float((gradient - exact[""]).norm() / exact[""].norm())
        assert gap < 1e-11, f"{way}: results differ by {gap:.2g}"
    single = sides(torch.float32)
    sums = {way: float(run().double().abs().sum()) for way, run in single.items()}
    taken = in_turn({way: lambda run=run: [run() for _ in range(calls)] for way, run in single.items()}, rounds)
    each = {way: [t / calls / each_call for t in times] for way, times in taken.items()}
    work += f", p = {exact[''].shape[-1]}"
    return [row(work, way, each[way], each[""], (sums[way], sums[""]), unit) for way in single if way]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    found = [r for case in CASES for r in compare(*case, options.rounds, options.calls)]
    for name, build, samples in PRODUCTS:
        work = f"Hessian product of a fully connected network, {name}, {samples} samples"
        sides = partial(products, build, samples)
        found += rows(work, sides, options.rounds, 20 * options.calls, 1, "product")
    save("gradients", found)


if __name__ == "__main__":
    main()
