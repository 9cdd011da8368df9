"""Config files: Python files with get_config(), read so that a fault in one is a line with its place."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from argenseg_jax import config_keys
from argenseg_jax.errors import UserError, brief

_MODULE = "argenseg_config_file"  # its name in sys.modules, where dataclasses look for it


def load_module(path: str) -> ModuleType:
    """Runs the file, whose neighbours (`from configs import common`) can be imported.

    Raises UserError "FILE:LINE: ExceptionName: text" for whatever it raises.
    """
    if not os.path.isfile(path):
        raise UserError(f"--config: there is no file '{path}'")
    if not path.endswith(".py"):
        raise UserError(f"--config: '{path}' is no Python file (.py)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    with _located(path):
        spec.loader.exec_module(module)
    return module


def call(module: ModuleType, name: str, *args: Any) -> Any:
    """module.NAME(*args), with faults as `load_module` has them; UserError where there is no such function."""
    path = module.__file__
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{path} has no {name}()")
    with _located(path):
        return function(*args)


def get_config(spec: str) -> tuple[ModuleType, ConfigDict]:
    """The module of FILE.py[:arg] and its config, checked and locked; numpy numbers are made Python's."""
    path, colon, arg = spec.partition(":")
    module = load_module(path)
    config = call(module, "get_config", *([arg] if colon else []))
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returns {type(config).__name__}; a ConfigDict such as common.base() is expected"
        )
    with _located(path):  # values that cannot be copied
        config = ConfigDict(config) if isinstance(config, FrozenConfigDict) else copy.deepcopy(config)
    try:
        plain = config_keys.flattened(config)
        # Only what is not plain yet: an assignment ends what a derived reference follows.
        override(config, {k: v for k, v in plain.items() if repr(config_keys.lookup(config, k)) != repr(v)})
        config_keys.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return module, config.lock()


def override(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    """Sets checked keys {'optim.lr': value}; references of a config to its own fields are followed."""
    with config.unlocked(), config.ignore_type():
        for key, value in settings.items():
            config_keys.assign(config, key, value)


@contextlib.contextmanager
def _located(path: str) -> Iterator[None]:
    """Any exception of a config file as a UserError that names the line in it. Ctrl-C passes."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit and GeneratorExit too: it is the file's
        line, text = _line(error, path), error.msg if isinstance(error, SyntaxError) else error
        if isinstance(error, SyntaxError) and not _same(error.filename, path):
            text = f"{error.msg} ({error.filename}, line {error.lineno})"
        with contextlib.suppress(Exception):  # __str__ of the user's own exception
            text = brief(text)
        text = text if isinstance(text, str) else ""
        raise UserError(
            f"{path}{f':{line}' if line else ''}: {type(error).__name__}{f': {text}' if text else ''}"
        ) from error


def _line(error: BaseException, path: str) -> int | None:
    """Number of the innermost line of the file that took part in the error."""
    if isinstance(error, SyntaxError) and _same(error.filename, path):
        return error.lineno
    line, frame = None, error.__traceback__
    while frame:
        if _same(frame.tb_frame.f_code.co_filename, path):
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def _same(name: str | None, path: str) -> bool:
    return name is not None and os.path.abspath(name) == os.path.abspath(path)
