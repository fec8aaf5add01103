"""The report: a table for the terminal, a self-contained HTML page, Markdown, and two runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from validation.check import Check, Claim, Verdict
from validation.figures import claim_figure, svg
from validation.gallery import figures_of
from validation.options import reproduction
from validation.run_directory import FIGURES, Saved, code_digest
from validation.statistics import SIGMAS
from validation.store import write_text, writing


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


def write_report(folder: Path, runs: Sequence[Saved]) -> None:
    """report.html (every claim with its equation, source, figure and rows; needs no file beside it) and report.md."""
    import jinja2

    suites = []
    for run in runs:
        drawn, suite = _drawn(run), _suite(run)
        sections = [
            {"claim": claim, "rows": rows, "figure": drawn[f"claim-{number}"]}
            for number, (claim, rows) in enumerate(_claimed(run))
        ]
        figures = [
            {"name": name, "title": figure.title, "figure": drawn[name]}
            for name, figure in figures_of(suite, run.series).items()
        ]
        command = reproduction(suite, run.origin.get("settings", {}))
        suites.append({"name": suite, "sections": sections, "figures": figures, "run": run, "command": command})
    checks = [check for run in runs for check in run.checks]
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = template.render(
        suites=suites, checks=checks, sigmas=SIGMAS, unexpected=[check for check in checks if not check.as_expected]
    )
    write_text(folder / "report.html", page)
    write_text(folder / "report.md", markdown(checks))


def draw_figures(run: Saved, share: slice = slice(None)) -> None:
    """The report's figures of a run, or a share of them, as SVG in its folder: the report has them at hand."""
    with writing(run.folder):
        (run.folder / FIGURES).mkdir(exist_ok=True)
        for name, draw in list(_figures(run).items())[share]:
            write_text(run.folder / FIGURES / f"{name}.svg", svg(draw()))


def _drawn(run: Saved) -> dict[str, str]:
    """The figures by name: as they lie in the run's folder if this code drew them there, else drawn now."""
    folder, own = run.folder / FIGURES, run.origin.get("code") == code_digest()
    found = {}
    for name, draw in _figures(run).items():
        path = folder / f"{name}.svg"
        found[name] = path.read_text(encoding="utf-8") if own and path.exists() else svg(draw())
    return found


def _figures(run: Saved) -> dict[str, Callable[[], Figure]]:
    """What draws each of them, by name."""
    found: dict[str, Callable[[], Figure]] = {}
    for number, (_, rows) in enumerate(_claimed(run)):
        found[f"claim-{number}"] = partial(claim_figure, rows)
    for name, figure in figures_of(_suite(run), run.series).items():
        found[name] = partial(figure.draw, run.series)
    return found


def _claimed(run: Saved) -> list[tuple[Claim, list[Check]]]:
    """The claims that have checks, with them."""
    rows = ((claim, [check for check in run.checks if check.claim == claim.name]) for claim in run.claims)
    return [(claim, checks) for claim, checks in rows if checks]


def _suite(run: Saved) -> str:
    return run.checks[0].suite if run.checks else run.folder.name


def markdown(checks: Sequence[Check]) -> str:
    """The verdict table in Markdown."""
    head = "| suite | claim | setting | quantity | theory | measured | runs (diverged) | allowed gap | verdict |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for check in checks:
        mark = "" if check.as_expected else f" (expected: {check.expected})"
        cells = [
            check.suite, check.claim, check.setting, check.observable, f"{check.predicted:.5g}",
            f"{check.measured:.5g} ± {check.standard_error:.2g}", f"{check.seeds} ({check.diverged})",
            f"{check.allowed:.2g}", f"{check.verdict}{mark}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def comparison(first: Sequence[Check], second: Sequence[Check]) -> str:
    """Where two runs differ: verdicts, measurements ``SIGMAS`` combined standard errors apart, rows only one has."""

    def key(check: Check) -> tuple[str, str, str, str]:
        return check.suite, check.claim, check.setting, check.observable

    ones, others = {key(check): check for check in first}, {key(check): check for check in second}
    both = [name for name in ones if name in others]
    lines = []
    for name in both:
        one, other = ones[name], others[name]
        gap = other.measured - one.measured
        error = math.hypot(one.standard_error, other.standard_error)
        apart = math.isfinite(gap) and abs(gap) > SIGMAS * error + 1e-9 * abs(one.measured)
        if one.verdict != other.verdict or apart:
            lines.append(
                f"  {' · '.join(name)}: {one.measured:.5g} ± {one.standard_error:.2g} ({one.verdict}) against "
                f"{other.measured:.5g} ± {other.standard_error:.2g} ({other.verdict})"
            )
    lines += [f"  only in the first: {' · '.join(name)}" for name in ones if name not in others]
    lines += [f"  only in the second: {' · '.join(name)}" for name in others if name not in ones]
    return "\n".join([f"{len(both)} checks in both, {len(lines)} differences", *lines]) + "\n"
