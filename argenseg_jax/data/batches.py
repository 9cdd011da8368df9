"""An endless order of samples -> batches, with grain: shared out among places, packed, stacked, resumed.

What a place of the batch takes does not depend on the process that reads it, so a run may go on
with another number of processes. A broken sample is skipped, counted by file and line, and too many
of them end the run.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from argenseg_jax import processes
from argenseg_jax.data import packing
from argenseg_jax.data.order import Order
from argenseg_jax.errors import UserError, located

Batch = dict[str, np.ndarray]
SMALL = 100  # the share of broken samples is taken of at least so many: one early fault is no verdict


@dataclasses.dataclass(frozen=True)
class InvalidSample:
    """Stands in the order for a sample that cannot be used."""

    reason: str


class BatchIterator(Iterator[Batch]):
    """Iterates over batches, and remembers which samples were taken and which of them were broken.

    All processes read one endless order of samples. Place r of a batch of B takes the samples r,
    r + B, r + 2 B, ... of it, and a broken one is followed by the next of the same place. Where rows
    are packed, some of the samples that a place has taken wait for a later row. So each place depends
    on nothing but how many samples it has taken and which of them wait, whoever reads it: this is the
    state, the same for any number of processes, devices and workers, and a run that goes on with
    another number of them takes every sample once, as if nothing had happened.

    Attributes:
      skipped: {message that names file and line: times seen} in this process's slots, up to the
        last batch that came out.
      close: call it to end the reading threads and processes; otherwise they end with the iterator.
    """

    def __init__(
        self,
        order: Order,
        rows: packing.Packing,
        batch_size: int,
        slots: Sequence[int],
        *,
        max_broken: float = 0.01,
        workers: int = 0,
        threads: int = 2,
    ):
        """Starts at the beginning.

        Args:
          order: of pieces (dicts of arrays) and InvalidSample, without end.
          rows: how pieces become rows.
          batch_size: B, rows of the global batch.
          slots: the slots of it that this process reads.
          max_broken: largest share of broken samples; more of them are a UserError.
          workers: most worker processes; they divide the places evenly among them.
          threads: that read in this process where there are no workers; 0 = the one that batches.
        """
        self._order, self._packing, self._size = order, rows, batch_size
        self._max_broken, self._workers, self._threads = max_broken, workers, threads
        self._open({place: _Taken() for place in slots})

    def __next__(self) -> Batch:
        batch, self._taken = next(self._iterator)
        return batch

    @property
    def skipped(self) -> dict[str, int]:
        total = collections.Counter()
        for taken in self._taken.values():
            total.update(taken.broken)
        return dict(total)

    def get_state(self) -> dict[str, Any]:
        """{"taken", "waiting", "broken": {place: ...}, "order"} of this process; that of a run has all places.

        Which samples wait is said by their numbers among those that the place has taken.
        """
        return {
            "order": self._order.get_state(),
            "taken": {str(place): t.count for place, t in self._taken.items()},
            "waiting": {str(place): list(t.waiting) for place, t in self._taken.items() if t.waiting},
            "broken": {str(place): dict(t.broken) for place, t in self._taken.items() if t.broken},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where a run's state was taken; UserError if it is damaged or of another batch size."""
        rows = sorted(map(str, range(self._size)))
        with located("the saved iterator state", "state of the data", UserError):
            if (found := sorted(state["taken"])) != rows:
                raise UserError(f"of {len(found)} rows a batch, not of the {self._size} of this run")
            taken = {p: _Taken.of(state, str(p)) for p in self._taken}
            counts = {p: _Taken.of(state, str(p)).count for p in range(self._size)}
            used = max((p + self._size * (count - 1) + 1 for p, count in counts.items() if count), default=0)
            self._order.set_state(state.get("order", {}), used)
        self.close()
        self._open(taken)

    def _open(self, taken: dict[int, _Taken]) -> None:
        self._taken = taken
        rows = _Rows(
            self._order.dataset(),
            self._packing,
            self._size,
            taken,
            self._max_broken,
            threads=0 if self._workers else self._threads,
        )
        shares, workers = _Shares(rows), 0
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read flags; a notebook has parsed none
                flags.FLAGS.mark_as_parsed()
            # Every worker has its own places; grain takes their shares of a batch in turn.
            workers = max(n for n in range(1, self._workers + 1) if len(taken) % n == 0)
            shares = shares.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), processes.begin_worker)
        self._iterator = ThreadPrefetchIterDataset(
            _Batches(shares, taken, self._max_broken, workers), prefetch_buffer_size=2
        ).__iter__()
        # Also at exit: grain's threads must not outlive the modules that they use.
        self.close = weakref.finalize(self, _close, self._iterator)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """How many samples a place has taken; which of them wait; the broken ones by reason."""

    count: int = 0
    waiting: tuple[int, ...] = ()
    broken: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @classmethod
    def of(cls, state: Mapping[str, Any], row: str) -> _Taken:
        """The part of a run's state that belongs to a row; ValueError or TypeError where it is damaged."""
        count, waiting = state["taken"][row], state["waiting"].get(row, [])
        broken = collections.Counter(state["broken"].get(row, {}))
        if not all(type(n) is int and n >= 0 for n in (count, *waiting, *broken.values())):
            raise ValueError(f"row {row} has a number of samples that is none")
        if any(n >= count for n in waiting):
            raise ValueError(f"row {row} waits with samples that it has not taken")
        return cls(count, tuple(waiting), broken)


