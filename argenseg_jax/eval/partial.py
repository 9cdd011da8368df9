"""Answers of an evaluation, saved as they come: one that was stopped goes on where it was."""
from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import files, hosts
from argenseg_jax.eval import saved


class Partial:
    """A folder of rows, in files that appear whole and are never changed: no row is ever half there.

    The first line of a file says of which evaluation its rows are. Every process writes its own files,
    so on resume their number may be another one.

    Args:
      folder: shared by all processes; it appears with the first rows.
      key: what the answers depend on (data, checkpoint, flags), JSON-able. Files of another key are
        removed.
      every: seconds of answers that one file holds, and that a stop loses at most.
    """

    def __init__(self, folder: epath.PathLike, key: Mapping[str, Any], every: float = 10.0):
        self.folder, self.key, self.every = epath.Path(folder), json.loads(json.dumps(key)), every
        self._rows: list[Mapping[str, Any]] = []
        self._since = time.monotonic()

    def open(self) -> dict[int, dict[str, Any]]:
        """{index: row} of what is there; every process calls it, before any `add`."""
        found = {path: saved.read_rows(path) for path in sorted(self.folder.glob("*.jsonl"))}
        hosts.gather(None)  # all have read the same; nobody has written yet
        strange = [path for path, (head, *_) in found.items() if head != self.key]
        if hosts.is_first():
            for path in strange:
                path.unlink()
        hosts.gather(None)
        self._since = time.monotonic()
        return {row["index"]: row for path, (_, *rows) in found.items() if path not in strange for row in rows}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows; writes all that are not written yet when it is time."""
        self._rows += rows
        if self._rows and time.monotonic() - self._since >= self.every:
            # No other file begins with this sample: it is answered once.
            name = f"{self._rows[0]['index']}.jsonl"
            lines = "".join(json.dumps(row) + "\n" for row in (self.key, *self._rows))
            files.write(self.folder / name, lines)
            self._rows, self._since = [], time.monotonic()

    def remove(self) -> None:
        """When the evaluation is complete and its result written."""
        self.folder.rmtree(missing_ok=True)
