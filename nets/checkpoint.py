"""Checkpoints of image training: whole files or none, everything a run needs to go on, and whose they are.

A file is a dictionary that ``torch.load`` reads: step, parameters, buffers, momentum, running average, counters,
recorded series, and hashes of the recipe, network, data and start that made it. It carries a digest of its contents.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nets.images import ImageSet

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the file is left as it is."""


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is kept.

    Attributes:
        path: the file that is replaced by each next checkpoint. When it is there, the run goes on from it.
        every: so many steps apart; also at the end, and when the time given is over.
        keep: steps whose checkpoint stays, in a file of its own (:meth:`at`), to fine-tune from.

    Raises:
        ValueError: an interval below 1.
    """

    path: Path
    every: int = 1000
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"checkpoints every {self.every} steps are not usable: choose 1 or more.")

    def at(self, step: int) -> Path:
        """The file that keeps this step, e.g. ``run-step10000.pt`` beside ``run.pt``."""
        return self.path.with_name(f"{self.path.stem}-step{step}{self.path.suffix}")


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write beside the target, flush to disk, then put it in place in one move: the old file or the new one is there.

    Raises:
        CheckpointError: nothing can be written there.
    """
    whole = {"format": FORMAT, **state}
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({**whole, "digest": digest(whole)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as fault:
        raise CheckpointError(
            f"the checkpoint '{path}' cannot be written ({fault.strerror}): choose another folder or make room; an "
            "earlier one is left as it is."
        ) from fault


def read(path: Path) -> dict[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        CheckpointError: a file that is missing, truncated, damaged, or no checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint '{path}': check the path.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # zip, pickle and torch each have their own
        raise CheckpointError(
            f"'{path}' is truncated, damaged or no checkpoint ({type(fault).__name__}): it is left as it is; move it "
            "away to start afresh."
        ) from fault
    if not isinstance(found, dict) or found.get("format") != FORMAT or "digest" not in found:
        raise CheckpointError(f"'{path}' is no checkpoint of image training: it is left as it is; give another path.")
    stated = found.pop("digest")
    if stated != digest(found):
        raise CheckpointError(
            f"the contents of '{path}' do not match their digest, the file is damaged: it is left as it is; move it "
            "away to start afresh."
        )
    return found


def check_owner(path: Path, found: Mapping[str, Any], owner: Mapping[str, str]) -> None:
    """Whether a checkpoint belongs to this run.

    Raises:
        CheckpointError: it was made with another recipe, network, data, start or seed, which are named.
    """
    other = [name for name, identity in owner.items() if found["owner"].get(name) != identity]
    if other:
        raise CheckpointError(
            f"the checkpoint '{path}' was made with another {' and '.join(other)}: it is left as it is; give another "
            "path, or what it was made with."
        )


def owner_of(recipe: str, module: nn.Module, images: ImageSet, seed: int, root_seed: int) -> dict[str, str]:
    """Hashes by which a checkpoint knows its run."""
    layers = [(name, type(part).__qualname__, part.extra_repr()) for name, part in module.named_modules()]
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in module.state_dict().items()]
    data = {
        "train": (images.train_x, images.train_y), "test": (images.test_x, images.test_y), "classes": images.classes
    }  # fmt: skip
    return {
        "recipe": digest(recipe),
        "network": digest(repr((layers, shapes))),
        "data": digest(data),
        "start": digest(dict(module.state_dict())),
        "seed": f"{seed} of root {root_seed}",
    }


def start_from(path: str | Path, module: nn.Module, average: bool = False) -> nn.Module:
    """Weights and running statistics of a checkpoint in a copy of the module: fine-tune from here at a lower step.

    Momentum, counters and schedule are not taken over: train the returned module with a recipe of its own.

    Args:
        average: the running average of weights instead; its BatchNorm statistics are those of the run's last weights,
            so re-estimate them before evaluating (nets.averaging).

    Raises:
        CheckpointError: an unusable file, another network, no average in it.
    """
    path = Path(path)
    found = read(path)
    weights = found["average"] if average else found["parameters"]
    if average and not weights:
        raise CheckpointError(f"'{path}' holds no average of weights: train with averaging > 0, or take the weights.")
    new = {**weights, **found["buffers"]}
    expected = {name: value.shape for name, value in module.state_dict().items()}
    if {name: value.shape for name, value in new.items()} != expected:
        raise CheckpointError(
            f"the checkpoint '{path}' is of another network: it is left as it is; give a module of the same layers and "
            "widths."
        )
    module = copy.deepcopy(module)
    module.load_state_dict(new)
    return module


def digest(value: Any) -> str:
    """SHA-256 of nested dictionaries, lists, numbers, text and tensors."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        hasher.update(f"dict {len(value)}".encode())
        for key in sorted(value):
            hasher.update(repr(key).encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"list {len(value)}".encode())
        for part in value:
            _feed(hasher, part)
    elif isinstance(value, Tensor):
        hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
        hasher.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        hasher.update(repr(value).encode())
