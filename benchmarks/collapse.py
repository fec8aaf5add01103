"""Single-neuron and quartic-well ensembles against the published recursions in numpy, on the same work.

Usage: python benchmarks/collapse.py [--rounds 5] [--full]
The peers are the notebooks' loops over steps, vectorised over paths: one Brownian motion a sample for the neuron,
one a walker for the well. Means of the final states are compared first, then both are timed in turns; seconds are per
path and step. ``--full`` also times the whole published sweep of the neuron once, 50 noise levels × 1000 trajectories ×
100 000 steps (13 h 14 min in the notebook). Writes benchmarks/results/collapse.json.
"""

from __future__ import annotations

import argparse

import numpy as np
from measure import in_turn, row, save, seconds

from simulators.neuron import single_neuron
from simulators.scalar import quartic_well
from theory.collapse_data import neuron_data
from theory.streams import named_generator

DT, STEP = 0.01, 0.0025
X, Y = neuron_data(32, 0.1, 0)


def neuron_loop(etas: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Literal Euler-Maruyama with 32 noise channels, shape (levels, trajectories, 2)."""
    draws, final = named_generator(0, "numpy neuron"), []
    for eta in etas:
        w = start.copy()
        for _ in range(steps):
            t = np.tanh(w[:, :1] * X)
            first, second = w[:, 1:] * (1 - t**2) * X, t
            r = w[:, 1:] * t - Y
            dW = np.sqrt(DT * eta / len(X)) * draws.standard_normal(t.shape)
            move1 = -DT * (r * first).mean(1) + (first * dW).sum(1)
            move2 = -DT * (r * second).mean(1) + (second * dW).sum(1)
            w = w + np.stack([move1, move2], 1)
        final.append(w)
    return np.stack(final)


def well_loop(zetas: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """The published loop, shape (levels, walkers)."""
    draws, final = named_generator(0, "numpy well"), []
    for zeta in zetas:
        theta = start.copy()
        for _ in range(steps):
            drift = -(theta**3 - 1.5 * theta)
            diffusion = zeta * theta * draws.standard_normal(len(theta))
            theta = theta + STEP * drift + np.sqrt(STEP) * diffusion
        final.append(theta)
    return np.stack(final)


def same_law(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Means of ln(size), after a check that they agree within 5 standard errors."""
    a, b = np.log(np.abs(ours) + 1e-30), np.log(np.abs(theirs) + 1e-30)
    error = 5 * np.sqrt(a.var(-1) / a.shape[-1] + b.var(-1) / b.shape[-1])
    assert (np.abs(a.mean(-1) - b.mean(-1)) < error).all(), "the two have different laws"
    return float(b.mean()), float(a.mean())


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    draws, rows = named_generator(0, "benchmark start"), []

    etas, start, steps = np.array([0.5, 2.0, 2.5, 3.5]), draws.standard_normal((1024, 2)), 1000
    runs = {
        "here": lambda: single_neuron(X, Y, etas, start, DT, [steps], 0, "bench"),
        "numpy": lambda: neuron_loop(etas, start, steps),
    }
    checksum = same_law(np.linalg.norm(runs["here"]()[0], axis=-1), np.linalg.norm(runs["numpy"](), axis=-1))
    each = {
        name: np.array(taken) / (len(etas) * len(start) * steps)
        for name, taken in in_turn(runs, arguments.rounds).items()
    }
    work = f"single tanh neuron, 32 samples, {len(etas)} levels x {len(start)} trajectories x {steps} steps"
    rows.append(row(work, "numpy loop over steps", list(each["numpy"]), list(each["here"]), checksum, "path and step"))

    zetas, walkers, steps = np.array([1.0, 1.8, 2.5]), 2 * draws.standard_normal(1024), 2000
    runs = {
        "here": lambda: quartic_well(1.5, zetas, walkers, STEP, [steps], 0, "bench", "euler"),
        "numpy": lambda: well_loop(zetas, walkers, steps),
    }
    checksum = same_law(runs["here"]()[0], runs["numpy"]())
    each = {
        name: np.array(taken) / (len(zetas) * len(walkers) * steps)
        for name, taken in in_turn(runs, arguments.rounds).items()
    }
    work = f"quartic well, Euler, {len(zetas)} levels x {len(walkers)} walkers x {steps} steps"
    rows.append(row(work, "published numpy loop", list(each["numpy"]), list(each["here"]), checksum, "path and step"))

    more = {}
    if arguments.full:
        etas = np.r_[np.linspace(0, 1, 5), np.linspace(1.05, 2.5, 40), np.linspace(2.6, 4, 5)]
        start = draws.standard_normal((1000, 2))
        whole = seconds(lambda: single_neuron(X, Y, etas, start, DT, [100_000], 0, "full"))
        more["whole single-neuron sweep, s"] = round(whole, 1)
    save("collapse", rows, **more)


if __name__ == "__main__":
    main()
