"""The diagonal network's SGD against the published loop in numpy: same draws, same steps, in turns.

Usage: python benchmarks/diagonal.py [--seeds 32] [--rounds 5]
The published run (n = 80, d = 200, η = 0.25, 100 001 steps), twice: steps alone, and with train and test loss, ℓ1, ℓ0
and mean ln α on the published grid of 348 points, by both sides. Predictors and all quantities are compared first.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from measure import in_turn, row, save

from nets.diagonal import initial_state, sgd, standard_measurements
from theory.problem import Regression, gaussian_sparse
from theory.schedule import Schedule
from theory.trajectory import Probe, Trajectory, linear_grid

ETA, STEPS = 0.25, 100_001

QUANTITIES = ("train loss", "test loss", "l1", "l0", "ln alpha")


def numpy_loop(problem: Regression, index: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """One run as the papers' notebooks do it: a Python loop over steps, numpy in each, quantities on the grid."""
    X, y, X_test, y_test = (part.numpy() for part in (problem.X, problem.y, problem.X_test, problem.y_test))
    u, v, wanted, seen = np.full(X.shape[1], 0.1), np.zeros(X.shape[1]), set(grid.tolist()), []
    for k, i in enumerate(index):
        if k in wanted:
            w = u * v
            losses = (((X @ w - y) ** 2).mean() / 2, ((X_test @ w - y_test) ** 2).mean() / 2)
            alpha = np.log(np.abs(u**2 - v**2) + 1e-300).mean()
            seen.append((*losses, np.abs(w).sum(), (np.abs(w) > 1e-50).sum(), alpha))
        pull = (X[i] @ (u * v) - y[i]) * X[i]
        u, v = u - ETA * pull * v, v - ETA * pull * u
    return u * v, seen


def ensemble(problem: Regression, index: np.ndarray, grid: np.ndarray) -> Trajectory:
    """All runs at once."""
    at, measure = torch.from_numpy(grid), standard_measurements(problem)
    probes = {name: Probe(measure[name], at, at_once=True) for name in QUANTITIES} if len(grid) else {}
    seeds = range(len(index))
    return sgd(
        problem, initial_state(problem), [Schedule(ETA)], index.shape[1], seeds=seeds, indices=index, probes=probes
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    problem, rows = gaussian_sparse(80, 200, 20), []
    index = np.random.default_rng(1).integers(0, 80, (options.seeds, STEPS), dtype=np.int32)
    grids = {"": np.empty(0, int), ", five quantities at the published 348 points": linear_grid(STEPS).numpy()}
    for what, grid in grids.items():
        ours = ensemble(problem, index, grid)  # compiles, and is compared first
        w, seen = numpy_loop(problem, index[0], grid)
        assert ours.finite.all(), "a run that diverges saves its steps: choose other draws"
        gap = float(np.abs(ours.final.w[0, 0].numpy() - w).max())
        assert gap < 1e-9, f"the two disagree by {gap}"
        sums = (float(w.sum()), float(ours.final.w[0, 0].sum()))
        if len(grid):
            mine = np.stack([series.values[:, 0, 0].numpy() for series in ours.series.values()], 1)
            theirs_too = np.array(seen)
            assert np.allclose(mine[:, :-1], theirs_too[:, :-1], rtol=1e-7), "their measured quantities disagree"
            # u² - v² taken directly loses the digits of ln α that the loop here keeps.
            assert np.allclose(mine[:, -1], theirs_too[:, -1], rtol=1e-3), "their ln α disagree"
            sums = (float(theirs_too.sum()), float(mine.sum()))
        taken = in_turn(
            {
                "numpy": lambda grid=grid: numpy_loop(problem, index[0], grid),
                "here": lambda grid=grid: ensemble(problem, index, grid),
            },
            options.rounds,
        )
        theirs = [t / STEPS for t in taken["numpy"]]
        here = [t / STEPS / options.seeds for t in taken["here"]]
        work = f"diagonal SGD, n=80, d=200, {options.seeds} seeds{what}"
        rows.append(row(work, "published numpy loop, one seed", theirs, here, sums, "seed-step"))
    save("diagonal", rows)


if __name__ == "__main__":
    main()
