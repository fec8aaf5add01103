"""ResNet-18 on CIFAR-10, SGD against SVAG on the published schedules, on a GPU in pieces of under ten minutes.

Usage: python benchmarks/gpu_resnet.py --train train.parquet --test test.parquet [--style plain] [--seconds 540]
       python benchmarks/gpu_resnet.py --tiny --device cpu      (does every part run? nothing is kept)

Called again, it goes on where it stopped: inside a run from its checkpoint, else with the next run. First the training
engine is timed against a data-loader script on the same network and batches (benchmarks/resnet.py); then every
schedule and seed is run by SGD and by SVAG. When all are done it holds SVAG against SGD, prints block-wise sparsity and
test error beside those of the published notebook, what a prediction costs in SGD runs, and writes
benchmarks/results/gpu-resnet-STYLE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import save
from resnet import SETTINGS, WARM, compare

from nets.image_files import read_parquet
from nets.images import digits
from nets.published_nets import network
from theory.streams import seed_of
from validation.resnet_large import Cell, Kind, outcome
from validation.resnet_published import held, published_cells
from validation.resnet_runs import SPARSITY
from validation.settings import ResnetSettings

KINDS: tuple[Kind, ...] = ("sgd", "svag")
PUBLISHED = {  # AVPF's notebook, 100 epochs, one run: sparsity of blocks 1 to 5 without duplicates, test error in %
    "0.002": ((0.6994, 0.7037, 0.7755, 0.6554, 0.9872), 14.29),
    "0.05, 10%": ((0.6880, 0.6818, 0.7475, 0.5774, 0.9594), 10.13),
    "0.05, 30%": ((0.7233, 0.5873, 0.6569, 0.4723, 0.7698), 6.58),
    "0.05, 50%": ((0.7186, 0.5475, 0.5431, 0.4591, 0.6297), 5.61),
}


def finish(cells: Sequence[Cell], seeds: int, root: int, folder: Path, seconds: float) -> list[dict[str, Any]] | None:
    """All outcomes, or None when the time was over first."""
    folder.mkdir(parents=True, exist_ok=True)
    end, found = time.monotonic() + seconds, []
    for seed in range(seeds):
        for cell in cells:
            for kind in KINDS:
                left = end - time.monotonic()
                result = outcome(cell, kind, seed, root, folder, left) if left > 0 else None
                if result is None:
                    print(f"{cell.name}, {kind}, seed {seed}: not done yet; call again to go on")
                    return None
                print(f"{cell.name}, {kind}, seed {seed}: test accuracy {result['test accuracy']}")
                found.append(result)
    return found


def report(outcomes: Sequence[Mapping[str, Any]]) -> None:
    """A line a run: blocks and test error; under each schedule the published ones."""
    for cell in dict.fromkeys(row["cell"] for row in outcomes):
        for row in (row for row in outcomes if row["cell"] == cell):
            values = [block[SPARSITY] for block in row["blocks"]]
            blocks = " ".join("  nan " if value is None else f"{value:.4f}" for value in values)
            error = "diverged" if row["test accuracy"] is None else f"{100 * (1 - row['test accuracy']):.2f} %"
            print(f"{cell:12s} {row['kind']:5s} {row['seed']}: {blocks}  {error}")
        if cell in PUBLISHED:
            blocks, error = PUBLISHED[cell]
            print(f"{cell:12s} published: {' '.join(f'{value:.4f}' for value in blocks)}  {error:.2f} %")


def main() -> None:
    """Run what is left, report what is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--style", choices=("plain", "state-of-the-art"), default="state-of-the-art")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--svag", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=500, help="of this call, the timing of the engine left out")
    parser.add_argument("--folder", type=Path, default=Path("gpu-resnet"), help="what is kept between calls")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="digits and a tiny network, to see that it runs")
    options = parser.parse_args()
    device, tiny = torch.device(options.device), options.tiny
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --tiny --device cpu to see that the parts run")
    if not tiny and not (options.train and options.test):
        parser.error("give --train and --test, two parquet files of images")
    if not tiny and device.type != "cuda":
        parser.error("only a CUDA device is measured: give --tiny to see that the parts run on another")
    images = digits(256, dtype=torch.float32) if tiny else read_parquet(options.train, options.test)
    images = images.standardized("channel").to(device)
    settings = ResnetSettings(
        style=options.style, epochs=1 if tiny else options.epochs, large_svag=options.svag,
        **({"network": "resnet_tiny", "width": 4, "large_batch": 64} if tiny else {}),
    )  # fmt: skip
    cells, seeds = published_cells(settings, images), 2 if tiny else options.seeds
    root = seed_of("gpu resnet") % 2**62
    with tempfile.TemporaryDirectory() as trial:
        folder = Path(trial) if tiny else options.folder / options.style
        found = finish(cells, seeds, root, folder, options.seconds)
    if found is None:
        return
    report(found)
    checks = held(found, options.svag)
    for check in checks:
        print(f"{check.setting}: SVAG {check.predicted:.4f}, SGD {check.measured:.4f}: {check.verdict}")
    first = {kind: [row["seconds"] for row in found if row["kind"] == kind] for kind in KINDS}
    cost = sum(first["svag"]) / max(sum(first["sgd"]), 1e-9)
    print(f"a prediction costs {cost:.1f} SGD runs (of runs that were not interrupted)")
    recipe = dataclasses.replace(SETTINGS["plain"], steps=WARM + (5 if tiny else 200), batch_size=64 if tiny else 256)
    shape = {"classes": images.classes, "channels": images.train_x.shape[1], "width": settings.width}
    rows = compare(
        settings.network, "plain", lambda: network(settings.network, **shape), images, recipe,
        1 if tiny else 3, 0 if tiny else 8,
    )  # fmt: skip
    if tiny:
        print("nothing is kept of a trial")
        return
    save(f"gpu-resnet-{options.style}", rows, outcomes=found, checks=[dataclasses.asdict(c) for c in checks], cost=cost)


if __name__ == "__main__":
    main()
