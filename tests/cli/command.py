"""Runs a command inside the test's process: what it printed, and its exit code."""
from __future__ import annotations

import importlib
import sys

from absl import flags

from argenseg_jax.cli import __main__ as cli
from argenseg_jax.cli import parsing


def call(capfd, *args) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of stderr); the command's flags are gone afterwards."""
    known = set(flags.FLAGS)
    capfd.readouterr()
    argv = sys.argv
    try:
        code = cli.main([str(a) for a in args])
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - known:
            # A library that a command imports keeps its flags: it is imported once.
            if not flags.FLAGS.find_module_defining_flag(name, "").startswith("array_record"):
                delattr(flags.FLAGS, name)
        sys.modules.pop(f"argenseg_jax.cli.{args[0]}", None)
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if line.strip()]


def refused(capfd, *args) -> str:
    """The one line of a user error."""
    code, out, err = call(capfd, *args)
    assert (code, out, len(err)) == (2, "", 1), (code, out, err)
    assert err[0].startswith("error: ")
    return err[0]


def config_of(*args) -> dict:
    """The config that a command line of `train` or the like stands for, as nested dicts."""
    known = set(flags.FLAGS)
    argv, module = sys.argv, importlib.import_module(f"argenseg_jax.cli.{args[0]}")
    try:
        parsing.parse(args[0], [str(a) for a in args[1:]])
        return flags.FLAGS.config.to_dict()
    finally:
        sys.argv = argv
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        sys.modules.pop(module.__name__, None)
