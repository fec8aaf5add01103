"""Run directories: one suite with its resolved settings in a folder named by their hash; whole, or set aside.

A run's folder holds ``settings.json``, ``log.jsonl``, ``checks.json``, ``checks.csv``, ``results.nc`` and, written
last, ``DONE`` with the SHA-256 of each. A run that is done is not done again; one that was not finished goes on after
the last stage it kept; one made by other code or damaged since is set aside and redone. Two processes never write to
the same folder: the second waits or says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import resource
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from validation import store
from validation.check import Check, Claim, check_from_row
from validation.settings import RunSettings, SettingsError
from validation.stages import Stages
from validation.suite import Outcome, Progress, run_suite

FORMAT = 2
MARK, LOCK, STAGES, FIGURES = "DONE", "lock", "stages", "figures"
RESULTS = ("checks.json", "checks.csv", "results.nc")
FILES = ("settings.json", "log.jsonl", *RESULTS)
UNFINISHED = "it was not finished"


class DamagedError(Exception):
    """A run that says it is done and is not what it was; the message says what is wrong."""


@dataclass(frozen=True, eq=False)
class Saved:
    """A finished run as it is on disk."""

    folder: Path
    checks: list[Check]
    claims: list[Claim]
    series: xr.Dataset
    origin: dict[str, Any]


def resolved(suite: str, settings: RunSettings, device: torch.device) -> dict[str, Any]:
    """Everything that decides a run's results, and nothing else."""
    return {
        "suite": suite,
        "size": settings.size,
        "seeds": settings.replicates,
        "device": device.type,
        "settings": dataclasses.asdict(getattr(settings, suite)),
    }


def run_name(suite: str, settings: RunSettings, device: torch.device) -> str:
    """``suite-hash``: the same settings give the same name, others another."""
    text = json.dumps(resolved(suite, settings, device), sort_keys=True)
    return f"{suite}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.cache
def code_digest() -> str:
    """SHA-256 of the four packages' source: results made by other code are not taken for this code's."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for folder in ("theory", "simulators", "nets", "validation"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def run_or_load(
    root: Path, suite: str, settings: RunSettings, device: torch.device, *, mode: str = "text", fresh: bool = False,
    wait: bool = False,
) -> tuple[Saved, bool]:  # fmt: skip
    """The finished run of ``suite`` below ``root``, and whether it was run now.

    Args:
        mode: how progress is shown, see :class:`~validation.suite.Progress`.
        fresh: run again even if it is done; the earlier results are kept in ``earlier-N``.
        wait: for another process that works on the same run; otherwise that is an error.

    Raises:
        SettingsError: another process works on it, or nothing can be written there.
    """
    folder = root / run_name(suite, settings, device)
    with store.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder / STAGES, code_digest(), Progress(mode).say)
    with _locked(folder, wait):
        with store.writing(folder):
            reason = "asked to run again" if fresh and (folder / MARK).exists() else _unfit(folder)
            if fresh or reason is None:
                stages.clear()
            if reason is None:
                return load(folder), False
            for left in [*folder.glob(".*.*"), *folder.glob(f"{STAGES}/.*.*")]:
                left.unlink()  # what a killed process had half written
            # A run that was not finished goes on, and its log with it.
            names = RESULTS if reason == UNFINISHED else (*FILES, MARK)
            if kept := store.set_aside(folder, (*names, FIGURES)):
                Progress(mode).say(f"{folder.name}: {reason}; what was there is in {kept}")
            store.write_text(folder / "settings.json", _text(resolved(suite, settings, device)))
            progress = Progress(mode, folder / "log.jsonl", suite, stages)
        started, used = time.perf_counter(), time.process_time()
        try:
            outcome = run_suite(suite, settings, device, progress)
        except Exception:
            progress.failed(traceback.format_exc())
            raise
        progress.close()
        origin = store.provenance(dataclasses.asdict(settings), device, time.perf_counter() - started)
        origin["cpu_seconds"] = round(time.process_time() - used, 1)
        origin["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        with store.writing(folder), store.uninterrupted():
            _save(folder, outcome, origin | {"code": code_digest(), "format": FORMAT})
            stages.clear()
        return load(folder), True


def load(folder: Path) -> Saved:
    """A finished run, every file of it proved to be what was written.

    Raises:
        DamagedError: it is not finished, or a file is missing or altered.
        SettingsError: it was made by a later version of the package.
    """
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        version, digests = int(mark["format"]), dict(mark["sha256"])
    except FileNotFoundError:
        raise DamagedError(UNFINISHED) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError("its mark cannot be read") from None
    if version > FORMAT:
        raise SettingsError(
            f"'{folder}' has format {version} and this version reads up to {FORMAT}: update valleydrift to read it."
        )
    for name, expected in digests.items():
        path = folder / name
        if not path.exists():
            raise DamagedError(f"{name} is missing")
        if _sha256(path) != expected:
            raise DamagedError(f"{name} is not what was written")
    saved = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    return Saved(
        folder, [check_from_row(row) for row in saved["checks"]], [Claim(**claim) for claim in saved["claims"]],
        xr.load_dataset(folder / "results.nc"), saved["provenance"],
    )  # fmt: skip


def _unfit(folder: Path) -> str | None:
    """Why a run has to be done, or None when it is there."""
    if not any((folder / name).exists() for name in (*FILES, MARK)):
        return "new"
    try:
        saved = load(folder)
    except DamagedError as fault:
        return str(fault)
    if saved.origin.get("code") != code_digest():
        return "it was made by other code"
    return None


def _save(folder: Path, outcome: Outcome, origin: dict[str, Any]) -> None:
    store.write_checks(folder, outcome.checks, origin, outcome.claims)
    store.write_series(folder / "results.nc", outcome.series, origin)
    digests = {name: _sha256(folder / name) for name in FILES}
    store.write_text(folder / MARK, _text({"format": FORMAT, "sha256": digests}))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _text(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process ends, however it ends."""
    with store.writing(folder):
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise SettingsError(
                f"process {file.read().strip() or 'unknown'} works on '{folder}': wait for it or choose another --out."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
