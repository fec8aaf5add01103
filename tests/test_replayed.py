"""ReLU SGD on tensors that stay in place, and the graphs of steps that a GPU replays."""

import pytest
import torch

from nets.relu import sgd
from theory.device import Repeated, has_triton, say_once
from theory.minibatch import Minibatch
from theory.problem import gaussian_sparse
from theory.relu_network import ReluNetwork
from theory.schedule import Schedule
from theory.trajectory import Probe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETWORK = ReluNetwork((6, 5, 4, 1), (True, False, True))
OPTIONS = {
    "plain": {},
    "label noise, averaging": {"label_noise": 0.1, "label_noise_decays": True, "averaging": 0.9},
    "three samples": {"batch": Minibatch(3, replacement=False)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_replayed_steps_are_the_literal_ones(name):
    """Across the end of a block, with records, a decay, and a schedule that diverges."""
    problem = gaussian_sparse(8, 6, 2, n_test=4).to(DEVICE)
    start = 0.3 * torch.randn(NETWORK.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    schedules, probes = (
        [Schedule(0.02, ((0.5, 2.0),)), Schedule(500.0)],
        {"θ": Probe(lambda t: t, torch.tensor([0, 40]))},
    )
    runs = [
        sgd(NETWORK, problem, start, schedules, 1100, seeds=[2, 0], probes=probes, engine=engine, **OPTIONS[name])
        for engine in ("replayed", "literal")
    ]
    assert torch.equal(runs[0].first_bad_step, runs[1].first_bad_step)
    assert runs[0].finite.tolist() == [[True, True], [False, False]]
    assert torch.allclose(runs[0].final[0], runs[1].final[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(runs[0]["θ"].values[:, 0], runs[1]["θ"].values[:, 0], rtol=1e-9, atol=1e-12)
    assert (runs[0].final[0] - start).abs().max() > 1e-2


def test_what_is_missing_is_said_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch: pip install triton") as said:
        assert [has_triton(torch.device("cuda")) for _ in range(3)] == [False] * 3
    assert len(said) == 1
    assert not has_triton(torch.device("cpu"))
    say_once.cache_clear()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_step_is_taken_once(device):
    """However the calls are cut: eager, warming up, recording, replaying, and what is left over."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, count = torch.zeros(3, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def step():
        x.copy_(x * 0.5 + count)
        count.add_(1)

    repeat, expected, total = Repeated(step, torch.device(device), together=4), 0.0, 0
    for times in (2, 0, 7, 11, 4, 1):
        repeat(times)
        for k in range(total, total + times):
            expected = expected * 0.5 + k
        total += times
        assert int(count) == total
        assert x.tolist() == [expected] * 3
    assert (repeat._graph is not None) == (device == "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_what_cannot_be_recorded_runs_and_is_said():
    x = torch.zeros(1, device=DEVICE)

    def step():
        x.add_(1 if float(x) >= 0 else 0)  # waits for the device

    repeat = Repeated(step, DEVICE, together=4)
    with pytest.warns(RuntimeWarning, match="run one by one"):
        repeat(20)
    assert float(x) == 20
