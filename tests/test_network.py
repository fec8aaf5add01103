"""SDEs, SVAG and gradient flow of any module: against explicit per-sample gradients, enumeration, and in law."""

import copy
import itertools

import pytest
import torch
from torch import nn

from simulators.network import CROSS_ENTROPY, SQUARED, Network, gradient_flow
from simulators.network_sde import ExactCovarianceSDE, LabelNoiseSDE, run_sde
from simulators.noise import BrownianIncrements
from simulators.svag import MinibatchPairs, run_svag, svag_gradient
from theory.minibatch import Minibatch
from theory.trajectory import Probe

DOUBLE = torch.float64


def made(build, scale=0.5):
    """A module with parameters from a generator of its own: module constructors draw from the global one."""
    with torch.random.fork_rng(devices=[]):
        module = build()
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = scale * torch.randn(p.shape, generator=generator, dtype=DOUBLE)
    return module


def mlp(activation, outputs):
    return made(lambda: nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, outputs)))


def conv(outputs):
    return made(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, outputs)))


def draws(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def classes(n, count=3):
    return torch.arange(n) % count


CASES = {
    "tanh, squared": lambda **k: Network(mlp(nn.Tanh, 1), draws(7, 3), draws(7, seed=2), **k),
    "ReLU, squared": lambda **k: Network(mlp(nn.ReLU, 1), draws(7, 3), draws(7, 1, seed=2), **k),
    "ReLU, squared, two outputs": lambda **k: Network(mlp(nn.ReLU, 2), draws(7, 3), draws(7, 2, seed=2), **k),
    "tanh, cross-entropy": lambda **k: Network(mlp(nn.Tanh, 3), draws(7, 3), classes(7), CROSS_ENTROPY, **k),
    "conv, squared": lambda **k: Network(conv(1), draws(6, 1, 4, 4), draws(6, seed=2), **k),
    "conv, cross-entropy": lambda **k: Network(conv(3), draws(6, 1, 4, 4), classes(6), CROSS_ENTROPY, **k),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def build(request):
    return request.param


def sample_gradients(network, theta):
    """The n gradients one by one, shape (n, p), through the module's own .backward()."""
    rows = []
    for i in range(network.n):
        module = copy.deepcopy(network.module_at(theta))
        module.zero_grad()
        network.loss.values(module(network.X[i : i + 1]), network.y[i : i + 1]).sum().backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    return torch.stack(rows)


def covariance(gradients):
    centred = gradients - gradients.mean(0)
    return centred.T @ centred / len(gradients)


def as_matrix(sde, theta):
    """G, column by column."""
    eye = torch.eye(sde.channels, dtype=theta.dtype)
    return torch.stack([sde.g_prod(0.0, theta.unsqueeze(0), row.unsqueeze(0))[0] for row in eye], 1)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_noise_product_is_that_of_the_per_sample_gradients(build, chunk):
    network = build(chunk_size=chunk, weight_decay=0.1)
    theta, v, h = network.theta, draws(1, network.n, seed=3), 0.03
    J = sample_gradients(network, theta)
    sde = ExactCovarianceSDE(network, 0.2, Minibatch(2))
    kick = (0.2 / 2 / network.n) ** 0.5 * (v[0] - v.mean()) @ J
    drift = -J.mean(0) - 0.1 * theta
    f, g = sde.f_and_g_prod(0.0, theta.unsqueeze(0), v)
    assert torch.allclose(f[0], drift, rtol=1e-10, atol=1e-13)
    assert torch.allclose(g[0], kick, rtol=1e-10, atol=1e-13)
    one_pass = sde.increment(0.0, theta.unsqueeze(0), h, v)[0]
    assert torch.allclose(one_pass, drift * h + kick, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(3), Minibatch(3, replacement=False)])
def test_noise_has_the_covariance_of_the_minibatch_gradient(build, batch):
    network = build()
    G = as_matrix(ExactCovarianceSDE(network, 0.2, batch), network.theta)
    expected = covariance(sample_gradients(network, network.theta))
    assert torch.allclose(G @ G.T, 0.2 * batch.variance_factor(network.n) * expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("level", [0.5, lambda t: 0.5 + t, None], ids=["constant", "curve", "own"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("chunk", [None, 3])
def test_label_noise_is_one_vector_jacobian_product(level, outputs, chunk):
    module = mlp(nn.Tanh, outputs)
    network = Network(module, draws(7, 3), draws(7, outputs, seed=2), chunk_size=chunk, weight_decay=0.1)
    Phi = torch.func.jacrev(lambda theta: network.outputs(theta, network.X).reshape(-1))(network.theta)
    value = float(network.losses(network.theta.unsqueeze(0))) if level is None else 0.5
    sde, v = LabelNoiseSDE(network, 0.2, level, Minibatch(2)), draws(1, 7 * outputs, seed=3)
    kick = (2 * 0.2 * value / 2 / (7 * outputs)) ** 0.5 * Phi.T @ v[0]
    state = network.theta.unsqueeze(0)
    assert torch.allclose(sde.g_prod(0.0, state, v)[0], kick, rtol=1e-10, atol=1e-13)
    assert torch.allclose(sde.increment(0.0, state, 0.1, v), sde.f(0.0, state) * 0.1 + kick, rtol=1e-10, atol=1e-13)


def test_several_paths_are_the_same_numbers(build):
    network = build(chunk_size=4)
    thetas = network.theta + 0.1 * draws(3, network.p, seed=5)
    pairs = MinibatchPairs(1, network.n, Minibatch(2), 3)(0)
    sdes = [ExactCovarianceSDE(network, 0.2)]
    if network.loss is SQUARED:
        sdes.append(LabelNoiseSDE(network, 0.2))
        levels = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
        v = draws(1, sdes[1].channels)
        alone = torch.cat([LabelNoiseSDE(network, 0.2, float(x)).g_prod(0.0, thetas[:1], v) for x in levels])
        together = LabelNoiseSDE(network, 0.2, lambda t: levels).g_prod(0.0, thetas[:1].expand(3, -1), v.expand(3, -1))
        assert torch.allclose(together, alone, rtol=1e-10, atol=1e-13)
    for sde in sdes:
        v = draws(3, sde.channels, seed=6)
        alone = torch.cat([sde.increment(0.0, thetas[k : k + 1], 0.1, v[k : k + 1]) for k in range(3)])
        assert torch.allclose(sde.increment(0.0, thetas, 0.1, v), alone, rtol=1e-10, atol=1e-13)
    alone = torch.cat([svag_gradient(network, thetas[k : k + 1], pairs[k : k + 1], 3) for k in range(3)])
    assert torch.allclose(svag_gradient(network, thetas, pairs, 3), alone, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("batch", [Minibatch(1), Minibatch(2), Minibatch(4, replacement=False)])
def test_svag_with_l_1_is_sgd(build, batch):
    network = build(weight_decay=0.1)
    run = run_svag(network, network.theta, 0.3, 1, 5, seed=2, minibatch=batch)
    module, draw = copy.deepcopy(network.module_at(network.theta)), MinibatchPairs(2, network.n, batch)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, weight_decay=0.1)
    for k in range(5):
        rows = draw(k)[0, 0]
        optimizer.zero_grad()
        network.loss.values(module(network.X[rows]), network.y[rows]).mean().backward()
        optimizer.step()
    by_hand = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    assert torch.allclose(run.final[0], by_hand, rtol=1e-13, atol=1e-15)
    assert batch.replacement or len(set(rows.tolist())) == batch.size


@pytest.mark.parametrize("batch", [Minibatch(1), Minibatch(2), Minibatch(2, replacement=False)])
@pytest.mark.parametrize("ell", [1, 2, 4])
def test_mean_and_covariance_of_one_svag_step_by_enumeration(batch, ell):
    network = Network(mlp(nn.ReLU, 3), draws(3, 3), classes(3), CROSS_ENTROPY)
    every = itertools.product(range(3), repeat=2) if batch.replacement else itertools.combinations(range(3), 2)
    batches = [(i,) for i in range(3)] if batch.size == 1 else list(every)
    pairs = torch.tensor(list(itertools.product(batches, repeat=2)))
    eta, states = 0.3, network.theta.expand(len(pairs), -1)
    moves = -eta / ell * svag_gradient(network, states, pairs, ell)
    J = sample_gradients(network, network.theta)
    assert torch.allclose(moves.mean(0), -eta / ell * J.mean(0), rtol=1e-10, atol=1e-13)
    expected = eta**2 / ell * batch.variance_factor(3) * covariance(J)
    assert torch.allclose(covariance(moves), expected, rtol=1e-10, atol=1e-13)


class Diagonal(nn.Module):
    """h(x) = <u∘v, x>."""

    def __init__(self):
        super().__init__()
        self.u = nn.Parameter(torch.tensor([0.9, 0.7], dtype=DOUBLE))
        self.v = nn.Parameter(torch.tensor([0.3, -0.4], dtype=DOUBLE))

    def forward(self, X):
        return X @ (self.u * self.v)


LAW_X = torch.tensor([[1.0, 0.3], [-0.4, 1.2], [0.8, -0.9]], dtype=DOUBLE)
LAW_Y = torch.tensor([1.0, 0.5, -0.3], dtype=DOUBLE)


def small_relu(bias=True):
    return made(lambda: nn.Sequential(nn.Linear(2, 3, bias=bias), nn.ReLU(), nn.Linear(3, 1, bias=bias)))


def gap(a, b):
    return a[0] - b[0], (a[1] ** 2 + b[1] ** 2) ** 0.5


class Ensemble:
    """E[‖θ_T‖² / (1 + ‖θ_T‖²)] at T = 1.6 over many paths, with its standard error; 1 for paths that diverged."""

    def __init__(self, module, paths):
        self.network = Network(module, LAW_X, LAW_Y)
        self.starts = self.network.theta.expand(paths, -1)

    def svag(self, eta, ell):
        return self._mean(run_svag(self.network, self.starts, eta, ell, round(1.6 / eta) * ell, seed=3))

    def sde(self, eta, substeps):
        sde = ExactCovarianceSDE(self.network, eta)
        noise = BrownianIncrements(5, "law", len(self.starts), 3, refine=16 // substeps)
        return self._mean(run_sde(sde, self.starts, eta / substeps, round(1.6 / eta) * substeps, noise))

    def _mean(self, run):
        size = run.final.square().sum(1)
        value = torch.where(run.finite & size.isfinite(), 1 - 1 / (1 + size), 1.0)
        return float(value.mean()), float(value.std() / len(value) ** 0.5)


def test_svag_closes_the_gap_between_sgd_and_the_sde():
    ensemble = Ensemble(Diagonal(), 3000)
    sde = ensemble.sde(0.4, 8)
    for ell, far in [(1, True), (16, False)]:
        difference, error = gap(ensemble.svag(0.4, ell), sde)
        assert (abs(difference) > 4 * error) == far, (ell, difference, error)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "largest"), [(Diagonal, 0.4), (small_relu, 0.2)])
def test_sgd_svag_and_sde_approach_each_other(module, largest):
    """Weak error of SGD against its SDE is O(η), of SVAG O(η/l), of Euler-Maruyama O(dt)."""
    ensemble, gaps = Ensemble(module(), 20_000), []
    for eta in (largest, largest / 2):
        fine = ensemble.sde(eta, 16)
        gaps.append(gap(ensemble.svag(eta, 1), fine))
        for approach in (lambda k, eta=eta: ensemble.svag(eta, k), lambda k, eta=eta: ensemble.sde(eta, k)):
            (coarse, _), (near, error) = gap(approach(1), fine), gap(approach(8), fine)
            assert abs(near) < abs(coarse) / 4 + 4 * error, (eta, coarse, near, error)
    (large, large_error), (half, half_error) = gaps
    print(f"SGD minus SDE: {large:.4f} ± {large_error:.4f}, at half the step {half:.4f} ± {half_error:.4f}")
    assert abs(large) > 6 * large_error
    assert abs(half - large / 2) < 0.15 * abs(large) + 4 * (half_error**2 + large_error**2 / 4) ** 0.5


def peak_memory(work):
    """Most bytes live at once among those that ``work`` allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_memory_of_a_step_is_that_of_a_full_gradient():
    layers = [lambda: nn.Linear(64, 700), nn.ReLU, lambda: nn.Linear(700, 700), nn.ReLU, lambda: nn.Linear(700, 1)]
    module = made(lambda: nn.Sequential(*[layer() for layer in layers]))
    X, y = draws(1000, 64).float(), draws(1000).float()
    network, parameters = Network(module.float(), X, y), list(module.parameters())
    full = peak_memory(lambda: torch.autograd.grad((module(X).squeeze(1) - y).square().mean() / 2, parameters))
    noise = BrownianIncrements(1, "memory", 1, 1000, dtype=torch.float32)

    def peak_of_a_run(sde):
        return peak_memory(lambda: run_sde(sde, network.theta, 0.01, 2, noise)) / full

    exact = peak_of_a_run(ExactCovarianceSDE(network, 0.1))
    label = peak_of_a_run(LabelNoiseSDE(network, 0.1))
    chunked = peak_of_a_run(ExactCovarianceSDE(Network(module, X, y, chunk_size=250), 0.1))
    assert chunked < exact < 1.5 > label


@pytest.mark.parametrize("paths", [1, 2])
def test_resumed_runs_are_the_same_bit_for_bit(paths):
    network = Network(mlp(nn.ReLU, 3), draws(7, 3), classes(7), CROSS_ENTROPY, weight_decay=0.01)
    sde, start = ExactCovarianceSDE(network, 0.1), network.theta.expand(paths, -1)
    sizes = torch.linspace(0.1, 0.01, 40, dtype=DOUBLE)
    probes = {"all": Probe(network.losses, torch.arange(41)), "first": Probe(network.losses, torch.tensor([0]))}

    def svag(y0, steps, first, probes):
        return run_svag(network, y0, lambda t: 0.1 / (1 + t), 2, steps, 7, Minibatch(2), probes, first)

    def euler(y0, steps, first, probes):
        return run_sde(sde, y0, sizes[:steps], steps, BrownianIncrements(7, "w", paths, 7), probes, first)

    for go in (svag, euler):
        whole = go(start, 40, 0, probes)
        rest = go(go(start, 33, 0, None).final, 40, 33, probes)
        assert torch.equal(rest.final, whole.final)
        assert torch.equal(rest["all"].values, whole["all"].values[33:])
        assert rest["all"].steps.tolist() == list(range(33, 41))
        assert "first" not in rest.series
        assert whole["all"].values.shape == (41, paths)


def test_a_run_is_a_function_of_its_seed():
    network = Network(mlp(nn.Tanh, 1), draws(7, 3), draws(7))
    one, same, other = (run_svag(network, network.theta, 0.1, 2, 20, seed).final for seed in (1, 1, 2))
    three = run_svag(network, network.theta.expand(3, -1), 0.1, 2, 20, 1).final
    assert torch.equal(one, same) and not torch.equal(one, other)  # noqa: PT018
    assert torch.allclose(three[:1], one, rtol=1e-10)


def test_divergence_is_dated():
    network = Network(mlp(nn.ReLU, 1), draws(7, 3), draws(7))
    probes = {"loss": Probe(network.losses, torch.arange(0, 201, 20))}
    noise = BrownianIncrements(1, "w", 1, 7)
    for run in (
        run_sde(ExactCovarianceSDE(network, 50.0), network.theta, 50.0, 200, noise, probes),
        run_svag(network, network.theta, 50.0, 2, 200, 1, probes=probes),
    ):
        assert 0 < (bad := int(run.first_bad_step)) < 200
        assert torch.isfinite(run.final).all()
        assert torch.isnan(run["loss"].values[run["loss"].steps > bad]).all()


def test_the_module_is_left_alone():
    norm = nn.BatchNorm1d(5, dtype=DOUBLE)
    module = made(lambda: nn.Sequential(nn.Linear(3, 5), norm, nn.Dropout(0.3), nn.Linear(5, 1)).double()).eval()
    module[3].train()
    module[0].bias.requires_grad_(False)
    before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    network = Network(module, draws(7, 3), draws(7))
    assert network.p == sum(p.numel() for p in module.parameters()) - 5
    width = Probe(network.on_module(lambda m: m[0].weight.norm()), torch.tensor([0, 4]))
    run = run_svag(network, network.theta, 0.1, 2, 4, 1, probes={"width": width})
    run_sde(LabelNoiseSDE(network, 0.1), network.theta, 0.1, 4, BrownianIncrements(1, "w", 1, 7))
    assert run["width"].values.shape == (2, 1)
    assert torch.equal(run["width"].values[0, 0], module[0].weight.detach().norm())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())
    theta = network.theta.clone()
    module[0].weight.data.zero_()
    assert torch.equal(network.theta, theta)
    assert network.losses(run.final).isfinite().all()


def test_gradient_flow_of_a_linear_network_is_a_matrix_exponential():
    X, y, times = draws(7, 3), draws(7, seed=2), [0.0, 0.3, 0.31, 4.0, 10.0]
    network = Network(made(lambda: nn.Linear(3, 1, bias=False)), X, y, weight_decay=0.1, chunk_size=4)
    H = X.T @ X / 7 + 0.1 * torch.eye(3, dtype=DOUBLE)
    best = torch.linalg.solve(H, X.T @ y / 7)
    exact = torch.stack([best + torch.linalg.matrix_exp(-H * t) @ (network.theta - best) for t in times])
    assert torch.allclose(gradient_flow(network, network.theta, times, 1e-7, 1e-10), exact, rtol=0, atol=1e-6)
    assert torch.allclose(gradient_flow(network, network.theta, times), exact, rtol=0, atol=1e-2)


def test_gradient_flow_conserves_the_balance_of_relu_units():
    network = Network(small_relu(bias=False), LAW_X, LAW_Y)
    ends = torch.stack([network.theta, *gradient_flow(network, network.theta, [20.0], 1e-8, 1e-11)])
    balance = ends[:, 6:].square() - ends[:, :6].view(2, 3, 2).square().sum(2)
    assert torch.allclose(balance[0], balance[1], rtol=0, atol=1e-6)
    assert (ends[1] - ends[0]).norm() > 0.1


def network_with(module=None, X=None, y=None, loss=CROSS_ENTROPY, **settings):
    X, y = draws(7, 3) if X is None else X, classes(7) if y is None else y
    return Network(module or mlp(nn.Tanh, 3), X, y, loss, **settings)


def svag_with(eta=0.1, ell=1, batch=None, start=1.0, **settings):
    return run_svag(network_with(), start * network_with().theta, eta, ell, 3, 1, batch, **settings)


def run_exact(dt, channels=7):
    network, noise = network_with(), BrownianIncrements(1, "w", 1, channels)
    return run_sde(ExactCovarianceSDE(network, 0.1), network.theta, dt, 3, noise)


BAD = {
    "BatchNorm .* call .eval": lambda: network_with(nn.Sequential(mlp(nn.Tanh, 3), nn.BatchNorm1d(3, dtype=DOUBLE))),
    "dropout in train mode": lambda: network_with(nn.Sequential(mlp(nn.Tanh, 3), nn.Dropout())),
    "make y int64": lambda: network_with(y=draws(7)),
    "number them 0 to 2": lambda: network_with(y=torch.arange(7)),
    "convert y to": lambda: network_with(y=classes(7), loss=SQUARED),
    "give as many": lambda: network_with(y=draws(7, 2), loss=SQUARED),
    "X have NaN": lambda: network_with(X=torch.full((7, 3), torch.nan, dtype=DOUBLE)),
    "y have NaN": lambda: network_with(y=torch.full((7, 3), torch.inf, dtype=DOUBLE), loss=SQUARED),
    "do not pair up": lambda: network_with(X=draws(6, 3)),
    "convert one of them": lambda: network_with(X=draws(7, 3).float()),
    "no trainable parameter": lambda: network_with(nn.Tanh()),
    "one row per sample": lambda: network_with(nn.Sequential(mlp(nn.Tanh, 3), nn.Flatten(0))),
    "chunks of 0": lambda: network_with(chunk_size=0),
    "no meaning for the cross-entropy": lambda: LabelNoiseSDE(network_with(), 0.1),
    "loss level -1": lambda: LabelNoiseSDE(network_with(y=draws(7, 3), loss=SQUARED), 0.1, -1.0),
    "step size 0": lambda: ExactCovarianceSDE(network_with(), 0.0),
    "step size nan": lambda: svag_with(eta=torch.nan),
    "l = 0": lambda: svag_with(ell=0),
    "drawn without replacement": lambda: svag_with(batch=Minibatch(8, replacement=False)),
    "start of shape": lambda: svag_with(start=torch.nan),
    "between 0 and 3.$": lambda: svag_with(first_step=4),
    "dt has to be positive": lambda: run_exact(0.0),
    "give one each": lambda: run_exact(torch.ones(2)),
    "give 1 and 7": lambda: run_exact(0.1, channels=6),
    "tolerances": lambda: gradient_flow(network_with(), network_with().theta, [1.0], rtol=0.0),
    "times asked for": lambda: gradient_flow(network_with(), network_with().theta, [1.0, 0.5]),
    "loosen rtol": lambda: gradient_flow(network_with(), network_with().theta, [100.0], max_steps=3),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).find(". ") < 0 < str(told.value).endswith(".")
