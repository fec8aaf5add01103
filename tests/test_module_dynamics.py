"""SVAG and its isotropic rival on a module in place: against the flat twin, by hand, in law, resumed."""

import copy

import pytest
import torch
from torch import nn

from nets.batch_statistics import on_batch_statistics
from nets.images import digits
from nets.resnet import resnet
from simulators.estimated_noise import gaussian_weights, isotropic_gradient, run_gaussian, run_isotropic
from simulators.module_dynamics import Minibatches, ModuleDynamics, isotropic, svag
from simulators.network import CROSS_ENTROPY, Network
from simulators.network_sde import ExactCovarianceSDE
from simulators.noise import BrownianIncrements
from simulators.svag import Minibatches as Draws
from simulators.svag import MinibatchPairs, amplitudes, run_svag
from theory.minibatch import Minibatch

DOUBLE = torch.float64
loss = nn.functional.cross_entropy


def tiny(norm="none"):
    data = digits(64, dtype=DOUBLE)
    return resnet((4,), (1,), norm=norm, dtype=DOUBLE), data.train_x, data.train_y


def drawn(X, y, seed):
    pairs = MinibatchPairs(seed, len(X), Minibatch(8))
    return lambda k, m: (X[pairs(k)[0, m]], y[pairs(k)[0, m]])


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("ell", [1, 3])
def test_a_module_in_place_is_the_path_of_its_flat_twin(ell, momentum):
    module, X, y = tiny()
    network = Network(module, X, y, CROSS_ENTROPY, weight_decay=0.01)
    sizes = torch.linspace(0.1, 0.2, 4, dtype=DOUBLE)
    twin = run_svag(network, network.theta, sizes, ell, 4 * ell, 2, Minibatch(8), momentum=momentum).final[0]
    minibatches = Minibatches(module, loss, drawn(X, y, 2))
    run = ModuleDynamics(
        minibatches.parameters, svag(minibatches, ell), sizes, ell, momentum=momentum, weight_decay=0.01
    )
    run.advance(run.steps)
    assert torch.allclose(flat(module.parameters()), twin[: network.p], rtol=1e-9, atol=1e-12)
    assert run.first_bad_step == -1


def test_batch_norm_sees_each_minibatch_by_itself():
    ell, (module, X, y) = 3, tiny("batch")
    module.train()
    draw = drawn(X, y, 4)
    by_hand = 0
    for m, weight in enumerate(amplitudes(ell)):
        images, labels = draw(0, m)
        by_hand += weight * flat(torch.autograd.grad(loss(module(images), labels), list(module.parameters())))
    _, gradient = svag(Minibatches(module, loss, draw), ell)(0)
    assert torch.allclose(flat(gradient), by_hand, rtol=1e-10, atol=1e-13)
    # One pass of both together would be normalised by other statistics.
    (first, labels), (second, more) = draw(0, 0), draw(0, 1)
    parts = module(torch.cat([first, second])).split(8)
    together = sum(w * loss(h, t) for w, h, t in zip(amplitudes(ell), parts, (labels, more), strict=True))
    assert (flat(torch.autograd.grad(together, list(module.parameters()))) - by_hand).norm() > 0.03 * by_hand.norm()


@pytest.mark.parametrize("groups", [2, 5])
def test_isotropic_noise_has_the_mean_and_power_of_a_minibatch_and_no_direction(groups):
    """Gradients g_m = m-th of fixed vectors: mean ḡ and power follow by hand; noise from many steps."""
    module = nn.utils.skip_init(nn.Linear, 3, 1, bias=False, dtype=DOUBLE)
    nn.init.zeros_(module.weight)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([3.0, 1.0, 0.1], dtype=DOUBLE)  # one direction has nearly all of the noise
    X = scale * torch.randn(4000, groups, 3, generator=generator, dtype=DOUBLE)
    minibatches = Minibatches(module, lambda h, y: h.sum(), lambda k, m: (X[k, m : m + 1], X[k, m]))
    estimate = isotropic(minibatches, groups, BrownianIncrements(1, "isotropic", 1, 3))
    drawn_gradients = torch.stack([estimate(k)[1][0][0] for k in range(4000)])
    variance, own = drawn_gradients.var(0), scale.square()
    expected = own / groups + (1 - 1 / groups) * own.sum() / 3
    assert ((variance - expected).abs() < 5 * expected * (2 / 4000) ** 0.5 * 1.5).all()
    assert drawn_gradients.mean(0).abs().max() < 4 * (expected.max() / 4000) ** 0.5
    assert variance[2] > 20 * own[2]


