"""Fully connected networks: compiled loops, matrix products and automatic differentiation give the same numbers."""

import pytest
import torch
from torch import nn

from nets import mlp_gradient
from nets.curvature import hessian
from nets.gradients import weighted_gradients
from nets.mlp import mlp
from nets.mlp_gradient import DenseGradient, dense_gradient
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Objective
from simulators.network import CROSS_ENTROPY as CLASSES
from simulators.network import SQUARED as TARGETS
from simulators.network import Network
from simulators.network_sde import ExactCovarianceSDE
from theory.minibatch import Minibatch

DOUBLE, RUNS = torch.float64, 3
NETWORKS = pytest.mark.parametrize(
    ("widths", "activation"),  # below, at and beyond eights; one layer; eights alone
    [
        ((16, 6, 3), nn.Sigmoid),
        ((5, 8, 11, 4), nn.Tanh),
        ((9, 2), nn.Tanh),
        ((8, 16, 8), nn.ReLU),
        ((3, 9, 9, 2), nn.Identity),
    ],
)
PRECISIONS = pytest.mark.parametrize(("dtype", "rounding"), [(DOUBLE, 1e-13), (torch.float32, 2e-5)])
LOSSES = pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY])


def problem(widths, loss=SQUARED, activation=nn.Tanh, dtype=DOUBLE, n=37, bias=True):
    """n samples, and RUNS states."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, widths[0], generator=generator, dtype=dtype)
    labels = torch.randint(widths[-1], (n,), generator=generator)
    nets = [FlatNet(mlp(widths, activation, seed, 2.0, bias, dtype)) for seed in range(RUNS)]
    return Objective(nets[0], X, labels, loss), torch.stack([net.theta for net in nets])


def drawn(goal):
    """A minibatch of 13 samples a run."""
    return torch.randint(goal.n, (RUNS, 13), generator=torch.Generator().manual_seed(4))


def both_ways(monkeypatch, compute):
    """In the loops, and in products."""
    assert 13 in mlp_gradient.SAMPLES
    loops = compute()
    with monkeypatch.context() as patch:
        patch.setattr(mlp_gradient, "SAMPLES", range(0))
        products = compute()
    return loops, products


def assert_near(found, expected, rounding):
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * float(expected.abs().max()))


@PRECISIONS
@LOSSES
@NETWORKS
def test_gradients_and_losses_of_minibatches(widths, loss, activation, dtype, rounding, monkeypatch):
    goal, theta = problem(widths, loss, activation, dtype)
    dense, rows = dense_gradient(goal.net, loss), drawn(goal)
    rows[0, :2] = torch.tensor([0, goal.n - 1])
    expected = torch.stack([goal.on(some).gradient(at) for at, some in zip(theta, rows, strict=True)])
    levels = torch.stack([goal.on(some).value(at) for at, some in zip(theta, rows, strict=True)])
    for gradient, level in both_ways(monkeypatch, lambda: dense.on(goal.X, goal.labels)(theta, rows)):
        assert_near(gradient, expected, rounding)
        assert_near(level, levels, rounding)
    for gradient, _ in both_ways(monkeypatch, lambda: dense(theta, goal.X[rows], goal.labels[rows])):
        assert_near(gradient, expected, rounding)
    whole = torch.stack([goal.value(at) for at in theta])
    for level in both_ways(monkeypatch, lambda: dense.losses(theta, goal.X[None], goal.labels[None])):
        assert_near(level, whole, rounding)


@pytest.mark.parametrize("bias", [True, False])
def test_all_samples_or_the_same_ones_for_all_runs(bias, monkeypatch):
    goal, theta = problem((16, 6, 3), bias=bias)
    on = dense_gradient(goal.net, SQUARED).on(goal.X, goal.labels)
    expected = torch.stack([goal.gradient(at) for at in theta])
    for gradient, _ in both_ways(monkeypatch, lambda: on(theta, None)):
        assert_near(gradient, expected, 1e-13)
    for gradient, _ in both_ways(monkeypatch, lambda: on(theta, torch.arange(goal.n).unsqueeze(0))):
        assert_near(gradient, expected, 1e-13)


def test_losses_of_more_samples_than_a_block():
    goal, theta = problem((16, 6, 3), CROSS_ENTROPY, n=300)
    found = dense_gradient(goal.net, CROSS_ENTROPY).losses(theta, goal.X[None], goal.labels[None])
    assert_near(found, torch.stack([goal.value(at) for at in theta]), 1e-13)


def test_numbers_do_not_depend_on_how_many_run_beside():
    goal, theta = problem((16, 6, 3), dtype=torch.float32)
    on, rows = dense_gradient(goal.net, SQUARED).on(goal.X, goal.labels), drawn(goal)
    gradient, level = on(theta, rows)
    for run in range(RUNS):
        alone = on(theta[run : run + 1], rows[run : run + 1])
        assert torch.equal(gradient[run], alone[0][0])
        assert torch.equal(level[run], alone[1][0])


def test_a_run_that_is_lost_leaves_the_others():
    goal, theta = problem((16, 6, 3))
    on, rows = dense_gradient(goal.net, SQUARED).on(goal.X, goal.labels), drawn(goal)
    expected, _ = on(theta, rows)
    theta[0] = torch.nan
    found, _ = on(theta, rows)
    assert torch.isnan(found[0]).all()
    assert torch.equal(found[1:], expected[1:])


@LOSSES
def test_sample_gradients_are_those_of_single_samples(loss):
    goal, theta = problem((5, 8, 11, 4), loss)
    found = dense_gradient(goal.net, loss).sample_gradients(theta[1], goal.X, goal.labels)
    expected = torch.stack([goal.on(torch.tensor([i])).gradient(theta[1]) for i in range(goal.n)])
    assert_near(found, expected, 1e-13)


@LOSSES
def test_weights_of_either_sign_and_slopes_are_networks(loss, monkeypatch):
    goal, theta = problem((16, 6, 3), loss)
    squared = loss is SQUARED
    y = nn.functional.one_hot(goal.labels, 3).to(DOUBLE) if squared else goal.labels
    options = (goal.net.module, goal.X, y, TARGETS if squared else CLASSES)
    plain, given = Network(*options), Network(*options, gradients=weighted_gradients(goal.net, loss, goal.X))
    generator = torch.Generator().manual_seed(2)
    weights, slopes = (torch.randn(RUNS, 13, *more, generator=generator, dtype=DOUBLE) for more in ((), (3,)))
    rows = drawn(goal)
    for w, s in ((weights, slopes), (weights, None), (None, slopes)):
        expected = plain.weighted_gradient(theta, w, s, rows)
        for found in both_ways(monkeypatch, lambda w=w, s=s: given.weighted_gradient(theta, w, s, rows)):
            assert_near(found, expected, 1e-13)
    kicks = torch.randn(RUNS, goal.n, generator=generator, dtype=DOUBLE)
    one, other = (
        ExactCovarianceSDE(net, 0.1, Minibatch(4)).increment(0.0, theta, 0.1, kicks) for net in (plain, given)
    )
    assert_near(other, one, 1e-13)


@PRECISIONS
@LOSSES
@NETWORKS
def test_hessian_products(widths, loss, activation, dtype, rounding, monkeypatch):
    goal, theta = problem(widths, loss, activation, dtype, n=70)  # more than a block, and no multiple of eight
    v = torch.randn(goal.p, 2, generator=torch.Generator().manual_seed(3), dtype=dtype)
    by_autograd = torch.func.hessian(lambda at: loss.values(goal.outputs(at, goal.X), goal.labels).mean())(theta[1])
    for found in both_ways(monkeypatch, lambda: hessian(goal, theta[1]) @ v):
        assert_near(found, by_autograd @ v, 10 * rounding)


def test_what_is_too_wide_or_too_much_goes_to_products():
    goal, theta = problem((16, 6, 3))
    dense = dense_gradient(goal.net, SQUARED)
    assert dense.compiles(theta, 13)
    assert not dense.compiles(theta, 1)
    assert not dense.compiles(theta, 10**6)
    assert not dense.compiles(theta.half(), 13)
    assert not dense.compiles(torch.zeros(1, 10**6, dtype=DOUBLE), 13)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda theta, X, rows: (theta[:, 1:], X, rows), "give θ"),
        (lambda theta, X, rows: (theta, X[:, 1:], rows), "give θ"),
        (lambda theta, X, rows: (theta, X.float(), rows), "in one precision"),
        (lambda theta, X, rows: (theta, X, rows + 30), "numbers of samples"),
        (lambda theta, X, rows: (theta, X, -rows), "numbers of samples"),
        (lambda theta, X, rows: (theta, X, rows[:2]), "give θ"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(change, sentence):
    goal, theta = problem((16, 6, 3))
    rows = torch.arange(RUNS * 8).view(RUNS, 8)
    theta, X, rows = change(theta, goal.X, rows)
    with pytest.raises(ValueError, match=sentence) as caught:
        dense_gradient(goal.net, SQUARED).on(X, goal.labels)(theta, rows)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused():
    goal, theta = problem((16, 6, 3))
    dense = dense_gradient(goal.net, SQUARED)
    assert isinstance(dense, DenseGradient)
    with pytest.raises(ValueError, match="weights of shape"):
        dense.weighted_gradient(theta, goal.X[None], goal.labels[None], torch.ones(RUNS, 5, dtype=DOUBLE))
