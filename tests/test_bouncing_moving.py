"""The bouncing law in a basis that moves: exact where the valley is straight, and there no better than a fixed one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from nets.mlp import mlp
from nets.objective import SQUARED, FlatNet, Objective
from validation.bouncing_figures import moving_basis
from validation.bouncing_moving import dataset, follow, moving_checks
from validation.bouncing_runs import Setting, trained
from validation.check import Verdict

ROOT = 1


def objective_of(network, n=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Objective(FlatNet(network), x, torch.randint(0, 3, (n,), generator=generator), SQUARED)


def following_of(objective, setting, runs=32, blocks=8, block=25, K=12):
    (state,) = trained(objective, [setting], 20, ROOT)
    return follow(objective, setting, state, runs, blocks, block, K, ROOT)


@pytest.fixture(scope="module")
def straight():
    """Linear regression: a constant Hessian, so that both bases are one and the law is exact."""
    return following_of(objective_of(mlp((16, 3), nn.Tanh)), Setting("linear", 0.8, 32, momentum=0.3))


def test_on_a_straight_valley_the_law_holds_and_the_first_basis_does_as_well(straight):
    slope, spread = moving_checks(straight)
    assert abs(slope.measured - 1) < 4 * slope.standard_error + 1e-3
    assert slope.verdict == Verdict.INCONCLUSIVE  # the first block's basis is not rejected: it is the same one
    assert [rival.rejected for rival in slope.rivals] == [False, True, True, True]
    assert abs(spread.measured) < 4 * spread.standard_error + 1e-3
    assert torch.allclose(straight.curvature, straight.curvature[0].expand(8, -1), rtol=1e-3)


def test_sums_over_blocks_are_those_of_the_bases_where_they_are_one(straight):
    """Within the span of the first eight directions a constant Hessian's subspace does not turn."""
    assert torch.allclose(straight.squares.sum((0, 2)), straight.fixed_squares.sum((0, 2)), rtol=1e-2)
    assert torch.allclose(straight.products[0], straight.fixed_products[0])
    weights = torch.full((32,), 1 / 32, dtype=torch.float64)
    law = straight.setting.law.displacement_autocorrelation(straight.curvature)
    assert torch.allclose(straight.predicted(weights), law[0], rtol=1e-3)
    assert torch.equal(straight.predicted(weights, fixed=True), law[0])


def test_a_wrong_law_is_found_out(straight):
    bent = replace(straight, curvature=1.2 * straight.curvature)
    assert moving_checks(bent)[0].verdict == Verdict.DISAGREES


def test_a_figure_is_drawn_from_the_series_alone(straight):
    series = dataset(straight)
    assert series.sizes == {"bouncing_turning": 12}
    (axes,) = moving_basis(series).axes
    assert len(axes.lines) == 3


def test_divergence_is_one_sentence():
    with pytest.raises(ValueError, match=r"^linear: η=5, B=32 diverged: choose a smaller step size\.$"):
        following_of(objective_of(mlp((16, 3), nn.Tanh)), Setting("linear", 5.0, 32), blocks=60)
