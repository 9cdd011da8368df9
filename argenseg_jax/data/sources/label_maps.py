"""ADE20K, COCO-Stuff and own data: images with label maps that give every pixel a class.

ADEChallengeData2016/{images,annotations}/{training,validation}/*.{jpg,png}, objectInfo150.txt
cocostuff/{train2017,val2017}/*.jpg, stuffthingmaps/{train2017,val2017}/*.png, labels.txt
(or images/SPLIT and annotations/SPLIT, as in the official COCO-Stuff repository)
own: see data/sources/own.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.errors import SampleError, UserError

# family -> (images, maps, class names, value of the first class, values that are no class)
LAYOUTS = {
    "ade20k": (("images/{split}",), ("annotations/{split}",), ("objectInfo150.txt",), 1, (0,)),
    "cocostuff": (
        ("{split}", "images/{split}", "../coco/{split}"),
        ("stuffthingmaps/{split}", "annotations/{split}", "stuffthingmaps_trainval2017/{split}"),
        ("labels.txt", "cocostuff_classes.txt"),
        0,
        (255,),
    ),
    "own": (("images",), ("labels",), ("classes.txt",), 1, (0, 255)),
}
SPLITS = {"ade20k": "validation", "cocostuff": "val2017", "own": ""}
_LIMIT = 2**24  # bytes of a list of names
_NUMBER = r"[0-9]{1,9}"
ASKED = (
    "",
    "shown",
    "every",
)  # which classes are asked for: one of the image at random, each of the image, each of the data set


class LabelMapSource(base.Indexed[tuple]):
    """ "Segment {class}" from label maps.

    asked="": one sample per image, of a random class of the image (`draw`). `shown`: one per image and class of
    the image (opening reads all maps). `every`: one per image and class of the data set, absent ones included
    (an empty mask), as the mIoU of semantic segmentation needs.

    Args:
      folder: see the module's text.
      family: a key of LAYOUTS.
      split: such as validation.
      asked: one of ASKED.
      prompt: how a class is asked for; see templates.question.
      reading: see data/reader.py.
    """

    takes_prompt = True

    def __init__(
        self,
        folder: epath.Path,
        family: str,
        split: str = "",
        asked: str = "",
        prompt: str = templates.DEFAULT,
        reading: Reading = Reading(),
    ):
        check_asked(asked, f"{family}:{folder}:{split}")
        templates.question([], prompt)
        self.prompt = prompt
        split = split or SPLITS[family]
        images, maps, names, first, self._none = LAYOUTS[family]
        self._folder = base.find(folder, f"label maps of {family}", *(p.format(split=split) for p in maps))
        self._maps = base.by_stem(base.image_files(self._folder))
        root = base.find(folder, f"images of {family}", *(p.format(split=split) for p in images))
        self.names = read_names(base.find(folder, f"class names of {family}", *names), first)
        self._same = base.firsts(self.names)  # values of the same name are one class
        paths, every = base.image_files(root), [k for k, first in self._same.items() if k == first]
        super().__init__(str(root), [(p, None) for p in paths], reading)
        if asked:
            self.entries = [(p, v) for p in paths for v in (every if asked == "every" else self._shown(p))]

    def describe(self, entry: tuple) -> str:
        return entry[0].name

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng selects the class where the index does not."""
        return self.with_meta(index, lambda entry: self._class_of(entry, rng))

    def build(self, entry: tuple) -> Sample:
        return self._class_of(entry, np.random.default_rng(0))

    def _class_of(self, entry: tuple, rng: np.random.Generator) -> Sample:
        path, value = entry
        image, labels, map_path = self.reader.image(path), self._labels(path), self._map(path)
        transforms.check_sizes(image, [labels], [map_path.name], [path, map_path])
        if value is None:
            shown = self._classes(labels, map_path)
            value = shown[rng.integers(len(shown))]
        name, ignored = self.names[value], np.isin(labels, self._none)
        mask = np.isin(labels, [k for k, first in self._same.items() if first == value])
        return Sample(
            templates.turns(templates.question([name], templates.class_prompt(self.prompt))),
            (image,),
            (mask.astype(np.uint8) * 255,),
            {
                "files": [path.name],
                "kind": name,
                "sents": [name],
                "metric": "semantic",
                "ignore_mask": ignored.astype(np.uint8) * 255,
            },
        )

    def _map(self, image: epath.Path) -> epath.Path:
        """The label map of an image."""
        return self._maps.get(base.stem(image)) or self._folder / f"{image.stem}.png"

    def _labels(self, image: epath.Path) -> np.ndarray:
        """The values of a label map: integers [H, W]."""
        path = self._map(image)
        labels = self.reader.ids(path)
        if labels.ndim != 2:
            raise SampleError(f"{path.name} is coloured; a label map has one channel")
        return labels

    def _classes(self, labels: np.ndarray, path: epath.Path) -> list[int]:
        """The classes in a map, each as the first value of its name."""
        shown = [int(v) for v in np.unique(labels) if v not in self._none]
        if unknown := [v for v in shown if v not in self.names]:
            raise SampleError(f"{path.name}: value {unknown[0]} has no class name")
        if not shown:
            raise SampleError(f"{path.name} shows no class")
        return list(dict.fromkeys(self._same[v] for v in shown))

    def _shown(self, image: epath.Path) -> Sequence[int | None]:
        """As `_classes`; [None] for a map that cannot be read: reading the sample raises the error."""
        try:
            return self._classes(self._labels(image), self._map(image))
        except SampleError:
            return [None]


def check_asked(asked: str, name: str) -> None:
    """UserError unless `asked` is one of ASKED."""
    if asked not in ASKED:
        raise UserError(f"{name}: the third word is `every`, `shown` or absent, not '{asked}'")


def read_names(path: epath.Path, first: int) -> dict[int, str]:
    """{value in the maps: class name} of the three published forms.

    objectInfo150.txt is a table with the columns Idx and Name (of several names, between commas or
    semicolons, the first is used); labels.txt has lines `1: person` with 0 for unlabeled, one above the
    values in the maps; cocostuff_classes.txt has one name per line.

    Raises:
      UserError: none of them, no text, or a value that is named twice.
    """
    lines = [line for line in re.split(r"\r\n|\r|\n", files.read_text(path, _LIMIT)) if line.strip()]
    table = [line.split("\t") for line in lines]
    if table and "Idx" in table[0] and "Name" in table[0]:
        idx, name = table[0].index("Idx"), table[0].index("Name")
        pairs = [
            (cells[idx].strip(), re.split("[,;]", cells[name])[0]) for cells in table[1:] if len(cells) > max(idx, name)
        ]
        found = [(int(k), n) for k, n in pairs if re.fullmatch(_NUMBER, k)]
    elif all(re.match(rf"{_NUMBER}:\s*\S", line) for line in lines):
        pairs = [line.split(":", 1) for line in lines]
        found = [(int(k), n) for k, n in pairs if int(k) > 0]
    else:
        found = list(enumerate(lines, 1))
    if not found:
        raise UserError(
            f"{path}: no class names; looked for a table with Idx and Name, lines `1: person`, or one name per line"
        )
    names: dict[int, str] = {}
    for value, name in found:
        sentence = base.sentence(name.replace(":", " "))
        if not sentence or names.setdefault(value - 1 + first, sentence) != sentence:
            raise UserError(f"{path}: class {value} has {'two names' if sentence else 'no name'}")
    return names
