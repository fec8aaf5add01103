"""Compiled passes of convolutional networks in eval mode: torch's outputs, blocks and BatchNorm statistics."""

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from nets.averaging import estimate_statistics, has_batch_norm
from nets.convolutional_evaluation import ConvolutionalEvaluation, convolutional_evaluation
from nets.features import DivergedError, block_features, features_of
from nets.objective import FlatNet
from nets.resnet import resnet

DOUBLE, RUNS = torch.float64, 3


def images(n, dtype=DOUBLE, channels=1):
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).to(dtype)


def states(module):
    theta = FlatNet(module).theta
    noise = torch.randn(RUNS, len(theta), generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(theta)
    return theta * (1 + 0.3 * noise) + 0.05 * noise


@pytest.mark.parametrize("n", [3, 32, 75])  # fewer images than a pass takes, as many, and some over
@pytest.mark.parametrize(("norm", "activation"), [("batch", nn.ReLU), ("group", nn.Tanh), ("none", nn.Sigmoid)])
def test_passes_are_those_of_the_module_in_eval_mode(norm, activation, n):
    module = resnet((6, 16), norm=norm, activation=activation)
    X, train, theta = images(n), images(50), states(module)
    blocks = ("0", "2", "3", "4") if norm == "batch" else ("3", "4")  # "0" is normalised in place if it is not kept
    found = convolutional_evaluation(module, X, blocks)
    assert found is not None
    statistics = found.statistics(theta, train, 20)
    outputs, caught = found.outputs(theta, statistics, X), found.blocks(theta, statistics, X)
    for r, row in enumerate(theta):
        vector_to_parameters(row, module.parameters())
        if has_batch_norm(module):
            estimate_statistics(module, train, 20)
        module.eval()
        torch.testing.assert_close(outputs[r], module(X).detach(), rtol=1e-12, atol=1e-12)
        for name, features in block_features(module, X, blocks, units=None).items():
            torch.testing.assert_close(caught[name][r], features.activations, rtol=1e-12, atol=1e-12)
            again = features_of(name, caught[name][r], units=None)
            assert float(again.positive) == pytest.approx(float(features.positive))
            assert again.size == features.size


def test_single_precision_differs_by_rounding():
    wide, narrow = (resnet(norm="batch", dtype=dtype) for dtype in (DOUBLE, torch.float32))
    theta, results = states(narrow), []
    for module, dtype in ((wide, DOUBLE), (narrow, torch.float32)):
        found, X = convolutional_evaluation(module, images(40, dtype), ()), images(40, dtype)
        results.append(found.outputs(theta.to(dtype), found.statistics(theta.to(dtype), X, 40), X).double())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5)


def test_statistics_of_one_chunk_and_of_a_chunk_left_out():
    module = resnet(norm="batch")
    found, theta = ConvolutionalEvaluation(module), states(module)
    assert torch.equal(found.statistics(theta, images(30), 100), found.statistics(theta, images(30), 30))
    assert torch.equal(found.statistics(theta, images(30), 20), found.statistics(theta, images(20), 20))
    assert found.statistics(theta, images(4), 2).shape == (RUNS, 2 * (8 + 8 + 8 + 16 + 16 + 16))
    plain = ConvolutionalEvaluation(resnet(norm="group"))
    assert plain.statistics(states(resnet(norm="group")), images(4), 2).shape == (RUNS, 0)


def test_arguments_that_do_not_fit_are_refused():
    found, theta, X = ConvolutionalEvaluation(resnet(norm="batch"), ("3",)), states(resnet(norm="batch")), images(4)
    statistics = found.statistics(theta, X, 4)
    for work in (
        lambda: found.statistics(theta[:, 1:], X, 4),
        lambda: found.statistics(theta, X[:0], 4),
        lambda: found.statistics(theta, X, 0),
        lambda: found.outputs(theta, statistics[:, 1:], X),
        lambda: found.outputs(theta, statistics[:1], X),
        lambda: found.blocks(theta, statistics, X.float()),
        lambda: found.blocks(theta[0], statistics, X),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            work()
    narrow = ConvolutionalEvaluation(resnet(norm="batch"))
    with pytest.raises(ValueError, match="give more images"):
        narrow.statistics(theta, torch.ones(1, 1, 1, 1, dtype=DOUBLE), 1)


def test_what_a_diverged_network_puts_out_is_told():
    with pytest.raises(DivergedError, match="block '3' are NaN or infinite"):
        features_of("3", torch.tensor([[1.0, torch.inf]]))


class Twice(nn.Sequential):
    def forward(self, x):
        return self[2](self[1](self[1](self[0](x))).mean((2, 3)))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        Twice(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Conv2d(1, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100)),
    ],
    ids=["an unknown activation", "a block that runs twice", "too large"],
)
def test_what_the_loops_do_not_know_is_left_to_torch(module):
    assert convolutional_evaluation(module.double(), images(4), ("1",)) is None
    assert convolutional_evaluation(module.double(), images(4).flatten(1), ("1",)) is None
