"""Settings from the command line and from TOML or YAML files, with one sentence for whatever cannot be used."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from validation.settings import RunSettings, SettingsError


class Parser(argparse.ArgumentParser):
    """argparse that states an error as a :class:`SettingsError` instead of printing usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}: see '{self.prog} --help'.")


def add_options(parser: argparse.ArgumentParser, kind: type, prefix: str = "") -> None:
    """An option for every field of a settings dataclass; nested ones as ``--suite.field``."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            group = parser.add_argument_group(f"suite {field.name}", (hint.__doc__ or "").split(":", 1)[-1].strip())
            add_options(group, hint, f"{field.name}.")  # type: ignore[arg-type]
        elif field.name == "suites":
            continue
        else:
            several = get_origin(hint) is tuple
            default = field.default
            shown = " ".join(part if isinstance(part, str) else f"{part:g}" for part in default) if several else default  # type: ignore[union-attr]
            choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else field.name.split("_")[-1].upper()
            note = f" (default: {shown})" if shown != "" else ""
            parser.add_argument(
                f"--{prefix}{field.name.replace('_', '-')}",
                dest=prefix + field.name,
                nargs="+" if several else None,
                metavar=choices,
                help=_help(field) + note,
            )


def _help(field: dataclasses.Field[Any]) -> str:
    """A setting's sentence; argparse takes a bare % for a place to fill."""
    return str(field.metadata["help"]).replace("%", "%%")


def add_sweep_options(parser: argparse.ArgumentParser, suite: str) -> None:
    """Options of ``valleydrift sweep SUITE``: one for every setting of the suite, and how to run."""
    kind = type(getattr(RunSettings(), suite))
    for field in dataclasses.fields(kind):
        parser.add_argument(f"--{field.name.replace('_', '-')}", metavar="VALUES", help=_help(field))
    for field in dataclasses.fields(RunSettings):
        if field.name in ("size", "device", "seeds", "out"):
            parser.add_argument(f"--{field.name}", metavar=field.name.upper(), help=_help(field))
    parser.add_argument("--config", metavar="FILE", help="TOML or YAML file with settings common to all cells")
    parser.add_argument("--preset", metavar="NAME", help="a paper's experiment as what is common to all cells")
    parser.add_argument("--engine", choices=("local", "dask", "slurm"), default="local", help="who runs the cells")
    parser.add_argument("--scheduler", default="", metavar="ADDRESS", help="of a running dask cluster")


PRESETS = Path(__file__).with_name("presets")


def presets() -> list[str]:
    """Names of the settings that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def settings_from(
    arguments: Mapping[str, Any], config: str | None, kind: type = RunSettings, preset: str | None = None
) -> Any:
    """Defaults, overridden by a TOML or YAML file, overridden by the command line.

    Args:
        kind: the settings dataclass to fill.
        arguments: option name (``field`` or ``suite.field``) to raw value; ``None`` where not given.

    Raises:
        SettingsError: an unknown key, a value of the wrong kind, an unreadable file.
    """
    if preset is not None and preset not in presets():
        raise unknown("preset", preset, presets())
    files = [str(PRESETS / f"{preset}.toml")] if preset else []
    layers = [_flatten(_read(path)) for path in [*files, *([config] if config else [])]]
    layers.append({name: value for name, value in arguments.items() if value is not None})
    return _build(kind, {name: value for layer in layers for name, value in layer.items()}, "")


def to_toml(settings: Any) -> str:
    """Settings as a TOML file that :func:`settings_from` reads back."""
    tree = json.loads(json.dumps(dataclasses.asdict(settings)))
    plain = [f"{name} = {json.dumps(value)}" for name, value in tree.items() if not isinstance(value, dict)]
    for table, values in tree.items():
        if isinstance(values, dict):
            plain += ["", f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    return "\n".join(plain) + "\n"


def reproduction(suite: str, settings: Mapping[str, Any]) -> str:
    """The command that runs a suite with saved settings (``dataclasses.asdict`` of :class:`RunSettings`)."""
    words, defaults = ["valleydrift", "validate", suite], dataclasses.asdict(RunSettings())
    for name, value in settings.items():
        if name in ("suites", "out") or (isinstance(value, dict) and name != suite):
            continue
        pairs = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        known = defaults.get(name, {})
        for option, part in pairs.items():
            default = known.get(option.split(".")[-1]) if isinstance(value, dict) else known
            items = list(part) if isinstance(part, list | tuple) else part
            if items != (list(default) if isinstance(default, tuple) else default):
                texts = items if isinstance(items, list) else [items]
                words += [f"--{option.replace('_', '-')}", *map(str, texts)]
    return shlex.join(words)


def unknown(what: str, given: str, known: Iterable[str]) -> SettingsError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, 1)
    return SettingsError(
        f"there is no {what} '{given}'"
        + (f": did you mean '{near[0]}'?" if near else f": choose among {', '.join(known)}.")
    )


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints, parts, known = get_type_hints(kind), {}, []
    for field in dataclasses.fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = {key: value for key, value in values.items() if key.startswith(f"{name}.")}
            parts[field.name] = _build(hint, inner, f"{name}.")  # type: ignore[arg-type]
            known += list(inner)
            if name in values:
                raise SettingsError(f"'{name}' is a suite: give its settings in a table [{name}].")
        else:
            known.append(name)
            if name in values:
                parts[field.name] = _convert(name, hint, values[name])
    for given in values:
        if given not in known:
            raise unknown("setting", given, [prefix + f.name for f in dataclasses.fields(kind)])
    return kind(**parts)


def _convert(name: str, hint: Any, raw: Any) -> Any:
    """``raw`` (text from the command line, or a TOML value) as the field's type."""
    shown = name.replace("_", "-")
    if get_origin(hint) is tuple:
        items = raw if isinstance(raw, list | tuple) else [raw]
        return tuple(_convert(name, get_args(hint)[0], item) for item in items)
    if get_origin(hint) is Literal:
        if raw not in get_args(hint):
            raise unknown(shown, str(raw), get_args(hint))
        return raw
    if isinstance(raw, bool | list | dict) or (hint is str and not isinstance(raw, str)):
        raise SettingsError(f"{shown} {raw!r} is of the wrong kind: give {_wanted(hint)}.")
    try:
        if hint is int and isinstance(raw, float):
            raise ValueError
        return hint(raw)
    except ValueError:
        raise SettingsError(f"{shown} '{raw}' is not {_wanted(hint)}: give one.") from None


def _wanted(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "text"}[hint]


def _read(path: str) -> dict[str, Any]:
    import yaml

    kind = "YAML" if path.endswith((".yaml", ".yml")) else "TOML"
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if kind == "YAML" else tomllib.loads(text)
    except OSError as fault:
        raise SettingsError(f"the settings file '{path}' cannot be read ({fault.strerror}): check the path.") from fault
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as fault:
        why = " ".join(str(fault).split())
        raise SettingsError(f"the settings file '{path}' is not {kind} ({why}): mend it there.") from fault
    if tree is not None and not (isinstance(tree, dict) and all(isinstance(key, str) for key in tree)):
        raise SettingsError(f"the settings file '{path}' holds no names with values: write lines like 'seeds: 64'.")
    return tree or {}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key.replace("-", "_")
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
