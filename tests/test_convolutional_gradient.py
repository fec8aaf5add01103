"""Compiled gradients of convolutional networks: those of automatic differentiation, whatever else runs beside them."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from nets.batch_statistics import on_batch_statistics
from nets.compiled_elements import TANH, activate
from nets.convolutional_gradient import ConvolutionalGradient, convolutional_gradient
from nets.convolutional_plan import plan
from nets.gradients import batched_gradients, written_gradient
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Objective
from nets.resnet import PreActivationBlock, resnet
from nets.training import train
from simulators.network import CROSS_ENTROPY as CLASSES
from simulators.network import Network
from theory import threads
from theory.minibatch import Minibatch
from theory.schedule import Schedule

DOUBLE = torch.float64
RUNS = 5


def built(make):
    """What ``make`` builds, with torch's own initial weights of one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def samples(shape=(1, 8, 8), batch=11, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(RUNS, batch, *shape, generator=generator, dtype=DOUBLE).to(dtype)
    return X, torch.randint(0, 10, (RUNS, batch), generator=generator)


def states(module, spread=0.2):
    """Parameters of every run, all different, batch norms' scales and shifts included."""
    net = FlatNet(module)
    noise = torch.randn(RUNS, net.p, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(net.theta)
    return net, net.theta + spread * noise


def by_autograd(net, theta, X, labels, loss):
    leaf = theta.clone().requires_grad_()
    losses = loss.values(torch.func.vmap(net.outputs)(leaf, X), labels).mean(-1)
    return torch.autograd.grad(losses.sum(), leaf)[0], losses.detach()


def assert_equal(module, X, labels, loss=CROSS_ENTROPY, rtol=1e-12):
    net, theta = states(module)
    found = convolutional_gradient(net, loss, X[0])
    assert found is not None
    gradient, losses = found(theta, X, labels)
    expected, levels = by_autograd(net, theta, X, labels, loss)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=rtol * float(expected.abs().max()))
    torch.testing.assert_close(losses, levels, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.losses(theta, X, labels), levels, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY], ids=lambda loss: loss.name)
@pytest.mark.parametrize("batch", [3, 8, 11])  # fewer than eight images, eight, and some over
@pytest.mark.parametrize(("norm", "activation"), [("batch", nn.ReLU), ("group", nn.Sigmoid), ("none", nn.Tanh)])
def test_gradients_are_those_of_automatic_differentiation(norm, activation, batch, loss):
    module = on_batch_statistics(resnet((6, 16), norm=norm, activation=activation))
    assert_equal(module, *samples(batch=batch), loss)


def test_single_precision_differs_by_rounding():
    module = on_batch_statistics(resnet((8, 16), norm="batch", dtype=torch.float32))
    assert_equal(module, *samples(batch=16, dtype=torch.float32), rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), 1, 1), ((1, 1), 2, 0), ((5, 2), (3, 1), (1, 2)), ((2, 2), 2, 3)]
)
def test_kernels_of_every_shape(kernel, stride, padding, channels):
    def layers():
        last = nn.Conv2d(9, 5, kernel, stride, padding), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10)
        return nn.Sequential(nn.Conv2d(channels, 9, kernel, stride, padding), nn.Tanh(), *last).double()

    assert_equal(built(layers), *samples((channels, 9, 7), batch=9))


class Written(nn.Module):
    """Layers, and a body that calls them; then mean pooling and a head."""

    def __init__(self, body, **layers):
        super().__init__()
        self.body, self.pool, self.head, self.same = body, nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10), nn.Identity()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.head(self.pool(self.body(self, x)).flatten(1))


def read_before_and_after(net, x):
    first = net.one(x)
    active = torch.relu(first)
    return net.norm(first + active) + active + net.two(active) + first


def read_through_the_identity(net, x):
    first = net.one(x)
    kept = net.same(first)
    return net.two(torch.tanh(kept)) + functional.relu(net.norm(first)) + kept


def sums_of_sums(net, x):
    second = net.norm(net.one(x).relu())
    both = net.two(second) + net.three(second)
    return (second + both.tanh()) + net.same(second.sigmoid()) + both.relu()


