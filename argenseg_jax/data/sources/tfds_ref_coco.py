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
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates, tfds_folder
from argenseg_jax.data.sources.records import decode_image
from argenseg_jax.errors import UserError, located

_F = tfds.features
_REFEXP = {"refexp": _F.Sequence({"refexp_id": np.int64, "raw": _F.Text()})}
# The columns that list the expressions, and all columns that are read; images stay bytes.
EXPRESSION_COLUMNS = _F.FeaturesDict({"objects": _F.Sequence(_REFEXP)})
COLUMNS = _F.FeaturesDict(
    {
        "image": _F.Text(),
        "image/id": np.int64,
        "objects": _F.Sequence({**_REFEXP, "mask": _F.Text(), "label": np.int64}),
    }
)


class Phrase(NamedTuple):
    """One expression: index of the record, of the object in it, and its text."""

    record: int
    object: int
    text: str


class RefCocoSource(base.Indexed[Phrase]):
    """One sample per expression; opening it reads all records, without their images.

    Args:
      folder: the version folder.
      split: train, validation, testA, testB, test; `val` is validation.
      prompt: see templates.question.
    """

    takes_prompt = True

    def __init__(
        self, folder: epath.PathLike, split: str = "train", prompt: str = "referring", reading: Reading = Reading()
    ):
        templates.question([], prompt)
        self.prompt, split = prompt, {"val": "validation"}.get(split, split)
        self._records = tfds_folder.open_split(folder, split)
        if not {"image", "image/id", "objects"} <= set(tfds_folder.columns(folder)):
            raise UserError(f"{folder}: the records have no image, image/id and objects of `ref_coco`")
        entries = []
        for i in range(len(self._records)):
            with located(f"{folder} ({split}): record {i}", "record of `ref_coco`", UserError, Exception):
                record: Any = EXPRESSION_COLUMNS.deserialize_example_np(self._records[i])
                entries += [
                    Phrase(i, k, text.decode())
                    for k, texts in enumerate(record["objects"]["refexp"]["raw"])
                    for text in texts
                ]
        super().__init__(f"{folder} ({split})", entries, reading)

    def describe(self, entry: Phrase) -> str:
        return f"record {entry.record}, '{entry.text}'"

    def build(self, entry: Phrase) -> Sample:
        record: Any = COLUMNS.deserialize_example_np(self._records[entry.record])
        objects = record["objects"]
        image = decode_image(record["image"], "image", self.reader.max_pixels, ("JPEG", "PNG"))
        levels = decode_image(objects["mask"][entry.object], "mask", self.reader.max_pixels, ("PNG",))[..., 0]
        transforms.check_sizes(image, [levels], ["of the object"])
        image_id, category_id = int(record["image/id"]), int(objects["label"][entry.object])
        return Sample(
            templates.turns(templates.question([entry.text], self.prompt)),
            (image,),
            ((levels > 0).astype(np.uint8) * 255,),
            {
                "files": [f"image {image_id}"],
                "sents": [entry.text],
                "metric": "referring",
                "image_id": image_id,
                "category_id": category_id,
            },
        )


def is_ref_coco(folder: epath.PathLike) -> bool:
    """Whether the folder's features are those of `ref_coco`."""
    path = epath.Path(folder) / "features.json"
    return path.exists() and "refexp" in _keys(files.read_json(path))


def _keys(tree: Any) -> set[str]:
    """All keys of nested objects."""
    if not isinstance(tree, dict):
        return set()
    return set(tree).union(*map(_keys, tree.values()))
