"""Suite resnet: ensembles against literal loops, statistics on constructed data, runs resumed, figures."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn

from nets.averaging import estimate_statistics
from nets.images import ImageSet, digits
from nets.measures import block_table
from nets.objective import FlatNet
from nets.recipe import Recipe
from nets.resnet import resnet
from nets.training import Batches
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from validation import resnet_checks as claims
from validation.check import Verdict
from validation.gallery import figures_of
from validation.resnet import run
from validation.resnet_growth import Growth, Window, growth
from validation.resnet_large import Cell, outcome, published_schedules
from validation.resnet_published import held
from validation.resnet_runs import (
    Course,
    Experiment,
    Measure,
    gaussian_course,
    isotropic_course,
    sgd_course,
    svag_course,
)
from validation.settings import ResnetSettings, RunSettings, SettingsError
from validation.suite import Progress


def build(seed):
    return resnet((4,), (1,), norm="batch", seed=seed, dtype=torch.float64)


SCHEDULES = (Schedule(0.1), Schedule(0.4, ((0.5, 2.0),)))


def tiny(schedules=SCHEDULES):
    return Experiment(digits(96), build, schedules, 6, 8, 3, 2, 5)


@pytest.fixture(scope="module")
def courses():
    experiment = tiny()
    measure = Measure(experiment)
    return experiment, measure, sgd_course(experiment, measure), svag_course(experiment, measure, 2)


def test_the_ensemble_is_plain_sgd_in_train_mode_run_by_run(courses):
    experiment, measure, course, _ = courses
    draws, images = Batches(96, Minibatch(8), range(3), 5), experiment.images
    for cell, schedule in enumerate(experiment.schedules):
        sizes = schedule.step_sizes(6)
        for seed in range(3):
            module = build(seed).train()
            for k in range(6):
                rows = draws(k)[seed]
                module.zero_grad()
                nn.functional.cross_entropy(module(images.train_x[rows]), images.train_y[rows]).backward()
                with torch.no_grad():
                    for p in module.parameters():
                        p -= sizes[k] * p.grad
            assert torch.allclose(FlatNet(module).theta, course.theta[cell, seed], rtol=1e-8, atol=1e-11)
            estimate_statistics(module, images.train_x, 96)
            table = block_table(module, images.train_x, measure.names)
            assert torch.allclose(table, course.blocks[-1, cell, seed], rtol=1e-6)


def test_with_l_1_svag_and_its_wrong_scaling_are_both_sgd_on_other_draws(courses):
    experiment, measure, *_ = courses
    first, second = (svag_course(experiment, measure, 1, amplified) for amplified in (True, False))
    assert torch.equal(first.theta, second.theta)
    assert bool(first.finite.all())


def test_courses_have_the_shapes_they_state(courses):
    experiment, measure, sgd, svag = courses
    largest = experiment.only(1)
    for course in (sgd, svag, isotropic_course(largest, measure), gaussian_course(largest, measure)):
        cells = course.finite.shape[0]
        assert course.blocks.shape == (2, cells, 3, 1, 5)
        assert course.fit.shape == (2, cells, 3, 3)
        assert course.steps.tolist() == [3, 6]
        assert ((course.sparsity() > 0) & (course.sparsity() < 1)).all()


def test_a_diverged_run_is_counted_and_leaves_nan():
    experiment = tiny((Schedule(1e200),))
    course = sgd_course(experiment, Measure(experiment))
    assert not course.finite.any()
    assert course.sparsity()[-1].isnan().all()


def made(values, losses=None):
    """A course with these coefficients, (looks, cells, seeds)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    blocks = torch.zeros(*values.shape, 1, 5, dtype=torch.float64)
    blocks[..., 0, 2] = values
    fit = torch.zeros(*values.shape, 3, dtype=torch.float64)
    if losses is not None:
        fit[..., 0] = torch.as_tensor(losses, dtype=torch.float64)
    finite = torch.ones(values.shape[1:], dtype=torch.bool)
    return Course(torch.arange(len(values)), blocks, fit, finite, torch.zeros(*values.shape[1:], 1))


