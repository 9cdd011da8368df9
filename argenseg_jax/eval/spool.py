"""Records by index, in a temporary file beyond some megabytes: any number of them in little memory."""

from __future__ import annotations

import array
import json
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from argenseg_jax.errors import UserError


class Spool(Mapping[int, dict[str, Any]]):
    """{index: record}, in the order of the index; records are JSON-able.

    Args:
      count: indices are below it.
      memory: bytes that stay in memory.
    """

    def __init__(self, count: int, memory: int = 32 << 20):
        self.count = count
        self._file = tempfile.SpooledTemporaryFile(max_size=memory)
        self._starts = array.array("q", [-1]) * count
        self._end = self._count = 0

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Takes a record, unless that index has one; UserError where the temporary folder is full."""
        if index in self:
            return
        line = json.dumps(record).encode() + b"\n"
        try:
            self._file.seek(self._end)
            self._file.write(line)
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()} cannot take more answers ({error.strerror}); set TMPDIR to a folder with room"
            ) from None
        self._starts[index], self._end, self._count = self._end, self._end + len(line), self._count + 1

    def discard(self, index: int) -> None:
        """Forgets the record of an index."""
        if index in self:
            self._starts[index], self._count = -1, self._count - 1

    def lines(self) -> Iterator[str]:
        """The records as lines of JSON."""
        return map(self._line, self)

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._starts) and self._starts[index] >= 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self:
            raise KeyError(index)
        return json.loads(self._line(index))

    def __iter__(self) -> Iterator[int]:
        return (index for index, start in enumerate(self._starts) if start >= 0)

    def __len__(self) -> int:
        return self._count

    def _line(self, index: int) -> str:
        self._file.seek(self._starts[index])
        return self._file.readline().decode()
