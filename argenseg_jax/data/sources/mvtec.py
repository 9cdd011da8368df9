"""Anomaly detection in the layout of MVTec AD.

CATEGORY/{train/good, test/good, test/DEFECT}/000.png, ground_truth/DEFECT/000_mask.png
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.errors import SampleError, UserError

QUESTION = "<image>\n Please segment the defect of the {} in this image."


class ProductImage(NamedTuple):
    """An image of a product and the kind of its defect (`good`: none)."""

    category: epath.Path
    defect: str
    path: epath.Path


class AnomalySource(base.Indexed[ProductImage]):
    """One sample per image; the mask of a good one is empty.

    Args:
      folder: of all categories, or of one.
      split: train (good images only) or test.
      category: only this one, such as bottle.
      prompt: how a defect is asked for; see templates.question.
    """

    takes_prompt = True

    def __init__(
        self,
        folder: epath.Path,
        split: str = "test",
        category: str = "",
        prompt: str = templates.DEFAULT,
        reading: Reading = Reading(),
    ):
        templates.question([], prompt)
        self.prompt = prompt
        roots = (
            [folder / category]
            if category
            else ([folder] if files.kind_of(folder / split) == "folder" else base.subfolders(folder))
        )
        entries = [
            ProductImage(root, kind.name, path)
            for root in roots
            if files.kind_of(root / split) == "folder"
            for kind in base.subfolders(root / split)
            for path in base.image_files(kind)
        ]
        if not entries:
            looked = f"{category or 'CATEGORY'}/{split}/good/*.png"
            raise UserError(f"{folder}: no images of anomaly detection; looked for {looked}")
        super().__init__(str(folder), entries, reading)

    def describe(self, entry: ProductImage) -> str:
        return str(entry.path)

    def build(self, entry: ProductImage) -> Sample:
        image = self.reader.image(entry.path)
        if entry.defect == "good":
            mask = np.zeros(image.shape[:2], np.uint8)
        else:
            masks = base.Root(entry.category / "ground_truth" / entry.defect)
            path = masks.file(f"{entry.path.stem}_mask.png")
            mask = self.reader.mask(path)
            transforms.check_sizes(image, [mask], [path.name], [entry.path, path])
            if not mask.any():
                raise SampleError(f"{path.name} shows no defect")
        name = base.sentence(entry.category.name)
        question = (
            QUESTION.format(name) if self.prompt == templates.DEFAULT else templates.question([name], self.prompt)
        )
        return Sample(
            templates.turns(question),
            (image,),
            (mask,),
            {
                "files": [entry.path.name],
                "kind": f"{name}, {base.sentence(entry.defect)}",
                "sents": [name],
                "metric": "anomaly",
            },
        )
