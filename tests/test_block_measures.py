"""Block by block: what is caught, which units, measures of activations made to have known answers, and divergence."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nets.cnn import simple_cnn, vgg
from nets.features import DivergedError, block_activations, block_features, default_blocks
from nets.jacobian import jacobian_spectrum, network_jacobian_rank
from nets.measures import COLUMNS, Fit, block_table, fit, measure, measure_blocks, measured_subset
from nets.mlp import empty, mlp
from nets.objective import SQUARED
from nets.published_nets import network
from nets.resnet import resnet
from nets.units import hidden_layers
from theory.sparsity import feature_sparsity
from theory.streams import named_generator

DOUBLE = torch.float64


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def linear(*sizes, **options):
    return empty(nn.Linear, *sizes, dtype=DOUBLE, **options)


def images(n=20, channels=3, size=16, seed=0):
    return draws(n, channels, size, size, seed=seed)


def small(name="resnet18", seed=0):
    return network(name, width=4, dtype=DOUBLE, seed=seed)


@pytest.mark.parametrize("name", ["resnet18", "resnet18_plain"])
def test_blocks_are_the_published_ones(name):
    net, X = small(name), images()
    found = block_activations(net, X, units=None)
    assert list(found) == ["block1", "block2", "block3", "block4", "block5"]
    x = X
    with torch.no_grad():
        for part_name, part in net.eval().named_children():
            x = part(x)
            if part_name in found:
                assert torch.equal(found[part_name], x.flatten(1))
    assert found["block4"].min() >= 0  # behind the last norm and activation
    assert (found["block1"].min() < 0) == (name == "resnet18")  # the residual stream itself, before an activation


@pytest.mark.parametrize(
    ("net", "x", "blocks"),
    [
        (resnet((4, 8), (2, 2)), images(2, 1, 8), ("4", "6", "8")),
        (resnet((4, 8), (1, 1), activation=nn.Tanh, norm="batch"), images(2, 1, 8), ("3", "4", "6")),
        (simple_cnn(dtype=DOUBLE), images(2, 3, 32), ("1", "3", "6", "8", "12")),
        (vgg(width=2, hidden=4, dtype=DOUBLE), images(2, 3, 32), ("5", "12", "22", "32", "42", "46", "48")),
        (mlp((4, 5, 6, 3)), draws(2, 4), ("2", "4")),
        (small("wrn28"), images(2), ("block1", "block2", "block3", "block4")),
    ],
)
def test_default_blocks(net, x, blocks):
    assert default_blocks(net, x) == blocks


def test_chunks_and_modes_change_nothing():
    net, X = small("resnet18_gelu").train(), images()
    net.block2.eval()
    modes = [part.training for part in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    whole = block_features(net, X, units=30)
    for chunk in (1, 7, 20):
        parts = block_features(net, X, units=30, chunk=chunk)
        for name, features in whole.items():
            assert torch.allclose(parts[name].activations, features.activations, rtol=1e-12, atol=1e-12)
            assert parts[name].positive == features.positive
            assert parts[name].size == features.size
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not net._forward_hooks
    assert not net.block1._forward_hooks


def test_units_are_drawn_from_a_stream_of_the_block():
    net, X = small(), images()
    every, some = block_activations(net, X, units=None), block_activations(net, X, units=50)
    for name, phi in some.items():
        total = every[name].shape[1]
        if total <= 50:
            assert torch.equal(phi, every[name])
            continue
        chosen = named_generator(0, "units", name).permutation(total)[:50]
        assert torch.equal(phi, every[name][:, torch.from_numpy(chosen)])
    other = block_activations(net, X, ["block2"], units=50, seed=1)
    assert not torch.equal(other["block2"], some["block2"])


def test_any_part_can_be_a_block_and_later_steps_in_place_do_not_touch_it():
    net = nn.Sequential(linear(3, 4), nn.ReLU(inplace=True), linear(4, 2)).eval()
    _linear(net[0], draws(4, 3))
    X = draws(9, 3)
    found = block_activations(net, X, ["0", "1"])
    assert torch.allclose(found["0"], X @ net[0].weight.T)
    assert torch.equal(found["1"], found["0"].relu())
    assert block_activations(small(), images(), ["block1.0.conv1"])["block1.0.conv1"].shape == (20, 1000)


def _linear(layer, weight, bias=0.0):
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        layer.bias.fill_(0.0)
        layer.bias += torch.as_tensor(bias)


@pytest.fixture
def known():
    """Five hidden units on X: x₀, 2x₀ (a duplicate), x₁, one never active, one always."""
    net = nn.Sequential(linear(2, 5), nn.ReLU(), linear(5, 3))
    _linear(net[0], [[1, 0], [2, 0], [0, 1], [0, 0], [1, 1]], [0, 0, 0, -1, 5])
    _linear(net[2], [[1, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    X = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [3.0, -1.0], [-2.0, -2.0]], dtype=DOUBLE)
    return net, X


def test_measures_of_known_activations(known):
    net, X = known
    (block,) = measure_blocks(net, X)
    assert (block.name, block.units, block.sampled) == ("1", 5, 5)
    # positive: x₀ twice, 2x₀ twice, x₁ twice, none, four times
    assert block.sparsity == block.sampled_sparsity == 10 / 20
    assert block.distinct_sparsity == 8 / 20
    assert block.duplicates == pytest.approx(2 / 20)
    assert block.distinct == 3
    # The neurons (1, 0, 0 | 1, 0, 0) and (2, 0, 0 | 2, 0, 0) are 0.4 apart; the shortest is 0.19 of the longest.
    (layer,) = block.layers
    assert (layer.name, layer.independent, layer.units) == ("0", 5, 5)
    _linear(net[0], [[1, 0], [1, 0], [0, 1], [0, 0], [1, 1]], [0, 0, 0, -0.1, 1])
    _linear(net[2], [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    (block,) = measure_blocks(net, X)
    assert block.layers[0].independent == 3  # one copy and one that vanishes
    assert block.independent == 3 / 5


def published_scan(phi, threshold=0.95):
    """Share of positive activations and number of units that the published loop keeps, written out."""
    alive = np.flatnonzero((phi > 0).any(0))
    left, dropped = list(alive), []
    while True:
        correlation = np.abs(np.corrcoef(phi[:, left].T) - np.eye(len(left)))
        bad = [i for i in range(len(left)) if (correlation[i] > threshold).any()]
        if not bad:
            break
        dropped.append(left.pop(bad[0]))
    return (phi[:, left] > 0).sum() / phi.size, len(left)


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18_gelu"])
def test_sparsity_is_the_published_one_with_any_activation(name):
    net, X = small(name), images(30)
    with torch.no_grad():  # some units twice
        for k in (1, 2):
            conv = net.get_submodule(f"block{k}.0.conv1")
            conv.weight[2:] = conv.weight[:-2].clone() if k == 1 else conv.weight[2:]
    for block in measure_blocks(net, X, units=120):
        phi = block_activations(net, X, [block.name], units=120)[block.name]
        share, kept = published_scan(phi.numpy())
        assert block.distinct_sparsity == pytest.approx(share, abs=1e-15)
        assert block.distinct == kept
        assert block.distinct_sparsity == pytest.approx(feature_sparsity(phi, 0.95, normalize=False).item(), abs=1e-15)
        every = block_activations(net, X, [block.name], units=None)[block.name]
        assert block.sparsity == pytest.approx((every > 0).double().mean().item(), abs=1e-15)
        assert block.sampled == phi.shape[1]
        assert block.units == every.shape[1]


def test_every_layer_counts_to_one_block_in_order():
    net, X = small("resnet18_plain"), images(4)
    found = measure_blocks(net, X)
    names = [layer.name for block in found for layer in block.layers]
    assert names == list(hidden_layers(net, "published"))
    assert [layer.name for layer in found[0].layers][:2] == ["stem.0", "block1.0.conv1"]
    assert all(layer.name.startswith(block.name) for block in found[1:] for layer in block.layers)
    assert math.isnan(found[4].independent)
    assert measure_blocks(net, X, ["block3"], layers={})[0].layers == ()


def explicit_rows(net, X):
    rows = []
    for x in X:
        for value in net.eval()(x[None])[0]:
            gradient = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def test_jacobian_is_that_of_single_backward_passes():
    for net, X in ((resnet((2, 4), (1, 1), norm="batch"), images(4, 1, 8)), (mlp((4, 5, 3)), draws(6, 4))):
        singular = torch.linalg.svdvals(explicit_rows(net, X))
        assert torch.allclose(jacobian_spectrum(net, X), singular, rtol=1e-10)
    part = jacobian_spectrum(net, X, [2, 0])
    rows = explicit_rows(net, X).view(6, 3, -1)[:, [2, 0]].flatten(0, 1)
    assert torch.allclose(part, torch.linalg.svdvals(rows), rtol=1e-10)


@pytest.mark.parametrize("budget", [2**26, 2**12, 300])
def test_jacobian_ranks_that_are_known(budget):
    """Of a linear map to c outputs on inputs of rank r: r·c, whole or projected."""
    X = draws(8, 3) @ draws(3, 200, seed=1)
    net = linear(200, 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(draws(4, 200, seed=2))
    assert network_jacobian_rank(net, X, budget=budget) == 12
    assert network_jacobian_rank(net, X, [0, 3], budget=budget) == 6


def test_projection_moves_singular_values_by_what_is_said():
    net, X = resnet((6, 12), (1, 1)), images(3, 1, 8)
    exact = jacobian_spectrum(net, X)
    ratios = torch.stack([jacobian_spectrum(net, X, budget=2**14, seed=seed) / exact for seed in range(4)])
    assert ratios.std() > 1e-3  # it was projected
    assert ratios.min() > 1 - 1.2 / 8**0.5
    assert ratios.max() < 1 + 1.2 / 8**0.5
    one, other = (jacobian_spectrum(net, X, budget=budget) for budget in (2**12, 2**14))
    assert torch.allclose(one, other, rtol=1e-9)  # chunks


def test_fit_is_loss_and_accuracy():
    net = linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
    X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=DOUBLE), torch.tensor([0, 1, 1])
    found = fit(net, X, y, loss=SQUARED, chunk=2)
    assert found == Fit((0 + 1 / 2 + (9 + 1) / 2) / 3, 2 / 3, 3)
    assert fit(net, X, y).loss == pytest.approx(nn.functional.cross_entropy(X, y).item(), rel=1e-14)
    assert fit(net, X, y, chunk=1) == fit(net, X, y)


def test_all_measures_at_once_and_on_a_fixed_subset():
    net, X = small("resnet_tiny"), images(12, size=8)
    y = torch.arange(12) % 10
    found = measure(net, X, {"training": (X, y)}, inputs=6, jacobian_inputs=2)
    subset = measured_subset(X, 6)
    assert found.blocks == measure_blocks(net, subset)
    assert found["block3"] is found.blocks[2]
    assert found.fits == {"training": fit(net, X, y)}
    assert (found.jacobian_rank, found.jacobian_rows) == (network_jacobian_rank(net, subset[:2]), 20)
    assert measure(net, X, inputs=6).jacobian_rank is None
    assert torch.equal(measured_subset(X, 6), subset)
    assert torch.equal(measured_subset(X, 4), subset[:4])
    assert not torch.equal(measured_subset(X, 6, seed=1), subset)
    assert measured_subset(X, 12) is X


def test_the_table_has_the_measures_in_rows_and_nan_of_a_diverged_network():
    net, X = small("resnet_tiny"), images(6, size=8)
    table = block_table(net, X, units=20)
    assert table.shape == (5, len(COLUMNS))
    for row, block in zip(table, measure_blocks(net, X, units=20), strict=True):
        assert row[:4].tolist() == [block.sparsity, block.sampled_sparsity, block.distinct_sparsity, block.distinct]
        assert row[4].item() == block.independent or block.name == "block5"
    assert table[4, 4].isnan()
    for what in ("block2.0.conv1.weight", "block1.0.norm1.running_mean"):
        net = small("resnet_tiny")
        net.state_dict()[what].fill_(math.nan)
        assert block_table(net, X).isnan().all()
    with pytest.raises(ValueError, match="no block 'x'"):
        block_table(net, X, ["x"])


def broken(value, where="block2.0.conv1.weight"):
    net = small("resnet18_plain").float()
    with torch.no_grad():
        net.get_parameter(where).fill_(value)
    return net


HIDDEN = hidden_layers(mlp())["1"]
SPLIT = nn.Sequential(nn.Identity(), nn.Flatten(0), nn.ReLU())
BAD = {
    "'block2.0.conv1.weight' has NaN": lambda: measure_blocks(broken(math.nan), images(2)),
    "block 'block4' are NaN": lambda: block_activations(broken(math.inf, "block4.0.norm1.bias"), images(2)),
    "the loss on 2 samples is": lambda: fit(broken(math.inf, "head.bias"), images(2), torch.tensor([0, 1])),
    "Jacobian has NaN": lambda: jacobian_spectrum(broken(math.nan), images(1, size=8)),
    "no block 'layer4': choose from stem": lambda: block_activations(small(), images(2), ["layer4"]),
    "does not put out one tensor": lambda: block_activations(SPLIT, draws(2, 3), ["1"]),
    "name them, as in named_modules": lambda: default_blocks(linear(2, 2), draws(1, 2)),
    "has no activation": lambda: default_blocks(nn.Sequential(nn.Flatten(), nn.Flatten()), draws(1, 2)),
    "0 inputs in chunks of 512": lambda: block_activations(small(), images(0)),
    "chunks of 0": lambda: block_activations(small(), images(2), chunk=0),
    "0 units a block": lambda: block_activations(small(), images(2), units=0),
    "0 inputs were asked for": lambda: measure(small(), images(2), inputs=0),
    "one int64 class number per input": lambda: fit(small(), images(2), torch.zeros(2)),
    r"outputs \[10\] were asked of a network that has 10": lambda: network_jacobian_rank(small(), images(1), [10]),
    "0 trainable tensors": lambda: network_jacobian_rank(small().requires_grad_(False), images(1)),
    "layer 'x' is no part": lambda: measure_blocks(small(), images(2), layers={"x": HIDDEN}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_and_divergence_are_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert isinstance(told.value, DivergedError) == any(word in sentence for word in ("NaN", "loss"))
    assert str(told.value).endswith(".")
    assert "\n" not in str(told.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_the_networks():
    net, X = small("resnet_tiny"), images(12, size=8)
    here = measure(net, X, {"all": (X, torch.arange(12) % 10)}, jacobian_inputs=2)
    there = measure(net.cuda(), X, {"all": (X, torch.arange(12) % 10)}, jacobian_inputs=2)
    assert block_activations(net, X)["block1"].device.type == "cuda"
    for a, b in zip(here.blocks, there.blocks, strict=True):
        assert (a.distinct, a.layers) == (b.distinct, b.layers)
        assert a.distinct_sparsity == pytest.approx(b.distinct_sparsity, abs=1e-6)
    assert here.jacobian_rank == there.jacobian_rank
