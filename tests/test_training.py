"""The training loop: its literal twin, every way to find gradients alike, exact resume, dated divergence, bad input."""

import pytest
import torch
from torch import nn

from nets import training
from nets.curvature import hessian
from nets.images import digits
from nets.mlp import mlp
from nets.mlp_gradient import dense_gradient
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Loss, Objective
from nets.resnet import resnet
from nets.training import BLOCK, Batches, TrainingState, train
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.streams import named_generator
from theory.trajectory import Probe

DATA = digits(40)
SMALL = (64, 4, 10)


def objective_of(net=None, loss=SQUARED):
    return Objective(net or mlp(SMALL), DATA.train_x, DATA.train_y, loss)


def starts(count, **options):
    return torch.stack([FlatNet(mlp(SMALL, seed=seed, **options)).theta for seed in range(count)])


def theta_probe(steps):
    return {"theta": Probe(lambda state: state.theta.clone(), torch.arange(steps + 1))}


@pytest.mark.parametrize(
    "net", [lambda: mlp(SMALL), lambda: resnet((2,), (1,), norm="batch")], ids=["mlp", "BatchNorm"]
)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
@pytest.mark.parametrize("batch", [Minibatch(8), Minibatch(8, replacement=False), Minibatch(40, replacement=False)])
def test_it_is_torchs_sgd_on_the_same_batches(net, momentum, decay, batch):
    module, steps, seed = net(), 12, 3
    schedule = Schedule(0.1, ((0.5, 4.0),))
    run = train(objective_of(module), FlatNet(module).theta, [schedule], steps, seeds=[seed], batch=batch,
                momentum=momentum, weight_decay=decay)  # fmt: skip
    draws = Batches(40, batch, [seed])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=momentum, weight_decay=decay)
    module.train()
    for k, eta in enumerate(schedule.step_sizes(steps).tolist()):
        rows = torch.arange(40) if draws.full else draws(k)[0]
        optimizer.param_groups[0]["lr"] = eta
        optimizer.zero_grad()
        SQUARED.values(module(DATA.train_x[rows]), DATA.train_y[rows]).mean().backward()
        optimizer.step()
    assert torch.allclose(run.final.theta[0, 0], FlatNet(module).theta, rtol=0, atol=1e-12)
    for name, b in module.named_buffers():
        assert torch.allclose(run.final.buffers[name][0, 0].double(), b.double(), atol=1e-12)


@pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Identity])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_written_out_gradients_are_autograds(loss, activation, bias, full, monkeypatch):
    net = mlp((64, 5, 4, 10), activation, bias=bias)
    objective = objective_of(net, loss)
    assert dense_gradient(objective.net, loss) is not None
    two = torch.stack([FlatNet(mlp((64, 5, 4, 10), activation, seed, bias=bias)).theta for seed in (0, 1)])
    batch = Minibatch(40, replacement=False) if full else Minibatch(8)

    def final(together=None):
        schedules = [Schedule(0.1), Schedule(0.3)]
        return train(objective, two, schedules, 10, seeds=[0, 1], batch=batch, together=together).final.theta

    written, one_by_one = final(), final(together=False)
    monkeypatch.setattr(training, "written_gradient", lambda objective: None)
    batched = final()
    assert torch.allclose(written, one_by_one, rtol=1e-10, atol=1e-13)
    assert torch.allclose(batched, one_by_one, rtol=1e-10, atol=1e-13)
    assert (written[0, 0] - two[0]).norm() > 1e-3


def test_only_what_it_knows_is_written_out():
    def shape(net, loss=SQUARED):
        return dense_gradient(FlatNet(net), loss)

    assert shape(mlp(SMALL, nn.GELU)) is None
    assert shape(resnet((2,), (1,))) is None
    assert shape(mlp(SMALL), Loss("own", SQUARED.values)) is None
    part_frozen = mlp(SMALL)
    part_frozen[1].bias.requires_grad_(False)
    assert shape(part_frozen) is None
    assert shape(nn.Sequential(nn.Flatten(), nn.Tanh(), mlp((64, 10))[1])) is None


@pytest.mark.parametrize(
    "net", [lambda: mlp(SMALL), lambda: resnet((2,), (1,), norm="batch")], ids=["mlp", "BatchNorm"]
)
def test_resumed_it_goes_on_bit_for_bit(net):
    objective, steps = objective_of(net()), BLOCK + 9
    options = {"seeds": [4, 7], "momentum": 0.9, "batch": Minibatch(4)}
    start, schedules = objective.net.theta, [Schedule(0.05, ((0.5, 2.0),)), Schedule(0.1)]
    whole = train(objective, start, schedules, steps, probes=theta_probe(steps), **options)
    middle = None

    def keep(state):
        nonlocal middle
        if state.step == BLOCK - 3:
            middle = TrainingState(state.step, state.theta.clone(), state.mass.clone(), state.first_bad_step,
                                   {name: b.clone() for name, b in state.buffers.items()})  # fmt: skip
        return state.theta.sum(-1)

    train(objective, start, schedules, steps, probes={"keep": Probe(keep, torch.tensor([BLOCK - 3]))}, **options)
    rest = train(objective, middle, schedules, steps, probes=theta_probe(steps), **options)
    assert torch.equal(rest.final.theta, whole.final.theta)
    assert torch.equal(rest["theta"].values, whole["theta"].values[BLOCK - 3 :])
    assert all(torch.equal(rest.final.buffers[name], b) for name, b in whole.final.buffers.items())
    again = train(objective, middle, schedules, steps, **options)
    assert torch.equal(again.final.theta, whole.final.theta)  # the state was not changed by going on from it


