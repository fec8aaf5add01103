"""Nudged-SGD: the published updates literally, SGD at γ = 1 to the bit, saved and loaded, and its batched twin."""

import contextlib
import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nets.curvature import hessian
from nets.images import digits
from nets.lanczos import eigenpairs
from nets.mlp import mlp
from nets.nudged import Nudge, NudgedSGD, RandomDirections, SharpestDirections, sharpest_directions_of, sharpest_of
from nets.objective import SQUARED, FlatNet, Objective
from nets.training import Batches, train
from theory.minibatch import Minibatch
from theory.schedule import Schedule

DATA = digits(80)
OBJECTIVE = Objective(mlp((64, 4, 10)), DATA.train_x, DATA.train_y, SQUARED)
DRAWS = Batches(80, Minibatch(8), [0])


def new_net():
    return mlp((64, 4, 10))


def sharpest(net, k=3, tolerance=1e-6):
    return SharpestDirections(net, DATA.train_x, DATA.train_y, SQUARED, k, tolerance)


def run(net, optimizer, steps, first=0):
    """Steps on the minibatches of the stream; returns θ after every step."""
    path = []
    for k in range(first, steps):
        rows = DRAWS(k)[0]
        optimizer.zero_grad()
        SQUARED.values(net(DATA.train_x[rows]), DATA.train_y[rows]).mean().backward()
        optimizer.step()
        path.append(FlatNet(net).theta)
    return torch.stack(path)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("variant", ["correct_v", "correct_g", "correct_both"])
def test_gamma_one_is_sgd_to_the_bit(momentum, decay, variant):
    one, two = new_net(), new_net()
    nudged = NudgedSGD(one.parameters(), sharpest(one), 0.1, 1.0, variant=variant, momentum=momentum,
                       weight_decay=decay, refresh=5)  # fmt: skip
    plain = torch.optim.SGD(two.parameters(), lr=0.1, momentum=momentum, weight_decay=decay)
    assert torch.equal(run(one, nudged, 20), run(two, plain, 20))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["correct_v", "correct_g", "correct_both"])
def test_updates_are_the_published_ones(variant, momentum):
    """v = μm - ηg etc., written with the published velocity, on fresh eigenvectors every 4 steps."""
    eta, gamma, steps = 0.1, 0.2, 12
    net = new_net()
    optimizer = NudgedSGD(net.parameters(), sharpest(net), eta, gamma, variant=variant, momentum=momentum, refresh=4)
    path = run(net, optimizer, steps)
    theta = OBJECTIVE.net.theta
    m, V = torch.zeros_like(theta), None
    for k in range(steps):
        if k % 4 == 0:
            V = eigenpairs(hessian(OBJECTIVE, theta), 3, start=V, tolerance=1e-6).vectors
        g = OBJECTIVE.on(DRAWS(k)[0]).gradient(theta)

        def nudge(x, V=V):
            return x + (gamma - 1) * V @ (V.T @ x)

        v = momentum * m - eta * (g if variant == "correct_v" else nudge(g))
        m = v
        theta = theta + (v if variant == "correct_g" else nudge(v))
        assert torch.allclose(path[k], theta, rtol=0, atol=1e-10)


def test_a_small_gamma_slows_the_sharp_directions_alone():
    net = new_net()
    before = FlatNet(net).theta
    optimizer = NudgedSGD(net.parameters(), sharpest(net), 0.1, 0.0)
    after = run(net, optimizer, 1)[0]
    V = eigenpairs(hessian(OBJECTIVE, before), 3, tolerance=1e-6).vectors
    step = after - before
    plain = -0.1 * OBJECTIVE.on(DRAWS(0)[0]).gradient(before)
    assert (V.T @ step).norm() < 1e-8 < (V.T @ plain).norm()
    assert torch.allclose(step, plain - V @ (V.T @ plain), atol=1e-9)
    assert optimizer.overlap() == pytest.approx(float((V.T @ plain).norm() / plain.norm()), rel=1e-6)