def test_the_small_step_is_read_where_it_has_the_same_loss():
    course = made([[[0.6, 0.6]], [[0.5, 0.7]], [[0.4, 0.8]]], [[[3.0, 3.0]], [[1.0, 2.0]], [[0.5, 1.5]]])
    found = claims.at_equal_loss(course, 0, torch.tensor([1.2, 1.0]))
    assert found.tolist() == [0.5, 0.8]  # the second seed never gets there: its last look


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, Verdict.AGREES), (0.1, Verdict.DISAGREES)])
def test_svag_is_judged_by_the_effect_beyond_the_small_step(shift, verdict):
    spread = torch.linspace(-0.01, 0.01, 8, dtype=torch.float64)
    sgd, svag = (made([[(0.3 + s + spread).tolist()]]) for s in (0.0, shift))
    experiment = replace(tiny((Schedule(0.4),)), seeds=8)
    small = torch.full((8,), 0.55, dtype=torch.float64)
    check = claims.sparsity_check(
        experiment, 0, sgd, svag, 4, claims.SPARSITY, -1, {"rival": small}, small, Verdict.AGREES
    )
    assert check.verdict is verdict
    assert check.null == pytest.approx(0.55)


def test_a_law_that_moves_nothing_is_not_accepted():
    spread = torch.linspace(-0.01, 0.01, 8, dtype=torch.float64)
    course = made([[(0.3 + spread).tolist()]])
    experiment = replace(tiny((Schedule(0.4),)), seeds=8)
    check = claims.sparsity_check(
        experiment, 0, course, course, 4, claims.SPARSITY, -1, {"rival": 0.3 + spread}, 0.5 + spread, Verdict.AGREES
    )
    assert check.verdict is Verdict.INCONCLUSIVE


def synthetic(noise, seed=0):
    """16 replicas x 40 units: rates sampled with an error, outcomes with a martingale part of the stated variance."""
    generator = np.random.default_rng(seed)
    true = generator.standard_normal(40)
    error, variance = np.full((16, 40), 0.3), np.full((16, 40), noise**2)
    predicted = true + 0.3**0.5 * generator.standard_normal((16, 40))
    realised = true + noise * generator.standard_normal((16, 40))
    none = np.zeros((16, 40))
    return Growth(np.array(["layer"] * 40), realised, predicted, none, none[:1], variance, error)


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_the_expected_correlation_is_the_one_found_where_the_equation_holds(noise):
    gaps = []
    for seed in range(40):
        found = synthetic(noise, seed)
        gaps.append([a.mean() - b for a, b in zip(found.expected(0), (
            found.correlation(found.predicted).mean(), found.signs(found.predicted).mean()
        ), strict=True)])  # fmt: skip
    gaps = np.array(gaps)
    assert (np.abs(gaps.mean(0)) < 4 * gaps.std(0) / 40**0.5 + 0.02).all()
    assert synthetic(noise).correlation(np.random.default_rng(1).standard_normal((16, 40))).mean() < 0.4


def test_the_rates_predict_what_sgd_does_to_every_unit():
    experiment = Experiment(digits(96), build, (Schedule(0.02),), 1, 16, 1, 1, 3)
    found = growth(experiment, Window(20, 5, 80, 4, 0.01))
    assert found.realised.shape == found.predicted.shape == (4, len(found.layers))
    spread = np.sqrt(found.variance + found.error)
    assert (np.abs(found.realised - found.predicted) < 4.5 * spread).mean() > 0.99
    assert np.abs(found.realised).mean() > 3 * np.abs(found.realised - found.predicted).mean()


def cell(label="η=0.1"):
    recipe = Recipe(Schedule(0.1), 24, 16, "replacement", momentum=0.5, weight_decay=1e-3, precision="float64")
    return Cell(label, build, digits(96), recipe, 2)


def numbers(found):
    """As text, in which NaN equals itself."""
    return json.dumps({**found, "seconds": 0})


@pytest.mark.parametrize("kind", ["sgd", "svag"])
def test_a_large_run_stopped_in_time_ends_like_one_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("validation.resnet_large.STATISTICS", 96)
    alone = outcome(cell(), kind, 0, 7)
    legs = 0
    while (found := outcome(cell(), kind, 0, 7, tmp_path, seconds=0.0)) is None:
        legs += 1
    assert legs >= 1 or kind == "svag"  # SVAG looks at the clock every hundred steps
    assert numbers(found) == numbers(alone)
    assert json.dumps(outcome(cell(), kind, 0, 7, tmp_path)) == json.dumps(found)  # read, not run
    assert not list(tmp_path.glob("*.pt"))


