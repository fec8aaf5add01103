"""SGD for any model: against the diagonal network's own loop, hand-written recursions and exact identities per step."""

import numpy as np
import pytest
import sympy as sp
import torch

from nets.diagonal import initial_state
from nets.diagonal import sgd as diagonal_sgd
from nets.sampling import BatchStream, LabelNoiseStream
from nets.sgd import sgd
from nets.update import Update
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.symbolic import SymbolicModel, balance_law, relu
from theory.trajectory import Probe


def diagonal(theta, X):
    u, v = theta.chunk(2, -1)
    return X @ (u * v)


def single_relu(theta, X):
    return theta[0] * torch.relu(X @ theta[1:])


def trace(run, name="theta"):
    return run[name].values


def every_step(steps):
    return {"theta": Probe(lambda theta: theta, torch.arange(steps + 1))}


@pytest.fixture
def start(small):
    state = initial_state(small)
    return torch.cat([state.u, state.v])


@pytest.mark.parametrize(
    "batch", [Minibatch(), Minibatch(3), Minibatch(3, replacement=False), Minibatch(8, replacement=False)]
)
@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_equals_the_diagonal_networks_own_loop(small, start, batch, sigma):
    schedules, steps = [Schedule(0.05), Schedule(0.1, ((0.5, 2.0),))], 1100  # two blocks of draws
    options = dict(seeds=[3, 1], batch=batch, root_seed=7)
    run = sgd(diagonal, small, start, schedules, steps, label_noise=sigma, **options)
    own = diagonal_sgd(small, initial_state(small), schedules, steps, update=Update(label_noise=sigma), **options)
    expected = torch.cat([own.final.u, own.final.v], -1)
    assert run.final.shape == (2, 2, 24)
    assert run.dims == own.dims
    assert (run.final - expected).abs().max() < 1e-10
    assert (run.final - start).abs().min(-1).values.max() > 1e-6  # something moved


def test_given_samples_are_visited(small, start):
    index = np.random.default_rng(0).integers(0, small.n, (2, 60, 2))
    run = sgd(diagonal, small, start, [Schedule(0.1)], 60, seeds=range(2), indices=index)
    own = diagonal_sgd(small, initial_state(small), [Schedule(0.1)], 60, seeds=range(2), indices=index)
    assert torch.allclose(run.final, torch.cat([own.final.u, own.final.v], -1), rtol=0, atol=1e-12)
    other = sgd(diagonal, small, start, [Schedule(0.1)], 60, seeds=range(2), indices=index[:, ::-1])
    assert (run.final - other.final).abs().max() > 1e-6


def test_momentum_weight_decay_and_label_noise_by_hand(small):
    eta, mu, decay, sigma, steps, seed = 0.05, 0.8, 0.03, 0.4, 40, 5
    generator = np.random.default_rng(0)
    theta0 = generator.standard_normal(13)
    run = sgd(
        single_relu, small, torch.from_numpy(theta0), [Schedule(eta)], steps, seeds=[2, seed], batch=Minibatch(2),
        momentum=mu, weight_decay=decay, label_noise=sigma, probes=every_step(steps),
    )  # fmt: skip
    index = BatchStream(small.n, Minibatch(2), [seed], 0).block(steps)[0]
    shift = sigma * LabelNoiseStream(2, [seed], 0).block(steps)[0]
    X, y, theta, mass = small.X.numpy(), small.y.numpy(), theta0.copy(), np.zeros(13)
    for k in range(steps):
        assert np.abs(trace(run)[k, 0, 1].numpy() - theta).max() < 1e-12
        x = X[index[k]]
        z = x @ theta[1:]
        r = theta[0] * np.maximum(z, 0) - y[index[k]] - shift[k]
        gradient = np.concatenate([[(r * np.maximum(z, 0)).mean()], ((r * theta[0] * (z > 0)) @ x) / 2])
        mass = mu * mass + gradient + decay * theta
        theta = theta - eta * mass
    assert np.abs(run.final[0, 1].numpy() - theta).max() < 1e-12


def test_one_step_is_gradient_descent_on_noisy_labels(small):
    """Prop. 1: labels y + ξ with ξ_i = r_i(1 - n 1[i = i_t]) and the full gradient give the same step."""
    theta = torch.linspace(-1, 1, 13, dtype=torch.float64)
    index = np.arange(small.n)[:, None]  # seed i visits sample i
    run = sgd(single_relu, small, theta, [Schedule(0.3)], 1, seeds=range(small.n), indices=index)
    r = single_relu(theta, small.X) - small.y
    for i in range(small.n):
        xi = r.clone()
        xi[i] -= small.n * r[i]
        _, pull_back = torch.func.vjp(lambda at: single_relu(at, small.X), theta)
        expected = theta - 0.3 * pull_back((r - xi) / small.n)[0]
        assert (run.final[0, i] - expected).abs().max() < 1e-13