def test_batches_are_a_function_of_seed_and_step():
    one = Batches(40, Minibatch(8), [3])
    among = Batches(40, Minibatch(8), [1, 3])
    late = Batches(40, Minibatch(8), [3])(BLOCK + 5)
    for k in (0, 1, BLOCK - 1, BLOCK, BLOCK + 5, 2):
        assert torch.equal(one(k)[0], among(k)[1])
    assert torch.equal(one(BLOCK + 5), late)
    literal = named_generator(0, "batches", 3, block=0).integers(0, 40, (BLOCK, 8))
    assert torch.equal(one(0)[0], torch.from_numpy(literal[0]))
    without = Batches(40, Minibatch(8, replacement=False), [0])
    rows = torch.stack([without(k)[0] for k in range(3 * BLOCK)])
    assert all(len(row.unique()) == 8 for row in rows)
    # Every sample is drawn equally often: χ² over 40 samples at 4 sigma.
    counts = rows.flatten().bincount(minlength=40).double()
    chi = ((counts - counts.mean()).square() / (counts.mean() * (1 - 8 / 40))).sum()
    assert abs(chi - 39) < 4 * (2 * 39) ** 0.5


def test_seeds_and_schedules_do_not_see_each_other():
    objective, theta = objective_of(), starts(3)
    together = train(objective, theta, [Schedule(0.1), Schedule(0.2)], 30, seeds=range(3))
    alone = train(objective, theta[2], [Schedule(0.2)], 30, seeds=[2])
    assert torch.allclose(together.final.theta[1, 2], alone.final.theta[0, 0], rtol=0, atol=1e-13)
    other = train(objective, theta[2], [Schedule(0.2)], 30, seeds=[2], root_seed=1)
    assert not torch.allclose(other.final.theta, alone.final.theta)


@pytest.mark.parametrize("together", [True, False])
def test_divergence_is_dated_and_frozen(together):
    objective = objective_of()
    probes = theta_probe(400)
    run = train(objective, starts(2), [Schedule(0.1), Schedule(50.0)], 400, seeds=[0, 1], probes=probes,
                batch=Minibatch(8), together=together)  # fmt: skip
    assert run.finite.tolist() == [[True, True], [False, False]]
    theta = run["theta"].values
    for seed in range(2):
        bad = int(run.first_bad_step[1, seed])
        assert 0 < bad < 400
        assert torch.isnan(theta[bad + 1 :, 1, seed]).all()
        assert torch.equal(theta[bad, 1, seed], run.final.theta[1, seed])
        assert torch.isfinite(run.final.theta[1, seed]).all()
    assert torch.isfinite(theta[:, 0]).all()
    with pytest.raises(ValueError, match="before the run diverged"):
        hessian(objective, theta[-1, 1, 0])


def test_directions_change_what_is_stepped_along():
    objective = objective_of()
    still = train(objective, starts(2), [Schedule(0.1)], 3, seeds=[0, 1], direction=lambda state, g: 0 * g)
    assert torch.equal(still.final.theta[0], starts(2))
    seen = []

    def double(state, g):
        seen.append((state.step, tuple(g.shape)))
        return 2 * g

    twice = train(objective, starts(2), [Schedule(0.05)], 3, seeds=[0, 1], direction=double)
    plain = train(objective, starts(2), [Schedule(0.1)], 3, seeds=[0, 1])
    assert torch.allclose(twice.final.theta, plain.final.theta, atol=1e-14)
    assert seen == [(k, (1, 2, objective.p)) for k in range(3)]


def test_digits_are_learnt():
    data = digits()
    objective = Objective(mlp(), data.train_x, data.train_y, CROSS_ENTROPY)
    run = train(objective, objective.net.theta, [Schedule(0.5)], 600, seeds=[0])
    test = Objective(objective.net, data.test_x, data.test_y, CROSS_ENTROPY)
    assert test.accuracy(run.final.theta[0, 0]) > 0.93


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "not a run"),
        ({"seeds": []}, "not a run"),
        ({"schedules": []}, "no schedule"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight decay"),
        ({"batch": Minibatch(41, replacement=False)}, "without replacement"),
        ({"start": torch.zeros(3).double()}, "give .p,., .seeds, p. or"),
        ({"start": starts(2).float()}, "move it"),
        ({"start": starts(2) * torch.nan}, "finite one"),
        ({"start": lambda: train(objective_of(), starts(2), [Schedule(0.1)], 9, seeds=[0, 1]).final}, "cannot go on"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"start": starts(2), "schedules": [Schedule(0.1)], "steps": 5, "seeds": [0, 1]} | change
    if callable(arguments["start"]):
        arguments["start"] = arguments["start"]()
    positional = [arguments.pop(name) for name in ("start", "schedules", "steps")]
    with pytest.raises(ValueError, match=message) as told:
        train(objective_of(), *positional, **arguments)
    assert str(told.value).endswith(".")
