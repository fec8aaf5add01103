"""The diagonal network's SDE in the Triton kernel: compiled on a CUDA device, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

from nets.diagonal import initial_state
from simulators.diagonal import CompiledLoop, integrate_diagonal
from simulators.noise import BrownianIncrements
from theory.diagonal_sde import to_logs
from theory.problem import gaussian_sparse
from theory.sde import ExactCovariance, LabelNoise
from theory.trajectory import Probe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COVARIANCES = {"exact": ExactCovariance(0.3), "own": LabelNoise(0.3), "given": LabelNoise(0.3, lambda t: 0.1 + t)}


@pytest.mark.parametrize("name", COVARIANCES)
def test_kernel_equals_the_compiled_loop(triton_kernels, name):
    """In two blocks, of more paths, samples and features than a tile; logs at -1000; one path that blows up."""
    from simulators.diagonal_triton import TritonLoop

    problem, paths, exact = gaussian_sparse(17, 35, 3, n_test=2), 18, name == "exact"
    y0 = to_logs(initial_state(problem, 0.3)).repeat(paths, 1)
    y0[3], y0[4, :35] = -1000.0, -1000.0 if name == "given" else 300.0
    noise = BrownianIncrements(2, "w", paths, problem.n, refine=2 if name == "own" else 1)
    draws = np.random.default_rng(0)
    scales = torch.from_numpy(draws.uniform(0.01, 0.02, 5))
    levels = torch.from_numpy(draws.uniform(0.1, 0.2, (5, paths if name == "given" else 0)))
    there = problem.to(DEVICE)
    starts = y0.clone(), y0.clone().to(DEVICE)
    loops = CompiledLoop(problem, exact, starts[0], 0.1, noise), TritonLoop(there, exact, starts[1], 0.1, noise)
    for loop in loops:
        with np.errstate(all="ignore"):  # the interpreter is numpy, and one path overflows
            loop.advance(7, scales[:2].to(loop.logs), levels[:2].to(loop.logs))
            loop.advance(9, scales[2:].to(loop.logs), levels[2:].to(loop.logs))
    bad = loops[0].bad
    assert torch.equal(loops[1].bad.cpu(), bad)
    assert (bad >= 0).tolist() == [name != "given" and path == 4 for path in range(paths)]
    ours, usual = loops[1].logs.cpu(), torch.arange(paths) != 4
    assert torch.allclose(ours[usual], loops[0].logs[usual], rtol=1e-13, atol=1e-13)
    assert (ours[usual] - y0[usual]).abs().max() > 1e-2  # it moves


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", COVARIANCES)
def test_gpu_run_equals_the_cpu_run(name):
    here, probes = gaussian_sparse(40, 100, 5), {"y": Probe(lambda y: y, torch.tensor([0, 7, 300]))}
    runs = []
    for problem, device in ((here, "cpu"), (here.to(DEVICE), DEVICE)):
        y0 = to_logs(initial_state(problem, 0.3)).repeat(50, 1)
        noise = BrownianIncrements(2, "w", 50, 40, device=device)
        runs.append(integrate_diagonal(problem, COVARIANCES[name], y0, 0.05, 300, noise, probes)["y"].values.cpu())
    assert torch.allclose(runs[0], runs[1], rtol=1e-8, atol=1e-9)


def test_single_precision_goes_to_the_generic_integrator():
    problem = gaussian_sparse(8, 12, 3).to(dtype=torch.float32)
    y0 = to_logs(initial_state(problem, 0.3)).repeat(4, 1)
    runs = [
        integrate_diagonal(p, LabelNoise(0.1), y, 0.1, 50, BrownianIncrements(0, "w", 4, 8, dtype=y.dtype)).final
        for p, y in ((problem, y0), (problem.to(dtype=torch.float64), y0.double()))
    ]
    assert runs[0].dtype == torch.float32
    assert torch.allclose(runs[0].double(), runs[1], atol=1e-3)
