"""Counting independent units of a 512-unit layer: the published loop over pairs against ours, on the same units.

Usage: python benchmarks/neurons.py [--rounds 5]
The two numbers have to be equal; then both are timed in turns.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import torch
from measure import in_turn, row, save

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


def compare(dim: int, rounds: int) -> dict[str, Any]:
    """Both in turns on one layer; the two numbers have to be equal."""
    w = layer(512, dim)
    tensor = torch.from_numpy(w)
    expected, found = published_loop(w), int(independent_count(tensor))
    assert found == expected, f"{found} units where the published loop counts {expected}"
    taken = in_turn({"loop": lambda: published_loop(w), "here": lambda: independent_count(tensor)}, rounds)
    return row(
        f"independent units of 512 x {dim}, float32", "the published loop over pairs, numpy",
        taken["loop"], taken["here"], (expected, found), "layer",
    )  # fmt: skip


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    save("neurons", [compare(dim, rounds) for dim in (1025, 9217)])


if __name__ == "__main__":
    main()
