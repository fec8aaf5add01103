"""The SDE in the complement of given directions: projections to rounding, limits K = 0 and K = p, the floor."""

import pytest
import torch
from torch import nn

from simulators.network import Network
from simulators.network_sde import ExactCovarianceSDE, run_sde
from simulators.noise import BrownianIncrements
from simulators.orthogonal import OrthogonalSDE, complement
from theory.bouncing import LinearSGD
from theory.trajectory import Probe

DOUBLE = torch.float64


def draws(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def network(activation=nn.Tanh, weight_decay=0.1):
    with torch.random.fork_rng(devices=[]):
        module = nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 1)).double()
    for k, p in enumerate(module.parameters()):
        p.data = 0.5 * draws(*p.shape, seed=10 + k)
    return Network(module, draws(9, 3), draws(9, 1, seed=2), weight_decay=weight_decay)


def directions(p, K):
    return torch.linalg.qr(draws(p, K, seed=5))[0]


@pytest.mark.parametrize("follow", [False, True])
def test_drift_and_noise_are_the_projected_ones(follow):
    net = network()
    inner, E = ExactCovarianceSDE(net, 0.3), directions(net.p, 3)
    sde, theta, v = OrthogonalSDE(inner, E, follow), net.theta.expand(2, -1), draws(2, 9, seed=3)
    P = torch.eye(net.p, dtype=DOUBLE) - E @ E.T
    f, g = sde.f_and_g_prod(0.0, theta, v)
    assert torch.allclose(g, inner.g_prod(0.0, theta, v) @ P, rtol=1e-10, atol=1e-13)
    assert torch.allclose(f, inner.f(0.0, theta) @ (torch.eye(net.p) if follow else P).double(), rtol=1e-10, atol=1e-13)
    assert torch.allclose(sde.increment(0.0, theta, 0.2, v), 0.2 * f + g, rtol=1e-10, atol=1e-13)


def test_coordinates_along_the_directions_do_not_move():
    net = network(nn.ReLU)
    E = directions(net.p, 4)
    run = run_sde(OrthogonalSDE(ExactCovarianceSDE(net, 0.3), E), net.theta, 0.1, 50, BrownianIncrements(0, "o", 1, 9))
    moved = run.final[0] - net.theta
    assert float(moved.norm()) > 0.01
    assert float((E.T @ moved).norm()) < 1e-13


def test_no_direction_is_the_sde_itself_and_all_of_them_stand_still():
    net = network()
    inner = ExactCovarianceSDE(net, 0.3)

    def end(sde):
        return run_sde(sde, net.theta, 0.1, 20, BrownianIncrements(0, "o", 1, 9)).final[0]

    assert torch.equal(end(OrthogonalSDE(inner, torch.zeros(net.p, 0, dtype=DOUBLE))), end(inner))
    still = end(OrthogonalSDE(inner, directions(net.p, net.p)))
    assert torch.allclose(still, net.theta, atol=1e-12)


def test_each_path_may_have_its_own():
    net = network()
    inner, first, second = ExactCovarianceSDE(net, 0.3), directions(net.p, 2), directions(net.p, 3)
    own = torch.stack([torch.nn.functional.pad(first, (0, 1)), second])  # the first path has one less
    theta, v = net.theta + 0.1 * draws(2, net.p, seed=4), draws(2, 9, seed=3)
    both = OrthogonalSDE(inner, own).increment(0.0, theta, 0.1, v)
    for r, E in enumerate((first, second)):
        alone = OrthogonalSDE(inner, E).increment(0.0, theta[r : r + 1], 0.1, v[r : r + 1])
        assert torch.allclose(both[r], alone[0], rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match=r"off orthonormal by 0\.5"):
        OrthogonalSDE(inner, own * 0.5**0.5)


def test_directions_may_move():
    net = network()
    inner, first, later = ExactCovarianceSDE(net, 0.3), directions(net.p, 2), directions(net.p, 3)
    sde = OrthogonalSDE(inner, lambda t: first if t < 0.5 else later)
    theta, v = net.theta.unsqueeze(0), draws(1, 9, seed=3)
    for t, E in ((0.1, first), (0.7, later)):
        assert torch.equal(sde.increment(t, theta, 0.1, v), complement(inner.increment(t, theta, 0.1, v), E))


def test_following_the_floor_relaxes_without_noise_along_the_directions():
    """Linear regression: the coordinate along the sharpest direction decays to its minimum, the others fluctuate."""
    X = draws(40, 3) * torch.tensor([3.0, 1.0, 0.5])
    truth = torch.tensor([[1.0, -1.0, 0.5]], dtype=DOUBLE)
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(3, 1, bias=False).double()
    module.weight.data = torch.zeros(1, 3, dtype=DOUBLE)
    net = Network(module, X, X @ truth.T + 0.3 * draws(40, 1, seed=4))
    values, vectors = torch.linalg.eigh(X.T @ X / 40)
    minimum = torch.linalg.lstsq(X, net.y).solution[:, 0]
    sde = OrthogonalSDE(ExactCovarianceSDE(net, 0.1), vectors[:, 2:], follow_floor=True)
    every = {"theta": Probe(lambda y: y, torch.arange(200, 801))}
    run = run_sde(sde, net.theta.expand(16, -1), 0.1, 800, BrownianIncrements(0, "floor", 16, 40), every)
    x = (run["theta"].values - minimum) @ vectors
    assert float(x[..., 2].abs().max()) < 1e-6
    # Euler-Maruyama of step η is SGD with Gaussian noise: the middle direction has the discrete stationary variance.
    residual = net.y[:, 0] - X @ minimum
    noise = ((residual.unsqueeze(1) * X) @ vectors).var(0, unbiased=False)
    ratio = x[..., 1].square().mean(0) / LinearSGD(0.1).variance(values, noise)[1]
    # The noise at the minimum is a little below that of the visited states.
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 16**0.5 + 0.05


def test_bad_directions_are_said():
    net = network()
    inner = ExactCovarianceSDE(net, 0.3)
    with pytest.raises(ValueError, match="off orthonormal"):
        OrthogonalSDE(inner, 2 * directions(net.p, 2))
    with pytest.raises(ValueError, match="not columns"):
        OrthogonalSDE(inner, directions(net.p, 2)[:, 0])
    with pytest.raises(ValueError, match="off orthonormal"):
        OrthogonalSDE(inner, lambda t: torch.full((net.p, 2), torch.nan, dtype=DOUBLE)).increment(
            0.0, net.theta.unsqueeze(0), 0.1, draws(1, 9)
        )
