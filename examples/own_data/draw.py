"""Draws small tiles as if from above (fields with water, roads and roofs) in place of your own data.

  python examples/own_data/draw.py --out mine [--form labels|masks|polygons]

Writes mine/train and mine/val in one of the three forms that `own:FOLDER` reads (see README.md).
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
CLASSES = {"water": (50, 90, 160), "road": (120, 118, 115), "roof": (165, 80, 60)}
Outline = list[tuple[float, float]]


def scene(rng: np.random.Generator) -> list[tuple[str, Outline]]:
    """Classes and their outlines, from the lowest to the uppermost."""
    shapes = [(name, band(rng, width)) for name, width in (("water", 16), ("road", 8)) if rng.random() < 0.8]
    for _ in range(rng.integers(1, 5)):
        x, y, w, h = (*rng.integers(4, SIDE - 24, 2), *rng.integers(10, 22, 2))
        shapes.append(("roof", [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]))
    return shapes


def band(rng: np.random.Generator, width: float) -> Outline:
    """A strip from one side of the tile to the opposite one."""
    a, b = rng.uniform(0, SIDE - width, 2)
    strip = [(a, 0), (a + width, 0), (b + width, SIDE), (b, SIDE)]
    return [(y, x) for x, y in strip] if rng.random() < 0.5 else strip


def draw(shapes: list[tuple[str, Outline]], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image u8[S, S, 3], label map u8[S, S]: 1, 2, 3 in the order of CLASSES, 0 = field)."""
    image = Image.new("RGB", (SIDE, SIDE), (95, 125, 70))
    labels = Image.new("L", (SIDE, SIDE))
    for name, outline in shapes:
        ImageDraw.Draw(image).polygon(outline, CLASSES[name])
        ImageDraw.Draw(labels).polygon(outline, 1 + list(CLASSES).index(name))
    noisy = np.asarray(image, np.float32) + rng.normal(0, 12, (SIDE, SIDE, 1))
    return np.clip(noisy, 0, 255).astype(np.uint8), np.asarray(labels)


def write(folder: pathlib.Path, form: str, count: int, seed: int) -> None:
    """One split: images/ and the annotations of the form."""
    rng, coco = (
        np.random.default_rng(seed),
        {"images": [], "annotations": [], "categories": [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]},
    )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        shapes = scene(rng)
        image, labels = draw(shapes, rng)
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
        if form == "labels":
            save(folder / "labels" / f"{i:03d}.png", labels)
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        elif form == "masks":
            for k, name in enumerate(CLASSES, 1):
                if (labels == k).any():
                    save(folder / "masks" / name / f"{i:03d}.png", (labels == k) * np.uint8(255))
        coco["images"].append({"id": i, "file_name": f"{i:03d}.png", "height": SIDE, "width": SIDE})
        coco["annotations"] += [
            {
                "id": 100 * i + n,
                "image_id": i,
                "category_id": 1 + list(CLASSES).index(name),
                "segmentation": [[float(v) for point in outline for v in point]],
            }
            for n, (name, outline) in enumerate(shapes)
        ]
    if form == "polygons":
        (folder / "annotations.json").write_text(json.dumps(coco))


def save(path: pathlib.Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--form", default="labels", choices=("labels", "masks", "polygons"))
    args = parser.parse_args()
    for split, count, seed in (("train", 60, 0), ("val", 12, 1)):
        write(args.out / split, args.form, count, seed)
    print(json.dumps({"train": 60, "val": 12, "form": args.form}))


if __name__ == "__main__":
    main()
