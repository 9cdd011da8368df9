"""Answers of an evaluation, saved as they come: one that was stopped goes on where it was."""
from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import files, hosts
from argenseg_jax.eval import saved

KEY = "evaluation.json"


class Partial:
    """A folder of rows, in files that appear whole and are never changed: no row is ever half there.

    Every process writes its own files, so on resume their number may be another one.

    Args:
      folder: of this evaluation alone; shared by all processes.
      key: what the answers depend on (data, checkpoint, flags), JSON-able. What the folder holds of
        another key is removed.
      every: seconds of answers that one file holds, and that a stop loses at most.
    """

    def __init__(self, folder: epath.PathLike, key: Mapping[str, Any], every: float = 10.0):
        self.folder, self.key, self.every = epath.Path(folder), json.loads(json.dumps(key)), every
        self._rows: list[Mapping[str, Any]] = []
        self._since = time.monotonic()

    def open(self) -> dict[int, dict[str, Any]]:
        """{index: row} of what is there; every process calls it, before any `add`."""
        hosts.gather(None)  # nobody writes yet
        if hosts.is_first() and self._of_another():
            self.folder.rmtree(missing_ok=True)
            files.write(self.folder / KEY, json.dumps(self.key, indent=1))
        hosts.gather(None)  # the folder is that of this key, for all
        rows = [row for path in sorted(self.folder.glob("*.jsonl")) for row in saved.read_rows(path)]
        hosts.gather(None)  # all have read the same
        self._since = time.monotonic()
        return {row["index"]: row for row in rows}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows; writes all that are not written yet when it is time."""
        self._rows += rows
        if self._rows and time.monotonic() - self._since >= self.every:
            # No other file begins with this sample: it is answered once.
            name = f"{self._rows[0]['index']}.jsonl"
            files.write(self.folder / name, "".join(json.dumps(row) + "\n" for row in self._rows))
            self._rows, self._since = [], time.monotonic()

    def remove(self) -> None:
        """When the evaluation is complete and its result written."""
        self.folder.rmtree(missing_ok=True)

    def _of_another(self) -> bool:
        path = self.folder / KEY
        return not path.exists() or files.read_json(path) != self.key
