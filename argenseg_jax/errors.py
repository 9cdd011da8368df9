"""Errors that a user can fix (one line on the command line, exit code 2), and helpers that raise them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

# What reading data of an unexpected form raises: caught by every reader of untrusted values.
DATA_FAULTS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


_LONGEST = 2000  # characters of a message; names in data may have any length


class UserError(Exception):
    """Bad input. The message is one line: the file, key, line or shape at fault, and what to do.

    Names and values in it may be untrusted: unprintable characters are escaped, and the middle of a long
    message is left out.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        super().__init__(text)


class SampleError(UserError):
    """An invalid sample: training skips, counts and reports it; evaluation stops at it."""


def brief(error: object, limit: int = 200) -> str:
    """The text of an error, or of a value, as part of one line: at most `limit` characters, without memory addresses.

    The same fault has the same text in every run, so that faults can be counted by it.
    """
    text = re.sub(r"<(\S+)[^<>]* at 0x[0-9a-f]+>", r"<\1>", str(error)[: 100 * limit])
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text.encode("utf-8", "replace").decode()  # half an emoji cannot be printed
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@contextlib.contextmanager
def located(
    where: str,
    what: str = "sample",
    error: type[UserError] = SampleError,
    faults: type[Exception] | tuple[type[Exception], ...] = DATA_FAULTS,
) -> Iterator[None]:
    """Adds the location to errors: prefixes a UserError with `where`, and turns `faults` into one.

    Args:
      where: file and line or entry.
      what: what the value there should have been.
      error: the class to raise in both cases.
      faults: the exceptions to convert; Exception around a sample, which must never end a run.
    """
    try:
        yield
    except UserError as fault:
        raise error(f"{where}: {fault}") from None
    except faults as fault:
        raise error(f"{where}: not a {what} ({type(fault).__name__}: {brief(fault)})") from None
