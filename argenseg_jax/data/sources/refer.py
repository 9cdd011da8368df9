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
from argenseg_jax.data import rle
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, plain_pickle, templates
from argenseg_jax.errors import UserError, brief

_IMAGES = (
    "../images/mscoco/images/train2014",
    "../images/train2014",
    "../train2014",
    "images/train2014",
    "train2014",
    "../../coco/train2014",
)


class ReferringExpression(NamedTuple):
    """One sentence about the objects of an image (`anns` may be none: no target)."""

    ref_id: Any
    sent: str
    image_id: int | str
    anns: tuple[int | str, ...]


class ReferSource(base.Indexed[ReferringExpression]):
    """One sample per sentence of a split; the mask is the union of the objects it refers to.

    Args:
      folder: of one data set, such as refer_seg/refcoco.
      split: train, val, testA, testB, test.
      split_by: unc, umd, google; needed where the folder holds several refs files.
      image_root: folder of the images; by default looked for in the usual folders.
      prompt: see templates.question.
      reading: see data/reader.py.
    """

    takes_prompt = True

    def __init__(
        self,
        folder: epath.Path,
        split: str = "val",
        split_by: str = "",
        image_root: epath.PathLike = "",
        prompt: str = "referring",
        reading: Reading = Reading(),
    ):
        templates.question([], prompt)
        self.prompt, self.split = prompt, split
        path = _refs_file(folder, split_by)
        self._general = path.suffix == ".json"
        content = files.read_json(path) if self._general else plain_pickle.read(path)
        instances = files.read_json(base.find(folder, "instances", "instances.json"))
        where = folder / "instances.json"
        self._images = base.by_id(base.records(instances, "images", where), f"{where}: images")
        self._anns = base.by_id(base.records(instances, "annotations", where), f"{where}: annotations")
        refs = base.records({"refs": content}, "refs", path)
        found = base.each(refs, lambda ref: (base.text(ref["split"], "the split"), _expressions(ref)), f"{path}: refs")
        entries = [expression for name, mine in found if name == split for expression in mine]
        if not entries:
            known = sorted({name for name, _ in found})
            raise UserError(f"{path}: no split '{split}'; there are {brief(', '.join(known))}")
        root = files.to_path(image_root) if image_root else base.find(folder, "images", *_IMAGES)
        self._root = base.Root(root, reading.allow_outside)
        super().__init__(str(path), entries, reading)

    def describe(self, entry: ReferringExpression) -> str:
        return f"ref {entry.ref_id}"

    def build(self, entry: ReferringExpression) -> Sample:
        info = base.look_up(self._images, entry.image_id, "image")
        image, height, width = self.sized(info, self._root, "in instances.json")
        anns = [base.look_up(self._anns, k, "annotation") for k in entry.anns]
        drawn = rle.objects(anns, height, width)
        category = anns[0].get("category_id") if anns else None
        sents = [base.text(entry.sent, "`sent`")]
        return Sample(
            templates.turns(templates.question(sents, self.prompt)),
            (image,),
            (drawn.mask,),
            {
                "files": [info["file_name"]],
                "sents": sents,
                "metric": "grefcoco" if self._general else "referring",
                **drawn.meta(),
                **base.ids_of(image_id=entry.image_id, category_id=category),
            },
        )


def _refs_file(folder: epath.Path, split_by: str) -> epath.Path:
    names = {
        found[1] or found[2]: path
        for path in files.listed(folder)
        if (found := re.fullmatch(r"refs\((.*)\)\.p|grefs\((.*)\)\.json", path.name))
    }
    if not names:
        raise UserError(f"{folder}: no referring expressions; looked for refs(*).p, grefs(*).json")
    if split_by not in names and (split_by or len(names) > 1):
        raise UserError(
            f"{folder}: expressions split by {', '.join(names)}; name one of them, such "
            f"as refer:{folder}:val:{next(iter(names))}"
        )
    return names[split_by] if split_by else next(iter(names.values()))


def _expressions(ref: Mapping[str, Any]) -> list[ReferringExpression]:
    """The expressions of a ref; -1 (gRefCOCO) and `no_target` mean no object."""
    ids = ref["ann_id"]
    ids = ids if isinstance(ids, list) else [ids]
    anns: tuple[int | str, ...] = () if ref.get("no_target") else tuple(base.an_id(k) for k in ids if k != -1)
    return [ReferringExpression(ref["ref_id"], s["sent"], base.an_id(ref["image_id"]), anns) for s in ref["sentences"]]
