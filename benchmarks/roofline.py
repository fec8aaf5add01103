"""How near the hot CPU loops come to what the machine can do: ceilings, counts a step, fraction reached.

Usage: python benchmarks/roofline.py [--rounds 200]
Everything runs in one thread; the least of ``rounds`` runs of about a millisecond is taken, of ceilings and loops
alike, so that other work on the machine disturbs both least. Ceilings: triad bandwidth by working set, multiply-adds a
second, the loops' exponential and their normals. Counts a step are from the algorithm. A loop's limits are the seconds
a step would take if only that resource were used, at its ceiling; the fraction reached is the largest limit over the
measured seconds. Writes benchmarks/results/roofline.json and the tables of docs/roofline.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from measure import save, seconds
from numba import njit

from nets.batch_statistics import on_batch_statistics
from nets.convolutional_gradient import ConvolutionalGradient
from nets.convolutional_plan import CONVOLUTION, plan
from nets.diagonal import initial_state, sgd, standard_measurements
from nets.mlp import mlp
from nets.mlp_gradient import dense_gradient
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet
from nets.relu import sgd as relu_sgd
from nets.resnet import resnet
from simulators.diagonal import integrate_diagonal
from simulators.neuron import DEGREE, FUNCTIONS, single_neuron
from simulators.noise import BrownianIncrements
from simulators.relu import integrate_relu
from simulators.scalar import exponentials, quartic_well
from theory.collapse_data import neuron_data
from theory.diagonal import DiagonalState
from theory.diagonal_sde import to_logs
from theory.normals import fill_row, normals_key
from theory.problem import gaussian_sparse
from theory.relu_init import gaussian
from theory.relu_published import two_layer
from theory.schedule import Schedule
from theory.sde import LabelNoise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
MARK = "<!-- below this line: written by benchmarks/roofline.py -->"
SIZES = {"L1, 16 KiB": 2**14, "L2, 256 KiB": 2**18, "L3, 8 MiB": 2**23, "memory, 512 MiB": 2**29}


@dataclass(frozen=True)
class Loop:
    """A hot loop: seconds a step, and the least seconds a step that each resource allows."""

    name: str
    unit: str
    counts: str
    seconds: float
    limits: Mapping[str, float]
    left: str

    def row(self) -> dict[str, Any]:
        """As it is saved."""
        binding = max(self.limits, key=lambda name: self.limits[name])
        return {
            "loop": self.name, "unit": self.unit, "counts": self.counts, "seconds": self.seconds,
            "limits": dict(self.limits), "binding": binding, "fraction": self.limits[binding] / self.seconds,
            "left": self.left,
        }  # fmt: skip


@njit
def _triad(a, b, c, times):  # type: ignore[no-untyped-def]
    for repeat in range(times):
        for j in range(len(a)):
            a[j] = b[j] + (1.0 + repeat) * c[j]


@njit(fastmath={"contract"})
def _multiply_adds(v, times):  # type: ignore[no-untyped-def]
    """16 dependent multiply-adds an element; elements are independent."""
    for _ in range(times):
        for j in range(len(v)):
            x = v[j]
            for _ in range(16):
                x = x * 0.999 + 0.001
            v[j] = x


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # as the loops that it is a part of
def _exponentials(x, mantissa, bits, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        exponentials(x, mantissa, bits)


@njit
def _normals(key, out, times):  # type: ignore[no-untyped-def]
    for step in range(times):
        fill_row(key, step, 0, out)


def least(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` runs, after one that compiles."""
    run()
    return min(seconds(run) for _ in range(rounds))