class _Row(NamedTuple):
    """A row, the place that it is for, what the place has taken by now and which of it waits, and the
    broken samples that were skipped for it."""

    arrays: Batch
    place: int
    count: int
    waiting: tuple[int, ...]
    broken: tuple[str, ...]


class _Rows(grain.IterDataset):
    """Endless _Rows of some places of the batch, in turn."""

    def __init__(
        self,
        order: grain.MapDataset,
        rows: packing.Packing,
        stride: int,
        taken: Mapping[int, _Taken],
        max_broken: float,
        threads: int,
    ):
        super().__init__(order)
        self.packing, self.stride, self.threads = rows, stride, threads
        self.taken = dict(taken)
        # In a row, which chance would not bring about; without such an end one could wait forever.
        self.most = SMALL / (1 - max_broken) if max_broken < 1 else math.inf

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """How grain gives each of its worker processes a share: some of the places."""
        self.taken = dict(list(self.taken.items())[sl])

    def __iter__(self) -> _RowsIterator:
        return _RowsIterator(self._parent, self)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, order: grain.MapDataset, rows: _Rows):
        super().__init__()
        self._places = [_Place(order, rows, place, taken) for place, taken in rows.taken.items()]
        self._ready: collections.deque[_Row] = collections.deque()
        self._pool = futures.ThreadPoolExecutor(rows.threads) if rows.threads else None

    def __next__(self) -> _Row:
        if not self._ready:
            read = self._pool.map if self._pool else map
            self._ready.extend(read(_Place.next_row, self._places))
        return self._ready.popleft()

    def get_state(self) -> dict[str, Any]:
        """Asked for by grain; what is saved comes with the rows."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Never called: a new iterator is made for a new place in the data."""

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Place:
    """Reads the samples of one place of the batch and fills its rows."""

    def __init__(self, order: grain.MapDataset, rows: _Rows, place: int, taken: _Taken):
        self._order, self._rows, self._place, self._count = order, rows, place, taken.count
        self._resumed = taken.waiting  # numbers of samples to be read again
        self._waiting: list[tuple[int, packing.Example]] = []  # number and content, the oldest first

    def next_row(self) -> _Row:
        rule, broken = self._rows.packing, []
        for number in self._resumed:
            self._take(number, broken)
        self._resumed = ()
        chosen = packing.fill(rule, self._waiting, lambda count: self._fill(count, broken))
        return _Row(rule.join(chosen), self._place, self._count, tuple(n for n, _ in self._waiting), tuple(broken))

    def _fill(self, length: int, broken: list[str]) -> None:
        """Reads until so many samples wait."""
        in_turn = 0
        while len(self._waiting) < length:
            in_turn = 0 if self._take(self._count, broken) else in_turn + 1
            self._count += 1
            if in_turn >= self._rows.most:
                raise UserError(f"the next {in_turn} samples are broken, one after another; the last: {broken[-1]}")

    def _take(self, number: int, broken: list[str]) -> bool:
        """Whether sample `number` of this place could be read."""
        piece = self._order[self._place + self._rows.stride * number]
        if isinstance(piece, InvalidSample):
            broken.append(piece.reason)
            return False
        self._waiting.append((number, piece))
        return True


