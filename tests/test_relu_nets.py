"""SGD on ReLU networks: compiled loop against backpropagation and against the generic loop, options by hand."""

import numpy as np
import pytest
import torch

from nets import relu_compiled
from nets.relu import gd, half_mse, sgd, standard_measurements
from nets.sampling import BatchStream, LabelNoiseStream
from nets.sgd import sgd as generic_sgd
from theory.minibatch import Minibatch
from theory.problem import Regression
from theory.relu_init import balanced, gaussian, kinked
from theory.relu_network import ReluNetwork
from theory.relu_problems import multi_layer_teacher, twelve_points, two_layer_teacher
from theory.schedule import Schedule, Warmup
from theory.trajectory import Probe

NETWORKS = [
    ReluNetwork((2, 7, 1)),
    ReluNetwork((2, 7, 1), (True, False)),
    ReluNetwork((2, 6, 5, 1), (True, True, True)),
    ReluNetwork((2, 5, 4, 6, 1), (False, True, False, True)),
]
SCHEDULES = [Schedule(0.1), Schedule(0.05, ((0.5, 2.0),), Warmup(0.5, 5.0, 0.5), decay_at_once=True)]


@pytest.fixture
def plane() -> Regression:
    return two_layer_teacher(n=9, n_test=30)


def starts(network, seeds, scale=0.7):
    return gaussian(network, (scale,) * network.depth, seeds)


def every_step(steps):
    return {"theta": Probe(lambda theta: theta, torch.arange(steps + 1))}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network.widths))
@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(4, replacement=False), Minibatch(9, replacement=False)])
def test_compiled_equals_the_generic_loop(plane, network, batch):
    steps, seeds = 300, [4, 1, 2]
    start = starts(network, seeds)
    options = dict(seeds=seeds, batch=batch, label_noise=0.1, probes=every_step(steps), root_seed=5)
    fast = sgd(network, plane, start, SCHEDULES, steps, engine="compiled", **options)
    slow = generic_sgd(network, plane, start.expand(2, 3, -1), SCHEDULES, steps, **options)
    gap = (fast["theta"].values - slow["theta"].values).abs().max()
    assert gap < 1e-9
    assert fast.final.shape == (2, 3, network.size)
    assert fast.finite.all()
    assert fast.dims == slow.dims
    moved = (fast.final - start).abs().amax(-1)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network.widths))
@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(3)])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_compiled_equals_backpropagation_with_every_option(plane, network, batch, loss):
    problem = Regression(plane.X, plane.y.sign(), plane.X_test, plane.y_test.sign())
    options = dict(
        seeds=range(3), batch=batch, loss=loss, label_noise=0.2, label_noise_decays=True, averaging=0.6,
        probes=every_step(200),
    )  # fmt: skip
    fast, slow = (
        sgd(network, problem, starts(network, range(3)), SCHEDULES, 200, engine=engine, **options)
        for engine in ("compiled", "literal")
    )
    assert (fast["theta"].values - slow["theta"].values).abs().max() < 1e-9
    assert (fast.final[0] - fast.final[1]).abs().max() > 1e-3


def test_a_run_is_the_same_to_the_bit_however_many_run_beside_it(plane):
    network = NETWORKS[2]
    alone = sgd(network, plane, starts(network, [7]), SCHEDULES[:1], 500, seeds=[7]).final[0, 0]
    for others in (9, 70):
        seeds = [*range(100, 100 + others), 7]
        among = sgd(network, plane, starts(network, seeds), SCHEDULES, 500, seeds=seeds).final[0, -1]
        assert torch.equal(among, alone)
    probed = sgd(network, plane, starts(network, [7]), SCHEDULES[:1], 500, seeds=[7], probes=every_step(500))
    assert torch.equal(probed.final[0, 0], alone)  # nor does looking change a run