def ceilings(rounds: int) -> dict[str, float]:
    """What one thread of the machine does at best: bytes, multiply-adds, exponentials and normals a second."""
    found = {}
    for name, size in SIZES.items():
        a, b, c = (np.ones(size // 24) for _ in range(3))
        times = max(1, 2**22 // size)
        run = functools.partial(_triad, a, b, c, times)
        taken = least(run, rounds if size < 2**26 else 5)
        found[f"triad, bytes/s, {name}"] = 24 * len(a) * times / taken
    v, square, single = np.ones(512), torch.ones(192, 192, dtype=torch.float64), torch.ones(192, 192)
    loop = 16 * 512 * 20 / least(lambda: _multiply_adds(v, 20), rounds)
    product = 192**3 / least(lambda: square @ square, rounds)
    found["multiply-adds/s, loop"], found["multiply-adds/s, matrix product"] = loop, product
    found["multiply-adds/s, matrix product, float32"] = 192**3 / least(lambda: single @ single, rounds)
    x = np.linspace(-5, 5, 512)
    mantissa, bits = np.empty(512), np.empty(512, dtype=np.int64)
    found["exponentials/s"] = 512 * 100 / least(lambda: _exponentials(x, mantissa, bits, 100), rounds)
    out, key = np.empty(1024), normals_key(0, "roofline")
    found["normals/s"] = 1024 * 100 / least(lambda: _normals(key, out, 100), rounds)
    return found


def diagonal_sgd(c: Mapping[str, float], rounds: int) -> Loop:
    """Steps alone."""
    n, d, seeds, steps = 80, 200, 4, 10_240
    problem = gaussian_sparse(n, d, 20)
    index, start = np.random.default_rng(0).integers(0, n, (seeds, steps)), initial_state(problem)
    taken = least(lambda: sgd(problem, start, [Schedule(0.2)], steps, seeds=range(seeds), indices=index), rounds)
    return Loop(
        "diagonal SGD, n = 80, d = 200", "seed-step",
        "a coordinate: 6 multiply-adds; 32 bytes read and 16 written in L1, 8 of them of a row of X from L2",
        taken / seeds / steps,
        {
            "multiply-adds": 6 * d / c["multiply-adds/s, loop"],
            "L1 traffic": 48 * d / c["triad, bytes/s, L1, 16 KiB"],
            "L2 traffic": 8 * d / c["triad, bytes/s, L2, 256 KiB"],
        },
        "the end of each sum, on which the next pass waits; beyond that only fewer bytes a coordinate",
    )  # fmt: skip


def quantities(c: Mapping[str, float], rounds: int) -> Loop:
    """Five quantities of recorded states."""
    n, d, states = 80, 200, 64
    problem = gaussian_sparse(n, d, 20)
    measure, start = standard_measurements(problem), initial_state(problem).expand(states)
    names = ("train loss", "test loss", "l1", "l0", "ln alpha")

    def run() -> None:
        state = DiagonalState(start.a, start.b, start.a_exponent, start.b_exponent)
        for name in names:
            measure[name](state)

    taken = least(run, rounds)
    return Loop(
        "losses, ℓ1, ℓ0, ln α of recorded states", "state",
        f"{n + d} d multiply-adds (the 1000 held-out rows enter by their QR factor), 2 d logarithms",
        taken / states,
        {
            "multiply-adds": (n + d) * d / c["multiply-adds/s, matrix product"],
            "logarithms, as fast as exponentials": 2 * d / c["exponentials/s"],
        },
        "torch makes a temporary for every operation: two passes over memory each",
    )  # fmt: skip


def diagonal_sde(c: Mapping[str, float], rounds: int) -> Loop:
    """Label noise at the state's own loss."""
    n, d, paths, steps = 80, 200, 32, 32
    problem = gaussian_sparse(n, d, 20)
    y0 = to_logs(initial_state(problem)).repeat(paths, 1)
    noise = BrownianIncrements(0, "roofline", paths, n)
    taken = least(lambda: integrate_diagonal(problem, LabelNoise(0.1), y0, 0.1, steps, noise), rounds)
    sums = {
        "multiply-adds": 2 * n * d / c["multiply-adds/s, matrix product"],
        "exponentials": 2 * d / c["exponentials/s"],
        "normals": n / c["normals/s"],
    }
    return Loop(
        "diagonal label-noise SDE, n = 80, d = 200", "path-step",
        "2nd multiply-adds in two matrix products, 2d exponentials, n normals; one after the other",
        taken / paths / steps, sums | {"all three in turn": sum(sums.values())},
        "the update of the logs and the sums of squares, a pass over 2d numbers each",
    )  # fmt: skip


def relu_steps(c: Mapping[str, float], rounds: int) -> Loop:
    """The two-layer teacher-student network."""
    run, seeds, steps = two_layer(), 32, 1024
    starts = gaussian(run.network, (0.5, 0.0), range(seeds))
    index = np.random.default_rng(0).integers(0, run.problem.n, (seeds, steps))
    schedule, p, hidden = [Schedule(0.1)], run.network.size, 20
    taken = least(
        lambda: relu_sgd(run.network, run.problem, starts, schedule, steps, seeds=range(seeds), indices=index), rounds
    )
    return Loop(
        "ReLU SGD, 2-20-1, 32 runs side by side", "run-step",
        f"2p + 2·{hidden} multiply-adds (p = {p}: forward, gradient with step, back through the upper layer); weights "
        "read twice and written once, activations and gradients read and written in L1",
        taken / seeds / steps,
        {
            "multiply-adds": (2 * p + 2 * hidden) / c["multiply-adds/s, loop"],
            "L1 traffic": (24 * p + 6 * 8 * 2 * hidden) / c["triad, bytes/s, L1, 16 KiB"],
        },
        "inputs and targets are gathered run by run; layers have few rows, so loops are short",
    )  # fmt: skip


def relu_sde(c: Mapping[str, float], rounds: int) -> Loop:
    """Its SDE with label noise at the path's own loss, in float32."""
    run, paths, steps = two_layer(), 32, 256
    n, p, hidden = run.problem.n, run.network.size, 20
    noise = BrownianIncrements(0, "roofline", paths, n, dtype=torch.float32)
    y0 = run.start.expand(paths, -1).float()
    taken = least(lambda: integrate_relu(run.network, run.problem, LabelNoise(0.1), y0, 0.1, steps, noise), rounds)
    sums = {
        "multiply-adds": n * (2 * p + hidden) / c["multiply-adds/s, matrix product, float32"],
        "normals": n / c["normals/s"],
    }
    return Loop(
        "ReLU label-noise SDE, 2-20-1, 15 samples, float32", "path-step",
        f"n (2p + {hidden}) multiply-adds (p = {p}: forward, gradient, back through the upper layer), n normals; one "
        "after the other",
        taken / paths / steps, sums | {"both in turn": sum(sums.values())},
        "a load for every multiply-add; 16 samples are computed for 15; kicks are made path by path",
    )  # fmt: skip


def neuron(c: Mapping[str, float], rounds: int) -> Loop:
    """The single tanh neuron, whatever the number of samples."""
    x, y = neuron_data(32, 0.1, 0)
    start, few, steps = np.random.default_rng(0).standard_normal((128, 2)), 100, 4000

    def run(steps: int) -> float:
        return least(lambda: single_neuron(x, y, [2.0], start, 0.01, [steps], 0, "roofline"), rounds)

    taken = run(few + steps) - run(few)  # without the table
    sums = {
        "normals": 2 / c["normals/s"],
        "table": FUNCTIONS * (DEGREE + 1) * 8 / c["triad, bytes/s, L2, 256 KiB"],
        "multiply-adds": (FUNCTIONS * DEGREE + 20) / c["multiply-adds/s, loop"],
    }
    return Loop(
        "single tanh neuron, 32 samples", "path-step",
        "2 normals; 512 bytes of table from L1 or L2; 56 multiply-adds of polynomials and about 20 of the update",
        taken / 128 / steps, sums | {"all three in turn": sum(sums.values())},
        "the table is read path by path and used across paths: values go through memory in between",
    )  # fmt: skip


def well(c: Mapping[str, float], rounds: int) -> Loop:
    """Euler steps of the quartic well."""
    start, steps = np.random.default_rng(0).standard_normal(1024), 1000
    taken = least(lambda: quartic_well(1.5, [1.8], start, 0.0025, [steps], 0, "roofline", "euler"), rounds)
    return Loop(
        "quartic well, Euler", "path-step", "1 normal, 6 multiply-adds", taken / 1024 / steps,
        {"normals": 1 / c["normals/s"], "multiply-adds": 6 / c["multiply-adds/s, loop"]},
        "nothing beyond the normals",
    )  # fmt: skip


def residual_network(c: Mapping[str, float], rounds: int) -> Loop:
    """Gradients of residual networks, each on its own minibatch."""
    networks, images = 32, 8
    module = on_batch_statistics(resnet(norm="batch", dtype=torch.float32))
    net, compiled = FlatNet(module), ConvolutionalGradient(module, CROSS_ENTROPY.name)
    theta, labels = net.theta.repeat(networks, 1), torch.zeros(networks, images, dtype=torch.int64)
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((networks, images, 1, 8, 8), np.float32))
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    made = plan(
        module, dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False)), images, (1, 8, 8)
    )
    count = 0
    for op in made.operations[made.operations["kind"] == CONVOLUTION]:
        taps = int(made.starts[op["forward"] + op["y_pixels"]] - made.starts[op["forward"]])
        count += taps * images * int(op["inputs"] * op["outputs"]) * (3 if op["x_gradient"] >= 0 else 2)
    taken = least(lambda: compiled(theta, X, labels), max(rounds // 4, 5))
    return Loop(
        "gradient of a residual network (8, 16), BatchNorm, 8 images, float32", "network",
        f"{count / 1e6:.2f} million multiply-adds of convolutions: forward, to the kernel, to the input",
        taken / networks,
        {"multiply-adds": count / c["multiply-adds/s, matrix product, float32"]},
        "a load for every multiply-add; kernels are packed for one minibatch; BatchNorm reads everything three times",
    )  # fmt: skip


def fully_connected(c: Mapping[str, float], rounds: int) -> Loop:
    """Gradients of fully connected networks, each on its own minibatch of one set."""
    networks, images, widths = 64, 32, (64, 32, 10)
    net = FlatNet(mlp(widths, dtype=torch.float32))
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((1500, widths[0]), np.float32))
    dense = dense_gradient(net, SQUARED)
    assert dense is not None
    on, theta = dense.on(X, torch.zeros(len(X), dtype=torch.int64)), net.theta.repeat(networks, 1)
    rows = torch.arange(networks * images).view(networks, images) % len(X)
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    count = images * (2 * sum(sizes) + sum(sizes[1:]))
    taken = least(lambda: on(theta, rows), rounds)
    limits = {
        "multiply-adds": count / c["multiply-adds/s, matrix product, float32"],
        "tanh, as fast as exponentials": images * sum(widths[1:-1]) / c["exponentials/s"],
    }
    return Loop(
        "gradient of a fully connected network 64-32-10, tanh, 32 images, float32", "network",
        f"{count / 1e6:.3f} million multiply-adds, {images * sum(widths[1:-1])} tanh; one after the other",
        taken / networks, limits | {"both in turn": sum(limits.values())},
        "weights are turned and samples copied for one minibatch; gradients go back to where θ lies",
    )  # fmt: skip


def page(found: Mapping[str, float], rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = ["", "| ceiling, one thread | measured |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in found.items()]
    lines += ["", "| loop | counted | measured | limits | reached |", "|---|---|---|---|---|"]
    for r in rows:
        limits = ", ".join(f"{name} {1e9 * value:.3g} ns" for name, value in r["limits"].items())
        measured = f"{1e9 * r['seconds']:.3g} ns a {r['unit']}"
        lines.append(f"| {r['loop']} | {r['counts']} | {measured} | {limits} | {r['fraction']:.0%} of {r['binding']} |")
    lines += ["", "What is left:", ""]
    return "\n".join([*lines, *(f"- {r['loop']}: {r['left']}." for r in rows)]) + "\n"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    found = ceilings(rounds)
    loops = (
        diagonal_sgd,
        quantities,
        diagonal_sde,
        relu_steps,
        relu_sde,
        neuron,
        well,
        residual_network,
        fully_connected,
    )
    rows = [loop(found, rounds).row() for loop in loops]
    text = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    PAGE.write_text(text + MARK + "\n" + page(found, rows), encoding="utf-8")
    save("roofline", [], ceilings=found, loops=rows)


if __name__ == "__main__":
    main()
