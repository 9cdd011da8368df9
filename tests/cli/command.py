"""Runs a command inside the test's process: what it printed, and its exit code."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

from absl import flags

from argenseg_jax.cli import __main__ as cli
from argenseg_jax.cli import parsing


@contextlib.contextmanager
def own_flags(command: str) -> Iterator[None]:
    """Whatever flags the block defines are gone afterwards, and the command's module with them."""
    known, argv = set(flags.FLAGS), sys.argv
    try:
        yield
    finally:
        sys.argv = argv
        for name in set(flags.FLAGS) - known:
            # A library that a command imports keeps its flags: it is imported once.
            if not flags.FLAGS.find_module_defining_flag(name, "").startswith("array_record"):
                delattr(flags.FLAGS, name)
        forget()
        sys.modules.pop(f"argenseg_jax.cli.{command}", None)


def forget() -> None:
    """The values that an earlier command gave to flags which all commands share."""
    for flag in flags.FLAGS.flags_by_module_dict()["argenseg_jax.cli.common"]:
        flag.unparse()
        flag.present = 0


def main(*args) -> int:
    """The exit code."""
    with own_flags(args[0]):
        return cli.main([str(a) for a in args])


def call(capfd, *args) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of stderr)."""
    capfd.readouterr()
    code = main(*args)
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
    with own_flags(args[0]):
        importlib.import_module(f"argenseg_jax.cli.{args[0]}")
        parsing.parse(args[0], [str(a) for a in args[1:]])
        return flags.FLAGS.config.to_dict()
