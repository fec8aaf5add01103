"""Active units under SGD, under noise of all directions, and under noise orthogonal to the bouncing ones."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nets.curvature import hessian
from nets.mlp import mlp
from nets.objective import SQUARED, FlatNet, Objective
from nets.replicas import replicas
from simulators.network import Network
from simulators.network_sde import ExactCovarianceSDE, run_sde
from simulators.noise import BrownianIncrements
from theory.minibatch import Minibatch
from validation.bouncing_runs import Setting, draws_of
from validation.bouncing_sparsity import active_share, compare, sparsity_checks
from validation.check import Verdict

ROOT, CALM = 1, Setting("ReLU MLP", 0.05, 8)


@pytest.fixture(scope="module")
def objective():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (24,), generator=generator)
    return Objective(FlatNet(mlp((16, 8, 3), nn.ReLU)), x, labels, SQUARED)


@pytest.fixture(scope="module")
def shares(objective):
    return compare(objective, CALM, "2", 5, 30, 4, ROOT, block=10, most=4)


def test_the_share_is_the_one_of_signs(objective):
    theta = objective.net.theta.expand(2, -1).clone()
    theta[1] += 0.1
    weight, bias = theta[:, :128].view(2, 8, 16), theta[:, 128:136]
    before = torch.einsum("rui,ni->rnu", weight, objective.X.flatten(1)) + bias.unsqueeze(1)
    assert torch.allclose(active_share(objective, theta, "2"), (before > 0).double().mean((1, 2)))
    theta[0, 0] = torch.nan
    assert active_share(objective, theta, "2").isnan().tolist() == [True, False]


def test_where_nothing_bounces_the_noise_is_that_of_all_directions(objective, shares):
    assert shares.bouncing == 0
    draws, start = draws_of(CALM, objective.n, 4, "sparsity", ROOT), objective.net.theta.expand(4, -1)
    start, _ = replicas(objective, start, torch.zeros_like(start), 0.05, 5, draws)
    labels = nn.functional.one_hot(objective.labels, 3).to(objective.X)
    sde = ExactCovarianceSDE(Network(objective.net.module, objective.X, labels), 0.05, Minibatch(8))
    for stream, found in (("all directions", shares.all), ("orthogonal directions", shares.complement)):
        end = run_sde(sde, start, 0.05, 30, BrownianIncrements(ROOT, stream, 4, 24)).final
        assert torch.allclose(active_share(objective, end, "2"), found)


def test_the_bouncing_directions_are_those_of_the_dense_hessian(objective):
    setting = Setting("ReLU MLP", 0.6, 8)
    found = compare(objective, setting, "2", 5, 10, 4, ROOT, block=10, most=8)
    start = objective.net.theta.expand(4, -1)
    start, _ = replicas(
        objective, start, torch.zeros_like(start), 0.6, 5, draws_of(setting, objective.n, 4, "sparsity", ROOT)
    )
    every = torch.eye(objective.p, dtype=torch.float64)
    dense = [torch.linalg.eigvalsh(hessian(objective, theta) @ every) for theta in start]
    assert found.bouncing == sum(int((0.6 * values > 1).sum()) for values in dense) / 4 > 0


def test_every_path_has_its_own_start_and_goes_on_by_sgd(objective, shares):
    draws = draws_of(CALM, objective.n, 4, "sparsity", ROOT)
    for r in range(4):
        start = objective.net.theta.unsqueeze(0)
        end, _ = replicas(objective, start, torch.zeros_like(start), 0.05, 35, lambda k, r=r: draws(k)[r : r + 1])
        assert torch.allclose(active_share(objective, end, "2"), shares.sgd[r : r + 1])


def test_paths_that_diverge_are_nan_and_the_others_go_on(objective):
    lost = compare(objective, Setting("ReLU MLP", 60.0, 8), "2", 5, 20, 4, ROOT, block=10, most=4)
    assert lost.sgd.isnan().any()
    assert [check.verdict for check in sparsity_checks(lost)] == [Verdict.NOT_EVALUABLE] * 2


def test_verdicts_follow_the_shares(shares):
    generator = torch.Generator().manual_seed(0)
    scatter = 1e-3 * torch.randn(3, 16, generator=generator, dtype=torch.float64)
    known = replace(
        shares, sgd=0.2 + scatter[0], all=0.2 + scatter[1], complement=0.24 + scatter[2], quiet=0.25 + 0 * scatter[0]
    )
    both = sparsity_checks(known)
    assert [check.verdict for check in both] == [Verdict.AGREES, Verdict.DISAGREES]
    assert all(check.as_expected for check in both)
    orthogonal = replace(known, complement=0.2 + scatter[2])
    assert [check.verdict for check in sparsity_checks(orthogonal)] == [Verdict.INCONCLUSIVE, Verdict.AGREES]
    lost = replace(known, sgd=torch.where(torch.arange(16) == 3, torch.nan, known.sgd))
    assert [check.diverged for check in sparsity_checks(lost)] == [1, 1]
