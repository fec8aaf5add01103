"""A published recipe on images of one's own: SVAG against SGD on the last block, schedule by schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nets.image_files import read_parquet
from nets.images import ImageSet
from nets.published_nets import network
from theory.prediction import Prediction
from validation.check import Check, Claim, Rival, judge
from validation.resnet_checks import ERROR, SMALL, SUITE, SVAG_SOURCE
from validation.resnet_large import Cell, Kind, outcome, published_recipe, published_schedules
from validation.resnet_runs import SPARSITY
from validation.settings import ResnetSettings, RunSettings, SettingsError
from validation.suite import Progress

PUBLISHED = Claim(
    "a published recipe: sparsity coefficient of the last block, SVAG",
    "E[coefficient of SVAG with momentum, weight decay and augmentation] = E[coefficient of SGD]",
    "The recipe of Andriushchenko et al. on images given by path: schedules that decay at 10, 30 and 50 % of the run.",
)
KINDS: tuple[Kind, ...] = ("sgd", "svag")
SEEDS = {"quick": 2, "standard": 3, "paper": 3}


def published_cells(options: ResnetSettings, images: ImageSet) -> list[Cell]:
    """A cell for every schedule of the style, the small step first.

    Raises:
        SettingsError: an unknown network, or images that do not fit it.
    """
    channels, size = images.train_x.shape[1], images.train_x.shape[2]

    def build(seed: int) -> torch.nn.Module:
        return network(
            options.network, classes=images.classes, channels=channels, size=size, width=options.width, seed=seed
        )

    try:
        build(0)
        cells = []
        for label, schedule in published_schedules(options.style).items():
            recipe = published_recipe(options.style, schedule, images, options.epochs, options.large_batch)
            cells.append(Cell(label, build, images, recipe, options.large_svag))
    except ValueError as fault:
        raise SettingsError(str(fault)) from fault
    return cells


def published_checks(settings: RunSettings, root: int, device: torch.device, progress: Progress) -> list[Check]:
    """Every schedule and seed by SGD and by SVAG, each kept when it is done."""
    options, seeds = settings.resnet, settings.seeds or SEEDS[settings.size]
    try:
        images = read_parquet(Path(options.train), Path(options.test)).standardized("channel").to(device)
    except ValueError as fault:
        raise SettingsError(str(fault)) from fault
    found: list[dict[str, Any]] = []
    for cell in published_cells(options, images):
        for kind in KINDS:
            progress(f"{options.network} on {images.name}, {cell.name}, {kind.upper()}")
            for seed in range(seeds):
                name = f"published {cell.name} {kind} {seed}"
                found.append(progress.kept(name, partial(_whole, cell, kind, seed, root)))
    return held(found, options.large_svag)


def _whole(cell: Cell, kind: Kind, seed: int, root: int) -> dict[str, Any]:
    """An outcome without a limit of time."""
    found = outcome(cell, kind, seed, root)
    assert found is not None
    return found


def held(outcomes: Sequence[Mapping[str, Any]], l: int) -> list[Check]:  # noqa: E741
    """A check for every cell of which both kinds have two seeds or more; the first cell is the small step."""
    checks, small = list[Check](), None
    for cell in dict.fromkeys(result["cell"] for result in outcomes):
        measured, predicted = (_ends(outcomes, cell, kind) for kind in ("sgd", "svag"))
        seeds = min(len(measured), len(predicted))
        if seeds < 2:
            continue
        null = 0.0 if small is None else float(small.nanmean())
        rivals = [Rival(SMALL, null)] if small is not None else list[Rival]()
        prediction = Prediction("coefficient without duplicates", predicted[:seeds], null, ERROR, SVAG_SOURCE)
        finite = torch.isfinite(measured[:seeds]) & torch.isfinite(predicted[:seeds])
        checks.append(judge(
            SUITE, PUBLISHED, f"{cell}, l={l}", prediction, measured[:seeds], finite=finite, rivals=rivals,
        ))  # fmt: skip
        small = measured if small is None else small
    return checks


def _ends(outcomes: Sequence[Mapping[str, Any]], cell: str, kind: str) -> Tensor:
    """The last block's coefficient of every seed, NaN of diverged runs, (seeds,)."""
    rows = sorted((r for r in outcomes if (r["cell"], r["kind"]) == (cell, kind)), key=lambda r: r["seed"])
    values = [row["blocks"][-1][SPARSITY] for row in rows]
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float64)
