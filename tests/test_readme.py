"""README and launchers speak of commands, files and flags that exist."""

import pathlib
import re
import subprocess

import pytest

from argenseg_jax.cli.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
CALL = r"(?:-m argenseg_jax|^ *argenseg|\(argenseg) ([a-z]+)([^|#`\n]*)"
TEXTS = [ROOT / "README.md", *sorted((ROOT / "launch").iterdir())]


def module_of(command):
    """The file that holds a command."""
    return ROOT / (COMMANDS[command][0].replace(".", "/") + ".py")


def command_lines(path):
    """(command, its flags) of every `python -m argenseg_jax CMD ...` or `argenseg CMD ...`."""
    text = path.read_text().replace("\\\n", " ")
    calls = re.findall(CALL, text, re.M)
    return [(command, re.findall(r" --([a-z][\w-]*)", rest)) for command, rest in calls]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_commands_and_flags_exist(path):
    for command, used in command_lines(path):
        assert command in COMMANDS, f"{path.name}: {command}"
        if (module := module_of(command)).exists():
            known = module.read_text() + module.with_name("common.py").read_text()
            for flag in used:
                assert f'"{flag}"' in known, f"{path.name}: {command} --{flag}"


def test_status_names_the_commands_that_are_not_there():
    status = TEXTS[0].read_text().partition("## Status")[2]
    for command in COMMANDS:
        assert module_of(command).exists() != (f"`{command}`" in status), command


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_files_exist(path):
    for name in re.findall(r"\b(?:argenseg_jax|configs|tests|launch|docs|examples)/[\w/]+\.\w+", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_launchers_parse(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_the_tests_that_the_field_cases_name_exist():
    text = (ROOT / "docs" / "field-cases.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text))
    assert len(named) > 100
    for path, name in named:
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
