"""What the suite ``resnet`` saves, as named series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from nets.measures import COLUMNS
from validation.resnet_growth import Growth
from validation.resnet_runs import SPARSITY, Course, Experiment

FIT = ("training loss", "test loss", "test accuracy")
CELL, SEED, LOOK, BLOCK = "resnet_schedule", "resnet_seed", "resnet_step", "resnet_block"


def dataset(
    experiment: Experiment, blocks: Sequence[str], sgd: Course, svag: Course, others: Mapping[str, Course],
    found: Growth,
) -> xr.Dataset:  # fmt: skip
    """Measures of every block and the fit along the runs of SGD and SVAG, others' coefficients, growth of units.

    The others, Gaussian steps and rivals, ran on the schedule before the last, that of the largest step.
    """
    data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for kind, course in (("sgd", sgd), ("svag", svag)):
        for column, name in enumerate(COLUMNS):
            data[f"resnet {name} {kind}"] = (LOOK, CELL, SEED, BLOCK), course.blocks[..., column].numpy()
        for column, name in enumerate(FIT):
            data[f"resnet {name} {kind}"] = (LOOK, CELL, SEED), course.fit[..., column].double().numpy()
    for name, course in others.items():
        data[f"resnet {name}"] = (LOOK, SEED), course.blocks[:, 0, :, -1, SPARSITY].numpy()
    for name in ("realised", "predicted", "drift", "noise"):
        data[f"resnet growth {name}"] = ("resnet_replica", "resnet_unit"), getattr(found, name)
    coordinates = {
        LOOK: sgd.steps.numpy(), CELL: [schedule.label for schedule in experiment.schedules],
        SEED: np.arange(experiment.seeds), BLOCK: [f"block {k + 1}" for k in range(len(blocks))],
        "resnet_replica": np.arange(len(found.realised)),
        "resnet_unit": [f"{layer} #{k}" for k, layer in enumerate(found.layers)],
    }  # fmt: skip
    return xr.Dataset(data, coords=coordinates)
