"""Measurements along the sharpest directions: closed forms on quadratics, literal twins, the published rules."""

import math

import pytest
import torch
from torch import nn

from nets.curvature import hessian
from nets.images import digits
from nets.lanczos import eigenpairs
from nets.mlp import mlp
from nets.objective import SQUARED, Loss, Objective
from nets.resnet import resnet
from nets.sharp_directions import (
    Escape,
    EscapeRule,
    TopEigenvalues,
    alignment,
    cross_section,
    distance,
    frobenius_of_top,
    losses_after,
    minibatch_gradients,
    path_length,
    step_parts,
)
from nets.training import train
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.trajectory import Probe

DOUBLE = torch.float64
DATA = digits(60)
OBJECTIVE = Objective(mlp((64, 4, 10)), DATA.train_x, DATA.train_y, SQUARED)
THETA = OBJECTIVE.net.theta


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Bowl(nn.Module):
    """One output row per sample, all ½ Σ λ_k θ_k²."""

    def __init__(self, curvatures, theta):
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=DOUBLE)
        self.theta = nn.Parameter(torch.tensor(theta, dtype=DOUBLE))

    def forward(self, x):
        return (self.curvatures * self.theta.square()).sum().expand(len(x), 1) / 2


def bowl(curvatures=(10.0, 1.0, 0.1), theta=(1.0, 2.0, 3.0)):
    value = Loss("value", lambda outputs, labels: outputs.squeeze(-1))
    return Objective(Bowl(curvatures, theta), torch.zeros(4, 1, dtype=DOUBLE), torch.zeros(4, dtype=torch.int64), value)


def test_losses_after_parts_of_a_step_on_a_quadratic_are_exact():
    objective, eta, multiples = bowl(), 0.15, (0.5, 1.0, 2.0)
    theta, curvature = objective.net.theta, torch.tensor([10.0, 1.0, 0.1], dtype=DOUBLE)
    g = torch.stack([curvature * theta, randn(3)])
    parts = step_parts(g, torch.eye(3, dtype=DOUBLE)[:, :2], singly=1)
    assert torch.allclose(parts["top"] + parts["complement"], parts["whole"])
    assert parts["along"].shape == (2, 1, 3)
    unit = parts["random"][0] / parts["random"][0].norm()
    assert torch.allclose(parts["random"], (g @ unit).unsqueeze(1) * unit)

    def value(at):
        return (curvature * at.square()).sum(-1) / 2

    for part in parts.values():
        found = losses_after(objective, theta, part, eta, multiples)
        expected = torch.stack([value(theta - c * eta * part) for c in multiples], -1)
        assert found.shape == (*part.shape[:-1], 3)
        assert torch.allclose(found, expected, atol=1e-12)
    # Along e_1 with ηλ = 1.5: (1 - cηλ)² of that direction's loss is left.
    along = losses_after(objective, theta, parts["along"][0, 0], eta, multiples)
    rest = value(theta) - 5
    assert torch.allclose(along - rest, 5 * (1 - 1.5 * torch.tensor(multiples, dtype=DOUBLE)) ** 2)


def test_cross_section_and_widths_of_a_quadratic():
    objective, g = bowl(theta=(0.0, 2.0, 3.0)), torch.tensor([[0.3, 1, 1], [-0.5, 1, 1]], dtype=DOUBLE)
    section = cross_section(objective, objective.net.theta, torch.eye(3, dtype=DOUBLE)[:, 0], 0.1, g)
    assert section.unit == pytest.approx(0.04)
    assert len(section.offsets) == 15
    base = float(objective.value(objective.net.theta))
    assert torch.allclose(section.losses, base + 5 * (0.04 * section.offsets) ** 2)
    for ratio, width in section.widths().items():
        exact = math.sqrt((ratio - 1) * base / 5) / 0.04
        offered = [k for k in (0.25, 0.5, 1, 2, 4, 8, 16) if k >= exact]
        assert width == (offered[0] if offered else math.inf)
    tilted = cross_section(objective, objective.net.theta + torch.tensor([0.4, 0, 0]), torch.eye(3, dtype=DOUBLE)[:, 0],
                           0.1, g)  # fmt: skip
    assert tilted.width(1.01) == 0.25  # one wall is near; the farther side decides when both are reached


def test_the_farther_wall_decides_the_width():
    objective, g = bowl((10.0, 1.0, 0.1), (0.4, 2.0, 3.0)), torch.ones(1, 3, dtype=DOUBLE)
    section = cross_section(objective, objective.net.theta, torch.eye(3, dtype=DOUBLE)[:, 0], 0.1, g)
    right = min(
        k for k, v in zip(section.offsets, section.losses, strict=True) if k > 0 and v >= 1.5 * section.losses[7]
    )
    left = min(
        -k for k, v in zip(section.offsets, section.losses, strict=True) if k < 0 and v >= 1.5 * section.losses[7]
    )
    assert left > right
    assert section.width(1.5) == float(left)


def test_alignment_is_cosines_and_shares():
    V, g = torch.linalg.qr(randn(9, 3)).Q, randn(5, 9, seed=1)
    found, mean = alignment(g, V), g.mean(0)
    for m in range(5):
        assert found.to_mean[m] == pytest.approx(float(torch.cosine_similarity(g[m], mean, 0)))
        for i in range(3):
            assert found.to_directions[m, i] == pytest.approx(float(torch.cosine_similarity(g[m], V[:, i], 0)))
    assert torch.allclose(found.share, (g @ V).square().sum(1) / g.square().sum(1))
    assert torch.allclose(found.of_mean, mean @ V / mean.norm())
    inside = alignment(torch.stack([V[:, 0], torch.zeros(9, dtype=DOUBLE)]), V)
    assert inside.share.tolist() == pytest.approx([1.0, 0.0])


