"""Image training over several seeds, one after the other, and their runs as one trajectory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nets.checkpoint import Checkpoints
from nets.image_training import Trained, train_images
from nets.images import ImageSet
from nets.recipe import Recipe
from theory.trajectory import Series, Trajectory


def train_seeds(
    make: Callable[[int], nn.Module],
    images: ImageSet,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    folder: Path | None = None,
    every: int = 1000,
    keep: tuple[int, ...] = (),
    seconds: float | None = None,
    **options: Any,
) -> list[Trained]:
    """One run after the other, from ``make(seed)``, each kept in ``folder/seed-N.pt``.

    Args:
        seconds: for all together; runs not begun by then are missing from the result.
        options: further ones of :func:`train_images`.
    """
    end, runs = None if seconds is None else time.monotonic() + seconds, []
    for seed in seeds:
        kept = None if folder is None else Checkpoints(folder / f"seed-{seed}.pt", every, keep)
        left = None if end is None else end - time.monotonic()
        runs.append(train_images(make(seed), images, recipe, seed=seed, checkpoints=kept, seconds=left, **options))
        if not runs[-1].finished:
            break
    return runs


def ensemble(runs: Sequence[Trained]) -> Trajectory:
    """Finished runs of one recipe as a trajectory with the batch axis ``seed``; ``final`` is the tuple of runs.

    Raises:
        ValueError: no run, or one that is not finished.
    """
    if not runs or not all(run.finished for run in runs):
        raise ValueError("runs that are not finished make no ensemble: call train_seeds again to go on.")
    bad = torch.tensor([run.first_bad_step for run in runs])
    series = {}
    for name, first in runs[0].series.items():
        rows = [run[name].values for run in runs]
        shape = next((row.shape for row in rows if torch.isfinite(row).any()), rows[0].shape)
        # A run that diverged before its first record does not know the shape of what it would have measured.
        rows = [row if row.shape == shape else torch.full(shape, torch.nan, dtype=row.dtype) for row in rows]
        series[name] = Series(first.steps, torch.stack(rows, 1))
    return Trajectory(series, tuple(runs), bad, ("seed",))
