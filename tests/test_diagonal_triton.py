"""Diagonal SGD in the Triton kernel: compiled on a CUDA device where there is one, else in Triton's interpreter."""

import numpy as np
import pytest
import torch

from nets.diagonal import initial_state, sgd
from nets.diagonal_torch import MultiplicativeEngine
from nets.update import Update
from theory.diagonal import DiagonalState
from theory.minibatch import Minibatch
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from theory.trajectory import Probe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEM = gaussian_sparse(5, 6, 2, n_test=4).to(DEVICE)


def flat_start(replicates: int, spread: float) -> DiagonalState:
    """Coordinates of every size: many orders below 1, mantissas at the edges of their range, and exact zeros."""
    draws = np.random.default_rng(0)
    a, b = (torch.from_numpy(draws.uniform(0.2, 0.4, (replicates, PROBLEM.d))).to(DEVICE) for _ in range(2))
    a_exponent, b_exponent = (torch.zeros(a.shape, dtype=torch.int32, device=DEVICE) for _ in range(2))
    a[:, 0], b[:, 1], b_exponent[:, 1] = 2.0**-300 * spread, 2.0**70, -768
    a_exponent[:, 2], a[:, 3], b_exponent[:, 4] = -256, 0.0, -1024
    return DiagonalState(a, b, a_exponent, b_exponent)


@pytest.mark.parametrize(
    ("update", "size"),
    [(Update(), 1), (Update(weight_decay=1e-3, label_noise=0.1), 1), (Update(weight_decay=1e-3, averaging=0.9), 3)],
    ids=["plain", "weight decay, label noise", "averaging, three samples"],
)
def test_kernel_equals_the_readable_twin(triton_kernels, update, size):
    """Across a renormalisation, in two blocks, with states kept on the way, of step sizes some of which diverge."""
    from nets.diagonal_triton import TritonEngine

    draws, steps, first = np.random.default_rng(1), 9, 58
    index = draws.integers(0, PROBLEM.n, (2, steps, size), dtype=np.int32)
    shift = 0.1 * draws.standard_normal((2, steps, size)) if update.label_noise else np.empty((0, 0, 0))
    eta = np.array([0.1, 50.0])[:, None] / np.arange(1, steps + 1) ** 0.1
    start = flat_start(4, 1.0)
    kernel = TritonEngine(PROBLEM, start, update.weight_decay, update.averaging)
    twin = MultiplicativeEngine(PROBLEM, start, update)
    at, cut = np.array([0, 2, 4]), 5
    pieces = [(index[:, s], shift[:, s], eta[:, s]) for s in (slice(0, cut), slice(cut, steps))]
    seen = kernel.visit(*pieces[0], first, at)
    kernel.advance(*pieces[1], first + cut)
    kept = twin.visit(*pieces[0], first, at)
    twin.advance(*pieces[1], first + cut)
    assert torch.equal(kernel.bad, twin.bad)
    assert (kernel.bad[:2] < 0).all()
    assert (kernel.bad[2:] >= first).all()
    for ours, theirs in (
        (kernel.state(), twin.state()),
        (DiagonalState(*(p.flatten(0, 1) for p in parts(seen))), kept),
    ):
        theirs = DiagonalState(*(p.reshape(-1, PROBLEM.d) for p in parts(theirs)))
        alive = (twin.bad < 0).repeat(len(ours.a) // 4)
        assert torch.equal(ours.a_exponent, theirs.a_exponent)
        assert torch.equal(ours.b_exponent, theirs.b_exponent)
        assert torch.allclose(ours.a[alive], theirs.a[alive], rtol=1e-13, atol=0)
        assert torch.allclose(ours.b[alive], theirs.b[alive], rtol=1e-13, atol=0)
    if not update.averaging:
        assert not torch.equal(kernel.state().b_exponent, start.b_exponent)  # one was brought back


def parts(state: DiagonalState) -> tuple[torch.Tensor, ...]:
    return state.a, state.b, state.a_exponent, state.b_exponent


@pytest.mark.parametrize(
    "batch", [Minibatch(), Minibatch(2, replacement=False)], ids=["drawn there", "drawn on the host"]
)
def test_a_run_is_the_same_run(triton_kernels, batch):
    """The whole call, with its own draws: engine, records and final state are those of the other engines."""
    schedules, probes = (
        [Schedule(0.1), Schedule(0.3, ((0.5, 3.0),))],
        {"w": Probe(lambda s: s.w, torch.tensor([0, 2, 6]))},
    )
    arguments = dict(seeds=[4, 1], batch=batch, probes=probes)
    ours = sgd(PROBLEM, initial_state(PROBLEM), schedules, 6, engine="triton", **arguments)
    theirs = sgd(PROBLEM, initial_state(PROBLEM), schedules, 6, engine="multiplicative", **arguments)
    assert torch.allclose(ours["w"].values, theirs["w"].values, rtol=1e-13, atol=1e-16)
    assert torch.allclose(ours.final.log_alpha, theirs.final.log_alpha, rtol=1e-13)
    assert not torch.allclose(ours.final.w[:, 0], ours.final.w[:, 1])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_gpu_run_equals_the_cpu_run():
    """auto on the GPU and on the CPU: the same draws, states equal to what rounding grows to in a contracting run."""
    here = gaussian_sparse(40, 100, 5)
    there = here.to(DEVICE)
    runs = [sgd(p, initial_state(p), [Schedule(0.05)], 3000, seeds=range(64)).final for p in (here, there)]
    assert torch.allclose(runs[0].w, runs[1].w.cpu(), rtol=1e-8, atol=1e-12)
    assert torch.allclose(runs[0].log_alpha, runs[1].log_alpha.cpu(), rtol=1e-8)


def test_an_engine_that_cannot_run_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    problem = gaussian_sparse(5, 6, 2, n_test=4)
    with pytest.raises(ValueError, match="on a CUDA device with Triton: choose engine='auto'"):
        sgd(problem, initial_state(problem), [Schedule(0.1)], 1, engine="triton")
    with pytest.raises(ValueError, match="no engine 'fast': choose auto"):
        sgd(problem, initial_state(problem), [Schedule(0.1)], 1, engine="fast")