@pytest.mark.parametrize("groups", [2, 5])
def test_gaussian_noise_has_mean_and_covariance_of_a_minibatch(groups):
    """Against the law by hand, over many draws; all of ℝ³ is reached although each draw lies in a plane for M = 2."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.1]], dtype=DOUBLE)
    n = 40_000
    gradients = 1.0 + torch.randn(n, groups, 3, generator=generator, dtype=DOUBLE) @ mixing.T
    weights = gaussian_weights(torch.randn(n, groups, generator=generator, dtype=DOUBLE))
    drawn_gradients = (weights.unsqueeze(1) @ gradients).squeeze(1)
    covariance, found = mixing @ mixing.T, drawn_gradients.T.cov()
    scale = covariance.diagonal().sqrt()
    # Fourth moments exceed a Gaussian's, by a factor of at most 3 for M = 2.
    assert ((found - covariance).abs() / torch.outer(scale, scale)).max() < 5 * (3 * 2 / n) ** 0.5
    assert ((drawn_gradients.mean(0) - 1).abs() < 4 * scale / n**0.5).all()


def test_gaussian_steps_on_one_sample_a_batch_are_euler_maruyama_by_hand():
    module, X, y = tiny()
    network, M = Network(module, X, y, CROSS_ENTROPY, weight_decay=0.1), 3
    run = run_gaussian(network, network.theta, 0.2, 4, 7, Minibatch(8), groups=M)
    draws, noise = Draws(7, "gaussian", 64, Minibatch(8), M), BrownianIncrements(7, "gaussian", 1, M)
    theta = network.theta
    for k in range(4):
        g = []
        for rows in draws(k)[0]:
            weights = torch.full((1, 8), 1 / 8, dtype=DOUBLE)
            g.append(network.weighted_gradient(theta.unsqueeze(0), weights, rows=rows.unsqueeze(0))[0])
        mean = sum(g) / M
        kick = sum(xi * (each - mean) for xi, each in zip(noise(k)[0], g, strict=True)) / M**0.5
        theta = theta - 0.2 * (mean + kick + 0.1 * theta)
    assert torch.allclose(run.final[0], theta, rtol=1e-10, atol=1e-13)


def test_the_flat_rival_is_the_same_step_for_step():
    module, X, y = tiny()
    network = Network(module, X, y, CROSS_ENTROPY)
    twin = run_isotropic(network, network.theta, 0.1, 5, 3, Minibatch(8), groups=3).final[0]
    draws = Draws(3, "isotropic", 64, Minibatch(8), 3)
    minibatches = Minibatches(module, loss, lambda k, m: (X[draws(k)[0, m]], y[draws(k)[0, m]]))
    noise = BrownianIncrements(3, "isotropic", 1, network.p)
    run = ModuleDynamics(minibatches.parameters, isotropic(minibatches, 3, noise), torch.full((5,), 0.1, dtype=DOUBLE))
    run.advance(5)
    assert torch.allclose(flat(module.parameters()), twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ell", [1, 3])
def test_flat_paths_on_batch_statistics_are_modules_in_train_mode(ell):
    module, X, y = tiny("batch")
    network = Network(on_batch_statistics(module), X, y, CROSS_ENTROPY, batch_statistics=True)
    paths = run_svag(network, network.theta.expand(3, -1), 0.2, ell, 4 * ell, 2, Minibatch(8)).final
    for path in range(3):
        trained = copy.deepcopy(module).train()
        pairs = MinibatchPairs(2, len(X), Minibatch(8), 3)
        minibatches = Minibatches(trained, loss, lambda k, m, at=path, p=pairs: (X[p(k)[at, m]], y[p(k)[at, m]]))
        sizes = torch.full((4,), 0.2, dtype=DOUBLE)
        run = ModuleDynamics(minibatches.parameters, svag(minibatches, ell), sizes, ell)
        run.advance(run.steps)
        assert torch.allclose(flat(trained.parameters()), paths[path], rtol=1e-8, atol=1e-11)


def test_batch_statistics_are_no_ground_for_an_sde():
    module, X, y = tiny("batch")
    network = Network(on_batch_statistics(module), X, y, CROSS_ENTROPY, batch_statistics=True)
    with pytest.raises(ValueError, match="use run_svag"):
        ExactCovarianceSDE(network, 0.1)
    with pytest.raises(ValueError, match="running statistics: give a module that has none"):
        Network(module, X, y, CROSS_ENTROPY, batch_statistics=True)
    with pytest.raises(ValueError, match="leave chunk_size out"):
        Network(on_batch_statistics(module), X, y, CROSS_ENTROPY, batch_statistics=True, chunk_size=8)


def test_resumed_it_ends_bit_for_bit_alike_and_divergence_is_dated():
    ends = []
    for stops in ([6], [2, 4]):
        module, X, y = tiny()
        kept = None
        for stop in stops:
            minibatches = Minibatches(module, loss, drawn(X, y, 1))
            run = ModuleDynamics(minibatches.parameters, svag(minibatches, 2), torch.full((3,), 0.1), 2, momentum=0.5)
            if kept is not None:
                run.load_state_dict(kept)
            run.advance(stop)
            kept = run.state_dict()
        ends.append(flat(module.parameters()))
    assert torch.equal(*ends)
    module, X, y = tiny()
    wild = Minibatches(module, lambda h, y: h.square().sum(), drawn(X, y, 1))
    run = ModuleDynamics(wild.parameters, svag(wild, 1), torch.full((9,), 1e100, dtype=DOUBLE))
    run.advance(9)
    assert run.first_bad_step in (1, 2)


def test_what_cannot_be_used_is_refused():
    module, X, y = tiny()
    minibatches = Minibatches(module, loss, drawn(X, y, 1))
    sizes, gradient = torch.ones(3), svag(minibatches, 1)
    for work, sentence in (
        (lambda: svag(minibatches, 0), "l = 0"),
        (lambda: Minibatches(nn.Flatten(), loss, drawn(X, y, 1)), "no trainable parameter"),
        (lambda: isotropic_gradient(torch.ones(1, 3), torch.ones(3)), "give 2 or more"),
        (lambda: gaussian_weights(torch.ones(1)), "give 2 or more"),
        (lambda: isotropic(minibatches, 2, BrownianIncrements(0, "", 1, 3)), "does not fit"),
        (lambda: ModuleDynamics(minibatches.parameters, gradient, 0 * sizes), "positive numbers"),
        (lambda: ModuleDynamics(minibatches.parameters, gradient, sizes, momentum=-0.1), "momentum -0.1"),
        (lambda: ModuleDynamics(minibatches.parameters, gradient, sizes).advance(4), "there are step sizes for 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            work()
