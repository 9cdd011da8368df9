"""Reads pickle files of plain data without unpickling: the opcodes are listed, not run.

Only containers, numbers, strings and None are accepted. An opcode that names a class or a function, and
so could run code, is refused; so untrusted files can be read. The returned value is a tree of
bounded size and depth: a pickle of 250 bytes can refer to the same tuple 2**40 times, which code that
walks, hashes or prints it would follow.
"""

from __future__ import annotations

import itertools
import pickletools
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError, brief

MAX_BYTES = 256 * 2**20  # refs(unc).p of RefCOCO has about 50 MB
MAX_VALUES = 10_000_000  # values of the tree, and of the pickle; RefCOCO's have about 3 million
MAX_DEPTH = 100
_TEXT = 64  # characters that count as one more value
_BITS = 128  # of an integer
_KEYS = (str, bytes, int, float, bool, type(None))
_CONTAINERS = frozenset((list, tuple, dict))
_MARK = object()
_VALUES = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(path: epath.PathLike) -> Any:
    """The value in a pickle file (protocols 0 to 5) of plain data; UserError for anything else."""
    content = files.read_bytes(path, MAX_BYTES)
    try:
        return loads(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def loads(content: bytes) -> Any:
    """As `read`, of bytes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (code, argument, _) in enumerate(pickletools.genops(content)):
            if code.name == "STOP":
                value = stack.pop()
                _check_tree(value)
                return value
            if count >= 4 * MAX_VALUES:
                raise ValueError(f"more than {4 * MAX_VALUES} steps")
            _step(code.name, argument, stack, memo)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"not a readable pickle ({type(error).__name__}: {brief(error, 100)})") from None
    raise UserError("not a readable pickle (truncated)")


def _check_tree(value: Any) -> None:
    """ValueError unless the value, expanded, has at most MAX_VALUES values and MAX_DEPTH levels.

    A value that is referred to several times is visited once and counted each time.
    """
    sizes: dict[int, tuple[int, int] | None] = {}  # id -> (values, levels); None: its items are being visited
    pending = [((value,), False)]
    while pending:
        node, counted = pending.pop()
        if counted:
            sizes[id(node)] = _size(node, sizes)
        elif id(node) not in sizes:
            sizes[id(node)] = None
            pending.append((node, True))
            pending += [(item, False) for item in _items(node) if type(item) in _CONTAINERS]
        elif sizes[id(node)] is None:
            raise ValueError("a value that contains itself")


def _size(node: list | tuple | dict, sizes: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values, levels) of a container whose items are known."""
    size, depth = 1, 0
    for item in _items(node):
        kind = type(item)
        if kind in _CONTAINERS:
            known = sizes[id(item)]
            assert known is not None  # items are counted before their container
            inner, below = known
            size, depth = size + inner, max(depth, below)
        elif kind is str or kind is bytes:
            size += 1 + len(item) // _TEXT
        elif kind is int and item.bit_length() > _BITS:
            raise ValueError(f"an integer of more than {_BITS} bits")
        elif item is _MARK:
            raise ValueError("an unmatched mark")
        else:
            size += 1
    if size > MAX_VALUES or depth >= MAX_DEPTH + 1:  # one level is the tuple around the value
        raise ValueError(f"more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep")
    return size, depth + 1


def _items(node: list | tuple | dict) -> Iterable[Any]:
    return itertools.chain(node, node.values()) if type(node) is dict else node


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
        if len(stack) < count:
            raise ValueError("a tuple of more values than there are")
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
        shown = argument[:60] if isinstance(argument, (str, bytes)) else "" if argument is None else "a number"
        raise UserError(
            f"the pickle holds more than plain data (opcode {name}: {brief(shown, 60)}); it is "
            "refused, because such files can run code"
        )


def _since_mark(stack: list[Any]) -> list[Any]:
    """Takes what was pushed since the last mark off the stack, and the mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    for key in items[::2]:
        if not isinstance(key, _KEYS):  # hashing follows every reference
            raise ValueError(f"a key of type {type(key).__name__}")
    return dict(zip(items[::2], items[1::2], strict=True))
