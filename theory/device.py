"""What a device can do for a loop over steps, so that every engine asks in one place and says once what is missing."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

WARM_UP = 3  # steps before a graph is recorded


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on the device: CUDA, with Triton installed; without it that is said once."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        say_once("Triton is not installed, so loops on the GPU run in plain torch: pip install triton.")
        return False
    return True


def interprets_triton(device: torch.device) -> bool:
    """Whether kernels run on CPU tensors in Triton's interpreter: for tests, slow, and chosen by nothing itself."""
    asked = os.environ.get("TRITON_INTERPRET") == "1"
    return asked and device.type == "cpu" and importlib.util.find_spec("triton") is not None


@functools.cache
def say_once(sentence: str) -> None:
    """A warning, the first time."""
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)


class Repeated:
    """``step()`` many times: on a CUDA device recorded as a graph of many steps, which is replayed without Python.

    The step reads and writes tensors that stay where they are, counts for itself, and never waits for the device.
    Every call of it is a step of the run, the ones before recording too; recording runs nothing. Where a step cannot
    be recorded it runs as it is, and that is said once.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, together: int = 32) -> None:
        self._step, self._device, self._together = step, device, together
        self._graph: torch.cuda.CUDAGraph | None = None
        self._record = device.type == "cuda"

    def __call__(self, times: int) -> None:
        """The next ``times`` steps."""
        if self._record and times >= self._together + WARM_UP:
            self._record = False
            with torch.cuda.device(self._device):
                self._recorded()
            times -= WARM_UP
        while self._graph is not None and times >= self._together:
            self._graph.replay()
            times -= self._together
        for _ in range(times):
            self._step()

    def _recorded(self) -> None:
        """Take the warm-up's steps on a stream of their own, as CUDA asks, and record."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(self._together):
                    self._step()
        except RuntimeError as fault:
            reason = str(fault).splitlines()[0]
            say_once(f"Steps run one by one, because they cannot be recorded as a CUDA graph: {reason}")
        else:
            self._graph = graph
