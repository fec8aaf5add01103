"""Suite ``collapse`` on small ensembles: its statistics can fail, its checks are claimed, its figures draw."""

import numpy as np
import pytest
import torch
from scipy import stats

from theory.stochastic_logistic import StochasticLogistic, evolve, start
from theory.streams import named_generator
from validation import collapse, collapse_checks, collapse_figures, collapse_linear, collapse_models
from validation.check import Verdict
from validation.gallery import write_figure
from validation.settings import CollapseSettings, SettingsError

OPTIONS = CollapseSettings(paths=2000, sigmas=(20.0,), toy_steps=6000)


@pytest.fixture(scope="module")
def ran():
    parts = [
        collapse_models.quartic(OPTIONS, 256, 8), collapse_models.neuron(OPTIONS, 64, 1600),
        collapse_linear.linear(OPTIONS, 16), collapse_linear.toy(OPTIONS, 8), collapse_linear.general(4),
    ]  # fmt: skip
    checks = [check for part, _ in parts for check in part]
    return checks, collapse.dataset({name: value for _, series in parts for name, value in series.items()})


def test_every_check_is_claimed_and_every_claim_checked(ran):
    checks, series = ran
    assert {check.claim for check in checks} <= {claim.name for claim in collapse.CLAIMS}
    missing = {claim.name for claim in collapse_checks.CLAIMS} - {check.claim for check in checks}
    assert missing <= {collapse_checks.MERGING.name, collapse_checks.ESCAPE.name, collapse_checks.STRONG.name}
    assert all(str(name).startswith("collapse") for name in [*series.variables, *series.dims])


def test_theory_holds_on_a_small_ensemble(ran):
    checks, _ = ran
    claims = {collapse_checks.STATIONARY, collapse_checks.EXPONENT, collapse_checks.FINITE_TIME}
    claims |= {collapse_checks.NEURON_RATE, collapse_checks.PUBLISHED, collapse_checks.MODES}
    names = {claim.name for claim in claims}
    judged = [check for check in checks if check.claim in names]
    assert len(judged) > 15
    assert not [check for check in judged if check.verdict == Verdict.DISAGREES]


@pytest.mark.parametrize("name", sorted(collapse_figures.FIGURES))
def test_figures_draw_from_series_alone(ran, name, tmp_path):
    figure = collapse_figures.FIGURES[name]
    kept = ran[1][list(figure.variables)]
    assert len(figure.draw(kept).axes) >= 2
    written = write_figure(name, figure, kept, tmp_path, ["svg"])
    assert sorted(path.suffix for path in written) == [".csv", ".svg"]


def test_kolmogorov_accepts_its_law_and_rejects_another():
    u = np.random.default_rng(0).random(20_000)
    for sample, agrees in ((u, True), (u**1.2, False)):
        found = collapse_checks.kolmogorov(sample)
        assert (found.value < found.allowance) == agrees


def test_chi_square_has_the_stated_level():
    p, n = np.linspace(0.05, 0.95, 10), 1000
    draws = np.random.default_rng(1)
    verdicts = []
    for _ in range(200):
        share = draws.binomial(n, p) / n
        check = collapse_checks.chi_square(
            collapse_checks.FINITE_TIME, "test", collapse_checks.WELL, share, p, n, {"shifted": p + 0.08 * (1 - p)}
        )
        verdicts.append(check.verdict)
        assert check.rivals[0].rejected
    assert verdicts.count(Verdict.AGREES) >= 199


def test_weighted_root_finds_a_line_s_zero_with_its_error():
    draws, found = np.random.default_rng(2), []
    x = np.linspace(0.5, 1.5, 21)
    for _ in range(300):
        y = 2 * (x - 0.93) + 0.1 * draws.standard_normal(21)
        found.append(collapse_checks.weighted_root(x, y, np.full(21, 0.01), 1))
    roots, errors = np.array(found).T
    assert abs(roots.mean() - 0.93) < 4 * roots.std() / 300**0.5
    assert errors.mean() == pytest.approx(roots.std(), rel=0.15)


def test_joint_score_accepts_its_law_and_rejects_a_shifted_one():
    process = StochasticLogistic(np.linspace(0.3, 2.0, 12), 2.0, 1.3)
    law = evolve(process, start(process, 0.0, 60.0), 60.0)
    draws = np.random.default_rng(3)
    scores = []
    for _ in range(20):
        sample = np.exp(law.quantile(draws.random((12, 64)))).T
        value, expectation, spread, allowance = collapse_linear.joint_score(sample, law, named_generator(0, "score"))
        scores.append((value - expectation) / spread)
        assert value - expectation < allowance
    assert abs(np.mean(scores)) < 4 / 20**0.5
    shifted = collapse_linear.joint_score(1.6 * sample, law, named_generator(0, "score"))
    assert shifted[0] - shifted[1] > shifted[3]


def test_stationary_variance_of_the_gamma_law_is_what_the_suite_compares():
    process = StochasticLogistic(np.array([1.0]), 2.0, 0.8)
    assert process.shape[0] * process.scale[0] ** 2 == pytest.approx(
        stats.gamma.var(process.shape[0], scale=process.scale[0])
    )


def test_unusable_settings_are_one_sentence():
    for bad in ({"mu": -1.0}, {"sigmas": ()}, {"toy_steps": 100}):
        with pytest.raises(SettingsError):
            CollapseSettings(**bad)
    assert torch.get_default_dtype() == torch.float32
