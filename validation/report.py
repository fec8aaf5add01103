"""The report: a table for the terminal and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from validation.check import Check, Claim, Verdict
from validation.figures import claim_figure, course_figure, svg
from validation.statistics import SIGMAS
from validation.store import write_text


def table(checks: Sequence[Check]) -> str:
    """A row a check, grouped by claim, for a terminal."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.suite, check.claim), []).append(check)
    lines = []
    for (suite, claim), rows in groups.items():
        given = f"  [given {rows[0].given}]" if rows[0].given else ""
        lines.append(f"\n{suite} · {claim}{given}")
        width = max(len(check.setting) for check in rows)
        for check in rows:
            known = " (known)" if check.as_expected and check.verdict == Verdict.DISAGREES else ""
            mark = known if check.as_expected else f" (EXPECTED: {check.expected})"
            survivors = [rival.name for rival in check.rivals if not rival.rejected]
            open_rivals = f", not rejected: {', '.join(survivors)}" if survivors else ""
            lines.append(
                f"  {check.setting:{width}s}  {check.observable}: theory {check.predicted:.5g}, "
                f"measured {check.measured:.5g} ± {check.standard_error:.2g}, gap allowed {check.allowed:.2g}, "
                f"{check.seeds - check.diverged}/{check.seeds} runs: {check.verdict}{mark}{open_rivals}"
            )
    return "\n".join(lines) + "\n"


def write_report(
    folder: Path, checks: Sequence[Check], claims: Sequence[Claim], series: xr.Dataset, origin: dict[str, Any]
) -> None:
    """report.html: every claim with its equation, source, figure and rows; no file beside it is needed."""
    import jinja2

    sections = []
    for claim in claims:
        rows = [check for check in checks if check.claim == claim.name]
        if rows:
            sections.append({"claim": claim, "rows": rows, "figure": svg(claim_figure(rows))})
    prefixes = [name for name in ("gaussian", "table") if f"{name} train loss" in series]
    courses = [{"name": name, "figure": svg(course_figure(series, name))} for name in prefixes]
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = template.render(
        sections=sections, courses=courses, checks=checks, origin=origin, sigmas=SIGMAS,
        unexpected=[check for check in checks if not check.as_expected],
    )  # fmt: skip
    write_text(folder / "report.html", page)
