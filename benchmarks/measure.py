"""What all benchmarks share: timing in turns on the same work, a row a comparison, one JSON file each, one table.

A row states the work, who is compared, seconds of each, the ratio round by round (median, least, largest), and a
checksum of what both sides computed, which have been compared before the clock starts. ``python benchmarks/measure.py``
prints the table of all results as Markdown.
"""

from __future__ import annotations

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
    known = ("torch", "numpy", "numba", "torchsde", "diffrax", "jax", "curvlinops-for-pytorch", "scipy")
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
    print(json.dumps(result, indent=1, ensure_ascii=False))


def table() -> str:
    """All saved rows as Markdown."""
    lines = ["| work | compared with | theirs | here | ratio (least–largest) |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        for r in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            ratio, unit = r["ratio"], r["unit"]
            lines.append(
                f"| {r['work']} | {r['peer']} | {_time(r['peer, s'])} a {unit} | {_time(r['here, s'])} a {unit} | "
                f"{ratio['median']:.3g} ({ratio['least']:.3g}–{ratio['largest']:.3g}) |"
            )
    return "\n".join(lines) + "\n"


def _time(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


if __name__ == "__main__":
    print(table(), end="")