class _Shares(grain.IterDataset):
    """Rows of one step, stacked: (batch of the places of this process or worker, its _Rows, emptied).

    A worker sends a few large arrays a step instead of as many small ones as it has rows.
    """

    def __iter__(self) -> _SharesIterator:
        return _SharesIterator(self._parent.__iter__(), len(self._parent.taken))


class _SharesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, places: int):
        super().__init__(parent)
        self._places = places

    def __next__(self) -> tuple[Batch, list[_Row]]:
        rows = [next(self._parent) for _ in range(self._places)]
        stacked = {key: np.stack([row.arrays[key] for row in rows]) for key in rows[0].arrays}
        return stacked, [row._replace(arrays={}) for row in rows]

    def get_state(self) -> dict[str, Any]:
        """Asked for by grain; what is saved comes with the rows."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Never called: a new iterator is made for a new place in the data."""


class _Batches(grain.IterDataset):
    """Puts shares together: (batch, {place: _Taken}); counts and judges what is broken."""

    def __init__(self, shares: grain.IterDataset, taken: Mapping[int, _Taken], max_broken: float, workers: int):
        super().__init__(shares)
        self.taken, self.max_broken, self.workers = dict(taken), max_broken, workers

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(self._parent.__iter__(), self)


class _BatchesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, batches: _Batches):
        super().__init__(parent)
        self._taken, self._max_broken = dict(batches.taken), batches.max_broken
        self._workers = batches.workers

    def __next__(self) -> tuple[Batch, dict[int, _Taken]]:
        shares = [next(self._parent) for _ in range(self._workers or 1)]
        for row in (row for _, rows in shares for row in rows):
            before = self._taken[row.place].broken
            self._taken[row.place] = _Taken(
                row.count, row.waiting, before + collections.Counter(row.broken) if row.broken else before
            )
            if row.broken:
                self._judge(row.broken[-1])
        # What workers send lies in shared memory that is not ours to keep.
        return self._joined(shares) if self._workers else shares[0][0], dict(self._taken)

    def _joined(self, shares: list[tuple[Batch, list[_Row]]]) -> Batch:
        """The rows of all shares, each at its place."""
        order = {place: at for at, place in enumerate(self._taken)}
        whole = {key: np.empty((len(order), *array.shape[1:]), array.dtype) for key, array in shares[0][0].items()}
        for batch, rows in shares:
            for key, array in batch.items():
                whole[key][[order[row.place] for row in rows]] = array
        return whole

    def _judge(self, last: str) -> None:
        count = sum(taken.broken.total() for taken in self._taken.values())
        seen = sum(taken.count for taken in self._taken.values())
        if count > self._max_broken * max(seen, SMALL):
            raise UserError(
                f"{count} of {seen} samples are broken, more than data.max_broken"
                f" = {self._max_broken:g}; the last: {last}"
            )

    def get_state(self) -> dict[str, Any]:
        """Asked for by grain; what is saved comes with the batches."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Never called: a new iterator is made for a new place in the data."""


def _close(iterator: grain.DatasetIterator) -> None:
    iterator.close()
    iterator.close = lambda: None  # grain's __del__ closes again, which fails while Python exits
