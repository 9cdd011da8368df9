"""COCO-style annotations: COCO instances, and "segment {class}" from PACO-LVIS, PASCAL-Part, own data.

coco/{annotations/instances_val2017.json, val2017/*.jpg}
paco/annotations/paco_lvis_v1_val.json, images as in COCO (val2017/*.jpg)
pascal_part/train.json (as VLPart and LISA publish it), VOCdevkit/VOC2010/JPEGImages/*.jpg
own: see data/sources/own.py
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from etils import epath

from argenseg_jax import files
from argenseg_jax.data import rle
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates

# family -> (annotation files, folders of images); {split} is filled in
LAYOUTS = {
    "coco": (("annotations/instances_{split}.json", "instances_{split}.json"), ("{split}", "images/{split}")),
    "paco": (
        (
            "annotations/paco_lvis_v1_{split}.json",
            "paco_lvis_v1_{split}.json",
            "paco_lvis/annotations/paco_lvis_v1_{split}.json",
        ),
        (
            "train2017/..",
            "val2017/..",
            "coco/train2017/..",
            "coco/val2017/..",
            "../coco/train2017/..",
            "../coco/val2017/..",
        ),
    ),
    "pascalpart": (
        ("{split}.json", "pascal_part/{split}.json", "vlpart/pascal_part/{split}.json"),
        (
            "VOCdevkit/VOC2010/JPEGImages",
            "../VOCdevkit/VOC2010/JPEGImages",
            "../../VOCdevkit/VOC2010/JPEGImages",
            "JPEGImages",
        ),
    ),
    "own": (("annotations.json",), ("images",)),
}
SPLITS = {"coco": "val2017", "paco": "val", "pascalpart": "train", "own": ""}


class Objects(NamedTuple):
    """The annotations of one class in one image, by index in the file. Categories of the same name are one class."""

    image_id: Any
    category_id: Any
    anns: tuple[int, ...]


class CocoSource(base.Indexed[Objects]):
    """One sample per class in an image.

    `coco` asks for the instances: one mask per instance, largest first, and `meta['crowds']`, a list of u8[H, W].
    The others ask for the class: one mask, the union.

    Args:
      folder: see the module's text.
      family: a key of LAYOUTS.
      split: such as val2017.
      image_root: folder that file names start from; by default the first of LAYOUTS that exists.
      prompt: how a class is asked for; see templates.question.
      reading: see data/reader.py.
    """

    takes_prompt = True

    def __init__(
        self,
        folder: epath.Path,
        family: str = "coco",
        split: str = "",
        image_root: epath.PathLike = "",
        prompt: str = templates.DEFAULT,
        reading: Reading = Reading(),
    ):
        templates.question([], prompt)
        split = split or SPLITS[family]
        annotations, image_roots = ([p.format(split=split) for p in part] for part in LAYOUTS[family])
        path = base.find(folder, f"annotations of {family}", *annotations)
        content = files.read_json(path)
        self.family, self.prompt = family, prompt
        self._images = base.by_id(base.records(content, "images", path), f"{path}: images")
        self._names, same = base.classes(base.records(content, "categories", path), f"{path}: categories")
        self._anns = base.records(content, "annotations", path)
        keys = base.each(
            self._anns, lambda a: (base.an_id(a["image_id"]), base.an_id(a["category_id"])), f"{path}: annotations"
        )
        groups: dict[tuple[Any, Any], list[int]] = collections.defaultdict(list)
        for k, (image_id, category_id) in enumerate(keys):
            groups[image_id, same.get(category_id, category_id)].append(k)
        entries = [
            Objects(*key, tuple(groups[key]))
            for key in sorted(groups, key=base.in_order)
            if not all(self._anns[k].get("iscrowd") for k in groups[key])
        ]
        root = files.to_path(image_root) if image_root else base.find(folder, f"images of {family}", *image_roots)
        self._root = base.Root(root, reading.allow_outside)
        super().__init__(str(path), entries, reading)

    def describe(self, entry: Objects) -> str:
        return f"image {entry.image_id}, category {entry.category_id}"

    def build(self, entry: Objects) -> Sample:
        info = base.look_up(self._images, entry.image_id, "image")
        name = base.look_up(self._names, entry.category_id, "category")
        image, height, width = self.sized(info, self._root, "of the entry")
        anns = [self._anns[k] for k in entry.anns]
        separate = [a for a in anns if not a.get("iscrowd")]
        meta = {
            "files": [info["file_name"]],
            "kind": name,
            "sents": [name],
            **base.ids_of(image_id=entry.image_id, category_id=entry.category_id),
        }
        if self.family != "coco":
            drawn = rle.objects(separate, height, width)
            return Sample(
                templates.turns(templates.question([name], templates.class_prompt(self.prompt))),
                (image,),
                (drawn.mask,),
                {**meta, **drawn.meta(), "metric": "semantic"},
            )
        instances = rle.each(separate, height, width)
        crowds = [
            rle.union([a["segmentation"]], height, width).mask
            for a in anns
            if a.get("iscrowd") and not rle.is_empty(a.get("segmentation"))
        ]
        meta |= rle.Drawn(instances[0].mask, sum(one.dropped for one in instances)).meta()
        question = f"<image>\n Please segment every {name} in this image, one by one."
        return Sample(
            templates.turns(
                question if self.prompt == templates.DEFAULT else templates.question([name], self.prompt),
                f"Sure, the segmentation results: {', '.join(['<mask>'] * len(instances))}.",
            ),
            (image,),
            tuple(one.mask for one in instances),
            {**meta, "crowds": crowds, "metric": "instances"},
        )