def test_logistic_steps_averaging_and_decaying_label_noise_by_hand(plane):
    network, steps, seed, sigma, omega = ReluNetwork((2, 3, 1)), 30, 3, 0.3, 0.8
    problem = Regression(plane.X, plane.y.sign(), plane.X_test, plane.y_test.sign())
    schedule, start = Schedule(0.2, ((0.5, 4.0),)), starts(network, [seed])[0]
    run = sgd(
        network, problem, start, [schedule], steps, seeds=[seed], loss="logistic", label_noise=sigma,
        label_noise_decays=True, averaging=omega, probes=every_step(steps),
    )  # fmt: skip
    index = BatchStream(9, Minibatch(), [seed], 0).block(steps)[0, :, 0]
    noise = LabelNoiseStream(1, [seed], 0).block(steps)[0, :, 0]
    W, a = (part.numpy().copy() for part in (start[:6].reshape(3, 2), start[6:]))
    mean_W, mean_a = W.copy(), a.copy()
    for k in range(steps):
        seen = run["theta"].values[k, 0, 0].numpy()
        assert np.abs(seen - np.r_[mean_W.ravel(), mean_a]).max() < 1e-12
        decay = 4.0 if k > 15 else 1.0
        x, y = problem.X[index[k]].numpy(), problem.y[index[k]].item() + sigma / decay * noise[k]
        z = W @ x
        pull = -y / (1 + np.exp(y * (a @ np.maximum(z, 0))))
        W, a = W - 0.2 / decay * pull * np.outer(a * (z > 0), x), a - 0.2 / decay * pull * np.maximum(z, 0)
        mean_W, mean_a = omega * mean_W + (1 - omega) * W, omega * mean_a + (1 - omega) * a


def test_balance_law_holds_at_every_step(plane):
    """Δ(a_j² - ‖w_j‖²) = η²r²[(⟨w_j,x⟩)₊² - a_j² 1[⟨w_j,x⟩>0]‖x‖²], an identity for each unit and step."""
    network, steps, eta = ReluNetwork((2, 20, 1)), 2000, 0.26
    run = sgd(network, plane, starts(network, range(4), 0.5), [Schedule(eta)], steps, seeds=range(4),
              probes=every_step(steps))  # fmt: skip
    theta = run["theta"].values[:, 0]
    (W, _), (a, _) = network.split(theta)
    beta = a.squeeze(-2).square() - W.square().sum(-1)
    index = BatchStream(plane.n, Minibatch(), range(4), 0).block(steps)[:, :, 0].T  # (steps, seeds)
    x, y = plane.X[index], plane.y[index]
    z = torch.einsum("ksjd,ksd->ksj", W[:-1], x)
    r = network(theta[:-1], x.unsqueeze(-2)).squeeze(-1) - y
    on = (z > 0).double()
    bracket = torch.relu(z).square() - a.squeeze(-2)[:-1].square() * on * x.square().sum(-1, keepdim=True)
    expected = eta**2 * r.square().unsqueeze(-1) * bracket
    assert (beta.diff(dim=0) - expected).abs().max() < 1e-13
    assert expected.abs().max() > 1e-3


def test_full_batch_is_gradient_descent(plane):
    network = NETWORKS[1]
    start = starts(network, [0])[0]
    run = gd(network, plane, start, [Schedule(0.1)], 50)
    theta = start.clone().requires_grad_()
    for _ in range(50):
        loss = (network(theta, plane.X) - plane.y).square().mean() / 2
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - 0.1 * gradient).detach().requires_grad_()
    assert (run.final[0, 0] - theta).abs().max() < 1e-12


@pytest.mark.parametrize("engine", ["compiled", "literal"])
@pytest.mark.parametrize("batch", [Minibatch(), Minibatch(2)])
def test_divergence_is_dated_and_contained(plane, engine, batch):
    network, steps = ReluNetwork((2, 6, 1)), 40
    start = starts(network, range(4), 1.0)
    schedules = [Schedule(0.02), Schedule(40.0)]
    probes = {"loss": Probe(standard_measurements(network, plane)["train loss"], torch.arange(steps + 1))}
    run = sgd(network, plane, start, schedules, steps, seeds=range(4), batch=batch, engine=engine, probes=probes)
    assert run.finite[0].all()
    assert (run.first_bad_step[1] > 0).all()
    assert torch.isfinite(run.final).all()
    after = torch.arange(steps + 1).unsqueeze(1) > run.first_bad_step[1]
    assert (torch.isnan(run["loss"].values[:, 1]) == after).all()
    quiet = sgd(network, plane, start, schedules[:1], steps, seeds=range(4), batch=batch, engine=engine)
    assert torch.equal(run.final[0], quiet.final[0])  # what diverges beside a run does not touch it
    both = sgd(network, plane, start, schedules, steps, seeds=range(4), batch=batch, engine="literal")
    assert torch.equal(run.first_bad_step, both.first_bad_step)


