"""The command ``valleydrift``. Exit status: 0 every check as expected, 1 one is not, 2 bad input, 3 runs failed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from validation.explore import EXPLORATIONS
from validation.explore import explore as explore_model
from validation.options import Parser, add_options, add_sweep_options, presets, settings_from, to_toml, unknown
from validation.server import start_server
from validation.settings import RunSettings, SettingsError
from validation.suite import SUITES

COMMANDS = ("list", "validate", "sweep", "figures", "report", "explore")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    before = _handle_termination()
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except SettingsError as fault:
        print(f"valleydrift: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        said = "stopped; runs that are done are kept, the same command goes on from there."
        print(f"\nvalleydrift: {said}", file=sys.stderr)
        return 143 if stop.args else 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _handle_termination() -> Any:
    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the caller sees to signals
        return None


def _main(argv: list[str]) -> int:
    parser, parsers = _parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise unknown("command", argv[0], COMMANDS)
    for command, what, known in (("explore", "model", EXPLORATIONS), ("sweep", "suite", SUITES)):
        if argv[:1] == [command] and len(argv) > 1 and not argv[1].startswith("-") and argv[1] not in known:
            raise unknown(what, argv[1], known)
    arguments, extra = parser.parse_known_args(argv)
    given = vars(arguments)
    command = given.pop("command")
    key = " ".join(part for part in (command, given.get("model") or given.get("suite")) if part)
    if extra:
        options = [o for action in parsers.get(key, parsers["validate"])._actions for o in action.option_strings]
        raise unknown("option", extra[0].split("=")[0], options)
    if command is None or (command in ("explore", "sweep") and key == command):
        (parsers[command] if command else parser).print_help()
        return 0
    if command == "list":
        for name, summary in SUITES.items():
            print(f"{name:15s} {summary}")
        return 0
    run = {"validate": _validate, "sweep": _sweep, "figures": _figures, "report": _report, "explore": _explore}
    return run[command](given)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="valleydrift", allow_abbrev=False,
        description="Predict what large-step SGD does to a network, run it, and judge the prediction.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, more: str = "") -> Parser:
        return commands.add_parser(name, help=text, allow_abbrev=False, description=more or f"{text.capitalize()}.")

    parsers = {"list": command("list", "name the suites")}
    validate = parsers["validate"] = command(
        "validate", "run suites and judge their claims",
        "Run suites of claims (all of them by default), each in a run directory of its own below --out, and write a "
        "report of them all. A suite that is done with the same settings is not run again.",
    )  # fmt: skip
    validate.add_argument("suites", nargs="*", metavar="SUITE", help=f"any of: {', '.join(SUITES)}")
    validate.add_argument("--config", metavar="FILE", help="TOML or YAML file with these settings; options override it")
    validate.add_argument("--preset", metavar="NAME", help=f"settings of a paper's experiment: {', '.join(presets())}")
    validate.add_argument("--print-config", action="store_true", help="print the settings as TOML and stop")
    add_options(validate, RunSettings)
    sweep = parsers["sweep"] = command(
        "sweep", "run a suite over ranges of its settings",
        "Run a suite for every combination of values; a value is start:stop:count or a list with commas. Cells that "
        "are done are not run again, so a sweep that was stopped goes on.",
    )  # fmt: skip
    suites = sweep.add_subparsers(dest="suite", metavar="SUITE", parser_class=Parser)
    for name, summary in SUITES.items():
        parsers[f"sweep {name}"] = suites.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_sweep_options(parsers[f"sweep {name}"], name)
    for one in (validate, *(parsers[f"sweep {name}"] for name in SUITES)):
        one.add_argument("--fresh", action="store_true", help="run again what is done; earlier results are kept")
        one.add_argument("--quiet", action="store_true", help="no progress, no table: counts only")
        one.add_argument("--workers", type=int, default=0, metavar="N", help="processes side by side, 0 for one a core")
        one.add_argument("--log", choices=("text", "json"), default="text", help="progress as text or as JSON lines")
    figures = parsers["figures"] = command(
        "figures", "draw figures from saved results, with their data",
        "Draw figures by name (all of the run's when none is named) from a run or a results folder, each as image and "
        "as CSV. Without --from the suites that are needed are run at quick size first, or found done.",
    )  # fmt: skip
    figures.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    figures.add_argument("--list", action="store_true", help="name the figures and stop")
    figures.add_argument("--from", dest="source", metavar="RUN", help="a run directory or a results folder")
    figures.add_argument("--out", default="figures", metavar="DIR", help="output folder (default: figures)")
    figures.add_argument(
        "--format", nargs="+", default=["svg"], choices=("svg", "png", "pdf", "gif"), help="default: svg"
    )
    report = parsers["report"] = command("report", "rebuild the report of saved runs, or compare two")
    report.add_argument("run", metavar="RUN", help="a run directory or a results folder")
    report.add_argument("--against", metavar="OTHER", help="print where the two differ instead")
    report.add_argument("--out", metavar="DIR", help="folder for the report (default: RUN)")
    explore = parsers["explore"] = command("explore", "simulate a built-in SDE and plot it")
    models = explore.add_subparsers(dest="model", metavar="MODEL", parser_class=Parser)
    for name, kind in EXPLORATIONS.items():
        one = models.add_parser(name, help=kind.__doc__, description=kind.__doc__, allow_abbrev=False)
        parsers[f"explore {name}"] = one
        add_options(one, kind)
    return parser, parsers


def _explore(given: dict[str, Any]) -> int:
    name = given.pop("model")
    print(explore_model(name, settings_from(given, None, EXPLORATIONS[name])))
    return 0


def _mode(given: dict[str, Any]) -> str:
    quiet, log = given.pop("quiet"), given.pop("log")
    return "quiet" if quiet and log == "text" else log


def _validate(given: dict[str, Any]) -> int:
    mode, fresh, show = _mode(given), given.pop("fresh"), given.pop("print_config")
    config, preset, workers = given.pop("config"), given.pop("preset"), given.pop("workers")
    given["suites"] = given["suites"] or None
    settings = settings_from(given, config, preset=preset)
    for name in settings.suites:
        if name not in SUITES:
            raise unknown("suite", name, SUITES)
    if show:
        print(to_toml(settings), end="")
        return 0
    if workers != 1 and len(settings.suites) != 1:
        start_server(settings.suites or SUITES)
    from validation import commands

    return commands.validate(settings, mode, fresh, workers)


def _sweep(given: dict[str, Any]) -> int:
    from validation import commands

    suite, mode, fresh = given.pop("suite"), _mode(given), given.pop("fresh")
    how = {name: given.pop(name) for name in ("engine", "workers", "scheduler", "config", "preset")}
    return commands.sweep(suite, given, mode=mode, fresh=fresh, **how)


def _figures(given: dict[str, Any]) -> int:
    from validation import commands

    return commands.figures(given["names"], given["list"], given["source"], given["out"], given["format"])


def _report(given: dict[str, Any]) -> int:
    from validation import commands

    return commands.report(given["run"], given["against"], given["out"])


if __name__ == "__main__":
    sys.exit(main())
