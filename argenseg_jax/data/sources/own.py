"""A folder of own images and masks, in any of three forms, as "segment {class}".

FOLDER/images/*.{jpg,png,...}    and one of
FOLDER/masks/CLASS/NAME.png      a black and white mask per class and image images/NAME.jpg
FOLDER/labels/NAME.png           a class number per pixel (0 and 255: none), and the names of
FOLDER/classes.txt               1, 2, ..., one per line (or lines `3: river`)
FOLDER/annotations.json          polygons or run lengths of COCO; file names as in images/
"""

from __future__ import annotations

from typing import NamedTuple

from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.data.sources.coco import CocoSource
from argenseg_jax.data.sources.label_maps import LabelMapSource
from argenseg_jax.errors import UserError


class MaskFile(NamedTuple):
    """An image, a class, and the mask of the class in the image."""

    image: epath.Path
    name: str
    mask: epath.Path


class MaskFolders(base.Indexed[MaskFile]):
    """One sample per mask file of masks/CLASS/; also of black ones: examples of an absent class."""

    takes_prompt = True

    def __init__(self, folder: epath.Path, prompt: str = templates.DEFAULT, reading: Reading = Reading()):
        templates.question([], prompt)
        self.prompt = prompt
        images: dict[str, list[epath.Path]] = {}
        for path in base.image_files(_images(folder)):
            images.setdefault(base.stem(path), []).append(path)
        entries = []
        for kind in base.subfolders(folder / "masks"):
            for mask in base.image_files(kind):
                found = images.get(base.stem(mask), ())
                if len(found) != 1:
                    raise UserError(
                        f"{mask}: {'several images' if found else 'no image'} of this name in {folder / 'images'}"
                    )
                entries.append(MaskFile(found[0], base.sentence(kind.name), mask))
        if not entries:
            raise UserError(f"{folder}: no masks; looked for masks/CLASS/*.png")
        super().__init__(str(folder), sorted(entries), reading)

    def describe(self, entry: MaskFile) -> str:
        return str(entry.mask)

    def build(self, entry: MaskFile) -> Sample:
        image, mask = self.reader.image(entry.image), self.reader.mask(entry.mask)
        transforms.check_sizes(image, [mask], [entry.mask.name], [entry.image, entry.mask])
        return Sample(
            templates.turns(templates.question([entry.name], templates.class_prompt(self.prompt))),
            (image,),
            (mask,),
            {"files": [entry.image.name], "kind": entry.name, "sents": [entry.name], "metric": "semantic"},
        )


def open_own(folder: epath.Path, prompt: str = templates.DEFAULT, reading: Reading = Reading()) -> base.Indexed:
    """The source of whichever form the folder has; UserError where it is none of them, or several."""
    forms = {
        "annotations.json": lambda: CocoSource(folder, "own", prompt=prompt, reading=reading),
        "labels": lambda: LabelMapSource(folder, "own", asked="shown", prompt=prompt, reading=reading),
        "masks": lambda: MaskFolders(folder, prompt, reading),
    }
    found = [name for name in forms if files.kind_of(folder / name)]
    if len(found) != 1:
        raise UserError(
            f"{folder}: {'no' if not found else 'several'} annotations; looked for one of "
            f"masks/CLASS/*.png, labels/*.png with classes.txt, annotations.json; found "
            f"{', '.join(found) or 'none of them'}"
        )
    _images(folder)
    return forms[found[0]]()


def _images(folder: epath.Path) -> epath.Path:
    return base.find(folder, "images", "images")
