"""One tiny data set of every kind, to be opened in a folder or a bucket, or to be spoilt."""

import io
import json
import pickle

import numpy as np
from etils import epath
from PIL import Image

from argenseg_jax import files

TURNS = [{"from": "human", "value": "<image>\nSegment it."}, {"from": "gpt", "value": "<mask>"}]
BOX = [[0, 0, 6, 0, 6, 8, 0, 8]]
COCO = {
    "images": [{"id": 7, "file_name": "a.png", "height": 8, "width": 12}],
    "categories": [{"id": 3, "name": "box"}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "segmentation": BOX}],
}


def put(path, content):
    path = epath.Path(path)
    if not files.is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


IMAGE = png(np.full((8, 12, 3), 90, np.uint8))
MASK = png(np.repeat([[255] * 6 + [0] * 6], 8, 0).astype(np.uint8))
LABELS = png(np.repeat([[1] * 6 + [2] * 6], 8, 0).astype(np.uint8))


def fill(root):
    """One tiny data set of every kind below a folder; returns {name of the source below it: samples}."""
    line = {"image": "a.png", "mask": "m.png", "conversations": TURNS}
    for folder in (
        "flat",
        "own/images",
        "coco/val2017",
        "maps/images",
        "masks/images",
        "refer/train2014",
        "panoptic/val2017",
        "reason/val",
        "t2i",
        "mvtec/bolt/test/cut",
        "ade/images/validation",
    ):
        put(f"{root}/{folder}/a.png", IMAGE)
    put(f"{root}/flat/m.png", MASK)
    put(f"{root}/flat/d.jsonl", line)
    put(f"{root}/flat/x.jsonl", {**line, "image": f"{root}/flat/a.png", "mask": f"{root}/flat/m.png"})
    put(
        f"{root}/meta.json",
        {
            "x": {"root": "flat", "annotation": "flat/d.jsonl"},
            "y": {"root": f"{root}/flat", "annotation": f"{root}/flat/d.jsonl", "repeat_time": 2},
        },
    )
    put(
        f"{root}/flat/p.json",
        [
            {
                "image_info": {"file_name": "a.png", "height": 8, "width": 12, "id": 9},
                "instruction": [{"sent": "it"}],
                "anns": [{"segmentation": BOX}],
            }
        ],
    )
    put(f"{root}/own/annotations.json", COCO)
    put(f"{root}/coco/annotations/instances_val2017.json", COCO)
    put(f"{root}/maps/labels/a.png", LABELS)
    put(f"{root}/maps/classes.txt", b"left\nright\n")
    put(f"{root}/masks/masks/left/a.png", MASK)
    put(f"{root}/refer/instances.json", COCO)
    put(
        f"{root}/refer/refs(unc).p",
        pickle.dumps([{"ref_id": 1, "ann_id": 1, "image_id": 7, "split": "val", "sentences": [{"sent": "it"}]}], 2),
    )
    put(
        f"{root}/panoptic/annotations/panoptic_val2017.json",
        {
            **COCO,
            "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 3}]}],
        },
    )
    put(f"{root}/panoptic/annotations/panoptic_val2017/a.png", LABELS)
    put(
        f"{root}/reason/val/a.json",
        {"text": ["it"], "shapes": [{"label": "target", "points": [[0, 0], [5, 0], [5, 7]]}]},
    )
    put(f"{root}/t2i/a.txt", b"a grey field")
    put(f"{root}/mvtec/bolt/ground_truth/cut/a_mask.png", MASK)
    put(f"{root}/ade/annotations/validation/a.png", LABELS)
    put(f"{root}/ade/objectInfo150.txt", b"Idx\tName\n1\tleft, links\n2\tright\n")
    return {
        "jsonl:{}/flat/d.jsonl": 1,
        "{}/flat/d.jsonl": 1,
        "{}/flat/x.jsonl": 1,
        "{}/meta.json": 2,
        "meta:{}/meta.json": 2,
        "{}/flat/p.json": 1,
        "psalm:{}/flat/p.json": 1,
        "own:{}/own": 1,
        "own:{}/maps": 2,
        "own:{}/masks": 1,
        "coco:{}/coco": 1,
        "coco:{}/coco:val2017": 1,
        "refer:{}/refer": 1,
        "refer:{}/refer:val:unc": 1,
        "panoptic:{}/panoptic:val2017:shown": 1,
        "reasonseg:{}/reason:val": 1,
        "t2i:{}/t2i": 1,
        "mvtec:{}/mvtec": 1,
        "ade20k:{}/ade:validation:every": 2,
        "interactive:box:{}/flat/d.jsonl": 1,
        "interactive:point:own:{}/own": 1,
    }
