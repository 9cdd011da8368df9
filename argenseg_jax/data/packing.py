"""Sequences from encoded examples: one in each, or as many as fit, chosen from a buffer.

Axes: t tokens, p tiles and m masks of an example; T, P, M those of a packed sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from argenseg_jax.vocab import IGNORE

Example = Mapping[str, np.ndarray]  # tokens, labels i32[t], tiles u8[p, ...], masks u8[m, ...]
Size = Mapping[str, int]  # of an example, or the capacity of a sequence
PackedSequence = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How examples become sequences.

    Attributes:
      capacity: of a sequence; no example is larger.
      size: of an example.
      join: examples that fit together -> a sequence.
      buffer: number of examples from which a sequence is filled; 0 = one example per sequence.
    """

    capacity: Size
    size: Callable[[Example], Size]
    join: Callable[[Sequence[Example]], PackedSequence]
    buffer: int = 0


def next_index(pending: Sequence[Size], capacity: Size, *, first: bool) -> int | None:
    """Index of the pending example to add to a sequence: the longest that fits, or None.

    Args:
      pending: sizes, the oldest first.
      capacity: what is left of the sequence.
      first: whether the sequence is empty; it then begins with the oldest, so that none waits forever.
    """
    if first:
        return 0
    fits = [k for k, size in enumerate(pending) if all(size[key] <= capacity[key] for key in capacity)]
    return max(fits, key=lambda k: (pending[k]["tokens"], -k), default=None)


def fill(packing: Packing, pending: list[tuple[int, Example]], refill: Callable[[int], None]) -> list[Example]:
    """The examples of the next sequence.

    Args:
      packing: the rule.
      pending: (number, example), the oldest first; those of the sequence are removed.
      refill: n -> None, appends to `pending` until it holds n examples.
    """
    chosen, capacity = [], packing.capacity
    while not chosen or packing.buffer:
        refill(max(packing.buffer, 1))
        sizes = [packing.size(example) for _, example in pending]
        index = next_index(sizes, capacity, first=not chosen)
        if index is None:
            break
        chosen.append(pending.pop(index)[1])
        capacity = {key: capacity[key] - sizes[index][key] for key in capacity}
    return chosen


def size(example: Example) -> Size:
    """Size of an example of the LM task; `labels` counts the positions with a target."""
    return {
        "tokens": len(example["tokens"]),
        "labels": int(np.count_nonzero(example["labels"][1:] != IGNORE)),
        "tiles": len(example["tiles"]),
        "masks": len(example["masks"]),
    }


def join(examples: Sequence[Example], capacity: Size, pad: int) -> PackedSequence:
    """One sequence: segments 1, 2, ... in order, positions from 0 in each, then padding of segment 0.

    Tiles and masks are in the order of their placeholders in the tokens, followed by zeros.

    Returns:
      tokens, labels, positions, segment_ids i32[T], tiles u8[P, S, S, 3], masks u8[M, R, R, 3].
    """

    def padded_tokens(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
        return _padded(np.concatenate(arrays).astype(np.int32), capacity["tokens"], fill)

    lengths = [len(e["tokens"]) for e in examples]
    # The last position of a segment must not predict the first token of the next one.
    labels = [np.concatenate([[IGNORE], e["labels"][1:]]) for e in examples]
    return {
        "tokens": padded_tokens([e["tokens"] for e in examples], pad),
        "labels": padded_tokens(labels, IGNORE),
        "positions": padded_tokens([np.arange(n) for n in lengths], 0),
        "segment_ids": padded_tokens([np.full(n, k) for k, n in enumerate(lengths, 1)], 0),
        "tiles": _padded(np.concatenate([e["tiles"] for e in examples]), capacity["tiles"]),
        "masks": _padded(np.concatenate([e["masks"] for e in examples]), capacity["masks"]),
    }


def _padded(items: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    padded = np.full((length, *items.shape[1:]), fill, items.dtype)
    padded[: len(items)] = items
    return padded
