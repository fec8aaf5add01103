"""Cost against seeds, steps, n, d, paths, parameters and samples; memory against seeds, and where it ends.

Usage: python benchmarks/scaling.py [--rounds 5]
Seconds are the least of ``rounds`` runs in one thread. An exponent is the slope of ln seconds on ln size over the upper
half of the sizes: 1 is linear growth, 0 no growth. Memory is the largest resident size of processes that run nothing
else. Writes benchmarks/results/scaling.json and docs/scaling.png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numba
import numpy as np
import torch
from measure import save, seconds

from nets.diagonal import initial_state, sgd, standard_measurements
from nets.relu import sgd as relu_sgd
from simulators.diagonal import integrate_diagonal
from simulators.neuron import single_neuron
from simulators.noise import BrownianIncrements
from theory.collapse_data import neuron_data
from theory.diagonal_sde import to_logs
from theory.problem import gaussian_sparse
from theory.relu_init import gaussian
from theory.relu_network import ReluNetwork
from theory.relu_problems import two_layer_teacher
from theory.schedule import Schedule
from theory.sde import LabelNoise
from theory.trajectory import Probe, linear_grid

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "scaling.png"
MEMORY_SEEDS, MEMORY_STEPS = (1000, 4000, 16_000), 1024


@dataclass(frozen=True)
class Curve:
    """What grows, its sizes, and a run of each size."""

    what: str
    axis: str
    sizes: Sequence[int]
    run: Callable[[int], Callable[[], object]]


def diagonal(seeds: int = 16, steps: int = 500, n: int = 80, d: int = 200, recorded: bool = False) -> Any:
    """SGD on the diagonal network, as a call."""
    problem = gaussian_sparse(n, d, min(20, d))
    index = np.random.default_rng(0).integers(0, n, (seeds, steps), dtype=np.int32)
    probes = {}
    if recorded:
        measure = standard_measurements(problem)
        names = ("train loss", "test loss", "l1", "l0", "ln alpha")
        probes = {name: Probe(measure[name], linear_grid(steps), at_once=True) for name in names}
    start = initial_state(problem)
    step = 10.0 / d  # far from divergence at any d
    return lambda: sgd(problem, start, [Schedule(step)], steps, seeds=range(seeds), indices=index, probes=probes)


def sde(paths: int, steps: int = 20) -> Any:
    """The diagonal label-noise SDE, as a call."""
    problem = gaussian_sparse(80, 200, 20)
    y0, noise = to_logs(initial_state(problem)).repeat(paths, 1), BrownianIncrements(0, "scaling", paths, 80)
    return lambda: integrate_diagonal(problem, LabelNoise(0.1), y0, 0.1, steps, noise)


def relu(width: int, seeds: int = 32, steps: int = 200) -> Any:
    """SGD on a two-layer ReLU network, as a call."""
    network, problem = ReluNetwork((2, width, 1)), two_layer_teacher()
    starts = gaussian(network, (0.5, 0.0), range(seeds))
    index = np.random.default_rng(0).integers(0, problem.n, (seeds, steps), dtype=np.int32)
    step = [Schedule(0.01)]
    return lambda: relu_sgd(network, problem, starts, step, steps, seeds=range(seeds), indices=index)


def neuron(samples: int, paths: int = 256, steps: int = 8000) -> Any:
    """The single tanh neuron, as a call."""
    x, y = neuron_data(samples, 0.1, 0)
    start = np.random.default_rng(0).standard_normal((paths, 2))
    return lambda: single_neuron(x, y, [1.0], start, 0.01, [steps], 0, "scaling")


CURVES = (
    Curve("diagonal SGD, 500 steps", "seeds", [2**k for k in range(3, 11)], lambda k: diagonal(seeds=k)),
    Curve("diagonal SGD, 16 seeds", "steps", [500 * 2**k for k in range(6)], lambda k: diagonal(steps=k)),
    Curve(
        "diagonal SGD, 16 seeds, five quantities at 348 points", "steps", [1000 * 2**k for k in range(6)],
        lambda k: diagonal(steps=k, recorded=True),
    ),
    Curve("diagonal SGD, 16 seeds", "samples n", [20 * 2**k for k in range(8)], lambda k: diagonal(n=k)),
    Curve("diagonal SGD, 16 seeds", "inputs d", [25 * 2**k for k in range(8)], lambda k: diagonal(d=k)),
    Curve("diagonal label-noise SDE, 20 steps", "paths", [32 * 2**k for k in range(6)], sde),
    Curve("ReLU SGD 2-w-1, 32 runs", "width w", [10 * 2**k for k in range(7)], relu),
    Curve("single neuron, 256 paths, 8000 steps", "samples m", [8 * 2**k for k in range(7)], neuron),
)  # fmt: skip


def measured(curve: Curve, rounds: int) -> dict[str, Any]:
    """Seconds of every size, sizes in turn, and the exponent of growth."""
    runs = [curve.run(size) for size in curve.sizes]
    for run in runs:
        run()
    least = np.min([[seconds(run) for run in runs] for _ in range(rounds)], 0)
    half = len(least) // 2
    exponent = np.polyfit(np.log(curve.sizes[half:]), np.log(least[half:]), 1)[0]
    return {"what": curve.what, "axis": curve.axis, "sizes": list(curve.sizes), "seconds": least.tolist(),
            "exponent": float(exponent)}  # fmt: skip


def largest_resident(seeds: int) -> int:
    """Bytes at most resident in this process after a run of ``seeds`` seeds."""
    problem = gaussian_sparse(80, 200, 20)
    sgd(problem, initial_state(problem), [Schedule(0.05)], MEMORY_STEPS, seeds=range(seeds))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> dict[str, Any]:
    """Bytes a seed of diagonal SGD, n = 80, d = 200, and how many seeds fill this machine."""
    spawn = multiprocessing.get_context("spawn")
    sizes = []
    for seeds in MEMORY_SEEDS:
        with spawn.Pool(1) as pool:
            sizes.append(pool.apply(largest_resident, (seeds,)))
    a_seed, fixed = np.polyfit(MEMORY_SEEDS, sizes, 1)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"seeds": list(MEMORY_SEEDS), "bytes": sizes, "bytes a seed": float(a_seed), "machine, bytes": total,
            "seeds that fill it": int((total - fixed) / a_seed)}  # fmt: skip


def draw(curves: Sequence[dict[str, Any]], held: dict[str, Any]) -> None:
    """All curves and the memory, log-log, with lines of slope 1."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(12, 10), layout="constrained")
    for axis, curve in zip(axes.flat, curves, strict=False):
        x, y = np.array(curve["sizes"]), np.array(curve["seconds"])
        axis.loglog(x, y, "o-")
        axis.loglog(x, y[-1] * x / x[-1], color="0.7", lw=1, zorder=0)
        axis.set_title(curve["what"], fontsize=9)
        axis.set(xlabel=curve["axis"], ylabel="seconds")
        axis.text(0.05, 0.9, f"exponent {curve['exponent']:.2f}", transform=axis.transAxes)
    last = axes.flat[len(curves)]
    last.loglog(held["seeds"], held["bytes"], "o-")
    last.axhline(held["machine, bytes"], color="tab:red", lw=1)
    more = np.geomspace(held["seeds"][-1], held["seeds that fill it"], 30)
    last.loglog(more, held["bytes"][-1] + held["bytes a seed"] * (more - more[0]), "--", color="0.5")
    last.set_title("diagonal SGD, memory (red: the machine's)", fontsize=9)
    last.set(xlabel="seeds", ylabel="bytes")
    figure.savefig(FIGURE, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def main() -> None:
    """Measure, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    curves, held = [], memory()
    for curve in CURVES:
        curves.append(measured(curve, rounds))
        print(f"{curve.what}, {curve.axis}: exponent {curves[-1]['exponent']:.2f}", flush=True)
    draw(curves, held)
    save("scaling", [], curves=curves, memory=held)


if __name__ == "__main__":
    main()
