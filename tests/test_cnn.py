"""The papers' convolutional networks: parameter counts, initial laws, shapes, and what cannot be built."""

import pytest
import torch
from torch import nn

from nets.cnn import simple_cnn, vgg
from nets.resnet import resnet


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_are_the_published_ones():
    assert count(simple_cnn()) == 361_898
    assert count(resnet((64, 128, 256, 512), (2, 2, 2, 2), channels=3, norm="batch", dtype=torch.float32)) == 11_173_962
    convolutions = sum(9 * a * b + b for a, b in zip(
        [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512],
        [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512], strict=True))  # fmt: skip
    assert count(vgg()) == convolutions + 2 * (512 * 512 + 512) + 512 * 10 + 10


def test_initial_weights_have_the_stated_laws():
    for part in simple_cnn(seed=3):
        if isinstance(part, nn.Conv2d | nn.Linear):
            receptive = part.weight[0, 0].numel()
            bound = (6 / (receptive * (part.weight.shape[0] + part.weight.shape[1]))) ** 0.5
            assert bound * 0.98 < part.weight.abs().max() <= bound
            assert part.bias.abs().max() == 0
    for part in vgg(width=16, hidden=128, seed=3):
        if isinstance(part, nn.Conv2d | nn.Linear) and part.weight.numel() > 2000:
            scale = (2 / part.weight[0].numel()) ** 0.5
            assert part.weight.std().item() == pytest.approx(scale, abs=4 * scale / (2 * part.weight.numel()) ** 0.5)
    state = torch.random.get_rng_state()
    first, second = vgg(width=4, hidden=8, seed=1), vgg(width=4, hidden=8, seed=1)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, vgg(width=4, hidden=8, seed=2)[0].weight)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_vgg_runs_forward_and_backward(norm, activation):
    network = vgg(classes=7, width=8, hidden=16, norm=norm, activation=activation, size=64)
    out = network(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert out.shape == (3, 7)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_sizes_that_make_no_network():
    for wrong in (lambda: vgg(size=28), lambda: vgg(width=0), lambda: simple_cnn(size=6)):
        with pytest.raises(ValueError, match="choose"):
            wrong()