@pytest.mark.parametrize("body", [read_before_and_after, read_through_the_identity, sums_of_sums])
def test_what_is_needed_again_is_not_overwritten(body):
    def module():
        layers = {
            "one": nn.Conv2d(1, 8, 3, padding=1),
            "two": nn.Conv2d(8, 8, 3, padding=1),
            "norm": nn.GroupNorm(4, 8),
        }
        if body is sums_of_sums:
            layers["three"] = nn.Conv2d(8, 8, 1)
        return Written(body, **layers).double()

    assert_equal(built(module), *samples(batch=8))


def test_what_only_passes_a_value_on_costs_no_memory():
    def size(*between):
        last = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        module = built(lambda: nn.Sequential(nn.Conv2d(1, 8, 3), *between, *last, nn.Linear(8, 10)))
        place, places = 0, {}
        for name, parameter in module.named_parameters():
            places[name], place = place, place + parameter.numel()
        return plan(module, places, 8, (1, 8, 8)).size

    assert size(nn.Identity()) == size() < size(nn.Tanh())


def test_means_and_overwriting_functions():
    def body(net, x):
        y = functional.relu(net.one(x), inplace=True)
        z = net.two(y)
        z += y
        return net.norm(z)

    class Averaged(Written):
        def forward(self, x):
            y = self.body(self, x)
            return self.head(torch.mean(y, dim=(2, 3)) + y.relu().mean([-2, -1]))

    def module(body=body):
        layers = {
            "one": nn.Conv2d(1, 8, 3, padding=1),
            "two": nn.Conv2d(8, 8, 3, padding=1),
            "norm": nn.GroupNorm(4, 8),
        }
        return Averaged(body, **layers).double()

    assert_equal(built(module), *samples(batch=8))

    def both(net, x):  # what is read later has been overwritten
        first = net.norm(net.one(x))
        return functional.relu(first, inplace=True) + net.two(first)

    assert convolutional_gradient(FlatNet(built(lambda: module(both))), SQUARED, samples()[0][0]) is None


def test_a_network_of_pre_activation_blocks():
    def module():
        blocks = (
            PreActivationBlock(8, outputs, stride, "batch", nn.ReLU, DOUBLE) for outputs, stride in ((8, 1), (12, 2))
        )
        end = nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
        network = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), *blocks, *end).double()
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                part.reset_parameters()
        return on_batch_statistics(network)

    assert_equal(built(module), *samples(batch=8))


def test_signed_weights_and_slopes_and_targets_that_are_no_class():
    module = resnet((4, 8), norm="group")
    net, theta = states(module)
    X, labels = samples(batch=6)
    generator = torch.Generator().manual_seed(3)
    weights, slopes = (torch.randn(RUNS, 6, *more, generator=generator, dtype=DOUBLE) for more in ((), (10,)))
    plain = Network(module, X.flatten(0, 1), labels.flatten(), CLASSES)
    compiled = ConvolutionalGradient(module, "cross-entropy")
    given = Network(module, X.flatten(0, 1), labels.flatten(), CLASSES, gradients=compiled.weighted_gradient)
    rows = torch.arange(RUNS * 6).view(RUNS, 6)
    for w, c in ((weights, slopes), (weights, None), (None, slopes)):
        first, second = (network.weighted_gradient(theta, w, c, rows) for network in (plain, given))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12 * float(first.abs().max()))
    everything = [network.gradient(theta[:1]) for network in (plain, given)]  # one path, all samples
    torch.testing.assert_close(*everything, rtol=0, atol=1e-12 * float(everything[0].abs().max()))
    soft = torch.rand(RUNS, 6, 10, generator=generator, dtype=DOUBLE)
    expected, _ = by_autograd(net, theta, X, soft, CROSS_ENTROPY)
    torch.testing.assert_close(compiled(theta, X, soft)[0], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_norms_over_odd_numbers_of_rows():
    def layers():
        first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()
        second = nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*first, *second, nn.Linear(16, 10)).double()

    assert_equal(built(layers), *samples((1, 5, 5), batch=3))  # 75 rows, and nine an image


