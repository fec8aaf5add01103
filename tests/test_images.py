"""Digits and the networks trained on them: data as they are, seeded weights, shapes, and sentences on bad input."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from nets.augment import Augmentation
from nets.images import ImageSet, channel_statistics, digits
from nets.mlp import mlp
from nets.objective import FlatNet
from nets.resnet import BasicBlock, resnet


def test_digits_are_scikit_learns_every_image_once():
    table, data = load_digits(), digits(1500)
    pixels = torch.cat([data.train_x, data.test_x]).flatten(1)
    labels = torch.cat([data.train_y, data.test_y])
    assert data.train_x.shape == (1500, 1, 8, 8)
    assert data.test_x.shape == (297, 1, 8, 8)
    assert (data.n, data.classes, data.train_x.dtype) == (1500, 10, torch.float64)
    rows = {(*(16 * x).int().tolist(), y) for x, y in zip(pixels, labels.tolist(), strict=True)}
    assert rows == {(*x, y) for x, y in zip(table.data.astype(int).tolist(), table.target.tolist(), strict=True)}
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_a_split_is_a_function_of_its_seed_and_training_sets_are_nested():
    assert torch.equal(digits(100).train_x, digits(200).train_x[:100])
    assert torch.equal(digits(100).test_x[100:], digits(200).test_x)
    assert not torch.equal(digits(100, seed=1).train_x, digits(100).train_x)
    small = digits(200).subset(50, 10)
    assert (small.n, len(small.test_x)) == (50, 10)
    assert torch.equal(small.train_y, digits(200).train_y[:50])
    assert digits(10).to(dtype=torch.float32).test_x.dtype == torch.float32
    counts = digits(1500).train_y.bincount(minlength=10)
    assert counts.min() > 100


def test_seeded_subsets_are_nested_and_keep_images_with_their_labels():
    data = digits(300)
    small, large = data.subset(50, seed=1), data.subset(120, 7, seed=1)
    assert torch.equal(small.train_x, large.train_x[:50])
    assert (small.n, len(small.test_x), len(large.test_x)) == (50, 1497, 7)
    assert not torch.equal(small.train_x, data.subset(50).train_x)
    assert not torch.equal(small.train_x, data.subset(50, seed=2).train_x)
    rows = (large.train_x.flatten(1)[:, None] == data.train_x.flatten(1)).all(-1)
    assert (rows.sum(1) == 1).all()
    assert torch.equal(data.train_y[rows.int().argmax(1)], large.train_y)


def test_classes_are_kept_and_renumbered():
    data = digits(300)
    pair = data.of_classes(7, 1)
    for part in ("train", "test"):
        x, y = getattr(data, f"{part}_x"), getattr(data, f"{part}_y")
        assert torch.equal(getattr(pair, f"{part}_x"), x[(y == 7) | (y == 1)])
        assert torch.equal(getattr(pair, f"{part}_y"), (y[(y == 7) | (y == 1)] == 1).long())
    assert (pair.classes, pair.name) == (2, "digits, n=300, classes 7 1")


def test_standardized_images():
    data = digits(300)
    pixel = data.standardized("pixel")
    assert torch.allclose(pixel.train_x.mean(0), torch.zeros(1, 8, 8, dtype=torch.float64), atol=1e-13)
    assert pixel.train_x.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    colour = torch.cat([data.train_x, 3 * data.train_x.flip(-1) + 1], 1)
    two = images(train_x=colour, train_y=data.train_y, test_x=colour[:5], test_y=data.train_y[:5], classes=10)
    channel = two.standardized()
    mean, deviation = channel_statistics(channel.train_x)
    assert torch.allclose(mean, torch.zeros(2, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(deviation, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(channel.train_x[:, 0], channel.train_x[:, 1].flip(-1))
    assert torch.equal(channel.test_x, channel.train_x[:5])  # shifted and scaled alike


def test_weights_come_from_a_seed_with_torchs_own_law():
    one, same, other = mlp(seed=3), mlp(seed=3), mlp(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one[1].weight, other[1].weight)
    wide = mlp((64, 4000, 10))[1].weight.detach()
    assert wide.abs().max() <= 1 / 8
    assert wide.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.01)
    assert mlp((64, 32, 10), gain=0.5)[1].weight.abs().max() <= 1 / 16
    assert FlatNet(mlp()).p == 64 * 32 + 32 + 32 * 10 + 10
    assert FlatNet(mlp((64, 8, 10), bias=False, activation=nn.ReLU)).p == 64 * 8 + 80


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_a_deep_residual_network_starts_at_moderate_outputs(norm):
    data = digits(200)
    net = resnet((8, 16), (6, 6), norm=norm)
    outputs = net(data.train_x)
    assert outputs.shape == (200, 10)
    assert 0.05 < outputs.std() < 5
    gradient = torch.autograd.grad(nn.functional.cross_entropy(outputs, data.train_y), net.parameters())
    assert all(torch.isfinite(g).all() and g.norm() < 100 for g in gradient)
    blocks = [part for part in net if isinstance(part, BasicBlock)]
    assert len(blocks) == 12
    assert blocks[6](blocks[0](torch.ones(1, 8, 8, 8, dtype=torch.float64))).shape == (1, 16, 4, 4)


def test_a_block_is_what_its_formula_says():
    block = resnet((4,), (1,), seed=2)[3]
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = torch.relu(nn.functional.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1))
    inside = nn.functional.conv2d(inside, block.conv2.weight, block.conv2.bias, padding=1)
    assert torch.allclose(block(x), torch.relu(inside + x), atol=1e-14)


def images(**change):
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    return ImageSet(**({"train_x": x, "train_y": y, "test_x": x, "test_y": y, "classes": 3} | change))


BAD = {
    "choose between 1 and 1797": lambda: digits(1798),
    "choose between 1 and 20 ": lambda: digits(20).subset(21),
    "choose two or more different ones below 10": lambda: digits(20).of_classes(3, 3),
    "different ones below": lambda: digits(20).of_classes(3, 10),
    "by 'image': choose channel or pixel": lambda: digits(20).standardized("image"),
    "do not differ": lambda: images().standardized(),
    "do not fit": lambda: images(train_y=torch.zeros(3, dtype=torch.int64)),
    "NaN or infinite pixels": lambda: images(test_x=torch.full((4, 1, 2, 2), torch.nan)),
    "not int64 numbers from 0 to 1": lambda: images(classes=2),
    "no training image": lambda: images(train_x=torch.zeros(0, 1, 2, 2), train_y=torch.zeros(0, dtype=torch.int64)),
    "at least two sizes": lambda: mlp((64,)),
    "one of each": lambda: resnet((8, 16), (1,)),
    "choose none, batch or group": lambda: resnet(norm="layer"),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).endswith(".")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("what", [Augmentation(crop=2), Augmentation(2, True, 3), Augmentation(flip=True)])
def test_augmented_images_lie_in_memory_as_images_do(what, channels):
    """Convolutions of torch 2.13 on a CPU corrupt memory where one channel comes with the strides of channels last."""
    x = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert what(x, step=0).stride() == x.stride()
