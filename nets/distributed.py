"""Several devices or nodes: which rank this process is, what is its share of a minibatch, what all agree on.

Started by ``torchrun --nproc-per-node=4 script.py``; without it there is one rank and nothing here does anything. The
minibatch is cut into equal shares, draws are those of one device, gradients are averaged (DistributedDataParallel), and
every rank takes the same step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nets.averaging import has_batch_norm

T = TypeVar("T")


@contextlib.contextmanager
def ranks() -> Iterator[torch.device]:
    """Join the processes that torchrun started (nccl with a GPU each, else gloo); yields this one's device.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
    """
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(f"process {local} of this machine has no GPU, there are {gpus}: start {gpus} processes.")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one network together.

    Attributes:
        rank: 0 for the one that writes files.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As joined by :func:`ranks`; one process otherwise."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This rank's part of a minibatch.

        Raises:
            ValueError: a minibatch that does not divide.
        """
        if batch % self.count:
            raise ValueError(
                f"a minibatch of {batch} images cannot be shared by {self.count} processes: choose a multiple of "
                f"{self.count}."
            )
        part = batch // self.count
        return slice(self.rank * part, (self.rank + 1) * part)

    def synchronized(self, module: nn.Module, device: torch.device, sync_batch_norm: bool) -> nn.Module:
        """The module with BatchNorm over the whole minibatch, if asked for and there are several ranks.

        Raises:
            ValueError: asked for on CPUs, where torch has none.
        """
        if self.count == 1 or not sync_batch_norm or not has_batch_norm(module):
            return module
        if device.type != "cuda":
            raise ValueError(
                "BatchNorm over several processes needs GPUs: set sync_batch_norm=False, each then normalises by its "
                "own share of the minibatch and the running statistics of process 0 are kept."
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def averaging_gradients(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module whose backward pass leaves the mean gradient on every rank."""
        if self.count == 1:
            return module
        return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks; the host does not wait."""
        if self.count > 1:
            value = value / self.count
            dist.all_reduce(value)
        return value

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether it holds on any rank."""
        if self.count == 1:
            return value
        flag = torch.tensor(float(value), device=device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What the function returns on rank 0, or raises there, on every rank."""
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.writes:
            try:
                outcome[0] = function()
            except ValueError as fault:
                outcome[1] = fault
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result
