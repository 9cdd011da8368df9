"""Writes parameters that do not fit into memory as an Orbax step, slice by slice."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath

from argenseg_jax import files, trees
from argenseg_jax.ckpt import checksums as checksum_files
from argenseg_jax.ckpt.arrays import read_layout, spec
from argenseg_jax.interop.tensor_files import contiguous

_COMMITTED = "commit_success.txt"  # marks a complete folder in a bucket, for Orbax
_IN_FLIGHT_BYTES = 256 << 20


class ParamsWriter:
    """Like save_params, for parameters that do not fit into memory: slice by slice.

    Orbax writes the names, with placeholders; TensorStore then writes the arrays, one chunk per layer,
    uncompressed (weights hardly compress).
    """

    def __init__(self, path: epath.PathLike, leaves: Mapping[str, jax.ShapeDtypeStruct], *, checksums: bool = True):
        """Creates the arrays {leaf: shape and dtype}; every leaf must be written."""
        self._step, self._checksums = files.absolute(path), checksums
        item = self._step / "params"
        blanks = trees.unflatten({name: np.zeros(1) for name in leaves})
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns that there is no OCDBT to merge
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
            writer.save(item, args=ocp.args.PyTreeSave(blanks))
        logging.set_verbosity(verbosity)
        layout = read_layout(item)
        self._arrays, self._running, self._in_flight = {}, collections.deque(), 0
        for name, leaf in leaves.items():
            chunks = [1 if is_stacked(name) else leaf.shape[0], *leaf.shape[1:]]
            self._arrays[name] = tensorstore.open(
                {
                    **spec(item, layout, name),
                    "create": True,
                    "delete_existing": True,
                    "store_data_equal_to_fill_value": True,  # Orbax treats an absent chunk as damage
                    "metadata": {"compressor": None, "shape": leaf.shape, "chunks": chunks},
                },
                dtype=np.dtype(leaf.dtype),
            ).result()

    def write(self, name: str, where: tuple[int | slice, ...], values: np.ndarray) -> None:
        """Writes values at an index of a leaf, in the leaf's dtype; asynchronously."""
        array = self._arrays[name]
        values = contiguous(values, array.dtype.numpy_dtype)
        self._running.append((array[where].write(values), values.nbytes))
        self._in_flight += values.nbytes
        self._wait(_IN_FLIGHT_BYTES)

    def __enter__(self) -> ParamsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for all files, also if the conversion ends with an error."""
        self._wait(0)
        if not kind:
            if self._checksums:
                checksum_files.write(self._step)
            mark_complete(self._step)

    def _wait(self, limit: int) -> None:
        """Waits until at most `limit` bytes are in flight."""
        while self._running and self._in_flight > limit:
            future, size = self._running.popleft()
            future.result()
            self._in_flight -= size


def mark_complete(step: epath.Path) -> None:
    """Writes the marker of a complete step in a bucket, as Orbax's CheckpointManager does last."""
    if files.is_remote(step):
        (step / _COMMITTED).write_text("")


def is_stacked(name: str) -> bool:
    """Whether the first axis of a leaf is L, the layers of a scanned stack."""
    return "layers" in name.split("/")
