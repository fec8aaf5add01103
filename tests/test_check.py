"""The verdict: it agrees, disagrees, hesitates and refuses when it should, at the stated error rate."""

import numpy as np
import pytest
import torch

from theory.prediction import Prediction, Reference
from validation.check import Claim, Rival, Verdict, judge
from validation.statistics import SIGMAS, kendall_tau, mean, median, worst

SOURCE = Reference("A", 2023, "Eq. 1")
CLAIM = Claim("claim", "x = y", "meaning")


def verdict(value, sample, error=0.0, null=0.0, rivals=(), **more):
    prediction = Prediction("x", torch.as_tensor(value), null, error, SOURCE, **more)
    return judge("s", CLAIM, "here", prediction, torch.as_tensor(sample, dtype=torch.float64), rivals=rivals)


def draws(centre, n=64, sd=1.0, seed=0):
    return centre + sd * np.random.default_rng(seed).standard_normal(n)


def test_the_four_verdicts():
    sample = draws(10.0)
    half = Rival("half", 5.0)
    assert verdict(10.0, sample, rivals=[half]).verdict == Verdict.AGREES
    assert verdict(12.0, sample, rivals=[half]).verdict == Verdict.DISAGREES
    assert verdict(10.0, draws(10.0, n=3, sd=9.0), rivals=[half]).verdict == Verdict.INCONCLUSIVE
    nothing = verdict(10.0, np.full(4, np.nan), rivals=[half])
    assert nothing.verdict == Verdict.NOT_EVALUABLE
    assert (nothing.seeds, nothing.diverged) == (4, 4)


def test_the_error_is_a_fraction_of_the_effect_not_of_the_value():
    sample = draws(-4.65, sd=0.001)
    # Value -4.8 from a null of -4.6: 3 % off the value, but a factor four off the effect.
    assert verdict(-4.8, sample, error=0.1, null=-4.6).verdict == Verdict.DISAGREES
    assert verdict(-4.8, sample, error=0.1, null=0.0).verdict == Verdict.AGREES


def test_diverged_runs_are_counted_and_left_out():
    sample = draws(10.0)
    sample[:5] = np.nan
    finite = torch.ones(64, dtype=torch.bool)
    finite[5:8] = False
    sample[5:8] = 1e9
    prediction = Prediction("x", torch.tensor(10.0), 0.0, 0.0, SOURCE)
    check = judge("s", CLAIM, "here", prediction, torch.from_numpy(sample), finite=finite)
    assert (check.seeds, check.diverged, check.verdict) == (64, 8, Verdict.AGREES)


def test_paired_predictions_use_the_paired_error():
    base = draws(10.0, sd=5.0)
    noisy = base + draws(0.0, sd=0.1, seed=1)
    assert verdict(base, noisy, rivals=[Rival("half", torch.from_numpy(base / 2))]).standard_error < 0.02
    assert verdict(base - 1.0, noisy).verdict == Verdict.DISAGREES


def test_a_simulated_prediction_carries_its_own_error():
    sample = draws(10.0, sd=0.01)
    assert verdict(10.5, sample).verdict == Verdict.DISAGREES
    assert verdict(10.5, sample, standard_error=0.2).verdict == Verdict.AGREES


def test_distance_rivals_have_their_own_distance():
    near, far = torch.full((16,), 0.05), torch.full((16,), 0.9)
    rivals = [Rival("far", 0.0, far)]
    check = verdict(0.0, near, error=0.1, null=1.0, rivals=rivals)
    assert check.verdict == Verdict.AGREES
    assert check.rivals[0].predicted == pytest.approx(0.9)
    same = verdict(0.0, near, error=0.1, null=1.0, rivals=[Rival("as near", 0.0, near)])
    assert same.verdict == Verdict.INCONCLUSIVE


@pytest.mark.parametrize("n", [3, 8, 32])
def test_false_alarm_rate(n):
    """A true claim, 40 000 samples of n: at 4 sigma (Student's t) a false alarm comes 6 times in 100 000."""
    samples = np.random.default_rng(1).standard_normal((40_000, n))
    gap = np.abs(samples.mean(1))
    t = gap / (samples.std(1, ddof=1) / np.sqrt(n))
    allowed = mean(samples[0])
    quantile = allowed.allowance / allowed.standard_error
    alarms = (t > quantile).sum()
    assert alarms <= 12  # expectation 2.5; more than 12 has probability below 1e-5
    assert (t > 2).sum() > 1000  # and the statistic does spread


def test_median_error_and_worst():
    sample = draws(3.0, n=400)
    estimate = median(sample)
    assert estimate.standard_error == pytest.approx(np.sqrt(np.pi / 2 / 400), rel=0.25)
    assert estimate.allowance == SIGMAS * estimate.standard_error
    assert worst(np.array([0.1, -0.4, 0.2])).value == -0.4


def test_identical_replicates_have_no_error():
    estimate = mean(np.full(10, 0.1) + 1e-18)
    assert estimate.standard_error == 0
    assert estimate.allowance == 0


def test_kendall_tau():
    rows = np.array([[1, 2, 3], [3, 2, 1], [1, 3, 2], [1, 1, 1]])
    assert kendall_tau(rows).tolist() == pytest.approx([1, -1, 1 / 3, 0])
