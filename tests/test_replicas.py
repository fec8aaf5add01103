"""Replicas of SGD: equal to the training loop on equal draws, epochs that visit everything once, exact gradients."""

import pytest
import torch
from torch import nn

from nets.gradients import batched_gradients, losses, sample_gradients
from nets.mlp import mlp
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Objective
from nets.replicas import Epochs, replicas
from nets.resnet import resnet
from nets.training import Batches, train
from theory.minibatch import Minibatch
from theory.schedule import Schedule

DOUBLE = torch.float64


def objective(kind="mlp", loss=SQUARED, n=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=DOUBLE)
    labels = torch.arange(n) % 3
    net = mlp((16, 6, 3), nn.Tanh) if kind == "mlp" else resnet((2, 3), classes=3)
    return Objective(FlatNet(net), x, labels, loss)


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_equal_to_the_training_loop_on_equal_draws(kind, momentum):
    goal, batch, seeds = objective(kind), Minibatch(5), range(3)
    start = goal.net.theta.expand(3, -1)
    seen = []
    theta, _ = replicas(
        goal, start, torch.zeros_like(start), 0.05, 12, Batches(goal.n, batch, seeds, 7), momentum,
        observe=lambda k, at: seen.append((k, at.clone())),
    )  # fmt: skip
    options = {"seeds": seeds, "batch": batch, "momentum": momentum, "root_seed": 7}
    expected = train(goal, goal.net.theta, [Schedule(0.05)], 12, **options).final.theta[0]
    assert torch.allclose(theta, expected, rtol=1e-10, atol=1e-13)
    assert [k for k, _ in seen] == list(range(12))
    assert torch.equal(seen[0][1], start)


def test_runs_may_differ_in_step_size_and_momentum():
    goal = objective()
    start = goal.net.theta.expand(2, -1)
    draws = Batches(goal.n, Minibatch(5), range(2), 1)
    both, _ = replicas(
        goal, start, torch.zeros_like(start), torch.tensor([0.1, 0.02]), 9, draws, torch.tensor([0.0, 0.9])
    )
    for row, (eta, mu) in enumerate([(0.1, 0.0), (0.02, 0.9)]):
        alone, _ = replicas(
            goal, start[:1], torch.zeros_like(start[:1]), eta, 9, lambda k, row=row: draws(k)[row : row + 1], mu
        )
        assert torch.allclose(both[row], alone[0], rtol=1e-6)


@pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_sample_gradients_are_those_of_single_samples(kind, loss):
    goal = objective(kind, loss, n=7)
    rows = sample_gradients(goal, goal.net.theta)
    alone = torch.stack([goal.on(torch.tensor([i])).gradient(goal.net.theta) for i in range(7)])
    assert torch.allclose(rows, alone, rtol=1e-9, atol=1e-13)
    single = batched_gradients(goal)(goal.net.theta.expand(7, -1), torch.arange(7).unsqueeze(1))[0]
    assert torch.allclose(rows, single, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_losses_are_those_of_single_states(kind, loss):
    goal = objective(kind, loss)
    theta = goal.net.theta * torch.tensor([[1.0], [0.5], [-2.0]], dtype=DOUBLE)
    assert torch.allclose(losses(goal, theta), torch.stack([goal.value(row) for row in theta]), rtol=1e-12)
    parts = Objective(goal.net, goal.X, goal.labels, loss, chunk=7)
    assert torch.allclose(losses(parts, theta), losses(goal, theta), rtol=1e-12)


def test_an_activation_after_the_last_layer_is_left_to_autograd():
    inner = objective()
    goal = Objective(nn.Sequential(*inner.net.module, nn.Tanh()), inner.X, inner.labels, SQUARED)
    rows = torch.arange(goal.n).unsqueeze(0)
    gradient, level = batched_gradients(goal)(goal.net.theta.unsqueeze(0), rows)
    assert torch.allclose(gradient[0], goal.gradient(goal.net.theta), rtol=1e-9, atol=1e-13)
    assert level[0] == pytest.approx(float(goal.value(goal.net.theta)))


def test_epochs_visit_every_sample_once_in_fresh_orders():
    draws = Epochs(12, 3, [4, 9], root_seed=1)
    assert draws.batches == 4
    first = torch.cat([draws(k) for k in range(4)], 1)
    second = torch.cat([draws(k) for k in range(4, 8)], 1)
    for order in (*first, *second):
        assert order.sort().values.tolist() == list(range(12))
    assert not torch.equal(first, second)
    assert torch.equal(Epochs(12, 3, [9], root_seed=1)(2)[0], first[1, 6:9])  # whatever the other seeds, in any order


def test_a_diverged_run_is_nan_and_leaves_the_others():
    goal = objective()
    start = goal.net.theta.expand(2, -1)
    draws = Batches(goal.n, Minibatch(5), range(2))
    theta, _ = replicas(goal, start, torch.zeros_like(start), torch.tensor([1e200, 0.1]), 20, draws)
    assert torch.isfinite(theta).all(1).tolist() == [False, True]


def test_bad_input_is_said():
    goal = objective()
    with pytest.raises(ValueError, match="divisor of 24"):
        Epochs(24, 7, [0])
    with pytest.raises(ValueError, match="do not fit"):
        replicas(goal, goal.net.theta, goal.net.theta, 0.1, 1, Epochs(24, 6, [0]))
