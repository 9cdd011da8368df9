"""Answers of an evaluation, saved as they come: one that was stopped resumes there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import distributed, files
from argenseg_jax.errors import UserError
from argenseg_jax.eval import predictions


class Partial:
    """A folder of records, in files that appear complete and are never changed: no record is ever half there.

    The first line of a file names the evaluation that its records are of. Every process writes its own files,
    so on resume their number may be another one.

    Args:
      folder: shared by all processes; it appears with the first records.
      key: what the answers depend on (data, checkpoint, flags), JSON-able. Files of another key are
        removed.
      every: seconds of answers that one file holds, and that a stop loses at most.
    """

    def __init__(self, folder: epath.PathLike, key: Mapping[str, Any], every: float = 10.0):
        self.folder, self.key, self.every = epath.Path(folder), json.loads(json.dumps(key)), every
        self._pending: list[Mapping[str, Any]] = []
        self._since = time.monotonic()

    def open(self) -> Iterator[dict[str, Any]]:
        """The records of what is there, older ones first; every process calls it, before any `add`.

        Files of another key, and damaged ones, are removed first.
        """
        paths = sorted(self.folder.glob("*.jsonl"), key=lambda path: (path.stat().mtime, path.name))
        unexpected = [path for path in paths if self._read(path) is None]
        distributed.barrier()  # all have read the same; nobody has written yet
        if distributed.is_first():
            for path in unexpected:
                path.unlink()
        distributed.barrier()
        self._since = time.monotonic()
        return (record for path in paths if path not in unexpected for record in self._read(path))

    def _read(self, path: epath.Path) -> list[dict[str, Any]] | None:
        """The records of a file; None where it is not of this evaluation."""
        try:
            head, *records = predictions.read_records(path)
        except UserError:
            return None
        valid = all(isinstance(record.get("index"), int) and record["index"] >= 0 for record in records)
        return records if head == self.key and valid else None

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes records; writes all that are not written yet when it is time."""
        self._pending += records
        if time.monotonic() - self._since >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes the records that are not written yet."""
        if self._pending:
            path = self.folder / f"{self._pending[0]['index']}.jsonl"
            if path.exists():  # a sample that has changed since; this one is read after it
                path = path.with_name(f"{path.stem}~{time.time_ns()}.jsonl")
            files.write(path, (json.dumps(record) + "\n" for record in (self.key, *self._pending)))
        self._pending, self._since = [], time.monotonic()

    def remove(self) -> None:
        """When the evaluation is complete and its result written."""
        self.folder.rmtree(missing_ok=True)
