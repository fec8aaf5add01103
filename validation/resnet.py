"""Suite ``resnet``: does SGD's SDE predict how sparse large steps make a residual network on images?"""

from __future__ import annotations

import torch

from nets.images import digits
from nets.label_noise import flip_symmetric
from nets.resnet import resnet
from theory.schedule import Schedule
from theory.streams import seed_of
from validation import resnet_checks as claims
from validation.check import Check, Verdict
from validation.resnet_checks import COURSE, GAUSSIAN_STEPS, ISOTROPIC, SPARSITY, UNAMPLIFIED
from validation.resnet_growth import Window, growth
from validation.resnet_published import PUBLISHED, published_checks
from validation.resnet_runs import (
    GAUSSIANS,
    Course,
    Experiment,
    Measure,
    gaussian_course,
    isotropic_course,
    sgd_course,
    svag_course,
)
from validation.resnet_series import dataset
from validation.settings import ResnetSettings, RunSettings
from validation.suite import Outcome, Progress

CLAIMS = [*claims.CLAIMS, PUBLISHED]
FLOAT = torch.float32  # sampling errors are 1e-2, and steps cost half
OK, MISS = Verdict.AGREES, Verdict.DISAGREES


def run(settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """All checks of the suite."""
    options, root = settings.resnet, seed_of(claims.SUITE) % 2**62
    experiment = digits_experiment(options, max(settings.replicates // 4, 2), root, device)
    measure, small, large = Measure(experiment), 0, len(options.step_sizes) - 1
    runs = f"{len(experiment.schedules)} schedules x {experiment.seeds} seeds"
    progress(f"SGD, {runs}")
    sgd = progress.kept("SGD", lambda: sgd_course(experiment, measure))
    progress(f"SVAG with l = {options.svag}, {runs}")
    svag = progress.kept("SVAG", lambda: svag_course(experiment, measure, options.svag))
    largest = experiment.only(large)
    progress("rivals: noise of the wrong scale, noise without direction")
    rivals = {
        UNAMPLIFIED: progress.kept("unamplified", lambda: svag_course(largest, measure, options.svag, False)),
        ISOTROPIC: progress.kept("isotropic", lambda: isotropic_course(largest, measure)),
    }
    progress("Gaussian steps of SGD's size")
    gaussian = progress.kept("Gaussian", lambda: gaussian_course(largest, measure))
    checks = sparsity_checks(experiment, options, sgd, svag, rivals)
    ends = {name: course.sparsity()[-1, 0] for name, course in rivals.items()}
    level = claims.at_equal_loss(sgd, small, sgd.fit[-1, large, :, 0])
    setting = f"{experiment.schedules[large].label}, {GAUSSIANS} minibatches a step"
    checks.append(
        claims.alone_check(claims.GAUSSIAN, claims.GAUSSIAN_SOURCE, setting, large, sgd, gaussian, ends, level, OK)
    )
    checks += group_norm_checks(group_norm_experiment(options, experiment), options.svag, progress)
    by_length = (small, *range(1, large), large + 1, large)  # the early decay of the largest step stands before it
    checks.append(claims.order_check(experiment, by_length, sgd))
    replicas = max(2 * settings.replicates, 8)
    progress(f"growth of units, {options.growth_steps} steps x {replicas} replicas")
    noisy = growth_experiment(options, root, device)
    window = Window(200, 50, options.growth_steps, replicas, options.growth_weight_decay)
    found = progress.kept("growth", lambda: growth(noisy, window))
    checks += claims.growth_checks(noisy, found, root, OK)
    if options.train:
        checks += published_checks(settings, root, device, progress)
    progress.close()
    return Outcome(
        checks, CLAIMS, dataset(experiment, measure.names, sgd, svag, {**rivals, GAUSSIAN_STEPS: gaussian}, found)
    )


def digits_experiment(options: ResnetSettings, seeds: int, root: int, device: torch.device) -> Experiment:
    """A residual network with BatchNorm on digits; constant steps that drop at the end, the largest also early."""
    late = tuple(Schedule(eta, ((0.8, 8.0),)) for eta in options.step_sizes)
    early = Schedule(options.step_sizes[-1], ((0.15, 8.0),))
    return Experiment(
        digits(options.images, dtype=FLOAT).to(device), lambda seed: resnet(norm="batch", seed=seed, dtype=FLOAT),
        (*late, early), options.steps, options.batch, seeds, 4, root,
    )  # fmt: skip


def growth_experiment(options: ResnetSettings, root: int, device: torch.device) -> Experiment:
    """The same network where noise goes on: a share of the labels is redrawn once and for all, and weights decay."""
    images = flip_symmetric(digits(options.images, dtype=FLOAT).to(device), options.growth_label_noise)
    schedule = Schedule(options.growth_step_size)
    return Experiment(
        images, lambda seed: resnet(norm="batch", seed=seed, dtype=FLOAT), (schedule,), 1, options.batch, 1, 1, root
    )


def group_norm_experiment(options: ResnetSettings, like: Experiment) -> Experiment:
    """The same network with GroupNorm, where steps are few and coarse; a small and a large constant step."""
    return Experiment(
        like.images, lambda seed: resnet(norm="group", seed=seed, dtype=FLOAT),
        (Schedule(options.group_norm_step_size / 10), Schedule(options.group_norm_step_size)),
        options.group_norm_steps, options.group_norm_batch, 2 * like.seeds, 1, like.root,
    )  # fmt: skip


def group_norm_checks(experiment: Experiment, l: int, progress: Progress) -> list[Check]:  # noqa: E741
    """SVAG and Gaussian steps against SGD."""
    measure, large = Measure(experiment), experiment.only(1)
    progress(f"GroupNorm, {experiment.seeds} seeds x {experiment.steps} steps: SGD, SVAG, Gaussian steps")
    sgd = progress.kept("GroupNorm SGD", lambda: sgd_course(experiment, measure))
    svag = progress.kept("GroupNorm SVAG", lambda: svag_course(large, measure, l))
    gaussian = progress.kept("GroupNorm Gaussian", lambda: gaussian_course(large, measure))
    level = claims.at_equal_loss(sgd, 0, sgd.fit[-1, 1, :, 0])
    setting = f"GroupNorm, {experiment.schedules[1].label}, B={experiment.batch}, {experiment.steps} steps"
    limit = {claims.LIMIT: svag.sparsity()[-1, 0]}
    # Known: a step this large is far from the SDE; noise of the same covariance in steps of the same size is not.
    return [
        claims.alone_check(SPARSITY, claims.SVAG_SOURCE, f"{setting}, l={l}", 1, sgd, svag, {}, level, MISS),
        claims.alone_check(
            claims.GAUSSIAN, claims.GAUSSIAN_SOURCE, f"{setting}, {GAUSSIANS} minibatches a step", 1, sgd, gaussian,
            limit, level, OK,
        ),
    ]  # fmt: skip


def sparsity_checks(
    experiment: Experiment, options: ResnetSettings, sgd: Course, svag: Course, rivals: dict[str, Course]
) -> list[Check]:
    """SVAG against SGD at the end of every schedule, and after a quarter of it where the step is not the small one."""
    checks, largest = list[Check](), len(options.step_sizes) - 1
    for cell in range(len(experiment.schedules)):
        small = claims.at_equal_loss(sgd, 0, sgd.fit[-1, cell, :, 0]) if cell else None
        for claim, look in ((SPARSITY, -1), (COURSE, 0)):
            if claim is COURSE and not 1 <= cell <= largest:
                continue
            held = {name: course.sparsity()[look, 0] for name, course in rivals.items()} if cell == largest else {}
            checks.append(
                claims.sparsity_check(experiment, cell, sgd, svag, options.svag, claim, look, held, small, OK)
            )
    return checks
