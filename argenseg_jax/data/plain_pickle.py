"""Reads pickle files of plain data without unpickling: the opcodes are listed, not run.

Only containers, numbers, texts and None are understood. Whatever names a class or a function, and
so could run code, is refused; that is what makes files from strangers readable.
"""
from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from etils import epath

from argenseg_jax.errors import UserError

_MARK = object()
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
           "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(path: epath.PathLike) -> Any:
    """The value in a pickle file (protocols 0 to 5) of plain data; UserError for anything else."""
    try:
        return loads(epath.Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def loads(content: bytes) -> Any:
    """As `read`, of bytes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(content):
            name = code.name
            if name == "STOP":
                return stack.pop()
            _step(name, argument, stack, memo)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"not a readable pickle ({type(error).__name__}: {error})") from None
    raise UserError("not a readable pickle (it ends too early)")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
    elif name in ("PROTO", "FRAME"):
        pass
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in _TUPLES:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("LIST", "TUPLE", "DICT"):
        items = _since_mark(stack)
        stack.append({"LIST": list, "TUPLE": tuple, "DICT": _pairs}[name](items))
    elif name in ("APPEND", "APPENDS"):
        items = [stack.pop()] if name == "APPEND" else _since_mark(stack)
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _since_mark(stack)
        stack[-1].update(_pairs(items))
    elif name == "POP":
        stack.pop()
    else:
        raise UserError(f"the pickle holds more than plain data (opcode {name}: "
                        f"{str(argument)[:60]}); it is refused, because such files can run code")


def _since_mark(stack: list[Any]) -> list[Any]:
    """Takes what was pushed since the last mark off the stack, and the mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("no mark")
    items = stack[at + 1:]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
