"""An endless order of samples -> batches, with grain: distributed over slots, packed, stacked, resumed.

    order     s0 s1 s2 s3 s4 s5 s6 s7 s8 s9 ...   endless, the same in every process (data/order.py)
                |
    slots     slot 0: s0 s4 s8 ...    slot 1: s1 s5 s9 ...    slot 2: s2 s6 ...    slot 3: s3 s7 ...
                |   slot r of a batch of B reads the samples r, r + B, r + 2 B, ...; invalid ones are skipped
                |   (_Slot); a buffer of pending examples fills one sequence per step (data/packing.py)
    shares    [slot 0, slot 2]        [slot 1, slot 3]       the sequences of one worker, stacked (_Shares)
                |
    batches   [slot 0, slot 1, slot 2, slot 3]   all slots of this process, and the Cursor of each (_Batches)

What a slot reads does not depend on the process that reads it, so a run may be resumed with another number
of processes. An invalid sample is skipped and counted by file and line; too many of them end the run.
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
from argenseg_jax.data import packing as packing_lib
from argenseg_jax.data.order import Order
from argenseg_jax.errors import UserError, located

Batch = dict[str, np.ndarray]
MIN_SAMPLES = 100  # the share of invalid samples is relative to at least this many


@dataclasses.dataclass(frozen=True)
class InvalidSample:
    """Takes the place in the order of a sample that cannot be used."""

    reason: str


class BatchIterator(Iterator[Batch]):
    """Iterates over batches, and tracks which samples were consumed and which of them were skipped.

    All processes read one endless order of samples. Slot r of a batch of B reads the samples r, r + B,
    r + 2 B, ... of it, and an invalid one is followed by the next of the same slot. With packing, some of
    the samples that a slot has consumed are pending for a later sequence. So each slot depends only on how
    many samples it has consumed and which of them are pending: this is the state, the same for any number
    of processes, devices and workers, and a run that is resumed with another number of them reads every
    sample once, as an uninterrupted run does.

    Attributes:
      skipped: {message that names file and line: times seen} in this process's slots, up to the last
        batch that was returned.
      close: call it to end the reading threads and processes; otherwise they end with the iterator.
    """

    def __init__(
        self,
        order: Order,
        packing: packing_lib.Packing,
        batch_size: int,
        slots: Sequence[int],
        *,
        max_broken: float = 0.01,
        workers: int = 0,
        threads: int = 2,
    ):
        """Starts at the beginning.

        Args:
          order: of examples (dicts of arrays) and InvalidSample, endless.
          packing: how examples become sequences.
          batch_size: B, sequences of the global batch.
          slots: those of the B that this process reads.
          max_broken: largest share of invalid samples; more of them are a UserError.
          workers: maximum number of worker processes; they divide the slots evenly among them.
          threads: that read in this process without workers; 0 = the thread that batches.
        """
        self._order, self._packing, self._batch_size = order, packing, batch_size
        self._max_broken, self._workers, self._threads = max_broken, workers, threads
        self._open({slot: Cursor() for slot in slots})

    def __next__(self) -> Batch:
        batch, self._cursors = next(self._iterator)
        return batch

    @property
    def skipped(self) -> dict[str, int]:
        total = collections.Counter()
        for cursor in self._cursors.values():
            total.update(cursor.skipped)
        return dict(total)

    def get_state(self) -> dict[str, Any]:
        """{"taken", "waiting", "broken": {slot: ...}, "order"} of this process; that of a run has all slots.

        Pending ("waiting") samples are given by their numbers among those that the slot has consumed ("taken").
        """
        return {
            "order": self._order.get_state(),
            "taken": {str(slot): c.consumed for slot, c in self._cursors.items()},
            "waiting": {str(slot): list(c.pending) for slot, c in self._cursors.items() if c.pending},
            "broken": {str(slot): dict(c.skipped) for slot, c in self._cursors.items() if c.skipped},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes from a run's state; UserError if it is damaged or of another batch size."""
        slots = sorted(map(str, range(self._batch_size)))
        with located("the saved iterator state", "state of the data", UserError):
            if (found := sorted(state["taken"])) != slots:
                raise UserError(f"of {len(found)} sequences per batch, not of the {self._batch_size} of this run")
            cursors = {r: Cursor.from_state(state, r) for r in range(self._batch_size)}
            ends = [r + self._batch_size * (c.consumed - 1) + 1 for r, c in cursors.items() if c.consumed]
            self._order.set_state(state.get("order", {}), max(ends, default=0))
        self.close()
        self._open({slot: cursors[slot] for slot in self._cursors})

    def _open(self, cursors: dict[int, Cursor]) -> None:
        self._cursors = cursors
        sequences = _Sequences(
            self._order.dataset(),
            self._packing,
            self._batch_size,
            cursors,
            self._max_broken,
            threads=0 if self._workers else self._threads,
        )
        shares, workers = _Shares(sequences), 0
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read flags; a notebook has parsed none
                flags.FLAGS.mark_as_parsed()
            # Every worker has its own slots; grain takes their shares of a batch in turn.
            workers = max(n for n in range(1, self._workers + 1) if len(cursors) % n == 0)
            shares = shares.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), processes.begin_worker)
        self._iterator = ThreadPrefetchIterDataset(
            _Batches(shares, cursors, self._max_broken, workers), prefetch_buffer_size=2
        ).__iter__()
        # Also at exit: grain's threads must not outlive the modules that they use.
        self.close = weakref.finalize(self, _close, self._iterator)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Iterator state of one slot.

    Attributes:
      consumed: samples read so far.
      pending: numbers of those that are in the buffer.
      skipped: invalid ones by reason.
    """

    consumed: int = 0
    pending: tuple[int, ...] = ()
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], slot: int) -> Cursor:
        """From the state of a run; ValueError or TypeError where it is damaged."""
        key = str(slot)
        consumed, pending = state["taken"][key], state["waiting"].get(key, [])
        skipped = collections.Counter(state["broken"].get(key, {}))
        if not all(type(n) is int and n >= 0 for n in (consumed, *pending, *skipped.values())):
            raise ValueError(f"slot {slot} has an invalid number of samples")
        if any(n >= consumed for n in pending):
            raise ValueError(f"slot {slot} has pending samples that it has not consumed")
        return cls(consumed, tuple(pending), skipped)


class _Sequence(NamedTuple):
    """One sequence of a batch.

    Attributes:
      arrays: its content.
      slot: of the batch.
      consumed, pending: of the slot's Cursor after this sequence.
      skipped: reasons of the invalid samples that were skipped for it.
    """

    arrays: packing_lib.PackedSequence
    slot: int
    consumed: int
    pending: tuple[int, ...]
    skipped: tuple[str, ...]


class _Sequences(grain.IterDataset):
    """Endless _Sequence of some slots of the batch, in turn."""

    def __init__(
        self,
        order: grain.MapDataset,
        packing: packing_lib.Packing,
        batch_size: int,
        cursors: Mapping[int, Cursor],
        max_broken: float,
        threads: int,
    ):
        super().__init__(order)
        self.packing, self.batch_size, self.threads = packing, batch_size, threads
        self.cursors = dict(cursors)
        # Consecutive ones, too many for chance; without this limit a slot could read forever.
        self.max_consecutive = MIN_SAMPLES / (1 - max_broken) if max_broken < 1 else math.inf

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain: gives each of its worker processes some of the slots."""
        self.cursors = dict(list(self.cursors.items())[sl])

    def __iter__(self) -> _SequencesIterator:
        order: Any = self._parent
        return _SequencesIterator(order, self)