def test_balance_of_a_relu_unit_moves_by_the_derived_law_at_every_step(small):
    """Δ(a² - ‖w‖²) per SGD step is the symbolic Itô drift with s² = η²r², exactly."""
    eta, steps, d = 0.1, 30, small.d
    theta0 = torch.linspace(0.2, 0.9, d + 1, dtype=torch.float64)
    index = np.random.default_rng(2).integers(0, small.n, (4, steps))
    run = sgd(single_relu, small, theta0, [Schedule(eta)], steps, seeds=range(4), indices=index,
              probes=every_step(steps))  # fmt: skip
    path = trace(run)[:, 0]  # (steps + 1, seeds, p)
    measured = (path[..., 0] ** 2 - path[..., 1:].square().sum(-1)).diff(dim=0)
    X, y = small.X[index.T], small.y[index.T]
    z, a = (path[:-1, :, 1:] * X).sum(-1), path[:-1, :, 0]
    r = a * z.relu() - y
    _, _, law = balance_law(samples=1, features=2)
    # The law depends on w, x through z = ⟨w, x⟩ and ‖x‖² alone: put w = (z, 0), x = (1, √(‖x‖² - 1)) or scale.
    assert {s.name for s in law.free_symbols} == {"a", "w1", "w2", "s1", "x1_1", "x1_2"}
    from theory.lowering import to_torch

    norm = X.square().sum(-1).sqrt()
    symbols = {s.name: s for s in law.free_symbols}
    lowered = to_torch(law, [symbols[name] for name in ("a", "w1", "w2", "s1", "x1_1", "x1_2")])
    zero = torch.zeros_like(z)
    predicted = lowered(a, z / norm, zero, eta * r.abs(), norm, zero)
    assert (measured - predicted).abs().max() < 1e-13
    assert measured.abs().max() > 1e-3
    assert (z < 0).any()  # both sides of the kink were visited


def test_a_lowered_model_trains_like_the_written_one(small):
    a, w, x = sp.Symbol("a", real=True), sp.symbols("w1:13", real=True), sp.symbols("x1:13", real=True)
    own = SymbolicModel(a * relu(sum(p * q for p, q in zip(w, x, strict=True))), [a, *w], x).to_torch()
    theta = torch.linspace(-0.5, 0.8, 13, dtype=torch.float64)
    runs = [sgd(model, small, theta, [Schedule(0.1)], 200, seeds=range(3)) for model in (own, single_relu)]
    assert torch.allclose(runs[0].final, runs[1].final, rtol=0, atol=1e-12)


def test_divergence_is_dated_frozen_and_like_the_diagonal_networks(small, start):
    steps, schedules = 400, [Schedule(0.05), Schedule(4.0)]
    probes = {"theta": Probe(lambda theta: theta, torch.arange(0, steps + 1))}
    run = sgd(diagonal, small, start, schedules, steps, seeds=range(3), probes=probes)
    own = diagonal_sgd(small, initial_state(small), schedules, steps, seeds=range(3))
    assert run.finite[0].all()
    assert not run.finite[1].any()
    assert torch.equal(run.first_bad_step, own.first_bad_step)
    for seed in range(3):
        bad = int(run.first_bad_step[1, seed])
        assert torch.isnan(trace(run)[bad + 1 :, 1, seed]).all()
        assert torch.equal(trace(run)[bad, 1, seed], run.final[1, seed])
        assert torch.isfinite(run.final[1, seed]).all()
    assert torch.isfinite(trace(run)[:, 0]).all()


def test_draws_do_not_depend_on_company_and_precision_is_kept(small, start):
    alone = sgd(diagonal, small, start, [Schedule(0.1)], 300, seeds=[4])
    among = sgd(diagonal, small, start, [Schedule(0.2), Schedule(0.1)], 300, seeds=[0, 4, 9])
    assert torch.allclose(alone.final[0, 0], among.final[1, 1], rtol=0, atol=1e-13)
    half = small.to(dtype=torch.float32)
    run = sgd(diagonal, half, start.float(), [Schedule(0.1)], 300, seeds=[4], label_noise=0.0)
    assert run.final.dtype == torch.float32
    assert (run.final.double() - alone.final).abs().max() < 1e-4


def test_zero_steps_and_own_starts(small, start):
    starts = torch.stack([start, 2 * start]).expand(1, 2, -1)
    run = sgd(diagonal, small, starts, [Schedule(0.1)], 0, seeds=range(2), probes=every_step(0))
    assert torch.equal(run.final, starts)
    assert torch.equal(trace(run)[0], starts)
    counted = []
    moved = sgd(diagonal, small, starts, [Schedule(0.1)], 5, seeds=range(2), progress=counted.append)
    assert counted == [5]
    assert (moved.final[0, 0] - moved.final[0, 1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "not a run"),
        ({"seeds": []}, "not a run"),
        ({"schedules": []}, "no schedule"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"label_noise": float("nan")}, "label noise"),
        ({"batch": Minibatch(9, replacement=False)}, "without replacement"),
        ({"indices": np.zeros((2, 4), int)}, "indices of shape"),
        ({"indices": np.full((2, 5), 8)}, "no sample's number"),
        ({"indices": np.zeros((2, 5))}, "no sample's number"),
        ({"start": torch.ones(2, 24).double()}, "start of shape"),
        ({"start": torch.ones(24)}, "float32"),
        ({"start": torch.full((24,), float("nan")).double()}, "NaN"),
        ({"model": lambda theta, X: X * theta[:12]}, "one number per input"),
    ],
)
def test_bad_arguments(small, start, change, message):
    arguments = {"model": diagonal, "start": start, "schedules": [Schedule(0.1)], "steps": 5, "seeds": range(2)}
    arguments |= change
    positional = [arguments.pop(name) for name in ("model", "start", "schedules", "steps")]
    with pytest.raises(ValueError, match=message):
        sgd(positional[0], small, *positional[1:], **arguments)
