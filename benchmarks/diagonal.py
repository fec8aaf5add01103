"""SGD on the diagonal network: the compiled ensemble against the papers' numpy loop, on the same draws in one process.

Usage: python benchmarks/diagonal.py [--seeds 32] [--steps 20000] [--rounds 5]
Prints seconds per seed-step of both, alternating, their ratio, and a checksum of what both computed;
writes benchmarks/results/diagonal.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from nets.diagonal import initial_state, sgd
from theory.problem import Regression, gaussian_sparse
from theory.schedule import Schedule


def numpy_loop(X: np.ndarray, y: np.ndarray, index: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """One run as the papers' notebooks do it: a Python loop over steps, numpy in each."""
    u, v = np.full(X.shape[1], 0.1), np.zeros(X.shape[1])
    for i in index:
        pull = (X[i] @ (u * v) - y[i]) * X[i]
        u, v = u - eta * pull * v, v - eta * pull * u
    return u, v


def ensemble(problem: Regression, index: np.ndarray, eta: float) -> torch.Tensor:
    """All runs at once."""
    schedule = [Schedule(eta)]
    run = sgd(problem, initial_state(problem), schedule, index.shape[1], seeds=range(len(index)), indices=index)
    return run.final.w[0]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    problem, eta = gaussian_sparse(80, 200, 20), 0.25
    X, y = problem.X.numpy(), problem.y.numpy()
    index = np.random.default_rng(0).integers(0, 80, (options.seeds, options.steps))
    ours = ensemble(problem, index, eta)  # compiles, and is compared first
    u, v = numpy_loop(X, y, index[0], eta)
    gap = float(np.abs(ours[0].numpy() - u * v).max())
    assert gap < 1e-9, f"the two disagree by {gap}"
    slow, fast = [], []
    for _ in range(options.rounds):
        start = time.perf_counter()
        numpy_loop(X, y, index[0], eta)
        slow.append((time.perf_counter() - start) / options.steps)
        start = time.perf_counter()
        ours = ensemble(problem, index, eta)
        fast.append((time.perf_counter() - start) / options.steps / options.seeds)
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "what": f"diagonal SGD, n=80, d=200, {options.steps} steps; numpy loop 1 seed, ensemble {options.seeds} seeds",
        "numpy loop, us per seed-step": 1e6 * statistics.median(slow),
        "ensemble, us per seed-step": 1e6 * statistics.median(fast),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "checksum": {"numpy loop, seed 0": float((u * v).sum()), "ensemble, seed 0": float(ours[0].sum())},
        "largest difference": gap,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
    }
    (root / "results").mkdir(exist_ok=True)
    (root / "results" / "diagonal.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