def test_minibatch_gradients_are_unbiased_and_repeatable():
    g = minibatch_gradients(OBJECTIVE, THETA, Minibatch(6), 400, seed=2)
    assert torch.equal(g[:3], minibatch_gradients(OBJECTIVE, THETA, Minibatch(6), 3, seed=2))
    z = (g.mean(0) - OBJECTIVE.gradient(THETA)) / (g.std(0) / 400**0.5).clamp_min(1e-12)
    assert z[g.std(0) > 1e-9].abs().max() < 5


@pytest.mark.parametrize("net", [lambda: mlp((64, 4, 10)), lambda: resnet((2,), (1,), norm="batch")])
def test_the_probe_of_eigenvalues_is_a_dense_decomposition(net):
    objective = Objective(net(), DATA.train_x, DATA.train_y, SQUARED)
    at = torch.tensor([0, 3, 6])
    probes = {"λ": Probe(TopEigenvalues(objective, 3, tolerance=1e-7), at),
              "θ": Probe(lambda state: state.theta.clone(), at)}  # fmt: skip
    run = train(objective, objective.net.theta, [Schedule(0.05), Schedule(1e200)], 6, seeds=[0, 1], probes=probes)
    found = run["λ"].values
    assert found.shape == (3, 2, 2, 3)
    assert torch.isnan(found[1:, 1]).all()  # diverged at once
    last = objective.at_buffers(run.final.buffers_of(0, 1))
    dense = torch.linalg.eigvalsh(hessian(last, run.final.theta[0, 1]).dense())
    assert torch.allclose(found[-1, 0, 1], dense.flip(0)[:3], rtol=1e-6)


RULES = {
    "normal": lambda g, e, f: g,
    "only top": lambda g, e, f: e * (e @ g),
    "remove top": lambda g, e, f: g - e * (e @ g),
    "top scaled": lambda g, e, f: f * e * (e @ g) + (g - e * (e @ g)),
    "bottom scaled": lambda g, e, f: e * (e @ g) + f * (g - e * (e @ g)),
    "constant overshoot": lambda g, e, f: g - e * (e @ g) + f * e * (e @ g).sign(),
}


@pytest.mark.parametrize("rule", RULES)
def test_escape_rules_are_the_published_ones_with_e_looked_up_every_step(rule):
    steps, eta, f = 6, 0.1, 0.3
    run = train(OBJECTIVE, THETA, [Schedule(eta)], steps, seeds=[0], batch=Minibatch(60, replacement=False),
                direction=Escape(OBJECTIVE, [EscapeRule(rule, f)], tolerance=1e-8))  # fmt: skip
    theta, e = THETA, None
    for _ in range(steps):
        e = eigenpairs(hessian(OBJECTIVE, theta), 1, start=e, tolerance=1e-8).vectors
        theta = theta - eta * RULES[rule](OBJECTIVE.gradient(theta), e[:, 0], f)
    assert torch.allclose(run.final.theta[0, 0], theta, rtol=0, atol=1e-9)


def test_the_other_escape_rules():
    E, g = torch.linalg.qr(randn(9, 3)).Q, randn(9, seed=1)
    along = E.T @ g
    scaled = EscapeRule("all top scaled", 0.2, 3).apply(g, E, torch.ones(3))
    assert torch.allclose(E.T @ scaled, 0.2 * along)
    assert torch.allclose(scaled - E @ (E.T @ scaled), g - E @ along)
    dropped = EscapeRule("drop", 0.5, 3).apply(g, E, torch.tensor([0.4, 0.6, 0.1]))
    assert torch.allclose(E.T @ dropped, along * torch.tensor([0.0, 1.0, 0.0]), atol=1e-14)
    rules = [EscapeRule("constant top"), EscapeRule("only top"), EscapeRule("drop", 0.5, 3)]
    run = train(OBJECTIVE, THETA, [Schedule(0.1)] * 3, 8, seeds=[0, 1], direction=Escape(OBJECTIVE, rules, 1e-6))
    moved = run.final.theta[0] - THETA  # along one line, that of the first e_1, for both seeds
    e = eigenpairs(hessian(OBJECTIVE, THETA), 1, tolerance=1e-6).vectors[:, 0]
    assert torch.allclose(moved, (moved @ e).unsqueeze(1) * e, atol=1e-9)
    curved = run.final.theta[1] - THETA
    assert (curved - (curved @ e).unsqueeze(1) * e).norm() > 1e-4


def test_distances_and_norms():
    path = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]], dtype=DOUBLE).unsqueeze(1)
    assert path_length(path).tolist() == [9.0]
    assert distance(path[-1], path[0]).tolist() == [3.0]
    assert frobenius_of_top(torch.tensor([3.0, -4.0])) == 5


BAD = {
    "rules were given": lambda: train(OBJECTIVE, THETA, [Schedule(0.1)] * 2, 1, seeds=[0],
                                      direction=Escape(OBJECTIVE, [EscapeRule()])),
    "there is no escape rule": lambda: EscapeRule("bounce").apply(randn(3), torch.eye(3, dtype=DOUBLE), torch.zeros(3)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_is_told_in_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        BAD[sentence]()
