"""Rows from encoded samples: one in each, or as many as fit, chosen from those that wait.

Axes: t tokens, p tiles and m masks of a sample; T, P, M those of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from argenseg_jax.vocab import IGNORE

Example = Mapping[str, np.ndarray]  # tokens, labels i32[t], tiles u8[p, ...], masks u8[m, ...]
Size = Mapping[str, int]  # of a piece, or the room that a row has
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How pieces become rows.

    Attributes:
      room: of a row; no piece is larger.
      size: of a piece.
      join: pieces that fit together -> a row.
      ahead: so many pieces wait for a row, of which it is filled; 0 = a row is one piece.
    """

    room: Size
    size: Callable[[Example], Size]
    join: Callable[[Sequence[Example]], Row]
    ahead: int = 0


def next_index(waiting: Sequence[Size], room: Size, *, first: bool) -> int | None:
    """Which waiting piece goes into the room that is left: the longest that fits, or None.

    Args:
      waiting: the oldest first.
      first: whether the row is empty; it then begins with the oldest, so that none waits forever.
    """
    if first:
        return 0
    fits = [k for k, size in enumerate(waiting) if all(size[key] <= room[key] for key in room)]
    return max(fits, key=lambda k: (waiting[k]["tokens"], -k), default=None)


def fill(rule: Packing, waiting: list[tuple[int, Example]], refill: Callable[[int], None]) -> list[Example]:
    """The pieces of the next row.

    Args:
      waiting: numbers and pieces, the oldest first; those of the row are taken out.
      refill: count -> None, adds to `waiting` until so many wait.
    """
    chosen, room = [], rule.room
    while not chosen or rule.ahead:
        refill(max(rule.ahead, 1))
        sizes = [rule.size(piece) for _, piece in waiting]
        pick = next_index(sizes, room, first=not chosen)
        if pick is None:
            break
        chosen.append(waiting.pop(pick)[1])
        room = {key: room[key] - sizes[pick][key] for key in room}
    return chosen


def size(piece: Example) -> Size:
    """Of a piece of the LM task; `labels` are the places with something to learn."""
    return {
        "tokens": len(piece["tokens"]),
        "labels": int(np.count_nonzero(piece["labels"][1:] != IGNORE)),
        "tiles": len(piece["tiles"]),
        "masks": len(piece["masks"]),
    }


def join(pieces: Sequence[Example], room: Size, pad: int) -> Row:
    """One row: segments 1, 2, ... in order, positions from 0 in each, then padding of segment 0.

    Tiles and masks follow each other in the order of their places in the tokens, then zeros.

    Returns:
      tokens, labels, positions, segment_ids i32[T], tiles u8[P, S, S, 3], masks u8[M, R, R, 3].
    """

    def line(parts: Sequence[np.ndarray], fill: int) -> np.ndarray:
        return _filled(np.concatenate(parts).astype(np.int32), room["tokens"], fill)

    lengths = [len(p["tokens"]) for p in pieces]
    # Nothing may be learned from the last place of one segment about the first of the next.
    labels = [np.concatenate([[IGNORE], p["labels"][1:]]) for p in pieces]
    return {
        "tokens": line([p["tokens"] for p in pieces], pad),
        "labels": line(labels, IGNORE),
        "positions": line([np.arange(n) for n in lengths], 0),
        "segment_ids": line([np.full(n, k) for k, n in enumerate(lengths, 1)], 0),
        "tiles": _filled(np.concatenate([p["tiles"] for p in pieces]), room["tiles"]),
        "masks": _filled(np.concatenate([p["masks"] for p in pieces]), room["masks"]),
    }


def _filled(items: np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    filled = np.full((length, *items.shape[1:]), fill, items.dtype)
    filled[: len(items)] = items
    return filled
