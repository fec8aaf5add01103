"""Invariant sets: proved in sympy, kept to rounding by SGD of real modules, and left where they are none."""

import copy

import pytest
import sympy as sp
import torch
from torch import nn

from nets.units import hidden_layers
from tests.test_units import MODULES, images, made, of, sequential
from theory.invariance_proof import Layer, prove_permutation_set, prove_sign_set
from theory.invariant_sets import (
    distance,
    pair_distances,
    permutation_set,
    sign_columns,
    sign_distances,
    sign_set,
)
from theory.streams import named_generator
from theory.symbolic import relu

DOUBLE = torch.float64
SIGMA = sp.Function("sigma")
LAYERS = {
    "dense": Layer(inputs=2),
    "conv": Layer("conv", places=3),
    "flattened": Layer("flattened"),
    "batch": Layer(norm="batch", places=3),
    "batch conv": Layer("conv", "batch"),
    "batch frozen": Layer(norm="batch", frozen=True),
    "layer norm": Layer(norm="group", places=1),
    "group": Layer("flattened", "group", units=4, groups=2, places=1),
}


def gelu(z):
    return z * (1 + sp.erf(z / sp.sqrt(2))) / 2


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_permutation_sets_are_proved_for_any_activation_at_all(layer):
    assert prove_permutation_set(SIGMA, layer).holds


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_sign_sets_need_nothing_but_an_activation_that_vanishes_at_zero(layer):
    missing = prove_sign_set(SIGMA, layer).across
    assert missing
    assert all(component.subs(SIGMA(0), 0) == 0 for component in missing.values())
    assert all(name.startswith("a") for name in missing)  # only outgoing weights feel σ(0)
    for activation in (sp.tanh, relu, gelu):
        assert prove_sign_set(activation, layer).holds
    for activation in (sp.cos, lambda z: sp.log(1 + sp.exp(z))):
        assert not prove_sign_set(activation, layer).holds


def test_proofs_say_where_sets_end():
    across_groups = Layer("flattened", "group", units=4, groups=2, places=1)
    assert prove_permutation_set(sp.tanh, across_groups, (0, 1)).holds
    assert not prove_permutation_set(sp.tanh, across_groups, (1, 2)).holds
    # Without γ, β a unit's own statistics switch it off at w_in = 0; shared statistics do not.
    assert prove_sign_set(sp.tanh, Layer(norm="batch", affine=False)).holds
    assert not prove_sign_set(sp.tanh, Layer(norm="group", affine=False, places=1)).holds
    # A normalisation after the activation makes σ(0) irrelevant.
    assert prove_sign_set(SIGMA, Layer(norm="batch", norm_last=True)).holds
    with pytest.raises(ValueError, match="2 or more places"):
        Layer("conv", places=1)
    with pytest.raises(ValueError, match="set frozen=False"):
        Layer(frozen=True)


def sets_of(layer, columns):
    return sign_set(1, columns, layer.norm), permutation_set(0, 1, layer.units, layer.groups, layer.norm)


COLUMNS = ["incoming"] * 3 + ["bias", "norm", "norm"] + ["outgoing"] * 2


@pytest.mark.parametrize("norm", ["none", "batch", "group", "batch+none"])
def test_projection_distance_and_directions_fit_together(norm):
    columns = COLUMNS if norm != "none" else [role for role in COLUMNS if role != "norm"]
    v = torch.randn(4, 5, len(columns), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for chosen in (sign_set(2, columns, norm), permutation_set(1, 3, 5, norm=norm)):
        on = chosen.project(v)
        assert torch.equal(chosen.project(on), on)
        assert distance(chosen, on).max() == 0
        assert torch.allclose(distance(chosen, v), (v - on).flatten(1).norm(dim=1))
        basis = chosen.directions(v).flatten(1)
        assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=DOUBLE))
        assert torch.allclose(v.flatten(1) @ basis.T, chosen.normal(v))
        assert torch.allclose(v.flatten(1) - chosen.normal(v) @ basis, on.flatten(1))
    kept = sign_columns(columns, norm)
    assert torch.allclose(sign_distances(v, kept)[:, 2], distance(sign_set(2, columns, norm), v))
    assert torch.allclose(pair_distances(v)[:, 1, 3], distance(permutation_set(1, 3, 5), v))


