"""The command line: `python -m argenseg_jax CMD --flag=value`; imports only the chosen command.

A command is a module of this package. Importing it defines its absl flags and nothing more (no
jax); its `run() -> dict` then does the work, and the dict is printed as the last line of stdout. A
`setup_devices()` of its own replaces the usual one, before the first use of jax.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from argenseg_jax import processes
from argenseg_jax.cli import common, parsing
from argenseg_jax.errors import UserError, brief

COMMANDS = {
    "train": ("argenseg_jax.cli.train", "train a model, or resume a run that was stopped"),
    "evaluate": ("argenseg_jax.cli.evaluate", "cIoU, gIoU and Pr@X of a model on a data set"),
    "segment": ("argenseg_jax.cli.segment", "one image and a prompt to a mask file"),
    "chat": ("argenseg_jax.cli.chat", "several turns about one image, in a terminal"),
    "convert": ("argenseg_jax.cli.convert", "weights between PyTorch and Orbax, both ways"),
    "verify": ("argenseg_jax.cli.verify", "compare with numbers recorded from the reference"),
    "compile": ("argenseg_jax.cli.compile", "compile for TPUs without having one: does it fit"),
    "prepare": ("argenseg_jax.cli.prepare", "any data source to ArrayRecord shards"),
    "sweep": ("argenseg_jax.cli.sweep", "expand a config's sweep() and run its points"),
}
_CTRL_C_EXIT = 128 + signal.SIGINT
_LINE = 1000  # letters of an error
_BUCKET = re.compile(r"\b(gcsfs|s3fs|adlfs|fsspec)\b")
_MACHINE = re.compile(r"RESOURCE_EXHAUSTED|No space left on device|Disk quota exceeded|Read-only file system")


def usage() -> str:
    """The help text without a command."""
    rows = "\n".join(f"  {name:9s} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: python -m argenseg_jax CMD [--flag=value ...]\n\n{rows}\n\n`CMD --help` lists the flags of a command."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 a check failed or a fault of ours, 2 user error.

    130 is Ctrl-C and 141 for a reader of stdout that is gone, as a shell reports them.
    """
    processes.end_with_parent()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stderr)
        return 0 if argv else 2
    try:
        return _run(argv[0], argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        code = _report(error, argv)
    if common.is_distributed():  # the others cannot continue without this process
        common.leave(code)
    return code


def entry() -> NoReturn:
    """`main` as a process."""
    code = main()
    if code == _CTRL_C_EXIT:  # without what libraries do at a normal exit: they print, and wait for one another
        for child in multiprocessing.active_children():
            child.terminate()
        common.leave(code)
    sys.exit(code)


def _report(error: BaseException, argv: Sequence[str]) -> int:
    """Writes to stderr what ended the command; returns its exit code.

    One line for what the user, the disk or the machine caused, with a traceback under --debug. Anything
    else is a fault of this program: a traceback, and a line that asks for a report.
    """
    line = _cause(error)
    if line is None or any(a in ("--debug", "--debug=true", "-debug") for a in argv):
        traceback.print_exception(error)
    if line is None:
        line = (
            f"unexpected {type(error).__name__}; please report this, with the traceback above and the "
            f"command: argenseg {shlex.join(argv)}"
        )
    print(f"error: {brief(line, _LINE)}", file=sys.stderr)
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):  # what stdout still holds would raise again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, KeyboardInterrupt):
        return _CTRL_C_EXIT
    return 2 if _cause(error) else 1


def _cause(error: BaseException) -> str | None:
    """What the user can mend, in one line; None where the fault is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C; what is complete is kept"
    if isinstance(error, BrokenPipeError):
        return "broken pipe: what reads the output of this command has ended"
    if isinstance(error, OSError) and error.errno:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror or str(error)
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}"
    if isinstance(error, ImportError) and _BUCKET.search(str(error)):
        return f"{brief(error)}; gs:// needs gcsfs: pip install 'argenseg_jax[tpu]'"
    if _MACHINE.search(text := str(error)):  # XLA and TensorStore have exceptions of their own for these
        return brief(text, 300)
    return None


def _run(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f"unknown command '{brief(command, 60)}'; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[command][0])
    if any(a in ("-h", "--help") for a in args):
        print(f"{command}: {COMMANDS[command][1]}\n\n{module.__doc__}\n" + flags.FLAGS.get_help(), file=sys.stderr)
        return 0
    parsing.parse(command, args)
    getattr(module, "setup_devices", common.setup_devices)()
    result = module.run()
    common.print_result(result)
    return 1 if result.get("ok") is False else 0


if __name__ == "__main__":
    entry()
