"""The suites there are, and what running one leaves. Importing this does not import torch."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from validation.check import Check, Claim
    from validation.settings import RunSettings

SUITES = {
    "diagonal": "label-noise SGD on diagonal linear networks: α-decay, end points, loss level, sparsity",
    "stabilization": "one-dimensional networks bounce across the minimum for ever, in a predicted band",
}
"""Name and summary; the module ``validation.<name>`` has a function ``run(settings, device, progress)``."""


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
    """Says on standard error what is running and how long it took."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._started, self._label = quiet, 0.0, ""

    def __call__(self, label: str) -> None:
        """Close the current stage and open the next."""
        self.close()
        self._label, self._started = label, time.perf_counter()
        if not self._quiet:
            print(f"  {label} …", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the current stage."""
        if self._label and not self._quiet:
            print(f" {time.perf_counter() - self._started:.1f} s", file=sys.stderr, flush=True)
        self._label = ""
