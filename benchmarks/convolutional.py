"""Gradients of many small residual networks at once: compiled loops against automatic differentiation.

Usage: python benchmarks/convolutional.py [--rounds 7] [--calls 10]

Every network has parameters and a minibatch of its own. Peers: ``torch.func.vmap`` over the networks with one backward
pass, and a loop over networks with a backward pass each. All have one thread. Gradients are compared in float64 (in
float32 a rounding error can put a ReLU on its other side), then the clock starts, in float32. Writes
benchmarks/results/convolutional.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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


def ways(options: dict[str, Any], runs: int, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same gradients found by each side, ours under the empty name."""
    module = on_batch_statistics(resnet(**options, dtype=dtype))
    net, generator = FlatNet(module), torch.Generator().manual_seed(0)
    theta = net.theta + 0.1 * torch.randn(runs, net.p, generator=generator).to(dtype)
    X = torch.randn(runs, batch, 1, 8, 8, generator=generator).to(dtype)
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

    return {"torch.func.vmap": under_vmap, "loop over networks": one_by_one, "": lambda: compiled(theta, X, labels)[0]}


def compare(name: str, options: dict[str, Any], runs: int, batch: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Rows of one network."""
    exact = {way: run() for way, run in ways(options, runs, batch, torch.float64).items()}
    for way, gradient in exact.items():
        gap = float((gradient - exact[""]).norm() / exact[""].norm())
        assert gap < 1e-11, f"{way}: gradients differ by {gap:.2g}"
    single = ways(options, runs, batch, torch.float32)
    sums = {way: float(run().double().abs().sum()) for way, run in single.items()}
    taken = in_turn({way: lambda run=run: [run() for _ in range(calls)] for way, run in single.items()}, rounds)
    each = {way: [t / calls / runs for t in times] for way, times in taken.items()}
    work = f"gradients of {runs} residual networks, {name}, p = {exact[''].shape[1]}, on {batch} images each"
    return [row(work, way, each[way], each[""], (sums[way], sums[""]), "network") for way in single if way]


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
