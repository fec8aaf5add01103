"""Counting independent units of a 512-unit layer: the published loop over pairs against ours, on the same units.

Usage: python benchmarks/neurons.py [--rounds 3]
The two numbers have to be equal. Alternates both in one process (the loop takes seconds), prints seconds and ratios of
the minima; writes benchmarks/results/neurons.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from theory.independent_neurons import independent_count
from theory.streams import named_generator

SAME, VANISHED, EPS = 0.1, 0.1, 1e-8


def published_loop(w: np.ndarray) -> int:
    """Three norms a pair and lists of taken units, as Chen et al. (2023) count."""
    norms = np.linalg.norm(w, axis=-1)
    w = w[~(norms / norms.max() < VANISHED)]
    close = []
    for i, j in combinations(range(len(w)), 2):
        squares = np.linalg.norm(w[i], axis=-1) ** 2 + np.linalg.norm(w[j], axis=-1) ** 2
        if 2 * np.linalg.norm(w[i] - w[j], axis=-1) ** 2 / (EPS + squares) < SAME:
            close.append((i, j))
    taken: list[int] = []
    lists = defaultdict(list)
    for i, j in close:
        if j in taken:
            continue
        if i not in taken:
            taken.append(i)
        taken.append(j)
        lists[i].append(j)
    for i in range(len(w)):
        if i not in taken:
            lists[i].append(i)
    return len(lists)


def layer(units: int, dim: int) -> np.ndarray:
    """A partly collapsed layer: units around 60 centres, at distances on both sides of the threshold; a few vanish."""
    draws = named_generator(0, "benchmark", units, dim)
    centres = draws.standard_normal((60, dim), dtype=np.float32)
    spread = 0.4 * draws.random((units, 1), dtype=np.float32)
    w = centres[draws.integers(0, 60, units)] + spread * draws.standard_normal((units, dim), dtype=np.float32)
    return w * np.where(draws.random((units, 1)) < 0.05, np.float32(0.02), np.float32(1.0))


def compare(dim: int, rounds: int) -> dict[str, float]:
    """Seconds of both, the least of ``rounds``; ours is called five times a round."""
    w = layer(512, dim)
    tensor = torch.from_numpy(w)
    independent_count(tensor)  # compiles
    slow, fast = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        expected = published_loop(w)
        slow.append(time.perf_counter() - start)
        for _ in range(5):
            start = time.perf_counter()
            found = int(independent_count(tensor))
            fast.append(time.perf_counter() - start)
            assert found == expected, f"{found} units where the published loop counts {expected}"
    return {
        "independent units": expected,
        "published loop, s": round(min(slow), 3),
        "ours, s": round(min(fast), 5),
        "ratio of minima": round(min(slow) / min(fast), 1),
        "ratio of medians": round(float(np.median(slow) / np.median(fast)), 1),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "tables": {f"512 units x {dim}": compare(dim, rounds) for dim in (1025, 9217)},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    (root / "results").mkdir(exist_ok=True)
    (root / "results" / "neurons.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
