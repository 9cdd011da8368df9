"""Kinds of config keys: rules that a value obeys, in words and as a check, and how its text is read."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key may be.

    Attributes:
      rule: the rule in words, as messages end: 'a number from 0 to 1'.
      read: the text of a flag -> value; ValueError where it is none.
      good: whether a plain value obeys the rule.
      none: whether None is allowed.
    """

    rule: str
    read: Callable[[str], Any]
    good: Callable[[Any], bool]
    none: bool = False


# ---------------------------------------------------------------------------------- kinds of keys


def _read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "t")


def _read_int(text: str) -> int:
    if len(text) > 50:  # Python takes a second for a million digits, and refuses more than 4300
        raise ValueError(text)
    return int(text, 0 if re.match(r"[-+]?0[xob]", text, re.I) else 10)


def _read_tuple(text: str) -> tuple[Any, ...]:
    """A Python tuple or list; or else the text is the only element."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        if re.match(r"\s*[(\[]", text):
            raise ValueError(text) from None  # a tuple with a mistake in it
        value = text
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def read_literal(text: str) -> str:
    """Text as it is, unless it is quoted: so the word 'None' can be told from the value None."""
    if text[:1] in ("'", '"'):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return text
        return value if isinstance(value, str) else text
    return text


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """A text that a file's name, a prompt and JSON can hold."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _is_regex(value: Any) -> bool:
    if not _is_text(value):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError, MemoryError):
        return False
    return True


def flag() -> Key:
    """true or false."""
    return Key("true or false", _read_bool, lambda v: isinstance(v, bool))


def whole(low: int, high: int, zero: str = "", rest: bool = False) -> Key:
    """A whole number of [low, high]; `zero` tells what 0 means; `rest` allows -1."""
    rule = f"a whole number from {low} {f'(= {zero}) ' if zero else ''}to {high}{', or -1' if rest else ''}"
    return Key(rule, _read_int, lambda v: _is_int(v) and (low <= v <= high or (rest and v == -1)))


def real(low: float, high: float, zero: str = "", above: bool = False, below: bool = False) -> Key:
    """A finite number of [low, high], without the limits where `above` or `below` says so."""
    rule = (
        f"a number {'above' if above else 'from'} {low:g} {f'(= {zero}) ' if zero else ''}"
        f"{'and below' if below else 'to'} {high:g}"
    )
    inside = lambda v: (low < v if above else low <= v) and (v < high if below else v <= high)
    return Key(rule, float, lambda v: (_is_int(v) or (isinstance(v, float) and math.isfinite(v))) and inside(v))


def text(none: str = "") -> Key:
    """Any text; `none` tells what None means, where it is allowed."""
    return Key(f"a text{f', or None (= {none})' if none else ''}", read_literal, _is_text, none=bool(none))


def choice(*names: str) -> Key:
    """One of these names."""
    return Key("one of " + ", ".join(n or "''" for n in names), str, lambda v: isinstance(v, str) and v in names)


def match(pattern: str, rule: str) -> Key:
    """A text that is of a pattern, as a whole."""
    return Key(rule, read_literal, lambda v: _is_text(v) and bool(re.fullmatch(pattern, v, re.DOTALL)))


def several(good: Callable[[Any], bool], rule: str, least: int = 0) -> Key:
    """A tuple or list of values that are `good`."""
    return Key(
        f"a tuple of {rule}",
        _read_tuple,
        lambda v: isinstance(v, (tuple, list)) and least <= len(v) and all(map(good, v)),
    )


def regexes() -> Key:
    """Path regexes."""
    return several(_is_regex, "regular expressions, such as ('vision/.*',)")


def texts() -> Key:
    """Names or paths."""
    return several(lambda v: _is_text(v) and bool(v.strip()), "texts, such as ('a', 'b')")


def wholes(low: int, high: int) -> Key:
    """At least one whole number."""
    return several(lambda v: _is_int(v) and low <= v <= high, f"whole numbers from {low} to {high}", least=1)


def window() -> Key:
    """Two finite numbers in rising order, or ()."""
    number = real(-1e30, 1e30).good
    return Key(
        "() or (low, high) with low below high, such as (0, 4095)",
        _read_tuple,
        lambda v: isinstance(v, (tuple, list)) and (not v or (len(v) == 2 and all(map(number, v)) and v[0] < v[1])),
    )


def is_group(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and _is_regex(value[0]) and real(0, 1e6).good(value[1])