def test_svag_goes_on_from_its_checkpoint_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("validation.resnet_large.LEG", 10)
    whole = outcome(cell(), "svag", 1, 7)
    assert outcome(cell(), "svag", 1, 7, tmp_path, seconds=0.0) is None
    (kept,) = tmp_path.glob("*.pt")
    other = replace(cell(), recipe=replace(cell().recipe, momentum=0.9))
    with pytest.raises(ValueError, match="another recipe"):
        outcome(other, "svag", 1, 7, tmp_path)
    assert kept.exists()
    assert numbers(outcome(cell(), "svag", 1, 7, tmp_path)) == numbers(whole)


def test_published_schedules_begin_with_the_small_step():
    assert list(published_schedules("state-of-the-art")) == ["0.002", "0.05, 10%", "0.05, 30%", "0.05, 50%"]
    peak = published_schedules("plain")["0.75, 50%"].step_sizes(100_000).max()
    assert float(peak) == pytest.approx(0.75 * 1.05**50, rel=1e-4)


def test_cells_with_two_seeds_of_both_kinds_are_held():
    def row(name, kind, seed, value):
        return {"cell": name, "kind": kind, "seed": seed, "blocks": [[0, 0, value, 0, 0]]}

    outcomes = [row("small", k, s, 0.6 + 0.001 * s) for k in ("sgd", "svag") for s in range(3)]
    outcomes += [row("large", "sgd", s, 0.3 + 0.001 * s) for s in range(3)]
    outcomes += [row("large", "svag", s, 0.31 + 0.002 * s) for s in range(3)]
    outcomes += [row("diverged", k, s, None) for k in ("sgd", "svag") for s in range(2)]
    checks = held([*outcomes, row("alone", "sgd", 0, 0.2)], 2)
    assert [check.setting for check in checks] == ["small, l=2", "large, l=2", "diverged, l=2"]
    assert [check.verdict for check in checks] == [Verdict.AGREES, Verdict.AGREES, Verdict.NOT_EVALUABLE]


def write_parquet(path, images, labels):
    def png(x):
        buffer = io.BytesIO()
        Image.fromarray((x[0].numpy() * 255).astype("uint8")).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": ""}

    table = pyarrow.table({"img": [png(x) for x in images], "label": labels.tolist()})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("images"), digits(64)
    assert isinstance(data, ImageSet)
    for name, (x, y) in {"train": (data.train_x, data.train_y), "test": (data.test_x[:64], data.test_y[:64])}.items():
        write_parquet(folder / f"{name}.parquet", x, y)
    options = ResnetSettings(
        images=64, steps=8, group_norm_steps=8, growth_steps=80, step_sizes=(0.1, 0.4), svag=2,
        train=str(folder / "train.parquet"), test=str(folder / "test.parquet"), network="resnet_tiny", width=2,
        epochs=1, large_batch=16,
    )  # fmt: skip
    return run(RunSettings(suites=("resnet",), seeds=4, resnet=options), torch.device("cpu"), Progress("quiet"))


def test_the_suite_judges_every_claim_and_every_figure_can_be_drawn(tiny_run):
    named = {claim.name for claim in tiny_run.claims}
    assert {check.claim for check in tiny_run.checks} == named
    figures = figures_of("resnet", tiny_run.series)
    assert set(figures) == {"resnet-sparsity", "resnet-blocks", "resnet-growth"}
    for figure in figures.values():
        assert figure.draw(tiny_run.series).axes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"step_sizes": (0.4, 0.1)}, "ascending"),
        ({"images": 10}, "choose 2 batches to 1797 images"),
        ({"growth_steps": 10}, "choose more"),
        ({"group_norm_steps": 7}, "choose more"),
        ({"group_norm_batch": 800}, "batches of 800"),
        ({"growth_label_noise": 1.5}, "between 0 and 1"),
        ({"train": "a.parquet"}, "give both train and test"),
        ({"svag": 0}, "choose a positive number"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(fields, sentence):
    with pytest.raises(SettingsError, match=sentence):
        ResnetSettings(**fields)


def test_images_that_cannot_be_read_or_networks_that_do_not_exist_are_said(tmp_path):
    from validation.resnet_published import published_cells, published_checks

    options = ResnetSettings(train=str(tmp_path / "a"), test=str(tmp_path / "b"))
    with pytest.raises(SettingsError, match="there is no file"):
        published_checks(RunSettings(resnet=options), 0, torch.device("cpu"), Progress("quiet"))
    with pytest.raises(SettingsError, match="there is no network 'resnet19'"):
        published_cells(replace(options, network="resnet19"), digits(64))
