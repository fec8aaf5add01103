"""Loops compiled in a process and loops that lie compiled on disk give the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = """
import hashlib
import numpy as np
import torch
from nets.diagonal import gd, initial_state, sgd
from nets.mlp import mlp
from nets.mlp_gradient import dense_gradient
from nets.objective import SQUARED, FlatNet
from simulators.neuron import single_neuron
from theory.problem import gaussian_sparse
from theory.schedule import Schedule

def told(name, *parts):
    print(name, hashlib.sha1(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest())

problem = gaussian_sparse(40, 100, 20)
start = initial_state(problem, 0.1)
for name, run, eta in (("gd", gd, 3.53), ("sgd", sgd, 0.1)):
    final = run(problem, start, [Schedule(eta)], 300, seeds=range(3)).final
    told(name, final.a, final.b)
x = np.random.default_rng(0).standard_normal(16)
told("neuron", single_neuron(x, 2 * x, [0.5, 1.0], np.full((40, 2), 0.1), 0.01, [500], 0, "kept"))
net = FlatNet(mlp((16, 9, 3)))
X, labels = torch.linspace(-1, 1, 13 * 16, dtype=torch.float64).view(13, 16), torch.arange(13) % 3
gradient, level = dense_gradient(net, SQUARED).on(X, labels)(net.theta.unsqueeze(0), None)
told("dense", gradient, level)
"""


@pytest.mark.slow
def test_fresh_and_kept_loops_give_the_same_bits(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", RUNS], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, check=True,
        )  # fmt: skip
        return done.stdout

    fresh = run()
    assert fresh.count("\n") == 4
    assert list(tmp_path.rglob("*.nbc"))
    assert run() == fresh
