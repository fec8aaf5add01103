"""Numbers of AVPF's ReLU notebooks: from the same draws where runs are stable, by median and range where chaotic.

Losses are quoted as published, without the ½ of our convention.

The published starts are torch's float32 normals, whose last bits depend on the CPU (AVX2 and plain kernels differ in
24 to 43 % of them). The float64 loop itself does not: starts 1e-15 apart end within 1e-9 at constant steps and at
10 %. So digits are held only where starts 1e-7 apart keep them; elsewhere such starts, or fresh ones, must surround
the published number.
"""

import numpy as np
import pytest
import torch

from nets.relu import sgd, standard_measurements
from theory.relu_init import gaussian, kinked
from theory.relu_published import multi_layer, one_dimensional, two_layer
from theory.sparsity import effective_rank, jacobian_rank, nuclear_norm, pattern_distance
from theory.trajectory import Probe
from validation.ordering import decreasing


def at_last(run, start, indices, seeds, threshold=0.99, schedules=None, dtype=torch.float64):
    """Measured values at the last published evaluation step, shape (schedules, seeds) each, θ and which are finite."""
    problem = run.problem.to(dtype=dtype)
    measure = standard_measurements(run.network, problem, threshold) | {"theta": lambda theta: theta}
    probes = {name: Probe(function, run.grid[-1:]) for name, function in measure.items()}
    result = sgd(
        run.network, problem, start.to(dtype), schedules or run.schedules, run.steps, seeds=seeds, indices=indices,
        probes=probes,
    )  # fmt: skip
    values = {name: series.values[-1] for name, series in result.series.items()}
    theta = values.pop("theta").double()
    values |= {"published " + name: 2 * values[name] for name in ("train loss", "test loss")}
    values["rank"] = jacobian_rank(run.network, theta, run.rank_inputs)
    return values, theta, result.finite


def published(run, threshold=0.99, **options):
    return at_last(run, run.start, run.indices(), [0], threshold, **options)


