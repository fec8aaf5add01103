"""The papers' networks by name: parameter counts, initial laws, blocks against their formula, units, bad input."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from nets.cnn import simple_cnn
from nets.published_nets import NETWORKS, network
from nets.published_resnets import avpf_resnet, ckyg_resnet, jkbfbs_resnet, wide_resnet
from nets.resnet import BasicBlock, PreActivationBlock
from nets.units import hidden_layers

COUNTS = {
    "resnet18_plain": 11_173_962,
    "resnet18": 11_172_170,
    "resnet34_plain": 21_282_122,
    "resnet18_gelu": 11_173_962,
    "resnet32_nobn": 465_674,
    "simple_cnn": 361_898,
    "simple_cnn_medium": 2_399_518,
}
ONE_DEPTH_FOR_ALL = [name for name in NETWORKS if not re.match("resnet(38|44|56|74|110$)", name)]
SMALL = {name: 1 if name == "wrn28" else 2 if "resnet" in name and "cnn" not in name else 4 for name in NETWORKS}


def count(module):
    return sum(p.numel() for p in module.parameters())


def inputs(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_papers(name):
    assert count(network(name)) == COUNTS[name]


def test_counts_of_the_wide_network_and_of_other_head_sizes():
    assert round(count(wide_resnet()) / 1e6, 2) == 36.48
    assert count(network("resnet18_gelu", classes=100)) == COUNTS["resnet18_gelu"] + 90 * 513
    assert count(network("resnet32_nobn", channels=1)) == COUNTS["resnet32_nobn"] - 2 * 9 * 16


@pytest.mark.parametrize("name", ONE_DEPTH_FOR_ALL)
def test_every_network_runs_and_its_units_can_be_followed(name):
    net = network(name, classes=7, channels=1, width=SMALL[name], seed=1).eval()
    x = inputs(3, 1, 32, 32)
    out = net(x)
    assert out.shape == (3, 7)
    assert torch.isfinite(out).all()
    published = hidden_layers(net, "published")
    assert len(published) >= 5
    assert not any("shortcut" in layer or layer == "head" for layer in published)
    same = network(name, classes=7, channels=1, width=SMALL[name], seed=1).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in net.state_dict().items())
    other = network(name, classes=7, channels=1, width=SMALL[name], seed=2)
    assert not torch.equal(next(net.parameters()), next(other.parameters()))


def test_names_and_shapes_of_blocks():
    net = network("resnet18", width=4).eval()
    assert [name for name, _ in net.named_children()] == [
        "stem", "block1", "block2", "block3", "block4", "block5", "head"
    ]  # fmt: skip
    shapes, x = [], inputs(2, 3, 32, 32)
    for part in net:
        x = part(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (32,), (10,)]
    blocks = {name: sum(isinstance(p, PreActivationBlock | BasicBlock) for p in network(name, width=1).modules())
              for name in ("resnet18", "resnet34_plain", "resnet_tiny_gn", "resnet32", "resnet110_nobn")}  # fmt: skip
    assert list(blocks.values()) == [8, 16, 4, 15, 54]
    assert network("resnet18_gn").get_submodule("block4.0.norm1").num_groups == 32
    kinds = {type(part) for part in network("resnet34", activation=nn.GELU, width=1).modules()}
    assert nn.GELU in kinds
    assert nn.ReLU not in kinds


def normal(weights, deviation):
    """Whether weights have mean 0, the deviation and the fourth moment of a normal law, each within 4 errors."""
    w, n = weights.double().flatten() / deviation, weights.numel()
    return (
        abs(w.mean()) < 4 / n**0.5
        and abs(w.square().mean() - 1) < 4 * (2 / n) ** 0.5
        and abs(w.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    )


def uniform(weights, bound):
    w, n = weights.double().flatten() / bound, weights.numel()
    return w.abs().max() <= 1 + 1e-6 and abs(w.square().mean() - 1 / 3) < 4 * (4 / 45 / n) ** 0.5


def convolutions(net):
    return {name: part for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_he_fan_out(norm):
    net = avpf_resnet((2, 1, 1), norm == "batch", norm, width=16, classes=100, seed=5)
    for name, part in convolutions(net).items():
        deviation = (2 / (part.weight[0, 0].numel() * part.out_channels)) ** 0.5
        deviation *= 0.5 if norm == "none" and name.endswith("conv2") else 1  # four residual branches
        assert normal(part.weight, deviation), name
        assert (part.bias is None) == (norm != "none")
    head = net.get_submodule("head")
    assert uniform(head.weight, head.in_features**-0.5)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm):
            assert (part.weight == 1).all()
        if getattr(part, "bias", None) is not None:
            assert (part.bias == 0).all()


def test_initial_laws_of_the_other_papers():
    gelu = ckyg_resnet(width=32, seed=2)
    stem = gelu.get_submodule("stem.0")
    assert uniform(stem.weight, 27**-0.5)
    assert uniform(gelu.get_submodule("head").bias, 256**-0.5)
    assert all(normal(part.weight, (2 / (part.weight[0, 0].numel() * part.out_channels)) ** 0.5)
               for part in convolutions(gelu).values() if part is not stem)  # fmt: skip
    for net, scale in (
        (jkbfbs_resnet(32), 1 / 15),
        (jkbfbs_resnet(20, "batch"), 1),
        (jkbfbs_resnet(20, "none", 0.3), 0.3),
    ):
        assert all(
            normal(part.weight, (2 * scale / part.weight[0].numel()) ** 0.5) for part in convolutions(net).values()
        )
        head = net.get_submodule("head")
        assert uniform(head.weight, (6 / 74) ** 0.5)
        assert (head.bias == 0).all()
    wide = wide_resnet(16, width=2)
    assert all(normal(part.weight, (2 / (part.weight[0, 0].numel() * part.out_channels)) ** 0.5)
               for part in convolutions(wide).values())  # fmt: skip


def literal(net, x, raw, post):
    """A forward pass written out from the papers' figures, from nothing but the parameters' names."""
    state, act = dict(net.state_dict()), functional.relu

    def conv(name, x, stride=1):
        w = state[f"{name}.weight"]
        return functional.conv2d(x, w, state.get(f"{name}.bias"), stride, w.shape[-1] // 2)

    def norm(name, x):
        if f"{name}.running_mean" not in state:
            return x
        mean, var, scale, shift = (state[f"{name}.{key}"].view(1, -1, 1, 1)
                                   for key in ("running_mean", "running_var", "weight", "bias"))  # fmt: skip
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = conv("stem.0", x)
    x = act(norm("stem.1", x)) if post else x
    stages = sum(name.startswith("block") for name, _ in net.named_children()) - 1
    for stage in range(1, stages + 1):
        k = 0
        while f"block{stage}.{k}.conv1.weight" in state:
            block, stride = f"block{stage}.{k}", 2 if stage > 1 and k == 0 else 1
            changed = f"{block}.shortcut.weight" in state
            if post:
                inner = norm(f"{block}.norm2", conv(f"{block}.conv2", act(norm(f"{block}.norm1", conv(
                    f"{block}.conv1", x, stride)))))  # fmt: skip
                x = act(
                    inner + (norm(f"{block}.shortcut_norm", conv(f"{block}.shortcut", x, stride)) if changed else x)
                )
            else:
                a = act(norm(f"{block}.norm1", x))
                inner = conv(f"{block}.conv2", act(norm(f"{block}.norm2", conv(f"{block}.conv1", a, stride))))
                x = inner + (conv(f"{block}.shortcut", x if raw else a, stride) if changed else x)
            k += 1
    if not post:
        x = act(norm(f"block{stages}.{k}", x))
    return functional.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])


@pytest.mark.parametrize(
    ("name", "raw", "post"),
    [("resnet18", False, False), ("resnet18_plain", False, True), ("resnet_tiny_none", False, True),
     ("resnet20", True, False), ("resnet20_nobn", True, False), ("wrn28", False, False)],
)  # fmt: skip
def test_networks_are_what_their_figures_say(name, raw, post):
    net = network(name, width=2, dtype=torch.float64, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor in (part.running_mean, part.bias):
                    tensor.normal_(generator=generator)
                for tensor in (part.running_var, part.weight):
                    tensor.uniform_(0.5, 1.5, generator=generator)
        x = inputs(3, 3, 16, 16).double()
        assert torch.allclose(net.eval()(x), literal(net, x, raw, post), rtol=1e-12, atol=1e-12)


def test_without_norm_outputs_stay_moderate_through_depth():
    for name in ("resnet34_none", "resnet110_nobn"):
        out = network(name, width=8)(inputs(64, 3, 16, 16))
        assert out.std() < 2


BAD = {
    "did you mean 'resnet18'": lambda: network("resnet-18"),
    "there is no network 'transformer': choose one of resnet18, ": lambda: network("transformer"),
    "width 0 makes no network": lambda: network("resnet18", width=0),
    "channels 0 makes no network": lambda: network("resnet20", channels=0),
    "blocks 0 makes no network": lambda: avpf_resnet(()),
    "depth 33: choose 6n": lambda: jkbfbs_resnet(33),
    "depth 27: choose 6n": lambda: wide_resnet(27),
    "scale 0.0 makes no": lambda: jkbfbs_resnet(20, scale=0.0),
    "choose none, batch or group": lambda: avpf_resnet(norm="layer"),
    "side 28 cannot be halved": lambda: network("vgg16", size=28),
    "side 0 are no images": lambda: network("resnet18", size=0),
    "too small for this network: choose 16 or more": lambda: network("simple_cnn_medium", size=15),
    "an odd side": lambda: simple_cnn(kernel=4),
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence]()
    assert str(told.value).endswith(".")
    assert "\n" not in str(told.value)


def test_the_smallest_images_that_fit():
    assert network("simple_cnn", size=10, width=2)(inputs(1, 3, 10, 10)).shape == (1, 10)
    assert network("simple_cnn_medium", size=16, width=2)(inputs(1, 3, 16, 16)).shape == (1, 10)
