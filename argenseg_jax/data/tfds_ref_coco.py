"""TFDS's own `ref_coco` (RefCOCO, RefCOCO+, RefCOCOg), built with file_format='array_record'.

    ref_coco/refcoco_unc/1.1.0/{dataset_info.json, features.json, *.array_record*}
    a record: image, image/id, objects: {id, mask, refexp: {refexp_id, raw}, ...}, coco_annotations
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import layout, psalm
from argenseg_jax.data.records import open_split
from argenseg_jax.data.sample import Sample

# The part of a record that says how many expressions there are.
WORDS = tfds.features.FeaturesDict({"objects": tfds.features.Sequence(
    {"refexp": tfds.features.Sequence({"refexp_id": np.int64, "raw": tfds.features.Text()})})})


class Phrase(NamedTuple):
    """One expression: place of the record, of the object in it, and its words."""

    record: int
    object: int
    words: str


class RefCocoSource(layout.Indexed[Phrase]):
    """One sample per expression; opening it reads all records, without their pictures.

    Args:
      folder: the version folder.
      split: train, validation, testA, testB, test; `val` is validation.
      prompt: see psalm.question.
    """

    def __init__(self, folder: epath.PathLike, split: str = "train", prompt: str = "referring"):
        psalm.question([], prompt)
        self.prompt, split = prompt, {"val": "validation"}.get(split, split)
        builder, self._records = open_split(folder, split)
        raw = builder.as_data_source(split=split,
                                     deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        words = (WORDS.deserialize_example_np(raw[i]) for i in range(len(raw)))
        entries = [Phrase(i, k, text.decode()) for i, record in enumerate(words)
                   for k, texts in enumerate(record["objects"]["refexp"]["raw"]) for text in texts]
        super().__init__(f"{folder} ({split})", entries)

    def from_(self, entry: Phrase) -> str:
        return f"record {entry.record}, '{entry.words}'"

    def made(self, entry: Phrase) -> Sample:
        record = self._records[entry.record]
        shown = record["objects"]["mask"][entry.object][..., 0]
        return Sample(layout.turns(psalm.question([entry.words], self.prompt)), (record["image"],),
                      ((shown > 0).astype(np.uint8) * 255,),
                      {"files": [f"image {record['image/id']}"], "sents": [entry.words],
                       "metric": "referring"})


def is_ref_coco(folder: epath.PathLike) -> bool:
    """Whether the folder's features are those of `ref_coco`."""
    path = epath.Path(folder) / "features.json"
    return path.exists() and "refexp" in _keys(files.read_json(path))


def _keys(tree: Any) -> set[str]:
    """All keys of nested objects."""
    if not isinstance(tree, dict):
        return set()
    return set(tree).union(*map(_keys, tree.values()))
