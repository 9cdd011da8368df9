"""Reads single arrays of a checkpoint through TensorStore, one layer at a time."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore
from etils import epath

from argenseg_jax import files


class StoredLeaf:
    """A saved array that is read one layer at a time, by numpy's indexing of the first axis."""

    def __init__(self, array: tensorstore.TensorStore):
        self.shape, self.dtype = array.shape, array.dtype.numpy_dtype
        self._array = array
        self._layers = array.chunk_layout.read_chunk.shape[:1]  # layers per chunk
        self._block: tuple[int, np.ndarray] | None = None  # the chunk read last, and its number

    def __getitem__(self, index: int | types.EllipsisType) -> np.ndarray:
        if index is ... or self._layers == (1,):
            return self._array[index].read().result()
        block, offset = divmod(index, *self._layers)
        if self._block is None or self._block[0] != block:
            self._block = None  # freed before the next one is read
            start, size = block * self._layers[0], self._layers[0]
            self._block = block, self._array[start : min(start + size, self.shape[0])].read().result()
        layer = self._block[1][offset]
        if offset + 1 == len(self._block[1]):
            self._block = None  # the last layer was read: frees the memory
        return layer


def read_layout(item: epath.Path) -> Mapping[str, Any]:
    return files.read_json(item / "_METADATA")


def spec(item: epath.Path, layout: Mapping[str, Any], name: str) -> dict[str, Any]:
    """TensorStore's spec of a saved array; Orbax joins the names of a path by dots."""
    key = name.replace("/", ".") + "/"
    text = os.fspath(item)
    if files.is_remote(item):

        def store(path: str) -> Any:
            return f"{text}/{path}"
    else:

        def store(path: str) -> Any:
            return {"driver": "file", "path": f"{text}/{path}"}

    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    if layout.get("use_ocdbt"):
        return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": store(""), "path": key}}
    return {"driver": driver, "kvstore": store(key)}
