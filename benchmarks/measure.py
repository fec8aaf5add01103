"""What all benchmarks share: timing in turns on the same work, a row a comparison, one JSON file each, one table.

A row states the work, who is compared, seconds of each, the ratio round by round (median, least, largest), and a
checksum of what both sides computed, which have been compared before the clock starts.

Usage: python benchmarks/measure.py [--markdown]
Prints the table of all results; with ``--markdown`` the rows of the README's table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return taken


def row(
    work: str,
    peer: str,
    theirs: Sequence[float],
    ours: Sequence[float],
    checksum: tuple[float, float],
    unit: str = "run",
) -> dict[str, Any]:
    """A comparison; ``theirs`` and ``ours`` are seconds a ``unit`` of work, round by round."""
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    return {
        "work": work,
        "peer": peer,
        "unit": unit,
        "peer, s": statistics.median(theirs),
        "here, s": statistics.median(ours),
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)},
        "checksum": {"peer": checksum[0], "here": checksum[1]},
    }


def save(name: str, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """``results/name.json`` with date, commit, machine and versions; printed too."""
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    known = ("torch", "triton", "numpy", "numba", "torchsde", "diffrax", "jax", "curvlinops-for-pytorch", "scipy")
    result = {
        "rows": list(rows),
        **more,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version()} | {part: found[part] for part in known if part in found},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if rows:
        print(table(result), end="")
    for what, value in more.items():
        print(f"{what}: {value}")


def saved() -> list[dict[str, Any]]:
    """All results that hold comparisons, by name."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json")))
    return [result for result in found if result["rows"]]


def table(*results: Mapping[str, Any]) -> str:
    """Rows with everything they hold, as Markdown."""
    lines = [
        "| work | compared with | theirs | here | ratio (least–largest) | checksums: theirs, here |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for r in result["rows"]:
            unit, sums = r["unit"], r["checksum"]
            lines.append(
                f"| {r['work']} | {r['peer']} | {_time(r['peer, s'])} a {unit} | {_time(r['here, s'])} a {unit} | "
                f"{_spread(r['ratio'])} | {sums['peer']:.10g}, {sums['here']:.10g} |"
            )
    return "\n".join(lines) + "\n"


def readme_table() -> str:
    """The README's table: the work with its time here, the peer, how many times faster, when and where."""
    lines = ["| work | compared with | times faster (least–largest) |", "|---|---|---|"]
    for result in saved():
        for r in result["rows"]:
            work = f"{r['work']} ({_time(r['here, s'])} a {r['unit']})"
            lines.append(f"| {work} | {r['peer']} | {_spread(r['ratio'])} |")
    places = sorted({f"{result['date']}, {result['machine']}, {result['device']}" for result in saved()})
    return "\n".join(lines) + f"\n\nRecorded: {'; '.join(places)}.\n"


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3g} ({ratio['least']:.3g}–{ratio['largest']:.3g})"


def _time(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="the rows of the README's table")
    print(readme_table() if parser.parse_args().markdown else table(*saved()), end="")
