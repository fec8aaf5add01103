"""Every schedule of the papers' image networks against numbers worked out by hand, and one sentence on bad input."""

import math
import re

import pytest
import torch

from theory.schedule import Schedule, StepClock, StepSizes, Warmup, sde_time, stack_step_sizes
from theory.schedule_shapes import Cosine, Cyclic, DecayTo, Exponential, GrowThenDecay, Linear, Multistep, Power

EVERY: list[StepSizes] = [
    Schedule(0.1, ((0.5, 10.0), (0.75, 10.0)), decay_at_once=True),
    GrowThenDecay(0.75, 0.5, Exponential(1.05)),
    GrowThenDecay(0.1, 0.3, Power(0.5)),
    GrowThenDecay(0.05, 0.1, Linear(6.0)),
    DecayTo(0.05, 0.0005, 0.3),
    Cosine(0.1, 0.001, warmup=0.1, cycles=2),
    Cyclic(0.2),
    Multistep(0.1, (60, 80), warmup=10),
]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda s: s.label)
def test_all_have_one_interface_and_become_sde_time(schedule):
    sizes = schedule.step_sizes(100)
    assert sizes.shape == (100,)
    assert sizes.dtype == torch.float64
    assert torch.isfinite(sizes).all()
    assert (sizes >= 0).all()
    assert schedule.step_sizes(0).shape == (0,)
    times = sde_time(sizes)
    assert float(times[-1]) == pytest.approx(float(sizes.sum()))
    positive = sizes[sizes > 0]
    assert [StepClock(positive)(float(t)) for t in sde_time(positive)[:-1]] == positive.tolist()


def test_they_stack():
    assert torch.equal(stack_step_sizes(EVERY, 50)[2], EVERY[2].step_sizes(50))
    assert len({schedule.label for schedule in EVERY}) == len(EVERY)


def test_exponential_warmup_of_the_plain_residual_network():
    sizes = GrowThenDecay(0.75, 0.5, Exponential(1.05)).step_sizes(10_000)
    assert float(sizes[0]) == pytest.approx(0.75, rel=1e-3)
    assert round(float(sizes[4998]), 3) == 8.596  # t = 49.99 of 100 epochs
    assert float(sizes.max()) == float(sizes[4998])
    assert round(float(sizes[4999]), 3) == 0.860
    assert round(float(sizes[8998]), 3) == 0.860
    assert round(float(sizes[8999]), 4) == 0.0860
    assert "0.75→8.6, 0.86 from 50%, 0.086 from 90%" in EVERY[1].label


@pytest.mark.parametrize(("at", "first", "second"), [(0.1, 0.001, 1e-4), (0.3, 0.003, 3e-4), (0.5, 0.005, 5e-4)])
def test_the_papers_best_setting_confounds_when_and_how_much(at, first, second):
    sizes = GrowThenDecay(0.05, at).step_sizes(1000)
    before = int(at * 1000) - 1
    assert (sizes[:before] == 0.05).all()
    assert torch.allclose(sizes[before:899], torch.tensor(first, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(sizes[899:], torch.tensor(second, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5])
def test_decaying_to_one_step_size_separates_them(at):
    sizes = DecayTo(0.05, 0.0005, at).step_sizes(1000)
    assert int((sizes == 0.05).sum()) == int(at * 1000)
    assert set(sizes.tolist()) == {0.05, 0.0005}
    grown = DecayTo(0.05, 0.0005, at, Warmup(0.1, 6.0)).step_sizes(1000)
    assert float(grown[50]) == pytest.approx(0.05 * (1 + 5 * 0.05))
    assert float(grown[-1]) == 0.0005
    assert DecayTo(0.05, 0.0005, at, Warmup(0.1, 6.0)).label.startswith("η=0.05→0.075, 0.0005 from")


def test_power_and_linear_warmups():
    sizes = GrowThenDecay(0.1, 0.36, Power(0.5)).step_sizes(1000)
    assert float(sizes[89]) == pytest.approx(0.1 * (1 + 3))  # 9 % of the run
    assert float(sizes[359]) == pytest.approx(0.1 * (1 + 6) / 10)
    assert float(sizes[-1]) == pytest.approx(0.1 * (1 + 6) / 100)
    sizes = GrowThenDecay(0.1, 0.3, Linear(5.0)).step_sizes(1000)
    assert float(sizes[249]) == pytest.approx(0.1 * 3)  # half of the way from 1 to 5 at a quarter of the run
    assert float(sizes[300]) == pytest.approx(0.3 / 0.5 * 5 * 0.1 / 10)


def test_cosine_by_hand():
    sizes = Cosine(2.0, 1.0).step_sizes(4)
    expected = [1 + (1 + math.cos(math.pi * s)) / 2 for s in (0.25, 0.5, 0.75, 1.0)]
    assert sizes.tolist() == pytest.approx(expected)
    warmed = Cosine(1.0, warmup=0.5).step_sizes(8)
    assert warmed.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, *Cosine(1.0).step_sizes(4).tolist()])
    twice = Cosine(1.0, cycles=2).step_sizes(8)
    assert torch.allclose(twice, Cosine(1.0).step_sizes(4).repeat(2), atol=1e-15)


def test_triangle_and_milestones_by_hand():
    assert Cyclic(1.0).step_sizes(5).tolist() == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3, 0.0])
    sizes = Multistep(1.0, (6, 8), warmup=4).step_sizes(10)
    assert sizes.tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    # CKYG's linear teacher: 3e-4 more each step for 10 000 steps, a tenth at 50 000 and at 53 000.
    sizes = Multistep(3.0, (50_000, 53_000), warmup=10_000).step_sizes(60_000)
    assert float(sizes[0]) == pytest.approx(3e-4)
    assert float(sizes[9_999]) == 3.0
    assert float(sizes[52_999]) == pytest.approx(0.3)
    assert float(sizes[53_000]) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GrowThenDecay(0.0, 0.5), "choose a positive number"),
        (lambda: GrowThenDecay(0.1, 0.95), "choose 0 < share <= 0.9"),
        (lambda: Exponential(0.9), "choose a base above 1"),
        (lambda: Power(1.5), "choose one between 0 and 1"),
        (lambda: Linear(-1.0), "choose a positive number"),
        (lambda: DecayTo(0.1, 0.0, 0.5), "final step size 0.0 is not usable"),
        (lambda: DecayTo(0.1, 0.1, 1.5), "choose a share in"),
        (lambda: Cosine(0.1, 0.2), "choose 0 <= final <= step size"),
        (lambda: Cyclic(0.1, 1.0), "choose a share between 0 and 1"),
        (lambda: Multistep(0.1, (5, 5)), "give ascending step numbers"),
        (lambda: Multistep(float("nan")), "choose a positive number"),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
