"""Curvature operators against dense matrices from torch.func, and against curvlinops where it is installed."""

import pytest
import torch
from torch import nn

from nets.curvature import gauss_newton, gradient_covariance, hessian
from nets.images import digits
from nets.mlp import mlp
from nets.objective import CROSS_ENTROPY, SQUARED, FlatNet, Objective
from nets.resnet import resnet
from theory.minibatch import Minibatch

DATA = digits(24)
NETS = {
    "tanh": lambda: mlp((64, 3, 10)),
    "ReLU": lambda: mlp((64, 3, 10), nn.ReLU),
    "deep, no bias": lambda: mlp((64, 3, 18, 10), nn.Sigmoid, bias=False),
    "linear": lambda: mlp((64, 17, 10), nn.Identity),
    "convolutions": lambda: resnet((2,), (1,), activation=nn.Tanh),
    "BatchNorm": lambda: warmed(resnet((2,), (1,), norm="batch")),
    "GroupNorm": lambda: resnet((2, 4), (1, 1), norm="group", activation=nn.SiLU),
}


def warmed(net):
    """Running statistics that are not the initial ones."""
    net(3 * DATA.test_x[:50] + 1)
    return net


@pytest.fixture(params=NETS, ids=NETS.keys())
def net(request):
    return NETS[request.param]()


@pytest.fixture(params=[SQUARED, CROSS_ENTROPY], ids=["squared", "cross-entropy"])
def objective(request, net):
    return Objective(net, DATA.train_x, DATA.train_y, request.param)


