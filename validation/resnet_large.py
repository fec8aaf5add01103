"""One large network at a time: a published recipe by SGD, and SVAG's prediction of it, each kept where it stops.

For networks of which a device holds one. SGD runs in ``nets.image_training``; SVAG gets the same network, images,
augmentation, label noise, momentum and schedule, and draws of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nets.augment import Augmentation
from nets.averaging import estimate_statistics, has_batch_norm
from nets.checkpoint import Checkpoints, check_owner, owner_of, read, write
from nets.image_training import train_images
from nets.images import ImageSet
from nets.measures import COLUMNS, block_table, fit, measured_subset
from nets.recipe import Feed, Precision, Recipe, numerics
from simulators.module_dynamics import Minibatches, ModuleDynamics, svag
from theory.schedule import Schedule, StepSizes
from theory.schedule_shapes import Exponential, GrowThenDecay
from validation.settings import Style

Kind = Literal["sgd", "svag"]
STATISTICS, CHUNK = 1024, 1024  # images a pass: for BatchNorm, and when measuring
KEEP, LEG = 60.0, 100  # seconds between checkpoints, steps between looks at the clock


@dataclass(frozen=True, eq=False)
class Cell:
    """A network, images and a recipe."""

    name: str
    build: Callable[[int], nn.Module]
    images: ImageSet
    recipe: Recipe
    svag: int


def published_schedules(style: Style) -> dict[str, StepSizes]:
    """AVPF's: a small constant step, and large ones that decay at 10, 30 and 50 % of the run (plain: at 50 %)."""
    if style == "plain":
        return {"0.01": Schedule(0.01), "0.75, 50%": GrowThenDecay(0.75, 0.5, Exponential(1.05))}
    late = {f"0.05, {at:.0%}": GrowThenDecay(0.05, at) for at in (0.1, 0.3, 0.5)}
    return {"0.002": Schedule(0.002), **late}


def published_recipe(style: Style, schedule: StepSizes, images: ImageSet, epochs: int, batch: int = 256) -> Recipe:
    """AVPF's deep networks: plain SGD, or momentum 0.9 with weight decay 5e-4, crops and flips; bf16 on a GPU.

    Minibatches are drawn with replacement, as the theory has them; the published code deals epochs.
    """
    on_gpu = images.train_x.device.type == "cuda"
    precision: Precision = "bfloat16" if on_gpu else "float32"
    recipe = Recipe(
        schedule, epochs * Recipe.per_epoch(images, batch), batch, "replacement", precision=precision,
        channels_last=on_gpu, compile=on_gpu,
    )  # fmt: skip
    if style == "plain":
        return recipe
    return replace(recipe, momentum=0.9, weight_decay=5e-4, augmentation=Augmentation(crop=4, flip=True))


def outcome(
    cell: Cell, kind: Kind, seed: int, root_seed: int, folder: Path | None = None, seconds: float | None = None
) -> dict[str, Any] | None:
    """Measures of the network that SGD, or SVAG, ends with; None when the time was over first.

    Args:
        folder: where checkpoints and finished outcomes are kept; called again, it goes on or returns what is there.
        seconds: stop after so long, with a checkpoint.

    Returns:
        numbers for JSON: ``blocks`` (a row a block, :data:`nets.measures.COLUMNS`), training loss, test accuracy,
        first bad step (in steps of the scheme; -1: none) and the seconds of its last leg.
    """
    stem = f"{cell.name}-{kind}-{seed}".replace(" ", "_").replace("%", "").replace(",", "")
    done = None if folder is None else folder / f"{stem}.json"
    if done is not None and done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    path = None if folder is None else folder / f"{stem}.pt"
    started = time.monotonic()
    found = (sgd_end if kind == "sgd" else svag_end)(cell, seed, root_seed, path, seconds)
    if found is None:
        return None
    module, bad = found
    result = {
        "cell": cell.name, "kind": kind, "seed": seed, "first bad step": bad, **measured(cell, module, bad),
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    if done is not None and path is not None:
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        temporary.replace(done)
        path.unlink(missing_ok=True)
    return result


def measured(cell: Cell, module: nn.Module, bad: int) -> Mapping[str, Any]:
    """Every block's measures and the fit; NaN (null in JSON) of a diverged run."""
    images = cell.images
    inputs = measured_subset(images.train_x, 21 * 512)
    table = block_table(module, inputs, chunk=CHUNK)
    if bad >= 0:
        return {"blocks": [[None] * len(COLUMNS)] * len(table), "training loss": None, "test accuracy": None}
    loss = cell.recipe.loss
    train = fit(module, images.train_x[:STATISTICS], images.train_y[:STATISTICS], loss=loss, chunk=CHUNK)
    test = fit(module, images.test_x, images.test_y, loss=loss, chunk=CHUNK)
    return {"blocks": table.tolist(), "training loss": train.loss, "test accuracy": test.accuracy}


def sgd_end(
    cell: Cell, seed: int, root_seed: int, path: Path | None, seconds: float | None
) -> tuple[nn.Module, int] | None:
    """The network after SGD and its first bad step."""
    kept = None if path is None else Checkpoints(path)
    run = train_images(
        cell.build(seed), cell.images, cell.recipe, seed=seed, root_seed=root_seed, checkpoints=kept, seconds=seconds
    )
    if not run.finished:
        return None
    return _evaluated(run.module, cell.images), run.first_bad_step


def svag_end(
    cell: Cell, seed: int, root_seed: int, path: Path | None, seconds: float | None
) -> tuple[nn.Module, int] | None:
    """The same after SVAG."""
    recipe, device = cell.recipe, cell.images.train_x.device
    images = cell.images.to(dtype=recipe.dtype)
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    module: Any = cell.build(seed).to(device, recipe.dtype)
    module = module.to(memory_format=layout).train()
    owner = owner_of(f"SVAG {cell.svag} {recipe.identity()}", module, images, seed, root_seed)
    feeds = [Feed(images, recipe, seed, root_seed + 1 + m) for m in range(2)]
    autocast = torch.bfloat16 if recipe.precision == "bfloat16" else None

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return recipe.loss.values(outputs.to(recipe.dtype), labels).mean()

    with numerics(recipe.deterministic, device):
        if recipe.compile:
            module.compile()
        minibatches = Minibatches(module, loss, lambda k, m: feeds[m](k), autocast)
        run = ModuleDynamics(
            minibatches.parameters, svag(minibatches, cell.svag), recipe.schedule.step_sizes(recipe.steps), cell.svag,
            momentum=recipe.momentum, weight_decay=recipe.weight_decay,
        )  # fmt: skip
        if path is not None and path.exists():
            state = read(path)
            check_owner(path, state, owner)
            module.load_state_dict(state["module"])
            run.load_state_dict(state["dynamics"])
        kept = started = time.monotonic()
        while run.step < run.steps and run.first_bad_step < 0:
            run.advance(min(LEG, run.steps - run.step))
            now = time.monotonic()
            over = seconds is not None and now > started + seconds and run.step < run.steps
            if path is not None and (over or now > kept + KEEP):
                write(path, {"owner": owner, "module": module.state_dict(), "dynamics": run.state_dict()})
                kept = now
            if over:
                return None
    return _evaluated(module, images), run.first_bad_step


def _evaluated(module: nn.Module, images: ImageSet) -> nn.Module:
    """In eval mode, BatchNorm's statistics estimated on the training set."""
    if has_batch_norm(module):
        estimate_statistics(module, images.train_x, min(STATISTICS, images.n))
    return module.eval()
