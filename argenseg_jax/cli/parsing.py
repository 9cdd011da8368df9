"""The command line -> FLAGS: config overrides by the table of keys, and gates that hold for every flag."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from argenseg_jax import config_keys
from argenseg_jax.errors import UserError, brief

FLAGS = flags.FLAGS
# Flags that name a file or folder to read or write.
PATHS = (
    "workdir",
    "checkpoint",
    "image",
    "out",
    "overlay",
    "scales",
    "from",
    "to",
    "vqvae",
    "root",
    "image_root",
    "codes",
    "verify",
    "rescore",
    "hlo",
    "case",
)
# {command: {old spelling of a flag: its name}}; every old spelling that is still read is here.
OLD_FLAGS = {
    "evaluate": {
        "config.eval.prompt": "eval_prompt",
        "config.eval.masks": "eval_masks",
        "image-root": "image_root",
    },
}
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_LARGEST = 2**31 - 1  # of whole numbers on the command line; jax counts in int32


class ConfigFlag(flags.Flag):
    """--config: FILE.py[:arg] until `parse` replaces the value by the config that it names.

    Attributes:
      spec: FILE.py[:arg] as given.
      module: the file's module.
      overrides: {'optim.lr': value} of the command line.
    """

    def __init__(self, help_string: str):
        super().__init__(flags.ArgumentParser(), flags.ArgumentSerializer(), "config", None, help_string)
        self.spec = ""
        self.module: Any = None
        self.overrides: dict[str, Any] = {}


def parse(command: str, args: Sequence[str]) -> None:
    """Reads the command line into FLAGS; whatever is wrong with it becomes one UserError."""
    for number, arg in enumerate(args, 1):
        if "\0" in arg or re.search("[\ud800-\udfff]", arg):
            raise UserError(f"argument {number} ({brief(arg, 60)}) is no UTF-8 text")
    args = [_renamed(arg, OLD_FLAGS.get(command, {})) for arg in _with_files(args)]
    config = FLAGS["config"] if "config" in FLAGS else None
    overrides = []
    if isinstance(config, ConfigFlag):
        args, overrides = _split(args)
    sys.argv = [command, *args]
    try:
        rest = FLAGS(sys.argv)[1:]
    except (flags.Error, TypeError, ValueError, OSError) as error:
        raise UserError(brief(error, 400)) from error
    except RecursionError as error:  # absl looks for similar names, letter by letter
        raise UserError("Unknown command line flag: its name has hundreds of letters") from error
    if rest:
        raise UserError(f"unexpected argument '{brief(rest[0], 100)}'; flags are written --name=value")
    _check_values()
    if not isinstance(config, ConfigFlag):
        return
    if config.value is not None:
        _resolve(config, overrides)
    elif overrides:
        raise UserError(f"--config is missing, which {overrides[0][0]} would change")


def _with_files(args: Sequence[str]) -> list[str]:
    """The arguments with those that absl's --flagfile=FILE names in place of it."""
    named = [arg.partition("=") for arg in args if re.match(r"--?flagfile\b", arg)]
    if not named:
        return list(args)
    from argenseg_jax import files

    for flag, _, path in named:
        if not path:
            raise UserError(f"{flag}: write --flagfile=FILE")
        files.read_text(path, limit=2**20)
    try:
        return FLAGS.read_flags_from_files(list(args), force_gnu=False)
    except (flags.Error, ValueError, OSError) as error:
        raise UserError(brief(error, 400)) from error


def _renamed(arg: str, names: Mapping[str, str]) -> str:
    """The argument with the flag's name in place of its old spelling."""
    name, equals, value = arg.partition("=")
    found = re.fullmatch(r"(--?)(.+)", name, re.DOTALL)
    return f"--{names[found[2]]}{equals}{value}" if found and found[2] in names else arg


def _split(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """(other arguments, [(flag, key, text)]) of --config.KEY=TEXT, --config.KEY TEXT and --[no]config.KEY."""
    rest, found, pending = [], [], iter(args)
    for arg in pending:
        override = _OVERRIDE.fullmatch(arg)
        if not override:
            rest.append(arg)
            continue
        no, key, text = override.groups()
        switch = key in config_keys.KEYS and config_keys.KEYS[key].rule == config_keys.flag().rule
        if no and (text is not None or not switch):
            raise UserError(f"{brief(arg, 100)}: only a key that is true or false is written so")
        if text is None:
            text = ("false" if no else "true") if switch else next(pending, None)
        if text is None:
            raise UserError(f"{brief(arg, 100)}: its value is missing")
        found.append((arg, key, text))
    return rest, found


def _resolve(config: ConfigFlag, overrides: Sequence[tuple[str, str, str]]) -> None:
    """Replaces the flag's text by the ConfigDict, with the overrides, checked."""
    from argenseg_jax import config_files

    settings: dict[str, Any] = {}
    for flag, key, text in overrides:
        if key not in config_keys.KEYS:
            raise UserError(f"{brief(flag, 100)}: {config_keys.unknown(key)}")
        try:
            value = config_keys.parse(key, text)
        except UserError as error:
            raise UserError(f"--config.{error}") from None
        # A repeated flag of a tuple gives one element each time, of anything else the last counts.
        settings[key] = (*settings[key], *value) if key in settings and isinstance(value, tuple) else value
    config.spec, config.overrides = config.value, settings
    config.module, config.value = config_files.get_config(config.spec)
    config_files.override(config.value, settings)
    config_keys.check(config.value)


def _check_values() -> None:
    """Rules for all flags of a command: nothing empty, infinite or beyond int32; paths of known kinds."""
    for flag in _own_flags():
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        for value in values:
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{flag.name}={value}: a finite number is expected")
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise UserError(f"--{flag.name}: {config_keys.shown(value)} is beyond {_LARGEST}")
            if isinstance(value, str) and not value.strip() and flag.default != "":
                raise UserError(
                    f"--{flag.name} is empty (an unset variable of the shell?); leave the flag out or give it a value"
                )
            if value and flag.name in PATHS and "://" in value:
                from argenseg_jax import files

                files.check_file_system(value)


def _own_flags() -> Iterator[flags.Flag]:
    """The given flags that this package defines."""
    for name in FLAGS:
        if FLAGS.find_module_defining_flag(name, "").startswith(("argenseg_jax", "__main__")) and FLAGS[name].present:
            yield FLAGS[name]
