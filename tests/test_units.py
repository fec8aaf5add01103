"""The units of a module: every parameter in its place, shown by swapping units without changing the function."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from nets.units import hidden_layers, unit_vectors
from simulators.network import Network

DOUBLE = torch.float64


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if shortcut:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(functional.gelu(self.bn1(self.conv1(x)))))
        return functional.gelu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(4, 4, 1, False), Block(4, 4, 1, False))
        self.layer2 = nn.Sequential(Block(4, 6, 2, True), Block(6, 6, 1, False))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn, self.conv1, self.conv2 = (
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.Conv2d(5, 4, 3, padding=1),
        )
        self.last, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.conv1(torch.relu(self.bn(x)))))
        x = functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 1)
        return self.fc(x.view(x.size(0), -1))


def sequential(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def of(kind, *args, **options):
    return lambda: kind(*args, **options)


MODULES = {
    "dense": sequential(nn.Flatten, of(nn.Linear, 36, 7), nn.Tanh, of(nn.Linear, 7, 5), nn.GELU, of(nn.Linear, 5, 3)),
    "conv, flattened": sequential(
        of(nn.Conv2d, 1, 4, 3), nn.ReLU, of(nn.MaxPool2d, 2), of(nn.Conv2d, 4, 6, 1), nn.GELU, nn.Flatten,
        of(nn.Linear, 24, 7), nn.SiLU, of(nn.Dropout, 0.0), of(nn.Linear, 7, 3),
    ),
    "batch norm": sequential(
        of(nn.Conv2d, 1, 4, 3), of(nn.BatchNorm2d, 4), nn.ReLU, nn.Flatten, of(nn.Linear, 64, 7), of(nn.BatchNorm1d, 7),
        nn.Tanh, of(nn.Linear, 7, 3),
    ),
    "flat batch norm": sequential(
        of(nn.Conv2d, 1, 4, 3), nn.Flatten, of(nn.BatchNorm1d, 64), nn.ReLU, of(nn.Linear, 64, 3)
    ),
    "group and layer norm": sequential(
        of(nn.Conv2d, 1, 4, 3), of(nn.GroupNorm, 2, 4), nn.GELU, of(nn.AdaptiveAvgPool2d, 1), nn.Flatten,
        of(nn.Linear, 4, 7), of(nn.LayerNorm, 7), nn.Tanh, of(nn.Linear, 7, 3),
    ),
    "residual": ResNet,
    "pre-activation": PreActivation,
}  # fmt: skip


def made(build, seed=0):
    """A module with random parameters and buffers, in eval mode, from a generator of its own."""
    with torch.random.fork_rng(devices=[]):
        module = build().double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=DOUBLE))
    return module


def images(n=5):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def swap(module, layer, first, second):
    """Exchange two units in parameters and statistics."""
    order = torch.arange(layer.units)
    order[[first, second]] = order[[second, first]]
    layer.write(module, layer.vectors(dict(module.named_parameters())).detach()[order])
    buffers = dict(module.named_buffers())
    for name in layer.statistics:
        buffers[name].copy_(buffers[name].view(layer.units, -1)[order].view_as(buffers[name]))


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_swapping_two_units_of_any_layer_leaves_the_function_alone(build):
    module = made(build)
    before = module(images())
    layers = hidden_layers(module)
    assert layers
    for layer in layers.values():
        swap(module, layer, 0, 1)  # units 0 and 1 share a group
        assert torch.allclose(module(images()), before, rtol=1e-12, atol=1e-12), layer.name
        part = layer.vectors(dict(module.named_parameters())).detach().clone()
        part[0] = 0
        layer.write(module, part)
        assert not torch.allclose(module(images()), before, rtol=1e-3), layer.name  # the test can fail
        module = made(build)


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_every_weight_leads_into_one_layer_and_out_of_another(build):
    module = made(build)
    layers, weights = hidden_layers(module).values(), {n for n, p in module.named_parameters() if p.ndim > 1}
    incoming = [part.parameter for layer in layers for part in layer.parts if part.role == "incoming"]
    outgoing = [part.parameter for layer in layers for part in layer.parts if part.role == "outgoing"]
    assert len(set(incoming)) == len(incoming)
    assert len(set(outgoing)) == len(outgoing)
    first, last = set(outgoing) ^ weights, set(incoming) ^ weights  # the first layer's and the last layer's weights
    assert len(first) == len(last) == 1
    assert first != last


def test_vectors_are_rows_in_and_columns_out():
    module = made(MODULES["conv, flattened"])
    vectors = unit_vectors(module)
    assert list(vectors) == ["0", "3", "6"]
    conv, dense = module[3], module[6]
    for c in range(6):
        columns = dense.weight[:, 4 * c : 4 * c + 4].T.flatten()
        assert torch.equal(vectors["3"][c], torch.cat([conv.weight[c].flatten(), conv.bias[c : c + 1], columns]))
    assert vectors["0"].shape == (4, 9 + 1 + 6)
    assert vectors["6"].shape == (7, 24 + 1 + 3)
    roles = hidden_layers(module)["3"].columns(dict(module.named_parameters()))
    assert roles == ["incoming"] * 4 + ["bias"] + ["outgoing"] * 28


def test_published_rule_labels_every_layer_of_a_residual_network_by_its_own_name():
    module = made(ResNet)
    layers = hidden_layers(module, "published")
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2",
             "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"]  # fmt: skip
    assert list(layers) == names
    readers = [*names[1:], "fc"]
    for name, reader in zip(names, readers, strict=True):
        assert [part.parameter for part in layers[name].parts] == [f"{name}.weight", f"{reader}.weight"]
        assert layers[name].norm == "ignored"


def test_full_rule_joins_what_sums_join():
    layers = hidden_layers(made(ResNet))
    stream = layers["layer2.0.conv2 + layer2.0.downsample.0 + layer2.1.conv2"]
    assert [p.parameter for p in stream.parts if p.role == "outgoing"] == ["layer2.1.conv1.weight", "fc.weight"]
    assert stream.norm == "batch"
    assert hidden_layers(made(PreActivation))["stem + conv2"].norm == "batch+none"
    assert hidden_layers(made(MODULES["group and layer norm"]))["0"].groups == 2


def test_index_points_into_the_flat_vector_of_the_simulators():
    module = made(MODULES["batch norm"])
    theta = Network(module, images(), torch.zeros(5, 3, dtype=DOUBLE)).theta
    for name, layer in hidden_layers(module).items():
        assert torch.equal(theta[layer.index(module)], unit_vectors(module)[name])
    module[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' of layer '0' is not trained"):
        hidden_layers(module)["0"].index(module)


def test_vectors_of_gradients_have_leading_axes():
    module = made(MODULES["dense"])
    layer = hidden_layers(module)["1"]
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in module.named_parameters()}
    both = layer.vectors(stacked)
    assert torch.equal(both[1], 2 * unit_vectors(module)["1"])
    assert both.shape == (2, 7, 36 + 1 + 5)


class Branch(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), how

    def forward(self, x):
        return self.c(self.how(self, x))


def with_shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    module[2].weight = module[0].weight
    return module


BAD = {
    "through call_function softmax": lambda: Branch(lambda m, x: torch.softmax(m.a(x), -1)),
    "gate": (lambda: Branch(lambda m, x: m.a(x) * m.b(x)), "call_function mul"),
    "sum with inputs": (lambda: Branch(lambda m, x: m.a(x) + x), "call_function add"),
    "twice": (lambda: Branch(lambda m, x: m.b(m.b(m.a(x)))), "'b' writes and reads the same units"),
    "control flow": (lambda: Branch(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x)), "cannot be traced"),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), "in groups"),
    "shared": (with_shared, "'2' shares its weight with another layer"),
    "one layer": (lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "no hidden layer"),
    "width": (lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Linear(4, 2)), "not clear"),
    "reshape": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(2), nn.Linear(16, 2)), "not a flattening of everything"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_followed_is_said_in_one_sentence(name):
    build, message = BAD[name] if isinstance(BAD[name], tuple) else (BAD[name], name)
    with torch.random.fork_rng(devices=[]):
        module = build()
    with pytest.raises(ValueError, match=message):
        hidden_layers(module)


def test_bad_arguments():
    module = made(MODULES["dense"])
    layer = hidden_layers(module)["1"]
    with pytest.raises(ValueError, match="choose full or published"):
        hidden_layers(module, "paper")
    with pytest.raises(ValueError, match="do not fit layer '1'"):
        layer.write(module, torch.zeros(7, 3))
    with pytest.raises(ValueError, match=r"needs the parameter '1.weight'"):
        layer.vectors({})