def vector(p, seed=0):
    return torch.randn(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_at(objective, theta):
    return objective.loss.values(objective.outputs(theta, objective.X), objective.labels).mean()


def test_hessian_gauss_newton_and_covariance_are_the_dense_ones(objective):
    theta, v = objective.net.theta, vector(objective.p)
    per_sample = torch.func.jacrev(lambda t: objective.loss.values(objective.outputs(t, objective.X), DATA.train_y))
    G = per_sample(theta)
    assert torch.allclose(objective.gradient(theta), G.mean(0), atol=1e-14)
    J = torch.func.jacrev(lambda t: objective.outputs(t, objective.X))(theta)
    h = objective.outputs(theta, objective.X).detach()
    if objective.loss is SQUARED:
        inner = torch.eye(10, dtype=h.dtype).expand(len(h), 10, 10)
    else:
        share = h.softmax(1)
        inner = torch.diag_embed(share) - share.unsqueeze(2) * share.unsqueeze(1)
    Jv = J @ v
    expected = torch.einsum("ncp,ncd,nd->p", J, inner, Jv) / len(h)
    for keep in (True, False):
        assert torch.allclose(gauss_newton(objective, theta, keep) @ v, expected, atol=1e-12)
        centred = G - G.mean(0)
        expected_c = centred.T @ (centred @ v) / len(G)
        assert torch.allclose(gradient_covariance(objective, theta, keep) @ v, expected_c, atol=1e-12)
        exact = torch.func.jvp(torch.func.grad(lambda t: loss_at(objective, t)), (theta,), (v,))[1]
        assert torch.allclose(hessian(objective, theta, keep) @ v, exact, atol=1e-11)


def test_dense_hessian_is_torchs_and_symmetric():
    objective = Objective(mlp((64, 2, 10)), DATA.train_x, DATA.train_y)
    dense = hessian(objective, objective.net.theta).dense()
    exact = torch.func.hessian(lambda t: loss_at(objective, t))(objective.net.theta)
    assert torch.allclose(dense, exact, atol=1e-12)
    assert torch.allclose(dense, dense.T, atol=1e-14)


def test_chunks_sums_and_blocks_change_nothing(net):
    theta = FlatNet(net).theta
    whole, parts = (Objective(net, DATA.train_x, DATA.train_y, chunk=chunk) for chunk in (None, 7))
    block = torch.stack([vector(whole.p, s) for s in range(2)], 1)
    for build in (hessian, gauss_newton, gradient_covariance):
        one, cut = build(whole, theta), build(parts, theta, keep_graph=False)
        assert torch.allclose(one @ block, cut @ block, atol=1e-12)
    combined = hessian(whole, theta).scaled(-0.3, 2.0) + gauss_newton(whole, theta)
    expected = -0.3 * (hessian(whole, theta) @ block) + 2 * block + gauss_newton(whole, theta) @ block
    assert torch.allclose(combined @ block, expected, atol=1e-13)
    assert whole.value(theta) == pytest.approx(float(parts.value(theta)), abs=1e-14)
    assert torch.allclose(whole.gradient(theta), parts.gradient(theta), atol=1e-14)


def test_covariance_is_that_of_minibatch_gradients():
    """With replacement the mean over all pairs of samples of the batch gradient's covariance is C/2, exactly."""
    data = DATA.subset(6)
    objective = Objective(mlp((64, 2, 10)), data.train_x, data.train_y, SQUARED)
    theta = objective.net.theta
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    g = torch.stack([objective.on(pair).gradient(theta) for pair in pairs])
    centred = g - g.mean(0)
    C = gradient_covariance(objective, theta).dense()
    assert torch.allclose(centred.T @ centred / len(g), C * Minibatch(2).variance_factor(6), atol=1e-15)


def test_batch_statistics_are_the_loss_of_the_whole_set():
    net = warmed(resnet((2,), (1,), norm="batch", activation=nn.Tanh))
    training = Objective(net, DATA.train_x, DATA.train_y, batch_statistics=True)
    inference = Objective(net, DATA.train_x, DATA.train_y)
    theta, v = training.net.theta, vector(training.p)
    net.train()
    expected = nn.functional.cross_entropy(net(DATA.train_x), DATA.train_y)
    assert training.value(theta) == pytest.approx(expected.item(), abs=1e-13)
    before = training.value(theta)
    hessian(training, theta) @ v
    assert training.value(theta) == before  # looking leaves the running statistics alone
    assert (hessian(training, theta) @ v - hessian(inference, theta) @ v).norm() > 1e-3
    step = 1e-5
    difference = (training.gradient(theta + step * v) - training.gradient(theta - step * v)) / (2 * step)
    assert torch.allclose(hessian(training, theta) @ v, difference, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="use the objective in eval mode"):
        gradient_covariance(training, theta)


def test_running_statistics_can_be_replaced():
    net = NETS["BatchNorm"]()
    objective = Objective(net, DATA.train_x, DATA.train_y)
    other = {name: b * 2 for name, b in objective.net.buffers.items()}
    moved = objective.at_buffers(other)
    assert moved.value(objective.net.theta) != objective.value(objective.net.theta)
    assert torch.equal(objective.at_buffers(objective.net.buffers).value(objective.net.theta),
                       objective.value(objective.net.theta))  # fmt: skip
    module = objective.net.module_at(objective.net.theta + 1)
    assert torch.equal(FlatNet(module).theta, objective.net.theta + 1)


@pytest.mark.parametrize("chunk", [None, 10])
def test_products_are_those_of_curvlinops(chunk):
    curvlinops = pytest.importorskip("curvlinops")
    net = mlp((64, 3, 10))
    objective = Objective(net, DATA.train_x, DATA.train_y, chunk=chunk)
    arguments = (net, nn.CrossEntropyLoss(), list(net.parameters()), [(DATA.train_x, DATA.train_y)])
    v = vector(objective.p)
    for build, theirs in ((hessian, curvlinops.HessianLinearOperator), (gauss_newton, curvlinops.GGNLinearOperator)):
        assert torch.allclose(
            build(objective, objective.net.theta) @ v, theirs(*arguments, check_deterministic=False) @ v, atol=1e-13
        )


def with_theta(change):
    objective = Objective(mlp((64, 2, 10)), DATA.train_x, DATA.train_y)
    return hessian(objective, change(objective.net.theta))


def made(net=None, X=DATA.train_x, labels=DATA.train_y, **options):
    return Objective(net or mlp((64, 2, 10)), X, labels, **options)


def frozen():
    net = mlp()
    for p in net.parameters():
        p.requires_grad_(False)
    return net


BAD = {
    "give one vector of": lambda: with_theta(lambda t: t[:-1]),
    "not finite, so it has no Hessian": lambda: with_theta(lambda t: t * torch.nan),
    r"give \(": lambda: with_theta(lambda t: t) @ torch.ones(3, dtype=torch.float64),
    "convert one of them": lambda: made(X=DATA.train_x.float()),
    "one int64 class number": lambda: made(labels=DATA.train_y.double()),
    "NaN or infinite": lambda: made(X=DATA.train_x / 0),
    "give 1 or more": lambda: made(chunk=0),
    "leave chunk out": lambda: made(NETS["BatchNorm"](), batch_statistics=True, chunk=5),
    "return .inputs, classes": lambda: made(nn.Sequential(mlp(), nn.Flatten(0))),
    "number classes 0 to 4": lambda: made(mlp((64, 5))),
    "set requires_grad": lambda: made(frozen()),
    "set its p to 0": lambda: made(nn.Sequential(mlp(), nn.Dropout(0.1))),
    "move the module to one": lambda: made(nn.Sequential(mlp(), nn.Flatten(), mlp((10, 10), dtype=torch.float32))),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).endswith(".")