def test_draws_are_those_of_the_other_loops_and_given_ones_are_followed(plane):
    network = ReluNetwork((2, 4, 1))
    index = BatchStream(plane.n, Minibatch(), [0, 1], 0).block(60)
    drawn = sgd(network, plane, starts(network, [0, 1]), SCHEDULES, 60, seeds=[0, 1])
    given = sgd(network, plane, starts(network, [0, 1]), SCHEDULES, 60, seeds=[0, 1], indices=index)
    assert torch.equal(drawn.final, given.final)


def test_float32_runs_in_torch(plane):
    network = ReluNetwork((2, 4, 1))
    problem, start = plane.to(dtype=torch.float32), starts(network, [0])
    single = sgd(network, problem, start.float(), SCHEDULES, 50, seeds=[0])
    assert single.final.dtype == torch.float32
    double = sgd(network, plane, start, SCHEDULES, 50, seeds=[0])
    assert (single.final - double.final).abs().max() < 1e-4
    with pytest.raises(ValueError, match="engine='auto'"):
        sgd(network, problem, start.float(), SCHEDULES, 50, seeds=[0], engine="compiled")


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: str(network.widths))
@pytest.mark.parametrize("n", [1, 9, 64, 150])
def test_compiled_loss_is_the_loss(network, n):
    problem = two_layer_teacher(n=n, n_test=1)
    theta = starts(network, range(6)).reshape(2, 3, -1)
    expected = (network(theta, problem.X) - problem.y).square().mean(-1) / 2
    assert torch.allclose(half_mse(network, theta, problem.X, problem.y), expected, rtol=1e-13, atol=0)
    single = half_mse(network, theta.float(), problem.X.float(), problem.y.float())
    assert torch.allclose(single.double(), expected, rtol=1e-4)
    assert torch.isnan(half_mse(network, theta, problem.X[:0], problem.y[:0])).all()  # no held-out data, no test loss


def test_lanes_fill_threads_and_instructions(monkeypatch):
    monkeypatch.setattr(relu_compiled, "get_num_threads", lambda: 2)
    assert [relu_compiled._lanes(runs) for runs in (1, 16, 17, 64, 1000)] == [8, 8, 16, 32, 32]


def test_networks_and_starts():
    network = ReluNetwork((3, 4, 2, 1), (True, False, True))
    theta = starts(network, range(5))
    assert theta.shape == (5, network.size) == (5, 3 * 4 + 4 + 4 * 2 + 2 + 1)
    assert torch.equal(network.join(network.split(theta)), theta)
    assert torch.equal(starts(network, [3])[0], theta[3])
    assert not torch.equal(starts(network, [3], 0.7), gaussian(network, (0.7,) * 3, [3], root_seed=1))
    X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 1)]
    by_layers = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]).double()
    torch.nn.utils.vector_to_parameters(theta[0], by_layers.parameters())
    assert torch.allclose(network(theta, X)[0], by_layers(X).squeeze(-1), atol=1e-14)
    bias = network.split(theta)[-1][1]
    assert torch.allclose(network.contributions(theta, X).sum(-1) + bias, network(theta, X), atol=1e-14)
    unit = theta[0][network.unit_parameters(1)[2]]
    (W, b), (out, _), _ = network.split(theta[0])
    assert torch.equal(unit, torch.cat([W[2], b[2:3], out[:, 2]]))
    assert network.unit_parameters(2).shape == (2, 4 + 1)

    two = ReluNetwork((2, 50, 1), (True, False))
    (W, b), (a, _) = two.split(balanced(two, 0.3, [0])[0])
    assert torch.allclose(a.abs().squeeze(0), W.norm(dim=1))
    assert {-1.0, 1.0} == set(a.sign().flatten().tolist())
    (W, b), (a, _) = two.split(kinked(two, [0])[0])
    assert set(W.flatten().tolist()) == {-2.5, 2.5}
    assert 1.5 < b.std() < 3.5
    assert 2.5 < a.std() < 5.5


