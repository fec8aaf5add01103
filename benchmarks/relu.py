"""ReLU networks against the published code's algorithms, rewritten literally, on the same work in one process.

Usage: python benchmarks/relu.py [--seeds 64] [--rounds 3]
Three comparisons, results checked to be equal first: SGD on the two-layer teacher-student problem (a Python loop over
steps with autograd in each, one seed, against the compiled ensemble, losses at the published 248 steps included);
the feature sparsity coefficient of 1000 units on 10000 inputs (greedy scan against one mask); Jacobian ranks along a
trajectory (one backward pass per sample against batched Jacobians). Prints ratios with spread and a checksum of what
both sides computed; writes benchmarks/results/relu.json.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
import torch
from measure import in_turn, row, save

from nets.relu import sgd, standard_measurements
from theory.relu_init import gaussian
from theory.relu_network import ReluNetwork
from theory.relu_published import PublishedRun, two_layer
from theory.sparsity import feature_sparsity, jacobian_rank, largest_later
from theory.trajectory import Probe


def as_module(network: ReluNetwork, theta: torch.Tensor) -> torch.nn.Sequential:
    """The network as torch layers, as the published code has it."""
    layers: list[torch.nn.Module] = []
    for rows, columns, biased in network.shapes:
        layers += [torch.nn.Linear(columns, rows, bias=biased, dtype=theta.dtype), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers[:-1])
    torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
    return module


def step_by_step(run: PublishedRun, step_size: float) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """The published training loop: one autograd step a sample, losses and a copy of the net at the evaluation steps."""
    X, y, X_test, y_test = (
        t if t.ndim == 2 else t.unsqueeze(1)
        for t in (run.problem.X, run.problem.y, run.problem.X_test, run.problem.y_test)
    )
    net = as_module(run.network, run.start)
    average, losses, nets = copy.deepcopy(net), [], []
    optimizer, draws = torch.optim.SGD(net.parameters(), lr=step_size / 2), np.random.RandomState(run.seed)
    evaluate, square = set(run.grid.tolist()), torch.nn.MSELoss()  # its gradient is twice that of the half-MSE
    for k in range(run.steps):
        if k in evaluate:
            losses.append((square(average(X), y), square(average(X_test), y_test)))
            nets.append(copy.deepcopy(average))
        rows = draws.choice(len(X), size=1, replace=False)
        loss = square(net(X[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for kept, new in zip(average.parameters(), net.parameters(), strict=True):
            kept.data = 0.0 * kept.data + 1.0 * new.data
    final = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return final, [(a.item() / 2, b.item() / 2) for a, b in losses]


def greedy_scan(correlation: np.ndarray, threshold: float) -> list[int]:
    """The published scan: delete one unit at a time while it correlates with one that is left; which ones went."""
    correlation, deleted, i, j = correlation - np.eye(len(correlation)), [], 0, 0
    while i != len(correlation):
        if (np.abs(correlation[i]) > threshold).sum() > 0:
            correlation = np.delete(correlation, i, axis=0)
            correlation = np.delete(correlation, i, axis=1)
            deleted.append(j)
        else:
            i += 1
        j += 1
    return deleted


def published_coefficient(phi: np.ndarray, threshold: float) -> float:
    """The published coefficient without normalisation, as for deep networks."""
    kept = np.where((phi > 0.0).sum(0) > 0)[0]
    kept = np.delete(kept, greedy_scan(np.corrcoef(phi[:, kept].T), threshold))
    return float((phi[:, kept] != 0).sum() / phi.size)


def sample_by_sample_ranks(network: ReluNetwork, thetas: torch.Tensor, X: torch.Tensor) -> list[int]:
    """The published rank: one backward pass a sample, the gradients stacked."""
    ranks = []
    for theta in thetas:
        net = as_module(network, theta)
        optimizer, rows = torch.optim.SGD(net.parameters(), lr=0.0), []
        for i in range(len(X)):
            output = net(X[[i]])
            optimizer.zero_grad()
            output.backward()
            rows.append(np.concatenate([part.grad.flatten().numpy() for part in net.parameters()]))
        singular = np.linalg.svd(np.vstack(rows))[1]
        ranks.append(int((singular / singular[0] > 1e-4).sum()))
    return ranks


PUBLISHED = "published algorithm"


def compare_sgd(seeds: int, rounds: int) -> dict[str, Any]:
    """Seconds per seed of the whole run, 14126 steps, η = 0.26, losses at 248 steps."""
    run = two_layer()
    schedule, measure = run.schedules[:1], standard_measurements(run.network, run.problem)
    probes = {name: Probe(measure[name], run.grid) for name in ("train loss", "test loss")}

    def ours(
        start: torch.Tensor, replicates: int, indices: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = sgd(
            run.network, run.problem, start, schedule, run.steps, seeds=range(replicates), indices=indices,
            probes=probes,
        )  # fmt: skip
        return result.final[0, 0], torch.stack([result[name].values[:, 0, 0] for name in probes], 1)

    starts = gaussian(run.network, (0.5, 0.0), range(seeds))
    final, losses = step_by_step(run, schedule[0].step_size)
    mine, curve = ours(run.start, 1, run.indices())
    gap = float((mine - final).abs().max())
    curve_gap = float((curve / torch.tensor(losses, dtype=torch.float64) - 1).abs().max())
    assert gap < 1e-9, f"the two disagree by {gap}"
    assert curve_gap < 1e-6, f"their loss curves disagree by {curve_gap}"
    ours(starts, seeds)
    taken = in_turn(
        {"theirs": lambda: step_by_step(run, schedule[0].step_size), "here": lambda: ours(starts, seeds)}, rounds
    )
    work = f"ReLU teacher-student 2-20-1, 14126 steps, losses at 248, {seeds} seeds"
    here, sums = [t / seeds for t in taken["here"]], (float(final.sum()), float(mine.sum()))
    return row(work, f"{PUBLISHED}, one seed", taken["theirs"], here, sums, "seed")


def compare_sparsity(duplicates: int, rounds: int, units: int = 1000, n: int = 10_000) -> list[dict[str, Any]]:
    """Seconds for the coefficient at correlation 0.95, ``duplicates`` of the units being copies of one."""
    phi = np.maximum(np.random.default_rng(0).standard_normal((n, units)), 0)
    if duplicates:
        phi[:, units - duplicates :] = phi[:, :1]
    tensor = torch.from_numpy(phi)
    coefficient = published_coefficient(phi, 0.95)
    mine = float(feature_sparsity(tensor, 0.95, normalize=False))
    assert abs(coefficient - mine) < 1e-12, f"{mine} where the scan finds {coefficient}"
    correlation = np.corrcoef(phi.T)
    taken = in_turn(
        {
            "theirs": lambda: published_coefficient(phi, 0.95),
            "here": lambda: feature_sparsity(tensor, 0.95, normalize=False),
            "scan": lambda: greedy_scan(correlation, 0.95),
            "mask": lambda: largest_later(torch.from_numpy(correlation)) > 0.95,
        },
        rounds,
    )
    work, sums = f"feature sparsity, {units} units x {n} inputs, {duplicates} copies", (coefficient, mine)
    return [
        row(work, PUBLISHED, taken["theirs"], taken["here"], sums, "layer"),
        row(f"{work}, selection alone", PUBLISHED, taken["scan"], taken["mask"], sums, "layer"),
    ]


def compare_ranks(rounds: int, every: int = 4) -> dict[str, Any]:
    """Seconds for the ranks of every fourth evaluated network of one run, 60 parameters at 60 inputs."""
    run = two_layer()
    probes = {"theta": Probe(lambda theta: theta, run.grid[::every])}
    result = sgd(run.network, run.problem, run.start, run.schedules[:1], run.steps, seeds=[0], indices=run.indices(),
                 probes=probes)  # fmt: skip
    thetas, X = result["theta"].values[:, 0, 0], run.rank_inputs
    theirs = sample_by_sample_ranks(run.network, thetas, X)
    mine = jacobian_rank(run.network, thetas, X).long().tolist()
    assert mine == theirs, "the ranks differ"
    taken = in_turn(
        {
            "theirs": lambda: sample_by_sample_ranks(run.network, thetas, X),
            "here": lambda: jacobian_rank(run.network, thetas, X),
        },
        rounds,
    )
    work, sums = f"Jacobian ranks of {len(thetas)} networks along a trajectory", (float(sum(theirs)), float(sum(mine)))
    return row(work, PUBLISHED, taken["theirs"], taken["here"], sums, "trajectory")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)  # layers draw weights that are then overwritten
    rows = [compare_sgd(options.seeds, options.rounds)]
    for copies in (0, 500, 900):
        rows += compare_sparsity(copies, options.rounds)
    save("relu", [*rows, compare_ranks(options.rounds)])


if __name__ == "__main__":
    main()