class _Stateless(grain.DatasetIterator):
    """An iterator whose state is saved with its elements, as Cursors."""

    def get_state(self) -> dict[str, Any]:
        """Called by grain."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Never called: resuming makes a new iterator."""


class _SequencesIterator(_Stateless):
    def __init__(self, order: grain.MapDataset, sequences: _Sequences):
        super().__init__()
        self._slots = [_Slot(order, sequences, slot, cursor) for slot, cursor in sequences.cursors.items()]
        self._ready: collections.deque[_Sequence] = collections.deque()
        self._pool = futures.ThreadPoolExecutor(sequences.threads) if sequences.threads else None

    def __next__(self) -> _Sequence:
        if not self._ready:
            read = self._pool.map if self._pool else map
            self._ready.extend(read(_Slot.next_sequence, self._slots))
        return self._ready.popleft()

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Slot:
    """Reads the samples of one slot of the batch and fills its sequences."""

    def __init__(self, order: grain.MapDataset, sequences: _Sequences, slot: int, cursor: Cursor):
        self._order, self._sequences = order, sequences
        self._slot, self._consumed = slot, cursor.consumed
        self._resumed = cursor.pending  # numbers of samples to be read again
        self._pending: list[tuple[int, packing_lib.Example]] = []  # (number, example), the oldest first

    def next_sequence(self) -> _Sequence:
        packing, skipped = self._sequences.packing, []
        for number in self._resumed:
            self._read(number, skipped)
        self._resumed = ()
        chosen = packing_lib.fill(packing, self._pending, lambda count: self._refill(count, skipped))
        pending = tuple(number for number, _ in self._pending)
        return _Sequence(packing.join(chosen), self._slot, self._consumed, pending, tuple(skipped))

    def _refill(self, count: int, skipped: list[str]) -> None:
        """Reads until `count` examples are pending."""
        consecutive = 0
        while len(self._pending) < count:
            consecutive = 0 if self._read(self._consumed, skipped) else consecutive + 1
            self._consumed += 1
            if consecutive >= self._sequences.max_consecutive:
                raise UserError(
                    f"the next {consecutive} samples are broken, one after another; the last: {skipped[-1]}"
                )

    def _read(self, number: int, skipped: list[str]) -> bool:
        """Appends sample `number` of this slot to the buffer; False if it is invalid."""
        example: Any = self._order[self._slot + self._sequences.batch_size * number]
        if isinstance(example, InvalidSample):
            skipped.append(example.reason)
            return False
        self._pending.append((number, example))
        return True


