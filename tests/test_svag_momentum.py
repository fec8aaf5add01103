"""SVAG with momentum, and with step sizes of their own for every path."""

import pytest
import torch
from scipy.linalg import expm, solve_continuous_lyapunov
from torch import nn

from simulators.network import SQUARED, Network
from simulators.svag import MinibatchPairs, run_svag
from theory.minibatch import Minibatch
from theory.trajectory import Probe

DOUBLE = torch.float64
CURVATURE, ETA, MU = 0.8, 0.4, 0.6


def scalar(targets):
    """h = θx with x = √CURVATURE: gradients λθ - √λ y_i, so that minibatch noise does not depend on θ."""
    module = nn.utils.skip_init(nn.Linear, 1, 1, bias=False, dtype=DOUBLE)
    nn.init.constant_(module.weight, 1.0)
    X = torch.full((len(targets), 1), CURVATURE**0.5, dtype=DOUBLE)
    return Network(module, X, torch.tensor(targets, dtype=DOUBLE), SQUARED)


def transition(ell):
    """(θ, m) after one step without noise: m' = (1 - (1-μ)/l) m + λθ/l, θ' = θ - (η/l) m'."""
    friction = 1 - (1 - MU) / ell
    row = torch.tensor([CURVATURE / ell, friction], dtype=DOUBLE)
    return torch.stack([torch.tensor([1.0, 0.0], dtype=DOUBLE) - ETA / ell * row, row])


GENERATOR = torch.tensor([[0.0, -ETA], [CURVATURE, -(1 - MU)]], dtype=DOUBLE)  # per SGD step


def test_with_momentum_and_l_1_it_is_the_heavy_ball():
    network = scalar([1.0, -2.0, 0.5])
    run = run_svag(network, network.theta, ETA, 1, 7, seed=3, minibatch=Minibatch(2), momentum=MU)
    pairs, theta, mass = MinibatchPairs(3, 3, Minibatch(2)), network.theta.clone(), torch.zeros(1, dtype=DOUBLE)
    for k in range(7):
        target = network.y[pairs(k)[0, 0]]
        mass = MU * mass + (CURVATURE * theta - CURVATURE**0.5 * target.mean())
        theta = theta - ETA * mass
    assert torch.allclose(run.final[0], torch.cat([theta, mass]), rtol=1e-12)


@pytest.mark.parametrize("ell", [1, 2, 5])
def test_one_step_without_noise_is_the_stated_map(ell):
    network = scalar([0.0])
    start = torch.tensor([[0.3, -0.7]], dtype=DOUBLE)
    run = run_svag(network, start, ETA, ell, 1, seed=0, momentum=MU)
    assert torch.allclose(run.final[0], transition(ell) @ start[0], rtol=1e-12)


def test_many_steps_approach_the_underdamped_flow_in_first_order():
    exact = torch.from_numpy(expm(GENERATOR.numpy() * 5))
    errors = [(torch.linalg.matrix_power(transition(ell), 5 * ell) - exact).norm() for ell in (40, 80)]
    assert 1.9 < errors[0] / errors[1] < 2.1


@pytest.mark.parametrize("ell", [1, 4])
def test_stationary_covariance_is_that_of_the_map_and_tends_to_the_sdes(ell):
    """Noise of one gradient: variance λ/B for targets ±1; l² (1/l)² l of it enters m in l steps."""
    network, paths = scalar([1.0, -1.0]), 2048
    A = transition(ell)
    B = torch.tensor([-ETA / ell, 1.0], dtype=DOUBLE) / ell
    noise = CURVATURE * ell * torch.outer(B, B)
    lifted = torch.eye(4, dtype=DOUBLE) - torch.kron(A, A)
    predicted = torch.linalg.solve(lifted, noise.reshape(4)).view(2, 2)
    start = torch.zeros(paths, 2, dtype=DOUBLE)
    final = run_svag(network, start, ETA, ell, 40 * ell, seed=5, momentum=MU).final
    measured = final.T @ final / paths
    spread = (2 / paths) ** 0.5 * predicted.diagonal()  # of a Gaussian's variance; these are lighter-tailed
    assert ((measured - predicted).diagonal().abs() < 4 * spread).all()
    # The same noise without its amplification by l would be told apart.
    assert ell == 1 or ((measured - predicted / ell).diagonal() > 10 * spread).all()


def test_stationary_covariance_in_the_limit_is_lyapunovs():
    kick = torch.tensor([[0.0, 0.0], [0.0, CURVATURE]], dtype=DOUBLE)
    limit = torch.from_numpy(solve_continuous_lyapunov(GENERATOR.numpy(), -kick.numpy()))
    gaps = []
    for ell in (50, 100):
        A, B = transition(ell), torch.tensor([-ETA / ell, 1.0], dtype=DOUBLE) / ell
        noise = CURVATURE * ell * torch.outer(B, B)
        found = torch.linalg.solve(torch.eye(4, dtype=DOUBLE) - torch.kron(A, A), noise.reshape(4)).view(2, 2)
        gaps.append((found - limit).abs().max())
    assert 1.8 < gaps[0] / gaps[1] < 2.2


def test_resumed_with_momentum_it_ends_bit_for_bit_alike():
    network = scalar([1.0, -2.0, 0.5])
    probe = {"θ": Probe(lambda theta: theta, torch.tensor([0, 4, 9]))}
    whole = run_svag(network, network.theta, ETA, 3, 9, seed=3, probes=probe, momentum=MU)
    half = run_svag(network, network.theta, ETA, 3, 4, seed=3, momentum=MU)
    rest = run_svag(network, half.final, ETA, 3, 9, seed=3, first_step=4, momentum=MU)
    assert torch.equal(whole.final, rest.final)
    assert whole["θ"].values.shape == (3, 1, 1)
    assert torch.equal(whole["θ"].values[2], whole.final[:, :1])


def test_step_sizes_of_every_path_are_those_of_its_own_run():
    network = scalar([1.0, -2.0, 0.5])
    sizes = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.4, 0.05]], dtype=DOUBLE)
    both = run_svag(network, network.theta.expand(2, 1), sizes, 2, 6, seed=1).final
    for path, own in enumerate(sizes):
        alone = run_svag(network, network.theta.expand(2, 1), own, 2, 6, seed=1).final
        assert torch.allclose(both[path], alone[path], rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"momentum": 1.0}, "momentum 1.0 is not usable"),
        ({"step_size": torch.ones(2)}, "do not last for 6"),
        ({"step_size": torch.ones(3, 5)}, r"give \(K,\) or \(paths, K\)"),
        ({"step_size": -torch.ones(6)}, "positive and finite"),
    ],
)
def test_unusable_arguments_are_refused(arguments, sentence):
    network = scalar([1.0, 2.0])
    with pytest.raises(ValueError, match=sentence):
        run_svag(network, network.theta, **{"step_size": 0.1, "l": 2, "steps": 6, "seed": 0} | arguments)