@pytest.mark.parametrize("size", [8, 3])
def test_minibatches_of_one_pass_are_normalised_each_by_itself(size):
    module = on_batch_statistics(resnet((4, 8), norm="batch"))
    _, theta = states(module)
    X, labels = samples(batch=3 * size)
    weights = torch.randn(RUNS, 3 * size, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    compiled = ConvolutionalGradient(module, "cross-entropy")
    data = X.flatten(0, 1), labels.flatten(), CLASSES
    plain = Network(module, *data, batch_statistics=True)
    given = Network(module, *data, batch_statistics=True, gradients=compiled.weighted_gradient)
    rows = torch.arange(RUNS * 3 * size).view(RUNS, -1)
    first, second = (network.weighted_gradient(theta, weights, None, rows, 3) for network in (plain, given))
    parts = [
        plain.weighted_gradient(theta, weights[:, part], None, rows[:, part])
        for part in (slice(0, size), slice(size, 2 * size), slice(2 * size, None))
    ]
    torch.testing.assert_close(first, sum(parts), rtol=0, atol=1e-12 * float(first.abs().max()))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12 * float(first.abs().max()))
    assert (plain.weighted_gradient(theta, weights, None, rows) - first).norm() > 0.01 * first.norm()
    for refuse in (plain.weighted_gradient, given.weighted_gradient):
        with pytest.raises(ValueError, match="minibatches of equal size"):
            refuse(theta, weights, None, rows, 2 if size == 3 else 5)
    with pytest.raises(ValueError, match="minibatches of equal size"):
        compiled.weighted_gradient(theta, X, labels, weights, None, 2 if size == 3 else 5)


def test_bits_do_not_depend_on_company_or_threads_and_nan_stays_at_home(monkeypatch):
    module = on_batch_statistics(resnet((8, 16), norm="batch", dtype=torch.float32))
    net, theta = states(module)
    X, labels = samples(batch=8, dtype=torch.float32)
    theta[1] = torch.nan
    found = convolutional_gradient(net, CROSS_ENTROPY, X[0])
    used = []
    monkeypatch.setattr(
        threads,
        "ThreadPoolExecutor",
        lambda count: used.append(count) or ThreadPoolExecutor(count),
    )
    monkeypatch.setattr(numba, "get_num_threads", lambda: 1)
    together, levels = found(theta, X, labels)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 2)
    again, _ = found(theta, X, labels)
    assert used == [2]
    assert torch.isnan(together[1]).any()
    assert torch.isnan(levels[1])
    for run in (0, 2, 3, 4):
        alone, level = found(theta[run : run + 1], X[run : run + 1], labels[run : run + 1])
        assert torch.equal(alone[0], together[run])
        assert torch.equal(again[run], together[run])
        assert torch.equal(level[0], levels[run])
        assert torch.isfinite(alone).all()


def test_samples_that_all_runs_share():
    module = resnet((4, 8))
    _, theta = states(module)
    X, labels = samples(batch=9)
    found = ConvolutionalGradient(module, "squared")
    expected = found(theta, X[:1].expand(RUNS, -1, -1, -1, -1), labels[:1].expand(RUNS, -1))
    for one, other in zip(found(theta, X[:1], labels[:1]), expected, strict=True):
        assert torch.equal(one, other)


