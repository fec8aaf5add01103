"""The claims on sharpness: series that draw every figure, and checks that can fail."""

import pytest
import torch
from matplotlib.figure import Figure

from validation import sharpness
from validation.check import Verdict
from validation.settings import RunSettings
from validation.sharpness_figures import FIGURES
from validation.suite import Progress


@pytest.fixture(scope="module")
def outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpness, "LOOKS", (0, 10, 20, 50, 100, 200))
        return sharpness.sharpness_checks(RunSettings(seeds=3), torch.device("cpu"), Progress("quiet"))


@pytest.mark.slow
def test_figures_are_drawn_from_the_saved_series_alone(outcome):
    _, series = outcome
    assert all(str(name).startswith("bouncing") for name in [*series.variables, *series.dims])
    for figure in FIGURES.values():
        assert isinstance(figure.draw(series[list(figure.variables)]), Figure)


@pytest.mark.slow
def test_every_claim_is_checked_and_none_disagrees(outcome):
    checks, _ = outcome
    assert {check.claim for check in checks} == {claim.name for claim in sharpness.CLAIMS}
    assert all(check.seeds == 3 and check.rivals for check in checks)
    verdicts = {check.verdict for check in checks if check.expected == Verdict.AGREES}
    assert verdicts <= {Verdict.AGREES, Verdict.INCONCLUSIVE}  # three seeds decide little


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([[1, 2, 3, 4]] * 5, Verdict.AGREES),
        ([[4, 3, 2, 1]] * 5, Verdict.DISAGREES),
        ([[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3], [3, 1, 4, 2]], Verdict.INCONCLUSIVE),
    ],
)
def test_an_ordered_check_can_fail(rows, verdict):
    values = torch.tensor(rows, dtype=torch.float64).T
    check = sharpness._order(sharpness.PEAK, "made up", "τ", values, torch.ones(len(rows), dtype=torch.bool), "nowhere")
    assert check.verdict == verdict


def test_diverged_seeds_are_counted_not_averaged():
    values = torch.tensor([[1.0, 2, 3]] * 6, dtype=torch.float64).T
    values[:, 2] = torch.nan
    finite = torch.arange(6) != 2
    check = sharpness._order(sharpness.PEAK, "made up", "τ", values, finite, "nowhere")
    assert (check.seeds, check.diverged, check.verdict) == (6, 1, Verdict.AGREES)
