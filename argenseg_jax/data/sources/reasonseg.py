"""ReasonSeg (LISA): SPLIT/*.jpg and SPLIT/*.json with a question and polygons.

{shapes: [{label: target | ignore..., points: [[x, y], ...]}], text: [...], is_sentence: bool}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import rle
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, drawing, templates
from argenseg_jax.errors import SampleError, UserError

IGNORED = 255


class Annotated(NamedTuple):
    """An image and the file of its question."""

    image: epath.Path
    record: epath.Path


class ReasonSegSource(base.Indexed[Annotated]):
    """One sample per image; `meta['ignore_mask']` u8[H, W] marks the pixels that no score counts."""

    takes_prompt = True

    def __init__(
        self, folder: epath.Path, split: str = "val", prompt: str = templates.DEFAULT, reading: Reading = Reading()
    ):
        """folder: ReasonSeg; split: train, val, test; prompt: see templates.question, by default by kind of text."""
        templates.question([], prompt)
        self.prompt = prompt
        path = base.find(folder, f"split '{split}' of ReasonSeg", f"{split}/")
        records = {base.stem(p): p for p in files.listed(path) if p.suffix == ".json"}
        if not records:
            raise UserError(f"{folder}: no split '{split}' of ReasonSeg; looked for {split}/*.json")
        entries = [Annotated(p, records[base.stem(p)]) for p in base.image_files(path) if base.stem(p) in records]
        if not entries:
            raise UserError(f"{path}: no image with its .json; looked for *.jpg with *.json")
        super().__init__(str(path), entries, reading)

    def describe(self, entry: Annotated) -> str:
        return entry.record.name

    def build(self, entry: Annotated) -> Sample:
        record = _read(entry.record)
        image = self.reader.image(entry.image)
        labels = draw_shapes(record["shapes"], *image.shape[:2])
        texts = [record["text"]] if isinstance(record["text"], str) else list(record["text"])
        sentence = bool(record.get("is_sentence", True))
        base.text(texts[0] if texts else None, "the text")
        default = "reasoning" if sentence else "semantic"
        question = templates.question(texts[:1], default if self.prompt == templates.DEFAULT else self.prompt)
        return Sample(
            templates.turns(question),
            (image,),
            ((labels == 1).astype(np.uint8) * 255,),
            {
                "files": [entry.image.name],
                "sents": texts[:1],
                "metric": "referring",
                "kind": "long query" if sentence else "short query",
                "ignore_mask": (labels == IGNORED).astype(np.uint8) * 255,
            },
        )


def draw_shapes(shapes: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """u8[H, W]: 1 inside targets, IGNORED where a label contains `ignore`; smaller shapes are drawn over larger ones.

    As LISA's `get_mask_from_json`: points are truncated to integers, outlines belong to their shape, and
    a shape labelled `flag` is not drawn.
    """
    rle.check_size(height, width)
    known = [s for s in shapes if s["label"].lower() != "flag"]
    outlines = [rle.points(s["points"]) for s in known]
    rle.check_amounts(outlines)
    drawn = [drawing.polygon(o.astype(np.int64), height, width) for o in outlines]
    areas = np.array([int((runs[:, 1] - runs[:, 0]).sum()) for runs in drawn], np.int64)
    if areas.sum() > rle.MAX_MASKS:
        raise SampleError(f"shapes of {areas.sum()} pixels; {rle.MAX_MASKS} are allowed in one sample")
    canvas = np.zeros((height, width), np.uint8)
    pixels = canvas.reshape(-1)
    for k in np.argsort(areas, kind="stable")[::-1]:
        value = IGNORED if "ignore" in known[k]["label"].lower() else 1
        for first, end in drawn[k].tolist():
            pixels[first:end] = value
    return canvas


def _read(path: epath.Path) -> Mapping[str, Any]:
    content = files.read_bytes(path, error=SampleError)
    try:
        text = files.decode_text(content, path.name, SampleError)
    except SampleError:  # some of the published files are not UTF-8
        text = content.decode("cp1252", "replace")
    return files.parse_json(text, path.name, SampleError)
