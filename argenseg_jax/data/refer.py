"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as published: refs(*).p or grefs(*).json, instances.json.

    refer_seg/refcoco/{refs(unc).p, instances.json}      refer_seg/grefcoco/{grefs(unc).json, ...}
    refer_seg/images/mscoco/images/train2014/COCO_train2014_*.jpg
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from argenseg_jax import files
from argenseg_jax.data import layout, plain_pickle, psalm, rle, transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import UserError

_IMAGES = ("../images/mscoco/images/train2014", "../images/train2014", "../train2014",
           "images/train2014", "train2014", "../../coco/train2014")


class Expression(NamedTuple):
    """One sentence about the objects of an image (`anns` may be none: no target)."""

    ref_id: Any
    sent: str
    image_id: int
    anns: tuple[int, ...]


class ReferSource(layout.Indexed[Expression]):
    """One sample per sentence of a split; the mask is the union of the objects it names.

    Args:
      folder: of one data set, such as refer_seg/refcoco.
      split: train, val, testA, testB, test.
      split_by: unc, umd, google; needed where the folder holds several refs files.
      image_root: folder of the pictures; by default looked for in the usual places.
      prompt: see psalm.question.
      reading: see data/reader.py.
    """

    def __init__(self, folder: epath.Path, split: str = "val", split_by: str = "",
                 image_root: epath.PathLike = "", prompt: str = "referring",
                 reading: Reading = Reading()):
        psalm.question([], prompt)
        self.prompt, self.split = prompt, split
        path = _refs_file(folder, split_by)
        self._general = path.suffix == ".json"
        content = files.read_json(path) if self._general else plain_pickle.read(path)
        whole = files.read_json(layout.find(folder, "instances", "instances.json"))
        where = folder / "instances.json"
        try:
            self._images = {i["id"]: i for i in layout.records(whole, "images", where)}
            self._anns = {a["id"]: a for a in layout.records(whole, "annotations", where)}
        except KeyError as error:
            raise UserError(f"{where}: an entry without {error}") from None
        refs = layout.records({"refs": content}, "refs", path)
        try:
            mine = [r for r in refs if r["split"] == split]
            entries = [Expression(r["ref_id"], s["sent"], r["image_id"], _ann_ids(r))
                       for r in mine for s in r["sentences"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: a ref without {error}") from None
        if not entries:
            raise UserError(f"{path}: no split '{split}'; there are "
                            f"{', '.join(sorted({str(r['split']) for r in refs}))}")
        self._root = epath.Path(image_root) if image_root else layout.find(
            folder, "pictures", *_IMAGES)
        super().__init__(str(path), entries, reading)

    def from_(self, entry: Expression) -> str:
        return f"ref {entry.ref_id}"

    def made(self, entry: Expression) -> Sample:
        info = self._images[entry.image_id]
        height, width = int(info["height"]), int(info["width"])
        path = self._root / info["file_name"]
        image = self.reader.image(path)
        transforms.check_shape(image, (height, width), "(height, width in instances.json)", path)
        drawn = rle.objects([self._anns[k] for k in entry.anns], height, width)
        return Sample(layout.turns(psalm.question([entry.sent], self.prompt)), (image,), (drawn.mask,),
                      {"files": [info["file_name"]], "sents": [entry.sent],
                       "metric": "grefcoco" if self._general else "referring", **drawn.meta()})


def _refs_file(folder: epath.Path, split_by: str) -> epath.Path:
    found = sorted([*folder.glob("refs(*).p"), *folder.glob("grefs(*).json")])
    names = {re.search(r"\((.*)\)", p.name)[1]: p for p in found}
    if not names:
        raise UserError(f"{folder}: no referring expressions; looked for refs(*).p, grefs(*).json")
    if split_by not in names and (split_by or len(names) > 1):
        raise UserError(f"{folder}: expressions split by {', '.join(names)}; name one of them, such "
                        f"as refer:{folder}:val:{next(iter(names))}")
    return names[split_by] if split_by else found[0]


def _ann_ids(ref: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of a ref's objects; -1 (gRefCOCO) and `no_target` stand for none."""
    ids = ref["ann_id"]
    ids = ids if isinstance(ids, list) else [ids]
    return () if ref.get("no_target") else tuple(k for k in ids if k != -1)
