"""Gradients of many small residual networks at once: compiled loops against automatic differentiation.

Usage: python benchmarks/convolutional.py [--rounds 7] [--calls 10]

Every network has parameters and a minibatch of its own, float32. Peers: ``torch.func.vmap`` over the networks with one
backward pass, and a loop over networks with a backward pass each. All have one thread. Gradients are compared before
the clock starts. Writes benchmarks/results/convolutional.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import numba
import torch
from measure import in_turn, row, save
from torch import Tensor, nn

from nets.batch_statistics import on_batch_statistics
from nets.convolutional_gradient import ConvolutionalGradient
from nets.objective import CROSS_ENTROPY, FlatNet
from nets.resnet import resnet

CASES = (
    ("BatchNorm", {"norm": "batch"}, 64, 8),
    ("BatchNorm", {"norm": "batch"}, 8, 8),
    ("GroupNorm", {"norm": "group"}, 32, 16),
    ("no norm, tanh", {"widths": (4, 8), "activation": nn.Tanh}, 32, 32),
)


def compare(name: str, options: dict[str, Any], runs: int, batch: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    module = on_batch_statistics(resnet(**options, dtype=torch.float32))
    net, generator = FlatNet(module), torch.Generator().manual_seed(0)
    theta = net.theta + 0.1 * torch.randn(runs, net.p, generator=generator)
    X = torch.randn(runs, batch, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (runs, batch), generator=generator)
    compiled = ConvolutionalGradient(module, CROSS_ENTROPY.name)

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

    ways = {"torch.func.vmap": under_vmap, "loop over networks": one_by_one, "": lambda: compiled(theta, X, labels)[0]}
    found = {way: run() for way, run in ways.items()}
    for way, gradient in found.items():
        gap = float((gradient - found[""]).norm() / found[""].norm())
        assert gap < 1e-5, f"{way or 'compiled'}: gradients differ by {gap:.2g}"
    taken = in_turn({way: lambda run=run: [run() for _ in range(calls)] for way, run in ways.items()}, rounds)
    each = {way: [t / calls / runs for t in times] for way, times in taken.items()}
    work = f"gradients of {runs} residual networks, {name}, p = {net.p}, on {batch} images each"
    sums = {way: float(gradient.double().abs().sum()) for way, gradient in found.items()}
    return [row(work, way, each[way], each[""], (sums[way], sums[""]), "network") for way in ways if way]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    save("convolutional", [r for case in CASES for r in compare(*case, options.rounds, options.calls)])


if __name__ == "__main__":
    main()
