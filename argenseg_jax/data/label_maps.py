"""ADE20K, COCO-Stuff and one's own: pictures whose label maps give every pixel a class.

    ADEChallengeData2016/{images,annotations}/{training,validation}/*.{jpg,png}, objectInfo150.txt
    cocostuff/{train2017,val2017}/*.jpg, stuffthingmaps/{train2017,val2017}/*.png, labels.txt
    (or images/SPLIT and annotations/SPLIT, as in the official COCO-Stuff repository)
    own: see data/own.py
"""
from __future__ import annotations

import re

import numpy as np
from etils import epath

from argenseg_jax.data import layout, psalm, transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

# family -> (pictures, maps, class names, value of the first class, values that are no class)
LAYOUTS = {
    "ade20k": (("images/{split}",), ("annotations/{split}",), ("objectInfo150.txt",), 1, (0,)),
    "cocostuff": (("{split}", "images/{split}", "../coco/{split}"),
                  ("stuffthingmaps/{split}", "annotations/{split}", "stuffthingmaps_trainval2017/{split}"),
                  ("labels.txt", "cocostuff_classes.txt"), 0, (255,)),
    "own": (("images",), ("labels",), ("classes.txt",), 1, (0, 255)),
}
SPLITS = {"ade20k": "validation", "cocostuff": "val2017", "own": ""}
ASKED = ("", "shown", "every")  # which classes of a picture are asked: one that is drawn, ...


class LabelMapSource(layout.Indexed[tuple]):
    """"Segment {class}" from label maps.

    One sample per picture, its class drawn among those that it shows (`draw`). Asked for `shown`: one
    per picture and class that it shows (all maps are read to know them). Asked for `every`: one per
    picture and class of the data set, also of absent ones (the mask is empty), which is what the mIoU
    of semantic segmentation is made of.

    Args:
      folder: see the module's text.
      family: a key of LAYOUTS.
      split: such as validation.
      asked: one of ASKED.
      reading: see data/reader.py.
    """

    def __init__(self, folder: epath.Path, family: str, split: str = "", asked: str = "",
                 reading: Reading = Reading()):
        check_asked(asked, f"{family}:{folder}:{split}")
        split = split or SPLITS[family]
        images, maps, names, first, self._none = LAYOUTS[family]
        self._maps = layout.find(folder, f"label maps of {family}",
                                 *(p.format(split=split) for p in maps))
        root = layout.find(folder, f"pictures of {family}", *(p.format(split=split) for p in images))
        self.names = read_names(layout.find(folder, f"class names of {family}", *names), first)
        paths = layout.pictures(root)
        super().__init__(str(root), [(p, None) for p in paths], reading)
        if asked:
            self.entries = [(p, v) for p in paths
                            for v in (self.names if asked == "every" else self._shown(p))]

    def from_(self, entry: tuple) -> str:
        return entry[0].name

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng picks the class where the index does not."""
        return self.named(index, lambda entry: self._class_of(entry, rng))

    def made(self, entry: tuple) -> Sample:
        return self._class_of(entry, np.random.default_rng(0))

    def _class_of(self, entry: tuple, rng: np.random.Generator) -> Sample:
        path, value = entry
        image, labels = self.reader.image(path), self._labels(path)
        transforms.check_sizes(image, [labels], [f"{path.stem}.png"], [path, self._maps / f"{path.stem}.png"])
        if value is None:
            shown = self._classes(labels, path)
            value = shown[rng.integers(len(shown))]
        name, ignored = self.names[value], np.isin(labels, self._none)
        return Sample(layout.turns(psalm.question([name], "semantic")), (image,),
                      ((labels == value).astype(np.uint8) * 255,),
                      {"files": [path.name], "kind": name, "sents": [name], "metric": "semantic",
                       "ignore_mask": ignored.astype(np.uint8) * 255})


    def _labels(self, path: epath.Path) -> np.ndarray:
        """The map of a picture: whole numbers [H, W]."""
        labels = self.reader.ids(self._maps / f"{path.stem}.png")
        if labels.ndim != 2:
            raise SampleError(f"{path.stem}.png is coloured; a label map has one channel")
        return labels

    def _classes(self, labels: np.ndarray, path: epath.Path) -> list[int]:
        """The values of the classes that a map shows."""
        shown = [int(v) for v in np.unique(labels) if v not in self._none]
        if unknown := [v for v in shown if v not in self.names]:
            raise SampleError(f"{path.stem}.png: value {unknown[0]} has no class name")
        if not shown:
            raise SampleError(f"{path.stem}.png shows no class")
        return shown

    def _shown(self, path: epath.Path) -> list[int | None]:
        """As `_classes`; [None] of a map that cannot be used: reading the sample says why."""
        try:
            return self._classes(self._labels(path), path)
        except SampleError:
            return [None]


def check_asked(asked: str, name: str) -> None:
    """UserError unless `asked` is one of ASKED."""
    if asked not in ASKED:
        raise UserError(f"{name}: the third word is `every`, `shown` or absent, not '{asked}'")


def read_names(path: epath.Path, first: int) -> dict[int, str]:
    """{value in the maps: class name} of the three published forms.

    objectInfo150.txt is a table with the columns Idx and Name (of several names the first is used);
    labels.txt has lines `1: person` with 0 for unlabeled, one above the values in the maps;
    cocostuff_classes.txt has one name a line.
    """
    lines = [line.rstrip("\r") for line in path.read_text().split("\n") if line.strip()]
    table = [line.split("\t") for line in lines]
    if table and "Idx" in table[0] and "Name" in table[0]:
        idx, name = table[0].index("Idx"), table[0].index("Name")
        pairs = [(row[idx], row[name]) for row in table[1:] if len(row) > max(idx, name)]
        found = {int(k) - 1 + first: n for k, n in pairs if k.strip().isdigit()}
    elif all(re.match(r"\d+:\s*\S", line) for line in lines):
        pairs = [line.split(":", 1) for line in lines]
        found = {int(k) - 1 + first: n for k, n in pairs if int(k) > 0}
    else:
        found = dict(enumerate(lines, first))
    if not found:
        raise UserError(f"{path}: no class names; looked for a table with Idx and Name, lines "
                        "`1: person`, or one name a line")
    return {k: layout.spoken(n.split(",")[0].split(";")[0].replace(":", " ")) for k, n in found.items()}
