"""The command ``valleydrift``. Exit status: 0 every check as expected, 1 one is not, 2 bad input."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from validation.explore import EXPLORATIONS
from validation.explore import explore as explore_model
from validation.options import Parser, add_options, settings_from, unknown
from validation.settings import RunSettings, SettingsError
from validation.suite import SUITES, Progress, run_suite


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except SettingsError as fault:
        print(f"valleydrift: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvalleydrift: stopped; nothing was written.", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    parser = Parser(
        prog="valleydrift", allow_abbrev=False,
        description="Predict what large-step SGD does to a network, run it, and judge the prediction.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands.add_parser("list", help="name the suites", allow_abbrev=False)
    validate = commands.add_parser(
        "validate", help="run suites and judge their claims", allow_abbrev=False,
        description="Run suites of claims (all of them by default) and write checks, series and a report.",
    )  # fmt: skip
    validate.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of: {', '.join(SUITES)}")
    validate.add_argument("--config", metavar="FILE", help="TOML file with these settings; options override it")
    validate.add_argument("--quiet", action="store_true", help="no progress, no table: verdict counts only")
    add_options(validate, RunSettings)
    explore = commands.add_parser("explore", help="simulate a built-in SDE and plot it", allow_abbrev=False)
    models = explore.add_subparsers(dest="model", metavar="MODEL", parser_class=Parser)
    parsers = {"list": validate, "validate": validate}
    for name, kind in EXPLORATIONS.items():
        parsers[name] = models.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False)
        add_options(parsers[name], kind)
    if argv and not argv[0].startswith("-") and argv[0] not in ("list", "validate", "explore"):
        raise unknown("command", argv[0], ["list", "validate", "explore"])
    if argv[:1] == ["explore"] and len(argv) > 1 and not argv[1].startswith("-") and argv[1] not in EXPLORATIONS:
        raise unknown("model", argv[1], EXPLORATIONS)
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        used = parsers.get(getattr(arguments, "model", None) or arguments.command, validate)
        options = [option for action in used._actions for option in action.option_strings]
        raise unknown("option", extra[0].split("=")[0], options)
    if arguments.command == "explore":
        return _explore(explore, arguments)
    if arguments.command == "list":
        for name, summary in SUITES.items():
            print(f"{name:15s} {summary}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "config", "quiet")}
    given["suites"] = given["suites"] or None
    settings = settings_from(given, arguments.config)
    for name in settings.suites:
        if name not in SUITES:
            raise unknown("suite", name, SUITES)
    return _validate(settings, arguments.quiet)


def _explore(parser: Parser, arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        parser.print_help()
        return 0
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "model")}
    print(explore_model(arguments.model, settings_from(given, None, EXPLORATIONS[arguments.model])))
    return 0


def _validate(settings: RunSettings, quiet: bool) -> int:
    from validation import store

    folder = store.prepare(settings.out)  # before the slow imports: a bad folder is said at once

    import torch
    import xarray as xr

    from validation.report import table, write_report

    device = _device(settings.device)
    checks, claims, series, started = [], [], [], time.perf_counter()
    for name in settings.suites or tuple(SUITES):
        if not quiet:
            print(f"{name}: {SUITES[name]}", file=sys.stderr)
        try:
            outcome = run_suite(name, settings, device, Progress(quiet))
        except ValueError as fault:
            raise SettingsError(str(fault)) from fault
        except torch.OutOfMemoryError as fault:
            raise SettingsError(f"suite {name} ran out of memory on {device}: choose fewer --seeds.") from fault
        checks += outcome.checks
        claims += outcome.claims
        series.append(outcome.series)
    origin = store.provenance(dataclasses.asdict(settings), device, time.perf_counter() - started)
    merged = xr.merge(series)
    try:
        store.set_aside(folder)
        store.write_checks(folder, checks, origin)
        store.write_series(folder, merged, origin)
        write_report(folder, checks, claims, merged, origin)
    except OSError as fault:
        raise SettingsError(
            f"the results could not be written to '{settings.out}' ({fault.strerror}): free room there or choose --out."
        ) from fault
    if not quiet:
        print(table(checks))
    unexpected = [check for check in checks if not check.as_expected]
    counts = ", ".join(
        f"{sum(check.verdict == verdict for check in checks)} {verdict.value}" for verdict in type(checks[0].verdict)
    )
    print(f"{len(checks)} checks in {origin['seconds']:.0f} s: {counts}; {len(unexpected)} not as expected.")
    print(f"report: {folder / 'report.html'}")
    return 1 if unexpected else 0


def _device(name: str):  # type: ignore[no-untyped-def]
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SettingsError("there is no CUDA device here: choose --device cpu or auto.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


if __name__ == "__main__":
    sys.exit(main())