def test_gamma_is_a_group_entry_that_schedules_can_change():
    net = new_net()
    optimizer = NudgedSGD(net.parameters(), sharpest(net), 0.1, 0.0, refresh=2)
    run(net, optimizer, 3)
    middle = copy.deepcopy(net)
    optimizer.param_groups[0]["gamma"] = 1.0
    plain = torch.optim.SGD(middle.parameters(), lr=0.1)
    assert torch.equal(run(net, optimizer, 8, first=3), run(middle, plain, 8, first=3))
    net = new_net()
    groups = [{"params": net[1].parameters()}, {"params": net[3].parameters(), "gamma": 1.0}]
    run(net, NudgedSGD(groups, sharpest(net), 0.1, 0.0), 1)
    other = new_net()
    run(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
    assert torch.equal(net[3].weight, other[3].weight)
    assert not torch.equal(net[1].weight, other[1].weight)


@pytest.mark.parametrize("directions", [sharpest, lambda net: RandomDirections(3, seed=1)])
def test_saved_and_loaded_it_goes_on_bit_for_bit(directions):
    def optimizer_of(net):
        return NudgedSGD(net.parameters(), directions(net), 0.1, 0.1, variant="correct_both", momentum=0.9, refresh=7)

    net = new_net()
    whole = run(net, optimizer_of(net), 20)
    first = new_net()
    optimizer = optimizer_of(first)
    run(first, optimizer, 10)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved, second = torch.load(file), new_net()
    second.load_state_dict(saved["net"])
    resumed = optimizer_of(second)
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(run(second, resumed, 20, first=10), whole[10:])


def test_burn_in_is_plain_sgd_and_closures_are_called():
    net, other = new_net(), new_net()
    optimizer = NudgedSGD(net.parameters(), sharpest(net), 0.1, 0.0, burn_in=3)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    path, expected = run(net, optimizer, 5), run(other, plain, 5)
    assert torch.equal(path[:3], expected[:3])
    assert not torch.allclose(path[3], expected[3])

    def closure():
        optimizer.zero_grad()
        loss = SQUARED.values(net(DATA.train_x), DATA.train_y).mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > OBJECTIVE.value(FlatNet(net).theta)


def test_directions_agree_whichever_way_they_are_asked():
    net = new_net()
    theta = FlatNet(net).theta
    closure = sharpest_directions_of(
        lambda: SQUARED.values(net(DATA.train_x), DATA.train_y).mean(), net.parameters(), 3, 1e-7
    )
    one, two, three = closure(0, theta, None), sharpest(net)(0, theta, None), sharpest_of(OBJECTIVE, 3)(0, theta, None)
    exact = torch.linalg.eigh(hessian(OBJECTIVE, theta).dense())[1][:, -3:]
    for V, tolerance in ((one, 1e-5), (two, 1e-5), (three, 0.1)):
        assert torch.allclose(V @ V.T, exact @ exact.T, atol=tolerance)


def test_the_control_is_orthonormal_and_a_function_of_seed_and_step():
    theta = torch.zeros(50, dtype=torch.float64)
    V = RandomDirections(4, seed=2)(7, theta, None)
    assert torch.allclose(V.T @ V, torch.eye(4, dtype=torch.float64), atol=1e-14)
    assert torch.equal(V, RandomDirections(4, seed=2)(7, theta, V))
    assert not torch.allclose(V, RandomDirections(4, seed=2)(8, theta, None))


def test_the_batched_twin_takes_the_optimizers_steps():
    gammas, refresh = [1.0, 0.1, 0.3], 4
    directions = [sharpest_of(OBJECTIVE, 3, 1e-9), sharpest_of(OBJECTIVE, 3, 1e-9), RandomDirections(3)]
    starts = torch.stack([FlatNet(mlp((64, 4, 10), seed=s)).theta for s in (0, 1)])
    run_of = train(OBJECTIVE, starts, [Schedule(0.1)] * 3, 12, seeds=[0, 1], batch=Minibatch(8),
                   direction=Nudge(directions, gammas, refresh))  # fmt: skip
    for s, gamma in enumerate(gammas):
        net = new_net()
        chosen = sharpest(net, 3, 1e-9) if s < 2 else RandomDirections(3)
        path = run(net, NudgedSGD(net.parameters(), chosen, 0.1, gamma, refresh=refresh), 12)
        assert torch.allclose(run_of.final.theta[s, 0], path[-1], rtol=0, atol=1e-9)


class NoWaiting(TorchDispatchMode):
    """Operators that fetch a number from the device, or shape results by it, are errors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["correct_v", "correct_g", "correct_both"])
def test_between_looks_nothing_waits_for_the_device(variant):
    net = new_net()
    optimizer = NudgedSGD(net.parameters(), sharpest(net), 0.1, 0.2, variant=variant, momentum=0.9, refresh=4)
    run(net, optimizer, 1)
    with NoWaiting():
        for _ in range(3):
            optimizer.step()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        optimizer.step()  # a look
    twin, found = Nudge(sharpest_of(OBJECTIVE, 3), [0.2], 4), []

    def watched(state, gradient):
        with NoWaiting() if state.step % 4 else contextlib.nullcontext():
            found.append(twin(state, gradient))
        return found[-1]

    train(OBJECTIVE, OBJECTIVE.net.theta, [Schedule(0.1)], 4, seeds=[0], direction=watched)
    assert len(found) == 4


@pytest.mark.parametrize("directions", [sharpest, lambda net: RandomDirections(3)])
def test_single_precision_stays(directions):
    net = new_net().float()
    data = DATA.to(dtype=torch.float32)
    chosen = directions(net) if directions is not sharpest else SharpestDirections(net, data.train_x, data.train_y, k=3)
    optimizer = NudgedSGD(net.parameters(), chosen, 0.1, 0.2, momentum=0.9)
    SQUARED.values(net(data.train_x), data.train_y).mean().backward()
    optimizer.step()
    kept = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, torch.Tensor)]
    assert {part.dtype for part in kept} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.gpu
def test_on_a_gpu_steps_are_the_cpus_and_wait_for_nothing():
    paths = []
    for device in ("cpu", "cuda"):
        net, data = new_net().to(device), DATA.to(device)
        chosen = SharpestDirections(net, data.train_x, data.train_y, SQUARED, 3, 1e-7)
        optimizer = NudgedSGD(net.parameters(), chosen, 0.1, 0.2, momentum=0.9, refresh=6)
        for k in range(12):
            rows = DRAWS(k)[0].to(device)
            optimizer.zero_grad()
            SQUARED.values(net(data.train_x[rows]), data.train_y[rows]).mean().backward()
            torch.cuda.set_sync_debug_mode("error" if k % 6 else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        paths.append(FlatNet(net).theta.cpu())
    assert torch.allclose(*paths, rtol=0, atol=1e-8)


def optimizer_with(directions=None, lr=0.1, gamma=0.5, **options):
    net = new_net()
    optimizer = NudgedSGD(net.parameters(), directions or sharpest(net), lr, gamma, **options)
    return run(net, optimizer, 1)


def nudge_with(gammas, directions=None, schedules=2):
    return train(OBJECTIVE, OBJECTIVE.net.theta, [Schedule(0.1)] * schedules, 1, seeds=[0],
                 direction=Nudge(directions or RandomDirections(2), gammas))  # fmt: skip


BAD = {
    "choose correct_v": lambda: optimizer_with(variant="nudge"),
    "refresh 0": lambda: optimizer_with(refresh=0),
    "gamma -1": lambda: optimizer_with(gamma=-1),
    "step size nan": lambda: optimizer_with(lr=torch.nan),
    "momentum 1": lambda: optimizer_with(momentum=1),
    "weight decay -1": lambda: optimizer_with(weight_decay=-1),
    "give finite columns": lambda: optimizer_with(lambda step, theta, previous: theta.unsqueeze(1)[:-1]),
    "for each schedule": lambda: nudge_with([0.5, torch.nan]),
    "give one each": lambda: nudge_with([0.5]),
    "1 step or more": lambda: Nudge(RandomDirections(), [1.0], 0),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).endswith(".")
