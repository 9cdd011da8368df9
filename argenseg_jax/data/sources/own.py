"""A folder of one's own pictures and masks, in any of three forms, as "segment {class}".

FOLDER/images/*.{jpg,png,...}    and one of
FOLDER/masks/CLASS/NAME.png      a black and white mask per class and picture images/NAME.jpg
FOLDER/labels/NAME.png           a class number per pixel (0 and 255: none), and the names of
FOLDER/classes.txt               1, 2, ..., one a line (or lines `3: river`)
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


class Masked(NamedTuple):
    """A picture, a class, and the mask of the one in the other."""

    picture: epath.Path
    name: str
    mask: epath.Path


class MaskFolders(base.Indexed[Masked]):
    """One sample per mask file of masks/CLASS/; black ones too: they teach that a class is absent."""

    takes_prompt = True

    def __init__(self, folder: epath.Path, prompt: str = templates.DEFAULT, reading: Reading = Reading()):
        templates.question([], prompt)
        self.prompt = prompt
        pictures: dict[str, list[epath.Path]] = {}
        for path in base.image_files(_images(folder)):
            pictures.setdefault(base.stem(path), []).append(path)
        entries = []
        for kind in base.subfolders(folder / "masks"):
            for mask in base.image_files(kind):
                found = pictures.get(base.stem(mask), ())
                if len(found) != 1:
                    raise UserError(
                        f"{mask}: {'several pictures' if found else 'no picture'} of this name in {folder / 'images'}"
                    )
                entries.append(Masked(found[0], base.sentence(kind.name), mask))
        if not entries:
            raise UserError(f"{folder}: no masks; looked for masks/CLASS/*.png")
        super().__init__(str(folder), sorted(entries), reading)

    def describe(self, entry: Masked) -> str:
        return str(entry.mask)

    def build(self, entry: Masked) -> Sample:
        image, mask = self.reader.image(entry.picture), self.reader.mask(entry.mask)
        transforms.check_sizes(image, [mask], [entry.mask.name], [entry.picture, entry.mask])
        return Sample(
            templates.turns(templates.question([entry.name], templates.class_prompt(self.prompt))),
            (image,),
            (mask,),
            {"files": [entry.picture.name], "kind": entry.name, "sents": [entry.name], "metric": "semantic"},
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
    return base.find(folder, "pictures", "images")