TRAINED = {
    **{name: MODULES[name] for name in ("dense", "conv, flattened", "batch norm", "flat batch norm", "residual")},
    "group and layer norm": MODULES["group and layer norm"],
    "pre-activation": MODULES["pre-activation"],
    "batch norm without scale": sequential(
        of(nn.Conv2d, 1, 4, 3, bias=False),
        of(nn.BatchNorm2d, 4, affine=False),
        nn.Tanh,
        nn.Flatten,
        of(nn.Linear, 64, 3),
    ),
}


def place(module, layer, chosen):
    """The module with one layer on a set; units of a pair get each other's statistics too."""
    module = copy.deepcopy(module)
    layer.write(module, chosen.project(entries(module, layer)))
    if hasattr(chosen, "second"):
        buffers = dict(module.named_buffers())
        for name in layer.statistics:
            rows = buffers[name].view(layer.units, -1)
            rows[chosen.first] = rows[chosen.second]
    return module


def train(module, steps=25, lr=0.05, momentum=0.9, weight_decay=1e-2):
    """SGD on random labels, batches of 4 out of 12."""
    draws = named_generator(0, "invariant sets")
    X, y = images(12), torch.arange(12) % 3
    optimizer = torch.optim.SGD(module.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(steps):
        rows = torch.from_numpy(draws.permutation(12)[:4])
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X[rows]), y[rows]).backward()
        optimizer.step()
    return module


def entries(module, layer):
    return layer.vectors({name: p.detach() for name, p in module.named_parameters()})


def off(module, layer, chosen):
    return float(distance(chosen, entries(module, layer)))


@pytest.mark.parametrize("build", TRAINED.values(), ids=TRAINED)
def test_sgd_keeps_every_layer_of_a_network_on_its_sets_to_rounding(build):
    module = made(build).train()
    parameters = dict(module.named_parameters())
    for layer in hidden_layers(module).values():
        for chosen in sets_of(layer, layer.columns(parameters)):
            start = place(module, layer, chosen)
            end = train(copy.deepcopy(start))
            moved = (layer.vectors(dict(end.named_parameters())) - layer.vectors(dict(start.named_parameters()))).norm()
            assert moved > 1e-2
            assert off(end, layer, chosen) < 1e-10 * moved, (layer.name, type(chosen).__name__)


@pytest.mark.parametrize("name", ["dense", "batch norm"])
def test_sgd_leaves_sets_that_are_none(name):
    module = made(TRAINED[name]).train()
    layer = next(iter(hidden_layers(module).values()))
    columns = layer.columns(dict(module.named_parameters()))
    for chosen in sets_of(layer, columns):
        vectors = entries(module, layer)
        shifted = chosen.project(vectors) + 1e-3 * chosen.directions(vectors)[-1]
        start = copy.deepcopy(module)
        layer.write(start, shifted)
        before = off(start, layer, chosen)
        assert abs(off(train(start), layer, chosen) - before) > 1e-5


def test_sgd_leaves_the_sign_set_of_an_activation_that_does_not_vanish_at_zero():
    with_softplus = made(sequential(nn.Flatten, of(nn.Linear, 36, 7), nn.Softplus, of(nn.Linear, 7, 3)))
    layer = hidden_layers(with_softplus)["1"]
    chosen = sign_set(0, layer.columns(dict(with_softplus.named_parameters())))
    assert off(train(place(with_softplus, layer, chosen)), layer, chosen) > 1e-2


def test_units_of_two_groups_part():
    module = made(MODULES["group and layer norm"]).train()
    layer = hidden_layers(module)["0"]
    with pytest.raises(ValueError, match="normalised in different groups"):
        permutation_set(1, 2, layer.units, layer.groups, layer.norm)
    chosen = permutation_set(1, 2, layer.units)
    assert off(train(place(module, layer, chosen)), layer, chosen) > 1e-3


def test_bad_arguments():
    with pytest.raises(ValueError, match="no pair out of 3"):
        permutation_set(1, 1, 3)
    with pytest.raises(ValueError, match="rule='full'"):
        sign_columns(COLUMNS, "ignored")
    with pytest.raises(ValueError, match="rule='full'"):
        permutation_set(0, 1, 3, norm="ignored")
    with pytest.raises(ValueError, match="no sign set is known"):
        sign_columns(["incoming", "outgoing"], "group")
