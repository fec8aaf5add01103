"""Writing results: checks as JSON and CSV, series as netCDF, provenance; whole files or none."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from validation.check import Check, Claim
from validation.settings import SettingsError


def prepare(out: str) -> Path:
    """The output folder, made if need be and proved writable.

    Raises:
        SettingsError: it is a file, or nothing can be written there.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"the output folder '{out}' is a file: choose another with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as fault:
        raise SettingsError(
            f"nothing can be written to the output folder '{out}' ({fault.strerror}): choose another with --out."
        ) from fault
    return folder


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move an earlier run's files of these names to ``earlier-N`` inside the folder, so that nothing is lost.

    Returns:
        where they are now; None when there were none.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    if found:
        number = 1
        while (folder / f"earlier-{number}").exists():
            number += 1
        (folder / f"earlier-{number}").mkdir()
        for path in found:
            path.rename(folder / f"earlier-{number}" / path.name)
        return folder / f"earlier-{number}"
    return None


def provenance(settings: dict[str, Any], device: torch.device, seconds: float) -> dict[str, Any]:
    """What it takes to run it again: settings, versions, device, threads, commit (when there is one), command."""
    packages = ("valleydrift", "torch", "numpy", "scipy", "sympy", "torchsde", "numba", "matplotlib")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(["valleydrift", *sys.argv[1:]]),
        "settings": settings,
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
    }


def write_checks(folder: Path, checks: Sequence[Check], origin: dict[str, Any], claims: Sequence[Claim]) -> None:
    """checks.json and checks.csv."""
    rows = [dataclasses.asdict(check) for check in checks]
    stated = [dataclasses.asdict(claim) for claim in claims]
    text = json.dumps(_finite({"provenance": origin, "claims": stated, "checks": rows}), indent=1, ensure_ascii=False)
    write_text(folder / "checks.json", text + "\n")
    columns = [field.name for field in dataclasses.fields(Check)]

    def cell(name: str, value: Any) -> Any:
        if name != "rivals":
            return value
        return "; ".join(
            f"{r['name']}: {r['predicted']:.6g} ({'rejected' if r['rejected'] else 'survives'})" for r in value
        )

    with replacing(folder / "checks.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([cell(name, row[name]) for name in columns] for row in rows)


def write_series(path: Path, series: xr.Dataset, origin: dict[str, Any]) -> None:
    """netCDF 4, with the provenance as an attribute."""
    series = series.assign_attrs(provenance=json.dumps(_finite(origin), ensure_ascii=False))
    encoding = {name: {"zlib": True, "complevel": 4} for name in series.data_vars}
    with replacing(path) as temporary:
        series.to_netcdf(temporary, engine="netcdf4", encoding=encoding)


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(target: Path, suffix: str = "") -> Iterator[str]:
    """Write beside the target (to a name with this suffix), then put it in place in one move."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}{suffix}")
    try:
        yield str(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say in one sentence when a run's folder cannot be written to."""
    try:
        yield
    except OSError as fault:
        raise SettingsError(
            f"the results could not be written to '{folder}' ({fault.strerror or fault}): free room there or choose "
            "--out; earlier results are as they were."
        ) from fault


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block is done.

    Handlers are replaced rather than signals blocked: another thread of the process would take a blocked signal.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    held = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: came.append(number)) for number in held]
    try:
        yield
    finally:
        for number, handler in zip(held, before, strict=True):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