def test_problems():
    plane, deep = two_layer_teacher(seed=1), multi_layer_teacher(seed=1)
    assert plane.X.shape == (15, 2)
    assert deep.X_test.shape == (1000, 5)
    for problem in (plane, deep):
        assert torch.allclose(problem.X.norm(dim=1), torch.ones(problem.n, dtype=torch.float64))
        assert problem.y.abs().max() > 0.1
    assert torch.equal(two_layer_teacher(seed=1).X, plane.X)
    assert not torch.equal(two_layer_teacher(seed=2).X, plane.X)
    points = twelve_points()
    assert points.X[0].item() == pytest.approx(-1.305)
    assert points.y[1].item() == pytest.approx(1.845)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(start=torch.zeros(5, dtype=torch.float64)), "does not fit"),
        (dict(start=torch.zeros(28)), "move one of them"),
        (dict(start=torch.full((28,), torch.nan, dtype=torch.float64)), "finite one"),
        (dict(seeds=[]), "at least one seed"),
        (dict(steps=-1), "steps >= 0"),
        (dict(loss="hinge"), "choose 'squared' or 'logistic'"),
        (dict(loss="logistic"), "labels -1 and 1"),
        (dict(label_noise=-0.1), "choose a number >= 0"),
        (dict(averaging=1.0), r"\[0, 1\)"),
        (dict(schedules=[]), "at least one"),
        (dict(network=ReluNetwork((1, 3, 1)), start=torch.zeros(6, dtype=torch.float64)), "takes 1 inputs"),
    ],
)
def test_bad_input(plane, change, message):
    arguments = dict(
        network=ReluNetwork((2, 7, 1), (True, False)), problem=plane, start=torch.zeros(28, dtype=torch.float64),
        schedules=[Schedule(0.1)], steps=5, seeds=[0],
    )  # fmt: skip
    sgd(**arguments)
    with pytest.raises(ValueError, match=message):
        sgd(**(arguments | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReluNetwork((2, 1)), "no network"),
        (lambda: ReluNetwork((2, 3, 2)), "no network"),
        (lambda: ReluNetwork((2, 3, 1), (True,)), "one each"),
        (lambda: ReluNetwork((2, 3, 1)).split(torch.zeros(4)), "has 9"),
        (lambda: ReluNetwork((2, 3, 1)).activations(torch.zeros(9), torch.zeros(1, 2), 2), "no hidden layer 2"),
        (lambda: gaussian(ReluNetwork((2, 3, 1)), (1.0,), [0]), "give 2 numbers"),
        (lambda: gaussian(ReluNetwork((2, 3, 1)), (1.0, 1.0), []), "at least one"),
        (lambda: kinked(ReluNetwork((2, 3, 3, 1)), [0]), "use gaussian"),
        (lambda: two_layer_teacher(n=0), "1 or more"),
    ],
)
def test_what_is_no_network_start_or_problem(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_warmup():
    sizes = Schedule(0.1, warmup=Warmup(0.5, 5.0)).step_sizes(10)
    assert torch.allclose(sizes[:6], 0.1 * (1 + 4 * torch.arange(6) / 10).double())
    assert (sizes[6:] == sizes[5]).all()
    assert sizes[5].item() == pytest.approx(0.1 * (1 + 4 * 0.5))
    late, once = (Schedule(0.1, ((0.5, 3.0),), Warmup(0.5, 5.0, 0.5), decay_at_once=at) for at in (False, True))
    peak = 0.1 * (1 + 4 * 0.5**0.5)
    assert late.step_sizes(10)[5].item() == pytest.approx(peak)
    assert once.step_sizes(10)[5].item() == pytest.approx(peak / 3)
    assert torch.equal(late.step_sizes(10)[6:], once.step_sizes(10)[6:])
    assert late.label == f"η=0.1→{peak:.3g}, /3 at 50%"
    assert (Schedule(0.1, warmup=Warmup(0.0, 5.0)).step_sizes(10) == 0.1).all()
    for bad in ((1.5, 2.0, 1.0), (0.5, 0.0, 1.0), (0.5, 2.0, 0.0)):
        with pytest.raises(ValueError, match="positive factor"):
            Warmup(*bad)
