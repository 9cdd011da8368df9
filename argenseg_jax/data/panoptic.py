"""Panoptic id maps: one class that is present is drawn, and its name fills the question's `{}`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from argenseg_jax.errors import SampleError

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
    if ids.ndim == 3:
        ids = ids.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    shown = set(np.unique(ids).tolist())
    classes = sorted({s["category_id"] for s in segments if s["id"] in shown})
    if not classes:
        raise SampleError("no segment of seg_info occurs in the panoptic map")
    chosen = classes[rng.integers(len(classes))]
    mine = [s for s in segments if s["category_id"] == chosen]
    name = mine[0].get("name") or COCO_NAMES.get(chosen)
    if name is None:
        raise SampleError(f"category_id {chosen} is no COCO category: give the segment a `name`")
    return np.isin(ids, [s["id"] for s in mine]).astype(np.uint8) * 255, name


def fill(conversations: Sequence[Mapping[str, str]], name: str) -> list[dict[str, str]]:
    """The turns with `{}` replaced by the name of the class."""
    return [{**turn, "value": turn["value"].replace("{}", name)} for turn in conversations]