def nudged(run, count):
    """The second schedule from ``count`` starts that differ in float32's last bit, on the published draws."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, run.network.size, generator=generator, dtype=torch.float64)
    indices = np.repeat(run.indices(), count, axis=0)
    return at_last(run, run.start * (1 + 1e-7 * noise), indices, range(count), schedules=run.schedules[1:2])


@pytest.fixture(scope="module")
def lenaic():
    return two_layer()


@pytest.fixture(scope="module")
def deep():
    return multi_layer()


def test_data_are_the_printed_ones(lenaic, deep):
    assert (lenaic.steps, deep.steps, int(lenaic.grid[-1]), int(deep.grid[-1])) == (14126, 10001, 14032, 9934)
    shown = torch.tensor([0.9664, -0.5862, 0.4440, 0.9520, 0.8456, 0.6576, -1.0138, 0.7839, -0.2553, -0.2928])
    assert (lenaic.problem.y[:10] - shown).abs().max() < 6e-5
    shown = torch.tensor([-0.6163, 0.9799, 0.3886, 0.1911, 0.3208, -0.6920, -0.3344, -0.1105, 1.2851, -0.3311])
    assert (deep.problem.y[:10] - shown).abs().max() < 6e-5
    line = one_dimensional()
    assert (line.steps, int(line.grid[-1]), line.network.size, len(line.grid)) == (31623, 31412, 300, 249)
    assert [float(s.step_sizes(line.steps).max()) for s in line.schedules] == pytest.approx(
        [0.000456, 0.0402], rel=1e-3
    )


def test_teacher_student_in_the_plane(lenaic):
    values, theta, finite = published(lenaic, schedules=lenaic.schedules[:1])
    assert finite.all()
    stable = {name: value[0, 0].item() for name, value in values.items()}
    assert stable["published train loss"] == pytest.approx(1.35384e-5, rel=5e-6)
    assert stable["published test loss"] == pytest.approx(6.0982e-4, rel=2e-5)
    assert stable["rank"] == 26
    assert stable["sparsity"] == pytest.approx(0.26333, abs=5e-6)
    (W, _), (a, _) = lenaic.network.split(theta[:, 0])
    assert theta[0, 0].norm().item() == pytest.approx(3.30917, abs=5e-6)
    assert nuclear_norm(W * a.abs().mT)[0].item() == pytest.approx(1.28380, abs=5e-5)
    on, at_start = (lenaic.network.preactivations(t, lenaic.problem.X) for t in (theta[:, 0], lenaic.start))
    assert pattern_distance(on, at_start)[0].item() == pytest.approx(0.073333, abs=5e-7)


def test_teacher_student_decayed_at_ten_percent_among_starts_a_last_bit_apart(lenaic):
    """Such starts end with training losses a factor 2 and nuclear norms 8 % apart; the published run is one of them.

    Its test loss, 1.622e-4, is left out: 32 starts reached 1.621e-4 at most, which decides nothing.
    """
    values, theta, finite = nudged(lenaic, 64)
    assert finite.all()
    (W, _), (a, _) = lenaic.network.split(theta[0])
    on, at_start = (lenaic.network.preactivations(t, lenaic.problem.X) for t in (theta[0], lenaic.start))
    measured = {
        1.0185e-5: values["published train loss"][0],
        1.52920: nuclear_norm(W * a.abs().mT),
        16: values["rank"][0],
        0.376667: pattern_distance(on, at_start),
    }
    for published_value, ends in measured.items():
        assert ends.min() <= published_value <= ends.max()
        assert ends.max() > 1.03 * ends.min()  # or else hold the digits
    assert (values["sparsity"][0] - 0.11).abs().max() < 0.04  # 0.26 at the small step


def test_three_layers(deep):
    values, theta, finite = published(deep)
    assert finite.all()
    stable = {name: value[0, 0].item() for name, value in values.items()}
    assert stable["published train loss"] == pytest.approx(0.00137137, rel=4e-6)
    assert stable["published test loss"] == pytest.approx(0.0613878, rel=2e-6)
    assert [values[f"active fraction {layer}"][0, 0].item() for layer in (1, 2)] == pytest.approx([0.57, 0.466])
    phi = deep.network.activations(theta[:, 0], deep.rank_inputs, 2)
    ranks = effective_rank(torch.linalg.svdvals(torch.nn.functional.normalize(phi, dim=-1)))
    assert ranks[:3].tolist() == pytest.approx([2.001751, 2.033605, 1.778763], abs=5e-4)
    assert values["rank"][:3, 0].tolist() == [150, 150, 125]
    assert values["published test loss"][1:3, 0].tolist() == pytest.approx([0.0321812, 0.0247715], rel=1e-3)
    assert [values[f"sparsity {layer}"][1, 0].item() for layer in (1, 2)] == pytest.approx([0.476, 0.312])


@pytest.mark.slow
def test_three_layers_in_the_published_precision(deep):
    """At 10 % float64 ends 0.5 % away in training loss; in float32 the published digits come out."""
    values, _, _ = published(deep, schedules=deep.schedules[:2], dtype=torch.float32)
    assert values["published train loss"][:, 0].tolist() == pytest.approx([0.00137137, 0.00109716], rel=1e-5)
    assert values["published test loss"][:, 0].tolist() == pytest.approx([0.0613878, 0.0321812], rel=2e-6)


@pytest.mark.parametrize(("factor", "train", "nuclear"), [(400.0, 2.0859e-4, 540.217), (500.0, 1.5994e-4, 540.183)])
def test_one_dimension(factor, train, nuclear):
    run = one_dimensional(factor)
    values, theta, finite = published(run, 0.999, schedules=run.schedules[:1])
    assert finite.all()
    assert values["published train loss"][0, 0].item() == pytest.approx(train, rel=4e-4)
    assert values["rank"][0, 0] == 85
    assert values["sparsity"][0, 0].item() == pytest.approx(0.22, abs=1e-3)
    assert values["active fraction"][0, 0].item() == pytest.approx(0.48667, abs=1e-5)
    scaled = run.network.contributions(theta[:, 0], run.problem.X)
    assert nuclear_norm(scaled)[0].item() == pytest.approx(nuclear, abs=2e-3)
    on, at_start = (run.network.preactivations(t, run.problem.X) for t in (theta[:, 0], run.start))
    assert pattern_distance(on, at_start)[0].item() == pytest.approx(0.040833, abs=5e-7)


def ensemble(run, start, seeds, threshold=0.99, schedules=slice(1, None)):
    """Orderings of rank and sparsity over the decayed schedules, from fresh starts and draws on the published data."""
    values, _, finite = at_last(run, start, None, range(seeds), threshold, run.schedules[schedules])
    names = [name for name in values if name.startswith(("sparsity", "rank"))]
    return {name: decreasing(values[name], finite) for name in names}


def test_chaotic_teacher_student_by_median_and_range(lenaic):
    """η = 0.91: four of five runs diverge; among the rest 10 % > 30 % > 50 % in rank and sparsity."""
    order = ensemble(lenaic, gaussian(lenaic.network, (0.5, 0.0), range(128)), 128)
    published = {"rank": (16, 12, 7), "sparsity": (0.11, 0.086667, 0.063333)}
    for name, numbers in published.items():
        measured = order[name]
        assert measured.p_value < 1e-4
        assert measured.median[0] > measured.median[1] > measured.median[2]
        assert 12 <= measured.survivors[0] <= 40  # binomial around 45 of 256: four standard errors either way
        for value, low, high in zip(numbers, measured.lowest, measured.highest, strict=True):
            assert low <= value <= high
    assert all(abs(m - p) <= 3 for m, p in zip(order["rank"].median, (16, 12, 8.5), strict=True))


def test_chaotic_three_layers_by_median_and_range(deep):
    order = ensemble(deep, gaussian(deep.network, (0.8,) * 3, range(64)), 64)
    published = {"rank": (150, 125, 102), "sparsity 1": (0.476, 0.378, 0.34), "sparsity 2": (0.312, 0.252, 0.182)}
    for name, numbers in published.items():
        assert order[name].survivors == (64, 64, 64)
        assert order[name].p_value < 1e-4
        for value, low, high in zip(numbers, order[name].lowest, order[name].highest, strict=True):
            assert low <= value <= high


@pytest.mark.parametrize(
    ("factor", "rank", "share"), [pytest.param(400.0, 19, 0.0642, marks=pytest.mark.slow), (500.0, 16, 0.0283)]
)
def test_chaotic_one_dimension_by_median_and_range(factor, rank, share):
    """A long warmup leaves a quarter of the rank and less than half of the sparsity coefficient of a short one.

    The published over-regularised run is sparser than most: one in twenty ends at 2.8 % or less, hence 64 seeds. It
    also underfits, at a loss of 0.26857. Starts a last bit from its own end there or at a loss 400 times smaller, with
    one CPU's kernels 1 of 24, so no single run is held to it.
    """
    run = one_dimensional(factor)
    order = ensemble(run, kinked(run.network, range(64)), 64, 0.999, slice(None))
    for name, value in (("rank", rank), ("sparsity", share)):
        assert order[name].p_value < 1e-6
        assert order[name].survivors == (64, 64)
        assert order[name].lowest[1] <= value <= order[name].highest[1]
    assert order["rank"].median[1] < 0.3 * order["rank"].median[0]
    assert order["sparsity"].median[1] < 0.5 * order["sparsity"].median[0]


def test_ordering_counts_divergence_and_does_not_see_what_is_not_there():
    noise = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    every = torch.ones(3, 200, dtype=torch.bool)
    p_values = torch.tensor([decreasing(noise[:, k : k + 10], every[:, :10]).p_value for k in range(0, 200, 10)])
    assert 0.2 < p_values.median() < 0.8  # exchangeable schedules: uniform p-values
    assert p_values.min() > 1e-3
    falling = noise + torch.tensor([2.0, 1.0, 0.0]).unsqueeze(1)
    assert decreasing(falling, every).p_value < 1e-10
    assert decreasing(falling.flip(0), every).p_value > 0.99
    assert decreasing(falling[:2], every[:2]).p_value < 1e-10
    finite = every.clone()
    finite[2, :195], finite[0, :] = False, True
    order = decreasing(falling, finite)
    assert (order.survivors, order.paired) == ((200, 200, 5), 5)
    lost = decreasing(falling, ~every)
    assert (lost.p_value, lost.survivors, lost.paired) == (1.0, (0, 0, 0), 0)
    assert torch.tensor(lost.median).isnan().all()
    with pytest.raises(ValueError, match="at least two schedules"):
        decreasing(noise[:1], every[:1])