def unknown_modules():
    """Networks that the loops do not know, by what is in the way."""
    conv, head = lambda **more: nn.Conv2d(1, 8, 3, padding=1, **more), (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    frozen, tied = nn.Linear(8, 10), nn.Conv2d(8, 8, 3, padding=1)
    frozen.bias.requires_grad_(False)
    linear = nn.Linear(8, 10)
    yield "max pooling", [conv(), nn.MaxPool2d(2), *head, linear]
    yield "gelu", [conv(), nn.GELU(), *head, linear]
    yield "an activation of the images", [nn.ReLU(), conv(), *head, linear]
    yield "dilation", [nn.Conv2d(1, 8, 3, dilation=2), *head, linear]
    yield "groups", [conv(), nn.Conv2d(8, 8, 3, groups=2), *head, linear]
    yield "reflection", [conv(padding_mode="reflect"), *head, linear]
    yield "running statistics", [conv(), nn.BatchNorm2d(8), *head, linear]
    yield "a frozen bias", [conv(), *head, frozen]
    yield "a shared layer", [conv(), tied, nn.ReLU(), tied, *head, linear]
    yield "an unflattened image", [conv(), nn.Flatten(), nn.Linear(512, 10)]
    yield "an activation at the end", [conv(), *head, linear, nn.Tanh()]
    yield "a bare parameter", [conv(), nn.PReLU(), *head, linear]
    yield "too many parameters", [conv(), nn.Conv2d(8, 300, 3), *head, nn.Linear(300, 10)]


@pytest.mark.parametrize(
    ("what", "layers"), [pytest.param(*case, id=case[0]) for case in built(lambda: list(unknown_modules()))]
)
def test_unknown_modules_are_left_to_autograd(what, layers):
    module = nn.Sequential(*layers).double()
    net = FlatNet(module)
    X, labels = samples(batch=4)
    assert convolutional_gradient(net, CROSS_ENTROPY, X[0]) is None
    if what not in ("running statistics", "a frozen bias"):
        objective = Objective(net, X.flatten(0, 1), labels.flatten(), CROSS_ENTROPY)
        theta = net.theta.expand(RUNS, -1)
        found, _ = batched_gradients(objective)(theta, torch.arange(RUNS * 4).view(RUNS, 4))
        torch.testing.assert_close(found, by_autograd(net, theta, X, labels, CROSS_ENTROPY)[0])


def test_hooks_are_left_to_autograd():
    module = resnet((4, 8))
    assert convolutional_gradient(FlatNet(module), SQUARED, samples()[0][0]) is not None
    module[0].register_forward_hook(lambda part, inputs, out: 2 * out)
    assert convolutional_gradient(FlatNet(module), SQUARED, samples()[0][0]) is None


class TwoOutputs(nn.Sequential):
    def forward(self, x):
        out = super().forward(x)
        return out, out


def test_what_puts_out_more_than_one_tensor_is_unknown():
    module = built(lambda: TwoOutputs(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    assert convolutional_gradient(FlatNet(module.double()), SQUARED, samples()[0][0]) is None


def test_training_takes_the_same_steps_together_and_one_by_one():
    module = on_batch_statistics(resnet((4, 8), norm="batch"))
    X, labels = samples(batch=12)
    goal = Objective(FlatNet(module), X.flatten(0, 1), labels.flatten(), CROSS_ENTROPY)
    assert isinstance(written_gradient(goal), ConvolutionalGradient)
    options = {"seeds": range(3), "batch": Minibatch(8), "momentum": 0.5}
    schedules = [Schedule(0.05), Schedule(0.2)]
    one, all_at_once = (
        train(goal, goal.net.theta, schedules, 6, together=together, **options).final.theta
        for together in (False, None)
    )
    torch.testing.assert_close(one, all_at_once, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_is_exact_to_rounding(dtype):
    x = np.concatenate([np.linspace(-25, 25, 20_001), np.geomspace(1e-30, 1, 503)]).astype(dtype)
    out = x.copy()
    activate(out, 0, 0, len(x), TANH)
    expected = np.tanh(x.astype(np.float64))
    assert (np.abs(out - expected) <= 8 * np.finfo(dtype).eps * np.abs(expected)).all()
    edge = np.array([-np.inf, np.inf, np.nan, 0, 0, 0, 0, 0], dtype)
    activate(edge, 0, 0, 8, TANH)
    np.testing.assert_array_equal(edge, [-1, 1, np.nan, 0, 0, 0, 0, 0])


def test_what_is_not_known_is_said():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    module = built(lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), *head, nn.Linear(8, 10))).double()
    X, labels = samples(batch=2)
    with pytest.raises(ValueError, match=r"automatic differentiation: it has an operation .* call_module 1"):
        ConvolutionalGradient(module, "squared")(FlatNet(module).theta.expand(RUNS, -1), X, labels)


def test_arguments_that_do_not_fit_are_refused():
    module = resnet((4, 8))
    net, theta = states(module)
    X, labels = samples(batch=2)
    compiled = ConvolutionalGradient(module, "squared")
    wrong = ((theta[:, 1:], X, labels), (theta[:2], X, labels), (theta, X[:2], labels), (theta, X, labels[:, :1]),
             (theta, X[:, :0], labels[:, :0]), (theta[0], X, labels))  # fmt: skip
    for arguments in wrong:
        with pytest.raises(ValueError, match=rf"do not fit: give \(R, {net.p}\), "):
            compiled(*arguments)
    with pytest.raises(ValueError, match="one precision"):
        compiled(theta, X.float(), labels)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="choose from squared, cross-entropy"):
        ConvolutionalGradient(resnet((4, 8)), "hinge")
