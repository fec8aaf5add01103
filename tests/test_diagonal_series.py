"""What the figures of suite ``diagonal`` are drawn from: laws along the run end where the laws of the checks do."""

import numpy as np
import pytest
import torch

from nets.diagonal import initial_state
from theory import alpha_decay
from theory.minibatch import Minibatch
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from validation import diagonal
from validation.diagonal_figures import FIGURES
from validation.diagonal_series import ENDS, LAWS, ensemble_series, law_along
from validation.gallery import write_figure

STEPS = 6000
SCHEDULES = [Schedule(0.05), Schedule(0.15, ((0.5, 4.0),)), Schedule(40.0)]  # the last diverges at once


@pytest.fixture(scope="module")
def measured():
    problem = gaussian_sparse(10, 20, 3)
    start = initial_state(problem, 0.1)
    run = diagonal.measure(problem, start, SCHEDULES, STEPS, range(4))
    cells = diagonal.cells_of(problem, start, SCHEDULES, run, STEPS)
    return run, cells, ensemble_series("gaussian", run, cells)


def test_the_law_along_the_run_ends_at_the_laws_change(measured):
    run, cells, _ = measured
    for cell in cells[:2]:
        at = torch.tensor([0, 1, 2500, 2520, STEPS])
        grid = run["level"].steps.tolist()
        left = max(k for k in grid if k <= 2500)
        right = grid[grid.index(left) + 1]
        along = law_along(cell, run["level"].steps, at)
        law = alpha_decay.sde_change_at_level(
            cell.problem, cell.eta_column, cell.level, cell.weights, Minibatch()
        ).mean(-1)
        assert torch.allclose(along[0], cell.start.mean_log_alpha.expand(4), atol=1e-12)
        assert torch.allclose(along[-1] - along[0], law, rtol=1e-10)
        first = 2 * cell.eta[0] ** 2 * cell.level[0] * cell.problem.mean_square.mean()
        assert torch.allclose(along[0] - along[1], first, rtol=1e-8)  # difference of numbers that hardly differ
        assert bool((along.diff(dim=0) <= 0).all())
        middle = law_along(cell, run["level"].steps, torch.tensor([left, left + 1, right]))
        assert right - left > 2
        assert torch.allclose(middle[1], middle[0] + (middle[2] - middle[0]) / (right - left), rtol=1e-12)


def test_end_points_interpolate_and_divergence_is_nan(measured):
    _, cells, series = measured
    points = torch.from_numpy(series["gaussian end points"].values)
    problem = cells[0].problem
    assert list(series["end_of"].values) == ENDS
    for row in (1, 2):  # the prediction and gradient flow
        assert torch.allclose(points[row, :2] @ problem.X.T, problem.y.expand(2, -1), atol=1e-6)
    assert bool(torch.isnan(points[:2, 2]).all())
    laws = series["gaussian alpha laws"]
    assert list(laws["alpha_law"].values) == LAWS
    assert np.isnan(laws.values[:, 2]).all()
    change = cells[1].change.mean(-1)
    assert np.array_equal(laws.values[0, 1], change.numpy())
    assert np.allclose(laws.values[1:, 1], laws.values[0, 1], rtol=0.5)  # all three laws say about what SGD did


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_figures_need_nothing_but_the_series(measured, tmp_path):
    _, _, series = measured
    for name in ("gaussian-alpha-decay", "gaussian-end-points"):
        figure = FIGURES[name]
        written = write_figure(name, figure, series[list(figure.variables)], tmp_path, ["svg", "png"])
        assert all(path.stat().st_size > 3000 for path in written)
