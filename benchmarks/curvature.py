"""Top-5 Hessian eigenpairs of networks of half a million parameters against curvlinops with scipy's eigsh.

Usage: python benchmarks/curvature.py [--rounds 5]        (needs pip install '.[dev]')
Both run on the same network, samples and threads in one process, alternating. eigsh goes first; ours has to reach the
residual that eigsh left. Eigenvalues are compared before anything is timed. Warm starts are from the eigenvectors at
the same state, and at states 1 and 20 SGD steps earlier, to a relative residual of 1e-2 beside a cold start to the
same, for the top 5 and for λ₁ alone. Prints seconds, products and ratios with their spread; writes
benchmarks/results/curvature.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import curvlinops
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from nets.curvature import hessian
from nets.images import digits
from nets.lanczos import Eigenpairs, eigenpairs
from nets.mlp import mlp
from nets.objective import Objective
from nets.resnet import resnet
from nets.training import train
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.streams import named_generator
from theory.trajectory import Probe

K, SAMPLES, TRAINED, DRIFTS = 5, 2048, 200, (1, 20)
NETS: dict[str, Callable[[], nn.Module]] = {
    "MLP 64-700-640-10": lambda: mlp((64, 700, 640, 10), dtype=torch.float32),
    "ResNet 32-64-96, 2 blocks each": lambda: resnet((32, 64, 96), (2, 2, 2), dtype=torch.float32),
}


def data() -> tuple[Tensor, Tensor]:
    """2048 digits: all 1797 and noisy copies of the first."""
    table = digits(1797, dtype=torch.float32)
    noise = named_generator(0, "benchmark noise").standard_normal((SAMPLES - table.n, 1, 8, 8))
    copies = table.train_x[: SAMPLES - table.n] + 0.1 * torch.from_numpy(noise).float()
    labels = torch.cat([table.train_y, table.train_y[: SAMPLES - table.n]])
    return torch.cat([table.train_x, copies]), labels


def compare(net: nn.Module, rounds: int, tolerance: float) -> dict[str, object]:
    """Equality of eigenvalues first, then seconds: eigsh, cold and warm, alternating."""
    objective = Objective(net, *data())
    last = TRAINED + max(DRIFTS)
    at = torch.tensor([*(last - drift for drift in sorted(DRIFTS, reverse=True)), last])
    keep = {"θ": Probe(lambda state: state.theta.clone(), at)}
    run = train(objective, objective.net.theta, [Schedule(0.05)], last, seeds=[0], batch=Minibatch(32), probes=keep)
    thetas = dict(zip(at.tolist(), run["θ"].values[:, 0, 0], strict=True))
    theta = thetas[last]
    module = objective.net.module_at(theta)
    products = [0]

    def theirs() -> Eigenpairs:
        operator = curvlinops.HessianLinearOperator(
            module, nn.CrossEntropyLoss(), list(module.parameters()), [(objective.X, objective.labels)],
            check_deterministic=False,
        ).to_scipy()  # fmt: skip
        products[0] = 0

        def product(v: np.ndarray) -> np.ndarray:
            products[0] += 1
            return operator @ v.astype(np.float32).reshape(-1)

        counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(objective.p).astype(np.float32)
        values, vectors = eigsh(counted, k=K, which="LA", tol=tolerance, v0=start)
        found = torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())
        return Eigenpairs(*found, torch.empty(0), products[0], True)

    def ours(start: Tensor | None, to: float, k: int = K) -> Callable[[], Eigenpairs]:
        return lambda: eigenpairs(hessian(objective, theta), k, start=start, tolerance=to)

    peer = theirs()
    H = hessian(objective, theta)
    residual = (H @ peer.vectors - peer.vectors * peer.values).norm(dim=0)
    reached = max(float(residual.max() / peer.values[0]), 2e-6)  # single precision goes no further
    peers = {"curvlinops, eigsh": theirs, "ours": ours(None, reached)}
    for k in (K, 1):
        peers[f"top {k} to 1e-2, cold"] = ours(None, 1e-2, k)
        for drift in (0, *DRIFTS):
            earlier = eigenpairs(hessian(objective, thetas[last - drift]), k, tolerance=1e-3).vectors
            peers[f"top {k} to 1e-2, warm from {drift} steps earlier"] = ours(earlier, 1e-2, k)
    results = {name: run() for name, run in peers.items()}
    for name, found in results.items():
        gap = float((found.values - peer.values[: len(found.values)]).abs().max() / peer.values[0])
        assert gap <= (3e-5 if name == "ours" else 1e-2), (
            f"{name} finds other eigenvalues: {found.values} and {peer.values}"
        )
        assert found.converged, f"{name} did not converge"
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run_peer in peers.items():
            start = time.perf_counter()
            run_peer()
            seconds[name].append(time.perf_counter() - start)
    rows: dict[str, object] = {"parameters": objective.p, "eigenvalues": [round(float(v), 4) for v in peer.values]}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["curvlinops, eigsh"], times, strict=True)]
        rows[name] = {
            "seconds (minimum, median)": [round(min(times), 4), round(statistics.median(times), 4)],
            "products": results[name].products,
            "times faster than eigsh (median, min, max)": [round(f(ratios), 2) for f in (statistics.median, min, max)],
        }
    for name in seconds:
        if "warm" in name:
            cold = seconds[f"{name.split(',')[0]}, cold"]
            warm = [a / b for a, b in zip(cold, seconds[name], strict=True)]
            rows[f"{name}: times faster than cold"] = [round(f(warm), 2) for f in (statistics.median, min, max)]
    rows["relative residual of eigsh and ours"] = reached
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--net", choices=[*NETS], default=None)
    arguments = parser.parse_args()
    names = [arguments.net] if arguments.net else list(NETS)
    tables = {
        f"{name}, {SAMPLES} samples, eigsh tol {tolerance:g}": compare(NETS[name](), arguments.rounds, tolerance)
        for name in names
        for tolerance in (1e-3,)
    }
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {
        "tables": tables,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "scipy", "curvlinops-for-pytorch")},
    }
    (root / "results").mkdir(exist_ok=True)
    (root / "results" / "curvature.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
