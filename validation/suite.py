"""The suites there are, and what running one leaves. Importing this does not import torch."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from validation.check import Check, Claim
    from validation.settings import RunSettings
    from validation.stages import Stages

Result = TypeVar("Result")

SUITES = {
    "diagonal": "label-noise SGD on diagonal linear networks: α-decay, end points, loss level, sparsity",
    "stabilization": "one-dimensional networks bounce across the minimum for ever, in a predicted band",
    "collapse": "noise that vanishes on an invariant set draws networks onto it: thresholds, laws, rates",
    "relu": "ReLU networks: the label-noise SDE against SGD, sparsity, rank, balance, over seeds",
    "bouncing": "directions with ηλ > 1: autocorrelation, variances, loss above the floor; sharpness; Nudged-SGD",
    "resnet": "a residual network on images: SVAG against SGD, sparsity of its blocks, growth of its units",
}
"""Name and summary; the module ``validation.<name>`` has a function ``run(settings, device, progress)``."""

COST = {
    "bouncing": (95, 1500),
    "diagonal": (45, 1200),
    "stabilization": (3, 400),
    "collapse": (50, 1200),
    "relu": (55, 1300),
    "resnet": (90, 800),
}
"""Seconds on one core, figures included, and MiB at quick size."""


def cost(suite: str) -> tuple[int, int]:
    """Seconds on one core and MiB of a suite at quick size; a guess for one that nobody has measured."""
    return COST.get(suite, (100, 1000))


def estimate(suites: Sequence[str], replicates: int, workers: int) -> str:
    """A sentence on how long suites of default lengths take side by side, the longest first, and their memory."""
    scale = replicates / 32
    costs = sorted((cost(name) for name in suites), reverse=True)
    busy = [0.0] * workers
    for seconds, _ in costs:
        busy[busy.index(min(busy))] += scale * seconds
    memory = sum(sorted((max(scale, 1) * mebibytes for _, mebibytes in costs), reverse=True)[:workers]) / 1024
    length = f"{max(busy):.0f} s" if max(busy) < 120 else f"{max(busy) / 60:.0f} min"
    share = f"{workers} workers" if workers > 1 else "one worker"
    return f"about {length} on {share} and {memory:.1f} GiB at default lengths, unless done before"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a suite leaves: its checks, the claims they belong to, and the measured series."""

    checks: list[Check]
    claims: list[Claim]
    series: xr.Dataset


def run_suite(name: str, settings: RunSettings, device: torch.device, progress: Progress) -> Outcome:
    """Run one suite by name."""
    return importlib.import_module(f"validation.{name}").run(settings, device, progress)


class Progress:
    """Says on standard error what is running and how long it took, keeps a log of it, and what long stages leave.

    Args:
        mode: ``text`` for people, ``lines`` the same for several suites at once (a stage is a whole line, written when
            it ends), ``json`` for a line of JSON an event, ``quiet`` for nothing.
        log: file that receives a line of JSON for every stage that ends.
        suite: named in the log.
        stages: keeps what long stages leave until the run is done.
    """

    def __init__(
        self, mode: str = "text", log: Path | None = None, suite: str = "", stages: Stages | None = None
    ) -> None:
        self._mode, self._log, self._suite, self._stages = mode, log, suite, stages
        self._started, self._label = 0.0, ""
        if log is not None:
            log.touch()

    def __call__(self, label: str) -> None:
        """Close the current stage and open the next."""
        self.close()
        self._label, self._started = label, time.perf_counter()
        if self._mode == "text":
            print(f"  {label} …", end="", file=sys.stderr, flush=True)

    def kept(self, name: str, work: Callable[[], Result]) -> Result:
        """``work()``, or what it left before this run was killed.

        Args:
            name: unlike any other in the suite.
            work: gives tensors, arrays, checks or other records of this package, in lists, tuples and dictionaries.
        """
        return work() if self._stages is None else self._stages(name, work)

    def close(self) -> None:
        """Close the current stage."""
        if not self._label:
            return
        seconds = time.perf_counter() - self._started
        line = self._line(stage=self._label, seconds=round(seconds, 3))
        if self._mode == "text":
            print(f" {seconds:.1f} s", file=sys.stderr, flush=True)
        elif self._mode == "lines":
            print(f"  {self._suite:14s} {self._label}: {seconds:.1f} s", file=sys.stderr, flush=True)
        elif self._mode == "json":
            print(line, file=sys.stderr, flush=True)
        self._keep(line)
        self._label = ""

    def failed(self, trace: str) -> None:
        """Keep in the log how the suite failed."""
        self._keep(self._line(stage=self._label, fault=trace))

    def say(self, message: str) -> None:
        """A sentence between stages."""
        if self._mode in ("text", "lines"):
            print(message, file=sys.stderr, flush=True)
        elif self._mode == "json":
            print(json.dumps({"message": message}, ensure_ascii=False), file=sys.stderr, flush=True)

    def _line(self, **event: Any) -> str:
        event = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "suite": self._suite, **event}
        return json.dumps(event, ensure_ascii=False)

    def _keep(self, line: str) -> None:
        if self._log is not None:
            from validation.store import writing

            with writing(self._log.parent), open(self._log, "a", encoding="utf-8") as file:
                file.write(line + "\n")
