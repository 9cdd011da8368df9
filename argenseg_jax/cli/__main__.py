"""The command line: `python -m argenseg_jax CMD --flag=value`; imports only the chosen command.

A command is a module of this package. Importing it defines its absl flags and nothing more (no
jax); its `run() -> dict` then does the work, and the dict is printed as the last line of stdout. A
`setup_devices()` of its own replaces the usual one, before the first use of jax.
"""
from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

from absl import flags

from argenseg_jax import processes
from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

COMMANDS = {
    "train": ("argenseg_jax.cli.train", "train a model, or go on with a run that was stopped"),
    "evaluate": ("argenseg_jax.cli.evaluate", "cIoU, gIoU and Pr@X of a model on a data set"),
    "segment": ("argenseg_jax.cli.segment", "one image and a prompt to a mask file"),
    "chat": ("argenseg_jax.cli.chat", "several turns about one image, in a terminal"),
    "convert": ("argenseg_jax.cli.convert", "weights between PyTorch and Orbax, both ways"),
    "verify": ("argenseg_jax.cli.verify", "compare with numbers recorded from the reference"),
    "compile": ("argenseg_jax.cli.compile", "compile for TPUs without having one: does it fit"),
    "prepare": ("argenseg_jax.cli.prepare", "any data source to ArrayRecord shards"),
    "sweep": ("argenseg_jax.cli.sweep", "expand a config's sweep() and run its points"),
    "serve": ("argenseg_jax.cli.serve", "a local web page for prompts and masks"),
}


def usage() -> str:
    """The help text without a command."""
    rows = "\n".join(f"  {name:9s} {text}" for name, (_, text) in COMMANDS.items())
    return (f"usage: python -m argenseg_jax CMD [--flag=value ...]\n\n{rows}\n\n"
            "`CMD --help` lists the flags of a command.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 a check failed, 2 user error."""
    processes.end_with_parent()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stderr)
        return 0 if argv else 2
    debug = any(a in ("--debug", "--debug=true", "-debug") for a in argv)
    try:
        return _run(argv[0], argv[1:])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except Exception:
        if not common.is_distributed():
            raise
        traceback.print_exc()
        code = 1
    if common.is_distributed():  # the others cannot go on without this process
        common.leave(code)
    return code


def _run(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(COMMANDS[command][0])
    if any(a in ("-h", "--help") for a in args):
        print(f"{command}: {COMMANDS[command][1]}\n\n{module.__doc__}\n"
              + flags.FLAGS.get_help(), file=sys.stderr)
        return 0
    common.parse_flags(command, args)
    getattr(module, "setup_devices", common.setup_devices)()
    result = module.run()
    common.print_result(result)
    return 1 if result.get("ok") is False else 0


if __name__ == "__main__":
    sys.exit(main())
