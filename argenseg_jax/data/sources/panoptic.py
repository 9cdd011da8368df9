"""Panoptic id maps: one of its classes is drawn at random, and its name fills the question's `{}`.

In the official JSONL such maps come with `seg_info`; COCO's own layout is a separate source:

    coco/annotations/panoptic_val2017.json, annotations/panoptic_val2017/*.png, val2017/*.jpg
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, label_maps, templates
from argenseg_jax.errors import SampleError, brief

_THINGS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,"
    "dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
_STUFF = {
    92: "banner",
    93: "blanket",
    95: "bridge",
    100: "cardboard",
    107: "counter",
    109: "curtain",
    112: "door",
    118: "wood floor",
    119: "flower",
    122: "fruit",
    125: "gravel",
    128: "house",
    130: "light",
    133: "mirror",
    138: "net",
    141: "pillow",
    144: "platform",
    145: "playing field",
    147: "railroad",
    148: "river",
    149: "road",
    151: "roof",
    154: "sand",
    155: "sea",
    156: "shelf",
    159: "snow",
    161: "stairs",
    166: "tent",
    168: "towel",
    171: "brick wall",
    175: "stone wall",
    176: "tile wall",
    177: "wood wall",
    178: "water",
    180: "window blind",
    181: "window",
    184: "tree",
    185: "fence",
    186: "ceiling",
    187: "sky",
    188: "cabinet",
    189: "table",
    190: "floor",
    191: "pavement",
    192: "mountain",
    193: "grass",
    194: "dirt",
    195: "paper",
    196: "food",
    197: "building",
    198: "rock",
    199: "wall",
    200: "rug",
}
COCO_NAMES = {k: name for k, name in enumerate(_THINGS, start=1) if name} | _STUFF
CONTIGUOUS = [COCO_NAMES[k] for k in sorted(COCO_NAMES)]  # the 133 names by their contiguous ids


class Map(NamedTuple):
    """A panoptic map, its image, and the class that is asked for (None: a random one)."""

    image_id: int | str
    image: Mapping[str, Any]
    file: Any
    segments: Sequence[Mapping[str, Any]]
    category: int | str | None


class PanopticSource(base.Indexed[Map]):
    """ "Segment {class}" from COCO panoptic: things and stuff, all segments of a class together.

    One sample per image, of a random class of the image (`draw`), or as chosen by label_maps.ASKED. Crowds
    are to be ignored: `meta['ignore_mask']`.

    Args:
      folder: see the module's text.
      split: such as val2017.
      asked: one of label_maps.ASKED.
      image_root: folder of the images; by default looked for in the usual folders.
      prompt: how a class is asked for; see templates.question.
      reading: see data/reader.py.
    """

    takes_prompt = True

    def __init__(
        self,
        folder: epath.Path,
        split: str = "val2017",
        asked: str = "",
        image_root: epath.PathLike = "",
        prompt: str = templates.DEFAULT,
        reading: Reading = Reading(),
    ):
        templates.question([], prompt)
        self.prompt = prompt
        label_maps.check_asked(asked, f"panoptic:{folder}:{split}")
        name = f"panoptic_{split}"
        path = base.find(folder, "panoptic annotations", f"annotations/{name}.json", f"{name}.json")
        maps = base.find(folder, "panoptic maps", f"annotations/{name}", name, f"annotations/{name}/{name}")
        content = files.read_json(path)
        images = base.by_id(base.records(content, "images", path), f"{path}: images")
        self.names, self._same = _classes(base.records(content, "categories", path), f"{path}: categories")
        annotations = base.records(content, "annotations", path)
        segments_of = base.each(annotations, _segments, f"{path}: annotations")
        entries = [
            Map(
                a["image_id"],
                base.look_up(images, a["image_id"], f"image (annotations[{k}] of {path})"),
                a.get("file_name"),
                segments,
                category,
            )
            for k, (a, segments) in enumerate(zip(annotations, segments_of, strict=True))
            for category in self._asked(asked, segments)
        ]
        root = (
            files.to_path(image_root)
            if image_root
            else base.find(folder, "images of COCO", split, f"images/{split}", f"../{split}")
        )
        self._maps, self._root = (base.Root(f, reading.allow_outside) for f in (maps, root))
        super().__init__(str(path), entries, reading)

    def _asked(self, asked: str, segments: Sequence[Mapping[str, Any]]) -> list[Any]:
        if asked == "every":
            return [k for k, first in self._same.items() if k == first]
        shown = {self._same.get(s["category_id"], s["category_id"]) for s in segments if not s.get("iscrowd")}
        return sorted(shown, key=base.in_order) if asked else [None]

    def describe(self, entry: Map) -> str:
        return str(entry.file)

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng selects the class where the index does not."""
        return self.with_meta(index, lambda entry: self._class_of(entry, rng))

    def build(self, entry: Map) -> Sample:
        return self._class_of(entry, np.random.default_rng(0))

    def _class_of(self, entry: Map, rng: np.random.Generator) -> Sample:
        image_path, map_path = self._root.file(entry.image["file_name"]), self._maps.file(entry.file)
        image = self.reader.image(image_path)
        ids = as_ids(self.reader.ids(map_path))
        transforms.check_sizes(image, [ids], [entry.file], [image_path, map_path])
        separate = [
            {"id": s["id"], "category_id": self._same.get(s["category_id"], s["category_id"])}
            for s in entry.segments
            if not s.get("iscrowd")
        ]
        names = {s["category_id"]: base.look_up(self.names, s["category_id"], "category") for s in separate}
        if entry.category is None:
            mask, category = draw_class(ids, separate, rng)
        else:
            category = entry.category
            mask = _union(ids, [s["id"] for s in separate if s["category_id"] == category])
        name = names[category] if category in names else base.look_up(self.names, category, "category")
        crowds = [s["id"] for s in entry.segments if s.get("iscrowd")]
        return Sample(
            templates.turns(templates.question([name], templates.class_prompt(self.prompt))),
            (image,),
            (mask,),
            {
                "files": [entry.image["file_name"]],
                "kind": name,
                "sents": [name],
                "metric": "semantic",
                "ignore_mask": _union(ids, crowds),
                **base.ids_of(image_id=entry.image_id, category_id=category),
            },
        )


