"""What the commands do once their options are understood (this imports torch; parsing does not)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from validation import store
from validation.check import Check, Verdict, check_from_row
from validation.gallery import figures_of, gallery, write_figure
from validation.options import unknown
from validation.report import comparison, table, write_report
from validation.run_directory import MARK, DamagedError, Saved, load
from validation.settings import RunSettings, SettingsError
from validation.suite import SUITES, Progress, cost, estimate
from validation.sweep import cells
from validation.sweep import sweep as run_sweep
from validation.workers import Task, TaskResult, cores, run_tasks, workers_for


def validate(settings: RunSettings, mode: str, fresh: bool, workers: int = 0) -> int:
    """Run suites side by side, or find them done, and write the report of them all; status 3 when some failed."""
    device, started = _device(settings.device), time.perf_counter()
    root = store.prepare(settings.out)
    runs = _runs(root, settings.suites or tuple(SUITES), settings, device, mode, fresh, workers)
    found = [run for run in runs if isinstance(run, Saved)]
    failed = [run for run in runs if isinstance(run, TaskResult)]
    if found:
        _write(root, found)
    checks = [check for run in found for check in run.checks]
    if mode == "text":
        print(table(checks))
    unexpected = [check for check in checks if not check.as_expected]
    counts = ", ".join(f"{sum(check.verdict == verdict for check in checks)} {verdict.value}" for verdict in Verdict)
    busy = sum(run.origin["cpu_seconds"] for run in found)
    print(
        f"{len(checks)} checks in {time.perf_counter() - started:.0f} s ({busy:.0f} CPU seconds of runs): {counts}; "
        f"{len(unexpected)} not as expected."
    )
    for result in failed:
        print(f"failed: {result.name}: {result.fault}")
    if found:
        print(f"report: {root / 'report.html'}")
    return 3 if failed else int(bool(unexpected))


def sweep(
    suite: str, given: dict[str, Any], *, mode: str, fresh: bool, engine: Any, workers: int, scheduler: str,
    config: str | None, preset: str | None,
) -> int:  # fmt: skip
    """Run a suite's cells; status 3 when some failed."""
    whole = ("size", "device", "seeds", "out")
    common = {name: given[name] for name in whole if given.get(name) is not None}
    swept = {name: text for name, text in given.items() if name not in whole and text is not None}
    settings = cells(suite, common, swept, config, preset)
    device, root = _device(settings[0].device), store.prepare(settings[0].out)
    side_by_side = workers_for(workers, [suite] * len(settings), device)
    if engine == "local":
        Progress(mode).say(estimate([suite] * len(settings), settings[0].replicates, side_by_side))
    results = run_sweep(
        root, suite, settings, device, engine=engine, workers=workers, mode=mode, fresh=fresh, scheduler=scheduler
    )
    failed = [result for result in results if result.fault]
    for result in failed:
        Progress(mode).say(f"{result.name}: {result.fault}")
    names = list(dict.fromkeys(result.name for result in results if not result.fault))
    runs = [load(root / name) for name in names]
    _write_tables(root, [check for run in runs for check in run.checks], runs)
    ran = sum(result.fresh for result in results)
    unexpected = sum(not check.as_expected for run in runs for check in run.checks)
    print(
        f"{len(results)} cells: {ran} run, {len(results) - ran - len(failed)} done before, {len(failed)} failed; "
        f"{unexpected} checks not as expected. Table: {root / 'sweep.csv'}"
    )
    return 3 if failed else int(unexpected > 0)


def figures(names: Sequence[str], list_them: bool, source: str | None, out: str, kinds: Sequence[str]) -> int:
    """Draw figures by name, all of a run's when none is named."""
    known = gallery()
    if list_them:
        for name, (suite, figure) in known.items():
            print(f"{name:28s} [{suite}] {figure.title}")
        return 0
    for name in names:
        if name not in known:
            raise unknown("figure", name, known)
    wanted = {known[name][0] for name in names} or set(SUITES)
    runs = _found(source, wanted) if source else _quick(wanted)
    if names and wanted - set(runs):
        raise SettingsError(f"'{source}' holds no run of suite {min(wanted - set(runs))}: choose another run, or none.")
    folder = store.prepare(out)
    for suite, run in runs.items():
        for name in [name for name in names if known[name][0] == suite] or figures_of(suite, run.series):
            try:
                written = write_figure(name, known[name][1], run.series, folder, kinds)
            except OSError as fault:
                raise SettingsError(f"'{out}' is not writable ({fault.strerror}): choose another --out.") from fault
            print(f"{name}: {', '.join(map(str, written))}")
    return 0