class _Shares(grain.IterDataset):
    """Sequences of one step, stacked: (their batch, each _Sequence without arrays).

    A share has the slots of one process or worker. A worker sends a few large arrays per step instead of
    several small ones per sequence.
    """

    def __iter__(self) -> _SharesIterator:
        sequences: Any = self._parent
        return _SharesIterator(sequences.__iter__(), len(sequences.cursors))


class _SharesIterator(_Stateless):
    def __init__(self, parent: grain.DatasetIterator, count: int):
        super().__init__(parent)
        self._count = count

    def __next__(self) -> tuple[Batch, list[_Sequence]]:
        sequences: list[_Sequence] = [next(self._parent) for _ in range(self._count)]
        stacked = {key: np.stack([s.arrays[key] for s in sequences]) for key in sequences[0].arrays}
        return stacked, [s._replace(arrays={}) for s in sequences]


class _Batches(grain.IterDataset):
    """Joins shares: (batch, {slot: Cursor}); counts invalid samples."""

    def __init__(self, shares: grain.IterDataset, cursors: Mapping[int, Cursor], max_broken: float, workers: int):
        super().__init__(shares)
        self.cursors, self.max_broken, self.workers = dict(cursors), max_broken, workers

    def __iter__(self) -> _BatchesIterator:
        return _BatchesIterator(self._parent.__iter__(), self)


class _BatchesIterator(_Stateless):
    def __init__(self, parent: grain.DatasetIterator, batches: _Batches):
        super().__init__(parent)
        self._cursors, self._max_broken = dict(batches.cursors), batches.max_broken
        self._workers = batches.workers

    def __next__(self) -> tuple[Batch, dict[int, Cursor]]:
        shares = [next(self._parent) for _ in range(self._workers or 1)]
        for sequence in (s for _, sequences in shares for s in sequences):
            skipped = self._cursors[sequence.slot].skipped
            if sequence.skipped:
                skipped = skipped + collections.Counter(sequence.skipped)
            self._cursors[sequence.slot] = Cursor(sequence.consumed, sequence.pending, skipped)
            if sequence.skipped:
                self._check_skipped(sequence.skipped[-1])
        # The arrays of a worker are in shared memory that is reused: copy them.
        return self._joined(shares) if self._workers else shares[0][0], dict(self._cursors)

    def _joined(self, shares: list[tuple[Batch, list[_Sequence]]]) -> Batch:
        """The sequences of all shares, each at its slot."""
        index = {slot: k for k, slot in enumerate(self._cursors)}
        joined = {key: np.empty((len(index), *array.shape[1:]), array.dtype) for key, array in shares[0][0].items()}
        for batch, sequences in shares:
            for key, array in batch.items():
                joined[key][[index[s.slot] for s in sequences]] = array
        return joined

    def _check_skipped(self, last: str) -> None:
        count = sum(cursor.skipped.total() for cursor in self._cursors.values())
        seen = sum(cursor.consumed for cursor in self._cursors.values())
        if count > self._max_broken * max(seen, MIN_SAMPLES):
            raise UserError(
                f"{count} of {seen} samples are broken, more than data.max_broken"
                f" = {self._max_broken:g}; the last: {last}"
            )


def _close(iterator: grain.DatasetIterator) -> None:
    iterator.close()
    iterator.close = lambda: None  # grain's __del__ closes again, which fails while Python exits
