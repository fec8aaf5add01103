"""Malformed settings, generated: each ends in status 2 with one sentence; and no setting is silently ignored."""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from validation.cli import main
from validation.options import settings_from, to_toml
from validation.settings import RunSettings, SettingsError
from validation.suite import SUITES

NUMBERS = [
    f"{suite}.{field.name}"
    for suite in SUITES
    for field in dataclasses.fields(getattr(RunSettings(), suite))
    if isinstance(field.default, int | float) and not isinstance(field.default, bool)
]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=12)
NOT_NUMBERS = st.one_of(
    WORDS.filter(lambda w: w not in ("nan", "inf", "infinity")), st.sampled_from(["", "1,5", "0x1", "--", "1e"])
)
BAD_VALUES = st.one_of(NOT_NUMBERS, st.sampled_from(["nan", "inf", "-inf"]))
KNOWN = {f.name for f in dataclasses.fields(RunSettings)} | {"config", "preset", "fresh", "quiet", "log", "help"}


def outcome(arguments):
    """Status and what was said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, err.getvalue()


def is_one_sentence(arguments):
    status, said = outcome(arguments)
    assert status == 2, (arguments, said)
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line]
    assert len(lines) == 1, said
    assert lines[0].startswith("valleydrift: ")
    assert lines[0].endswith((".", "?"))


many = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@many
@given(st.sampled_from(NUMBERS), BAD_VALUES)
def test_a_value_that_is_no_number(name, value):
    is_one_sentence(["validate", "--print-config", f"--{name.replace('_', '-')}={value}"])


@many
@given(WORDS.filter(lambda w: w not in KNOWN))
def test_an_option_that_does_not_exist(word):
    is_one_sentence(["validate", f"--{word}", "3"])


@many
@given(st.sampled_from(["toml", "yaml"]), WORDS.filter(lambda w: w not in KNOWN), st.integers())
def test_a_setting_that_does_not_exist(kind, word, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mine.{kind}"
        path.write_text(f"{word} = {value}\n" if kind == "toml" else f"{word}: {value}\n")
        is_one_sentence(["validate", "--print-config", "--config", str(path)])


@many
@given(st.sampled_from(["toml", "yaml"]), st.text(max_size=60))
def test_a_file_of_anything(kind, text):
    """Whatever the text: either it says nothing (comments, blanks), or one sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mine.{kind}"
        path.write_text(text, encoding="utf-8")
        status, said = outcome(["validate", "--print-config", "--config", str(path)])
    assert status in (0, 2)
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line]) == (status == 2)


@many
@given(st.sampled_from(NUMBERS), st.integers(-(10**6), -1))
def test_a_negative_number(name, value):
    status, said = outcome(["validate", "--print-config", f"--{name.replace('_', '-')}={value}"])
    assert status == 2, f"{name} {value} was taken"
    assert said.count("valleydrift: ") == 1


@many
@given(st.sampled_from(list(SUITES)), st.sampled_from(["1:2", ":::", "1:2:0", "a:b:2", "1:nan:3", "::3"]))
def test_a_range_that_is_none(suite, text):
    field = next(name for name in NUMBERS if name.startswith(f"{suite}.")).split(".")[1].replace("_", "-")
    is_one_sentence(["sweep", suite, f"--{field}={text}", "--out", "/proc/none"])


@pytest.mark.parametrize("name", NUMBERS)
def test_no_setting_is_ignored(name):
    """A changed value shows in the settings, on the command line and in a file alike."""
    suite, field = name.split(".")
    default = getattr(getattr(RunSettings(), suite), field)
    changed = default - 1 if isinstance(default, int) and default > 1 else default * 0.9
    try:
        given_on_command = settings_from({name: str(changed)}, None)
    except SettingsError:
        pytest.skip("this setting alone does not fit the others")
    assert getattr(getattr(given_on_command, suite), field) == changed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.toml"
        path.write_text(to_toml(given_on_command))
        assert settings_from({}, str(path)) == given_on_command
