"""Settings from the command line and from TOML files, with one sentence for whatever cannot be used."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
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
            shown = " ".join(f"{part:g}" for part in default) if several else default  # type: ignore[union-attr]
            choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else field.name.split("_")[-1].upper()
            note = f" (default: {shown})" if shown != "" else ""
            parser.add_argument(
                f"--{prefix}{field.name.replace('_', '-')}",
                dest=prefix + field.name,
                nargs="+" if several else None,
                metavar=choices,
                help=field.metadata["help"] + note,
            )


def settings_from(arguments: Mapping[str, Any], config: str | None, kind: type = RunSettings) -> Any:
    """Defaults, overridden by a TOML file, overridden by the command line.

    Args:
        kind: the settings dataclass to fill.
        arguments: option name (``field`` or ``suite.field``) to raw value; ``None`` where not given.

    Raises:
        SettingsError: an unknown key, a value of the wrong kind, an unreadable file.
    """
    layers = [_flatten(_read_toml(config))] if config else []
    layers.append({name: value for name, value in arguments.items() if value is not None})
    return _build(kind, {name: value for layer in layers for name, value in layer.items()}, "")


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


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as fault:
        raise SettingsError(f"the settings file '{path}' cannot be read ({fault.strerror}): check the path.") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise SettingsError(f"the settings file '{path}' is not TOML ({fault}): mend it there.") from fault


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key.replace("-", "_")
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