def report(run: str, against: str | None, out: str | None) -> int:
    """Rebuild a report, or say where two runs differ."""
    if against:
        print(comparison(_checks(run), _checks(against)), end="")
        return 0
    runs = list(_found(run, set(SUITES)).values())
    folder = store.prepare(out or run)
    try:
        write_report(folder, runs)
    except OSError as fault:
        raise SettingsError(f"'{folder}' could not be written to ({fault.strerror}): choose another --out.") from fault
    print(f"report: {folder / 'report.html'}")
    return 0


def _runs(
    root: Path, suites: Sequence[str], settings: RunSettings, device: torch.device, mode: str, fresh: bool, workers: int
) -> list[Saved | TaskResult]:
    """The suites' runs in the order given, made side by side with the longest first; how it failed where one did.

    Raises:
        SettingsError: settings that a suite cannot use; the others are stopped.
    """
    ordered = sorted(dict.fromkeys(suites), key=lambda name: -cost(name)[0])
    workers = workers_for(workers, ordered, device)
    shown, threads = "lines" if workers > 1 and mode == "text" else mode, max(cores() // workers, 1)
    tasks = [
        Task(str(root), name, settings, device.type, fresh, shown, wait=False, threads=threads, draw=True)
        for name in ordered
    ]
    Progress(mode).say(estimate(ordered, settings.replicates, workers))
    ended: list[str] = []

    def told(number: int, result: TaskResult) -> None:
        if result.misused:
            raise SettingsError(result.fault)
        ended.append(ordered[number])
        if shown == "lines":
            Progress(shown).say(f"{ended[-1]}: {'failed' if result.fault else 'done'}, {len(ended)} of {len(ordered)}")

    results = dict(zip(ordered, run_tasks(tasks, workers=workers, told=told), strict=True))
    return [results[name] if results[name].fault else load(root / results[name].name) for name in dict.fromkeys(suites)]


def _write(root: Path, runs: Sequence[Saved]) -> None:
    try:
        write_report(root, runs)
    except OSError as fault:
        raise SettingsError(
            f"the report could not be written to '{root}' ({fault.strerror}): free room there; the runs are kept, and "
            f"'valleydrift report {root}' makes it."
        ) from fault
    _write_tables(root, [check for run in runs for check in run.checks], runs)


def _write_tables(root: Path, checks: Sequence[Check], runs: Sequence[Saved]) -> None:
    """checks.json and checks.csv of all the runs together, with their names."""
    claims = {(claim.name, claim.equation): claim for run in runs for claim in run.claims}
    try:
        store.write_checks(root, checks, {"runs": [run.folder.name for run in runs]}, list(claims.values()))
    except OSError as fault:
        raise SettingsError(f"'{root}' could not be written to ({fault.strerror}): free room there.") from fault


def _found(source: str, suites: set[str]) -> dict[str, Saved]:
    """Suite to run: the run that ``source`` is, or those that the last command in it wrote.

    Raises:
        SettingsError: there is none, or one is damaged.
    """
    folder = Path(source)
    if (folder / MARK).exists():
        folders = [folder]
    elif (folder / "checks.json").exists():
        names = json.loads((folder / "checks.json").read_text(encoding="utf-8"))["provenance"].get("runs", [])
        folders = [folder / name for name in names]
    else:
        folders = sorted(path.parent for path in folder.glob(f"*/{MARK}"))
    if not folders:
        raise SettingsError(f"'{source}' holds no finished run: give a run directory or a results folder.")
    found: dict[str, Saved] = {}
    for one in folders:
        suite = one.name.rsplit("-", 1)[0]
        if suite in suites and suite not in found:
            try:
                found[suite] = load(one)
            except DamagedError as fault:
                raise SettingsError(f"the run '{one}' cannot be used ({fault}): run the suite again.") from fault
    return found


def _quick(suites: set[str]) -> dict[str, Saved]:
    settings = RunSettings()
    root, device = store.prepare(settings.out), _device(settings.device)
    names = [name for name in SUITES if name in suites]
    found = dict(zip(names, _runs(root, names, settings, device, "text", False, 0), strict=True))
    for name, run in found.items():
        if isinstance(run, TaskResult):
            raise SettingsError(f"suite {name} failed ({run.fault}): its figures need it.")
    return {name: run for name, run in found.items() if isinstance(run, Saved)}


def _checks(folder: str) -> list[Check]:
    """The checks of a run, of a results folder, or of a checks.json of any earlier format."""
    path = Path(folder)
    if path.is_dir() and not (path / "checks.json").exists():
        return [check for run in _found(folder, set(SUITES)).values() for check in run.checks]
    path = path / "checks.json" if path.is_dir() else path
    try:
        rows: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["checks"]
        return [check_from_row(row) for row in rows]
    except OSError as fault:
        raise SettingsError(f"'{path}' cannot be read ({fault.strerror}): give a run or a results folder.") from fault
    except (ValueError, KeyError, TypeError) as fault:
        raise SettingsError(f"'{path}' does not hold checks: give a run or a results folder.") from fault


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SettingsError("there is no CUDA device here: choose --device cpu or auto.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
