"""The endless order of a mixture's samples, and how it stays the same where the data have changed.

The order of a part is a shuffle of its samples, epoch by epoch. It depends on the number of samples, so a
run that is resumed on longer data would see some of them twice and others never. Instead an order is a
row of spans: the epoch that was under way ends as it began, with the samples of then, and all of them
take part from the next one on. The shares of the mixture stay those of then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np


class Share(NamedTuple):
    """A part of the mixture: its name for messages, its samples now, its weight."""

    name: str
    length: int
    weight: float


class Span(NamedTuple):
    """Epochs of the first `length` samples, up to place `end` of the part's stream (None: without end)."""

    length: int
    end: int | None


class Order:
    """Which sample of which part comes when.

    Args:
      shares: the parts.
      stream: (number of the part, length, seed) -> its endless shuffled stream.
      seed: of all orders.
    """

    def __init__(self, shares: Sequence[Share], stream: Callable[[int, int, int], grain.MapDataset], seed: int):
        self._shares, self._stream = list(shares), stream
        self._seeds = np.random.SeedSequence(seed).generate_state(len(shares))
        self.spans = [(Span(share.length, None),) for share in shares]
        self.weights = [share.weight for share in shares]

    def dataset(self) -> grain.MapDataset:
        """The samples in their order."""
        streams = [
            _Spans([self._stream(k, span.length, int(self._seeds[k]) + n) for n, span in enumerate(spans)], spans)
            if len(spans) > 1
            else self._stream(k, spans[0].length, int(self._seeds[k]))
            for k, spans in enumerate(self.spans)
        ]
        return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=self.weights)

    def get_state(self) -> dict[str, Any]:
        """{number of the part: {"spans", "weight"}}."""
        return {
            str(k): {"spans": [list(span) for span in spans], "weight": weight}
            for k, (spans, weight) in enumerate(zip(self.spans, self.weights, strict=True))
        }

    def set_state(self, state: Mapping[str, Any], taken: int) -> None:
        """Continues a run's order, of which the first `taken` places were in use; a line for changed data.

        ValueError, TypeError or KeyError where the state is damaged. One of other parts says nothing about
        these: whoever changes `data.sources` begins another order.
        """
        if sorted(state) != sorted(map(str, range(len(self._shares)))):
            return
        spans = [_spans(state[str(k)]["spans"]) for k in range(len(self._shares))]
        weights = [float(state[str(k)]["weight"]) for k in range(len(self._shares))]
        if all(len(s) == 1 and s[0].length == share.length for s, share in zip(spans, self._shares, strict=True)):
            return  # the same data; weights may have been set anew
        self.spans, self.weights = spans, weights
        used = self._used(taken)
        for k, share in enumerate(self._shares):
            if spans[k][-1].length == share.length:
                continue
            said = f"{share.name}: {share.length} samples, {spans[k][-1].length} when this run was saved; "
            if spans[k][-1].length > share.length:
                print(f"{said}those that are missing count as broken", file=sys.stderr)
                continue
            self.spans[k] = _grown(spans[k], share.length, used[k])
            print(
                f"{said}the epoch under way ends with the samples of then, the next one has all of them",
                file=sys.stderr,
            )

    def _used(self, taken: int) -> list[int]:
        """How many places of each part's stream lie before place `taken` of the mixture."""
        if len(self._shares) == 1:
            return [taken]
        picks, used, place = self.dataset()._selection_map, {}, taken - 1  # grain offers no other way to ask
        while place >= 0 and len(used) < len(self._shares):
            part, index = picks[place]
            used.setdefault(part, index + 1)
            place -= 1
        return [used.get(k, 0) for k in range(len(self._shares))]


def _spans(saved: Sequence[Sequence[Any]]) -> tuple[Span, ...]:
    spans = tuple(Span(*span) for span in saved)
    ends = [0, *(span.end for span in spans[:-1])]
    if (
        not spans
        or spans[-1].end is not None
        or not all(type(n) is int for n in (*ends, *(s.length for s in spans)))
        or ends != sorted(set(ends))
        or min(span.length for span in spans) < 1
    ):
        raise ValueError("the spans of a part are none")
    return spans


def _grown(spans: Sequence[Span], length: int, used: int) -> tuple[Span, ...]:
    """The spans with the last one closed at the end of its epoch, and one of `length` samples after it."""
    *before, last = spans
    start = before[-1].end if before else 0
    end = start + -(-max(used - start, 0) // last.length) * last.length
    return (*before, *([Span(last.length, end)] if end > start else []), Span(length, None))


class _Spans(grain.MapDataset):
    """One stream after another, each up to its end."""

    def __init__(self, streams: Sequence[grain.MapDataset], spans: Sequence[Span]):
        super().__init__(list(streams))
        self._ends = [span.end for span in spans]

    def __len__(self) -> int:
        return len(self._parents[-1])

    def __getitem__(self, index: int) -> Any:
        start = 0
        for stream, end in zip(self._parents, self._ends, strict=True):
            if end is None or index < end:
                return stream[index - start]
            start = end
        raise IndexError(index)
