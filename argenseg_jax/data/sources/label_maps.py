"""ADE20K, COCO-Stuff and one's own: pictures whose label maps give every pixel a class.

ADEChallengeData2016/{images,annotations}/{training,validation}/*.{jpg,png}, objectInfo150.txt
cocostuff/{train2017,val2017}/*.jpg, stuffthingmaps/{train2017,val2017}/*.png, labels.txt
(or images/SPLIT and annotations/SPLIT, as in the official COCO-Stuff repository)
own: see data/sources/own.py
"""

from __future__ import annotations

import re

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.errors import SampleError, UserError

# family -> (pictures, maps, class names, value of the first class, values that are no class)
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
ASKED = ("", "shown", "every")  # which classes of a picture are asked: one that is drawn, ...


class LabelMapSource(base.Indexed[tuple]):
    """ "Segment {class}" from label maps.

    One sample per picture, its class drawn among those that it shows (`draw`). Asked for `shown`: one
    per picture and class that it shows (all maps are read to know them). Asked for `every`: one per
    picture and class of the data set, also of absent ones (the mask is empty), which is what the mIoU
    of semantic segmentation is made of.

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
        root = base.find(folder, f"pictures of {family}", *(p.format(split=split) for p in images))
        self.names = read_names(base.find(folder, f"class names of {family}", *names), first)
        self._same = base.firsts(self.names)  # two values of one name are one question
        paths, every = base.image_files(root), [k for k, first in self._same.items() if k == first]
        super().__init__(str(root), [(p, None) for p in paths], reading)
        if asked:
            self.entries = [(p, v) for p in paths for v in (every if asked == "every" else self._shown(p))]

    def describe(self, entry: tuple) -> str:
        return entry[0].name

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng picks the class where the index does not."""
        return self.with_meta(index, lambda entry: self._class_of(entry, rng))

    def build(self, entry: tuple) -> Sample:
        return self._class_of(entry, np.random.default_rng(0))

    def _class_of(self, entry: tuple, rng: np.random.Generator) -> Sample:
        path, value = entry
        image, labels, of = self.reader.image(path), self._labels(path), self._map(path)
        transforms.check_sizes(image, [labels], [of.name], [path, of])
        if value is None:
            shown = self._classes(labels, of)
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

    def _map(self, picture: epath.Path) -> epath.Path:
        """The label map of a picture."""
        return self._maps.get(base.stem(picture)) or self._folder / f"{picture.stem}.png"

    def _labels(self, picture: epath.Path) -> np.ndarray:
        """The values of a label map: whole numbers [H, W]."""
        path = self._map(picture)
        labels = self.reader.ids(path)
        if labels.ndim != 2:
            raise SampleError(f"{path.name} is coloured; a label map has one channel")
        return labels

    def _classes(self, labels: np.ndarray, path: epath.Path) -> list[int]:
        """The classes that a map shows, each by the first value of its name."""
        shown = [int(v) for v in np.unique(labels) if v not in self._none]
        if unknown := [v for v in shown if v not in self.names]:
            raise SampleError(f"{path.name}: value {unknown[0]} has no class name")
        if not shown:
            raise SampleError(f"{path.name} shows no class")
        return list(dict.fromkeys(self._same[v] for v in shown))

    def _shown(self, picture: epath.Path) -> list[int | None]:
        """As `_classes`; [None] of a map that cannot be used: reading the sample says why."""
        try:
            return self._classes(self._labels(picture), self._map(picture))
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
    values in the maps; cocostuff_classes.txt has one name a line.

    Raises:
      UserError: none of them, no text, or a value that is named twice.
    """
    lines = [line for line in re.split(r"\r\n|\r|\n", files.read_text(path, _LIMIT)) if line.strip()]
    table = [line.split("\t") for line in lines]
    if table and "Idx" in table[0] and "Name" in table[0]:
        idx, name = table[0].index("Idx"), table[0].index("Name")
        pairs = [(row[idx].strip(), re.split("[,;]", row[name])[0]) for row in table[1:] if len(row) > max(idx, name)]
        found = [(int(k), n) for k, n in pairs if re.fullmatch(_NUMBER, k)]
    elif all(re.match(rf"{_NUMBER}:\s*\S", line) for line in lines):
        pairs = [line.split(":", 1) for line in lines]
        found = [(int(k), n) for k, n in pairs if int(k) > 0]
    else:
        found = list(enumerate(lines, 1))
    if not found:
        raise UserError(
            f"{path}: no class names; looked for a table with Idx and Name, lines `1: person`, or one name a line"
        )
    names: dict[int, str] = {}
    for value, name in found:
        spoken = base.sentence(name.replace(":", " "))
        if not spoken or names.setdefault(value - 1 + first, spoken) != spoken:
            raise UserError(f"{path}: class {value} has {'two names' if spoken else 'no name'}")
    return names