def _classes(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[dict[Any, str], dict[Any, Any]]:
    """As base.classes; for COCO's own categories the plainer names of COCO_NAMES ('wall-brick')."""
    own, same = base.classes(categories, where)
    return (COCO_NAMES, {k: k for k in COCO_NAMES}) if set(own) == set(COCO_NAMES) else (own, same)


def _segments(annotation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The segments of an annotation, checked for ids that maps and categories can have."""
    base.an_id(annotation["image_id"])
    segments = annotation["segments_info"]
    if not isinstance(segments, list):
        raise ValueError(f"segments_info {brief(repr(segments), 40)} is no list")
    for segment in segments:
        _segment_id(segment["id"])
        base.an_id(segment["category_id"])
    return segments


def _segment_id(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{brief(repr(value), 40)} is no id of a segment, which is an integer")
    return value


def as_ids(ids: np.ndarray) -> np.ndarray:
    """u8[H, W], or u8[H, W, 3] where the id is R + 256·G + 65536·B, -> the ids i32[H, W]."""
    return ids.astype(np.int32) @ np.array([1, 256, 65536], np.int32) if ids.ndim == 3 else ids


def _union(ids: np.ndarray, segment_ids: Sequence[int]) -> np.ndarray:
    return np.isin(ids, segment_ids).astype(np.uint8) * 255


def draw_class(
    ids: np.ndarray, segments: Sequence[Mapping[str, Any]], rng: np.random.Generator
) -> tuple[np.ndarray, Any]:
    """Draws one class of the map at random.

    Args:
      ids: u8[H, W], or u8[H, W, 3] where the id is R + 256·G + 65536·B.
      segments: [{'id', 'category_id'}].
      rng: selects the class.

    Returns:
      (mask u8[H, W] of all its segments, 0 and 255; its category_id).
    """
    ids = as_ids(ids)
    present = set(np.unique(ids).tolist())
    classes = sorted({s["category_id"] for s in segments if s["id"] in present}, key=base.in_order)
    if not classes:
        raise SampleError("no segment of seg_info occurs in the panoptic map")
    chosen = classes[rng.integers(len(classes))]
    return _union(ids, [s["id"] for s in segments if s["category_id"] == chosen]), chosen


def draw_official(ids: np.ndarray, seg_info: Any, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """As draw_class, for `seg_info` of the official JSONL: (mask, name of the class).

    Its category ids are the contiguous ones of detectron2 and PSALM: 0..132, in the order of COCO's. A
    segment may have its own `name`.
    """
    if not isinstance(seg_info, list):
        raise SampleError(f"seg_info {brief(repr(seg_info), 40)} is no list of {{id, category_id}}")
    segments = [{"id": _segment_id(s["id"]), "category_id": base.an_id(s["category_id"])} for s in seg_info]
    mask, chosen = draw_class(ids, segments, rng)
    own_name = next(s.get("name") for s in seg_info if s["category_id"] == chosen)
    if own_name:
        return mask, base.text(own_name, "the name")
    if not isinstance(chosen, int) or not 0 <= chosen < len(CONTIGUOUS):
        raise SampleError(
            f"category_id {chosen} is none of the contiguous ids 0..{len(CONTIGUOUS) - 1} of "
            "COCO's panoptic categories: give the segment a `name`"
        )
    return mask, CONTIGUOUS[chosen]


def fill(conversations: Sequence[Mapping[str, str]], name: str) -> list[dict[str, str]]:
    """The turns with `{}` replaced by the name of the class."""
    return [{**turn, "value": turn["value"].replace("{}", name)} for turn in conversations]
