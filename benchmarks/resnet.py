"""Training images a second against a data-loader loop, on the same network, batches and steps.

Usage: python benchmarks/resnet.py [--rounds 5] [--setting plain best]
       python benchmarks/resnet.py --train train.parquet --test test.parquet --net resnet18_plain --batch-size 256

The peer is a training script as the papers' are: torch's DataLoader over a dataset that augments image by image, the
loss read at every step, with ``best`` λ/2 Σ‖p‖² added to the loss tensor by tensor and weights averaged tensor by
tensor. ``plain`` has no augmentation, momentum, weight decay or average. Both sides visit the same batches; without
augmentation their weights after 20 steps are compared before anything is timed. The clock runs from step 100 to the
end, in turns. On a GPU there are rows for float32 and for bfloat16, channels-last and compiled; the peer is float32
(with the TF32 convolutions that torch chooses) and has worker processes. Writes benchmarks/results/resnet.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import row, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nets.augment import Augmentation
from nets.image_files import read_parquet
from nets.image_training import CHECK_EVERY, train_images
from nets.images import ImageSet, digits
from nets.published_nets import network
from nets.recipe import Recipe
from nets.replicas import Epochs
from nets.resnet import resnet
from theory.schedule import Schedule

WARM = CHECK_EVERY  # steps before the clock starts
SETTINGS = {
    "plain": Recipe(Schedule(0.05), WARM, 128),
    "best": Recipe(
        Schedule(0.02), WARM, 128, momentum=0.9, weight_decay=5e-4, averaging=0.999,
        augmentation=Augmentation(crop=4, flip=True),
    ),
}  # fmt: skip
FASTER = {"precision": "bfloat16", "channels_last": True, "compile": True}


class Images(Dataset[tuple[Tensor, int]]):
    """Images on the CPU, augmented one by one when fetched."""

    def __init__(self, images: ImageSet, augmentation: Augmentation | None) -> None:
        self.x, self.y, self.augmentation = images.train_x.cpu(), images.train_y.tolist(), augmentation

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, chosen = self.x[index], self.augmentation
        if chosen is not None:
            pad, (_, height, width) = chosen.crop, x.shape
            top, left = (int(value) for value in torch.randint(0, 2 * pad + 1, (2,)))
            x = nn.functional.pad(x, [pad] * 4)[:, top : top + height, left : left + width]
            x = x.flip(-1) if chosen.flip and torch.rand(()) < 0.5 else x
        return x, self.y[index]


@dataclass(frozen=True)
class Order:
    """The order of every epoch of a run, as the other side has it."""

    epochs: Epochs
    steps: int

    def __iter__(self) -> Iterator[list[int]]:
        return (self.epochs(step)[0].tolist() for step in range(self.steps))


def loader_loop(
    make: Callable[[], nn.Module], images: ImageSet, recipe: Recipe, workers: int
) -> tuple[nn.Module, float]:
    """A run through a data loader: the module, and seconds a step after the first ``WARM``."""
    device = images.train_x.device
    module = make().to(device).train()
    average = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=recipe.schedule.step_sizes(1).item(), momentum=recipe.momentum)
    order = Order(Epochs(images.n, recipe.batch_size, [0], drop_rest=True), recipe.steps)
    loader = DataLoader(
        Images(images, recipe.augmentation), batch_sampler=order, num_workers=workers, pin_memory=device.type == "cuda"
    )
    start, seen = 0.0, 0.0
    for step, (x, y) in enumerate(loader):
        if step == WARM:
            start = now(device)
        x, y = x.to(device), y.to(device)
        loss = recipe.loss.values(module(x), y).mean()
        if recipe.weight_decay:
            loss = loss + sum(0.5 * recipe.weight_decay * (p**2).sum() for p in module.parameters())
        optimizer.zero_grad()
        loss.backward()
        seen += loss.item()
        optimizer.step()
        if recipe.averaging:
            with torch.no_grad():
                for mean, p in zip(average, module.parameters(), strict=True):
                    mean.mul_(recipe.averaging).add_(p, alpha=1 - recipe.averaging)
    return module, (now(device) - start) / max(recipe.steps - WARM, 1)


def resident_loop(make: Callable[[], nn.Module], images: ImageSet, recipe: Recipe) -> tuple[nn.Module, float]:
    """The same through :func:`nets.image_training.train_images`."""
    times: dict[int, float] = {}

    def progress(step: int) -> None:
        times[step] = now(images.train_x.device)

    run = train_images(make(), images, recipe, progress=progress)
    assert run.first_bad_step < 0, "the run diverged: choose a smaller step"
    return run.module, (times[recipe.steps] - times.get(WARM, 0.0)) / max(recipe.steps - WARM, 1)


def now(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    name: str, setting: str, make: Callable[[], nn.Module], images: ImageSet, recipe: Recipe, rounds: int, workers: int
) -> list[dict[str, Any]]:
    """Weights after 20 steps compared first, then seconds an image, in turns."""
    short = dataclasses.replace(recipe, steps=20, augmentation=None)
    weights = [
        torch.cat([p.detach().flatten() for p in run[0].parameters()]).double()
        for run in (loader_loop(make, images, short, 0), resident_loop(make, images, short))
    ]
    moved = torch.cat([p.detach().flatten() for p in make().parameters()]).to(weights[0])
    gap = float((weights[0] - weights[1]).norm() / (weights[0] - moved).norm())
    assert gap < 0.01, f"the two sides end {gap:.2g} of the way they went apart"
    variants = {"float32": recipe}
    if images.train_x.is_cuda:
        variants["bfloat16, channels-last, compiled"] = dataclasses.replace(recipe, **FASTER)
    taken: dict[str, list[float]] = {label: [] for label in ("peer", *variants)}
    for _ in range(rounds):
        taken["peer"].append(loader_loop(make, images, recipe, workers)[1] / recipe.batch_size)
        for label, chosen in variants.items():
            taken[label].append(resident_loop(make, images, chosen)[1] / recipe.batch_size)
    sums = float(weights[0].abs().sum()), float(weights[1].abs().sum())
    work = f"{name} on {images.name}, B = {recipe.batch_size}, {setting} setting"
    peer = f"DataLoader loop, {workers} workers"
    return [row(f"{work}, {label}", peer, taken["peer"], taken[label], sums, "image") for label in variants]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--setting", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--net", default="", help="of nets.published_nets; by default the tiny ResNet (8, 16)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300, help=f"timed steps, after {WARM} others")
    parser.add_argument("--workers", type=int, default=None, help="of the peer; 0 on a CPU, 8 on a GPU by default")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = (8 if device.type == "cuda" else 0) if options.workers is None else options.workers
    images = (read_parquet(options.train, options.test) if options.train else digits()).to(device, torch.float32)
    shape = {"classes": images.classes, "channels": images.train_x.shape[1], "dtype": torch.float32}

    def make() -> nn.Module:
        return network(options.net, **shape) if options.net else resnet(**shape)

    rows = []
    for setting in options.setting:
        recipe = dataclasses.replace(SETTINGS[setting], steps=WARM + options.steps, batch_size=options.batch_size)
        name = options.net or "tiny ResNet (8, 16)"
        rows += compare(name, setting, make, images, recipe, options.rounds, workers)
    save("resnet", rows)


if __name__ == "__main__":
    main()
