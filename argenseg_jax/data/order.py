"""The endless order of a mixture's samples, and how it is resumed when the data have changed.

The order of a component is a shuffle of its samples, epoch by epoch. It depends on the number of samples,
so a run that is resumed on longer data would see some of them twice and others never. Instead an order is
a sequence of spans: the current epoch ends with the samples that it began with, and all samples take
part from the next epoch on. The weights of the mixture stay those of the saved run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain.python as grain
import numpy as np


class Component(NamedTuple):
    """A component of the mixture: its name for messages, its current number of samples, its weight."""

    name: str
    length: int
    weight: float


class Span(NamedTuple):
    """Epochs of the first `length` samples, up to index `end` of the component's stream (None: endless)."""

    length: int
    end: int | None


class Order:
    """The endless order of the samples of all components.

    Args:
      components: of the mixture.
      stream: (number of the component, length, seed) -> its endless shuffled stream.
      seed: of all orders.
    """

    def __init__(self, components: Sequence[Component], stream: Callable[[int, int, int], grain.MapDataset], seed: int):
        self._components, self._stream = list(components), stream
        self._seeds = np.random.SeedSequence(seed).generate_state(len(components))
        self.spans: list[tuple[Span, ...]] = [(Span(component.length, None),) for component in components]
        self.weights = [component.weight for component in components]

    def dataset(self) -> grain.MapDataset:
        """The samples in their order."""
        streams = [
            _Spans([self._stream(k, span.length, int(self._seeds[k]) + n) for n, span in enumerate(spans)], spans)
            if spans[1:]
            else self._stream(k, spans[-1].length, int(self._seeds[k]))
            for k, spans in enumerate(self.spans)
        ]
        return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights=self.weights)

    def get_state(self) -> dict[str, Any]:
        """{number of the component: {"spans", "weight"}}."""
        return {
            str(k): {"spans": [list(span) for span in spans], "weight": weight}
            for k, (spans, weight) in enumerate(zip(self.spans, self.weights, strict=True))
        }

    def set_state(self, state: Mapping[str, Any], consumed: int) -> None:
        """Resumes a run's order, of which the first `consumed` samples were used; logs changed data.

        A state with another number of components is ignored: a changed `data.sources` starts a new order.
        ValueError, TypeError or KeyError where the state is damaged.
        """
        if sorted(state) != sorted(map(str, range(len(self._components)))):
            return
        spans = [_parse_spans(state[str(k)]["spans"]) for k in range(len(self._components))]
        weights = [float(state[str(k)]["weight"]) for k in range(len(self._components))]
        if all(len(s) == 1 and s[0].length == c.length for s, c in zip(spans, self._components, strict=True)):
            return  # the same data; the config may have new weights
        self.spans, self.weights = spans, weights
        used = self._consumed_by_component(consumed)
        for k, component in enumerate(self._components):
            saved = spans[k][-1].length
            if saved == component.length:
                continue
            message = f"{component.name}: {component.length} samples, {saved} when this run was saved; "
            if saved > component.length:
                print(f"{message}the missing ones are skipped as broken", file=sys.stderr)
                continue
            self.spans[k] = _extended(spans[k], component.length, used[k])
            print(
                f"{message}the current epoch ends with the {saved} samples, the next one has all of them",
                file=sys.stderr,
            )

    def _consumed_by_component(self, consumed: int) -> list[int]:
        """How many samples of each component's stream are among the first `consumed` of the mixture."""
        if len(self._components) == 1:
            return [consumed]
        mixed: Any = self.dataset()
        selection = mixed._selection_map  # grain has no public way to ask
        used, position = {}, consumed - 1
        while position >= 0 and len(used) < len(self._components):
            component, index = selection[position]
            used.setdefault(component, index + 1)
            position -= 1
        return [used.get(k, 0) for k in range(len(self._components))]


def _parse_spans(saved: Sequence[Sequence[Any]]) -> tuple[Span, ...]:
    spans = tuple(Span(*span) for span in saved)
    ends = [0, *(span.end for span in spans[:-1])]
    if (
        not spans
        or spans[-1].end is not None
        or not all(type(n) is int for n in (*ends, *(s.length for s in spans)))
        or ends != sorted(set(ends))
        or min(span.length for span in spans) < 1
    ):
        raise ValueError("invalid spans of a component")
    return spans


def _extended(spans: Sequence[Span], length: int, used: int) -> tuple[Span, ...]:
    """The spans with the last one closed at the end of its epoch, and one of `length` samples after it."""
    *before, last = spans
    start = (before[-1].end if before else None) or 0
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
