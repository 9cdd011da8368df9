"""One job in several processes: values gathered from all processes, and a barrier."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather(value: Any) -> list[Any]:
    """[the value of process 0, of process 1, ...] on every process; all must call it together.

    Args:
      value: JSON-able; with several processes it comes back as JSON has it (tuples are lists).
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes)]


def barrier() -> None:
    """Waits until all processes have come here."""
    gather(None)


def fetch(tree: Any) -> Any:
    """The tree with complete numpy arrays for jax arrays, also for those whose shards other processes hold; all
    must call it together."""

    def to_host(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(to_host, tree)


def share(count: int) -> range:
    """Which of `count` items this process takes: every process_count-th."""
    return range(jax.process_index(), count, jax.process_count())


def is_first() -> bool:
    """Whether this is the process that writes and reports for all."""
    return jax.process_index() == 0
