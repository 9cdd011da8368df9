"""Panoptic id maps: one class that is present is drawn, and its name fills the question's `{}`.

In the official JSONL such maps come with `seg_info`; COCO's own layout is a source by itself:

    coco/annotations/panoptic_val2017.json, annotations/panoptic_val2017/*.png, val2017/*.jpg
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import label_maps, layout, psalm, transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

_THINGS = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,"
    "backpack,umbrella,,,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,"
    "dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain",
    112: "door", 118: "wood floor", 119: "flower", 122: "fruit", 125: "gravel", 128: "house",
    130: "light", 133: "mirror", 138: "net", 141: "pillow", 144: "platform", 145: "playing field",
    147: "railroad", 148: "river", 149: "road", 151: "roof", 154: "sand", 155: "sea", 156: "shelf",
    159: "snow", 161: "stairs", 166: "tent", 168: "towel", 171: "brick wall", 175: "stone wall",
    176: "tile wall", 177: "wood wall", 178: "water", 180: "window blind", 181: "window",
    184: "tree", 185: "fence", 186: "ceiling", 187: "sky", 188: "cabinet", 189: "table",
    190: "floor", 191: "pavement", 192: "mountain", 193: "grass", 194: "dirt", 195: "paper", 196: "food",
    197: "building", 198: "rock", 199: "wall", 200: "rug",
}
COCO_NAMES = {k: name for k, name in enumerate(_THINGS, start=1) if name} | _STUFF


class PanopticSource(layout.Indexed[tuple]):
    """"Segment {class}" from COCO panoptic: things and stuff, all segments of a class together.

    One sample per picture, its class drawn among those that it shows (`draw`), or as label_maps.ASKED
    says. Crowds are to be ignored: `meta['ignore_mask']`.

    Args:
      folder: see the module's text.
      split: such as val2017.
      asked: one of label_maps.ASKED.
      image_root: folder of the pictures; by default looked for in the usual places.
      reading: see data/reader.py.
    """

    def __init__(self, folder: epath.Path, split: str = "val2017", asked: str = "",
                 image_root: epath.PathLike = "", reading: Reading = Reading()):
        label_maps.check_asked(asked, f"panoptic:{folder}:{split}")
        name = f"panoptic_{split}"
        path = layout.find(folder, "panoptic annotations", f"annotations/{name}.json", f"{name}.json")
        self._maps = layout.find(folder, "panoptic maps", f"annotations/{name}", name,
                                 f"annotations/{name}/{name}")
        content = files.read_json(path)
        try:
            images = {i["id"]: i["file_name"] for i in layout.records(content, "images", path)}
            self.names = _names(layout.records(content, "categories", path))
            found = [(images[a["image_id"]], a["file_name"], a["segments_info"])
                     for a in layout.records(content, "annotations", path)]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: an entry without {error}") from None
        self._root = epath.Path(image_root) if image_root else layout.find(
            folder, "pictures of COCO", split, f"images/{split}", f"../{split}")
        super().__init__(str(path), [(*f, c) for f in found for c in self._asked(asked, f[-1])], reading)

    def _asked(self, asked: str, segments: Sequence[Mapping[str, Any]]) -> list[int | None]:
        shown = sorted({s["category_id"] for s in segments if not s.get("iscrowd")})
        return {"": [None], "shown": shown, "every": list(self.names)}[asked]

    def from_(self, entry: tuple) -> str:
        return entry[1]

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng picks the class where the index does not."""
        return self.named(index, lambda entry: self._class_of(entry, rng))

    def made(self, entry: tuple) -> Sample:
        return self._class_of(entry, np.random.default_rng(0))

    def _class_of(self, entry: tuple, rng: np.random.Generator) -> Sample:
        picture, file, segments, category = entry
        image = self.reader.image(self._root / picture)
        ids = as_ids(self.reader.ids(self._maps / file))
        transforms.check_sizes(image, [ids], [file], [self._root / picture, self._maps / file])
        single = [{**s, "name": self.names[s["category_id"]]} for s in segments if not s.get("iscrowd")]
        if category is None:
            mask, name = draw_class(ids, single, rng)
        else:
            name = self.names[category]
            mask = _union(ids, [s["id"] for s in single if s["category_id"] == category])
        crowds = [s["id"] for s in segments if s.get("iscrowd")]
        return Sample(layout.turns(psalm.question([name], "semantic")), (image,), (mask,),
                      {"files": [picture], "kind": name, "sents": [name], "metric": "semantic",
                       "ignore_mask": _union(ids, crowds)})


def _names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """{category id: name}; of COCO's own categories the plainer names of COCO_NAMES ('wall-brick')."""
    own = {c["id"]: layout.spoken(c["name"]) for c in categories}
    return COCO_NAMES if set(own) == set(COCO_NAMES) else own


def as_ids(ids: np.ndarray) -> np.ndarray:
    """u8[H, W], or u8[H, W, 3] where the id is R + 256·G + 65536·B, -> the ids i32[H, W]."""
    return ids.astype(np.int32) @ np.array([1, 256, 65536], np.int32) if ids.ndim == 3 else ids


def _union(ids: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    return np.isin(ids, chosen).astype(np.uint8) * 255


def draw_class(ids: np.ndarray, segments: Sequence[Mapping[str, Any]],
               rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Draws one class that the map shows.

    Args:
      ids: u8[H, W], or u8[H, W, 3] where the id is R + 256·G + 65536·B.
      segments: [{'id', 'category_id', optional 'name'}]; without a name that of the COCO panoptic
        category.
      rng: decides which.

    Returns:
      (mask u8[H, W] of all its segments, 0 and 255; its name).
    """
    ids = as_ids(ids)
    shown = set(np.unique(ids).tolist())
    classes = sorted({s["category_id"] for s in segments if s["id"] in shown})
    if not classes:
        raise SampleError("no segment of seg_info occurs in the panoptic map")
    chosen = classes[rng.integers(len(classes))]
    mine = [s for s in segments if s["category_id"] == chosen]
    name = mine[0].get("name") or COCO_NAMES.get(chosen)
    if name is None:
        raise SampleError(f"category_id {chosen} is no COCO category: give the segment a `name`")
    return _union(ids, [s["id"] for s in mine]), name


def fill(conversations: Sequence[Mapping[str, str]], name: str) -> list[dict[str, str]]:
    """The turns with `{}` replaced by the name of the class."""
    return [{**turn, "value": turn["value"].replace("{}", name)} for turn in conversations]
