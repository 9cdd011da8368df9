"""ReasonSeg (LISA): SPLIT/*.jpg beside SPLIT/*.json with a question and polygons.

    {shapes: [{label: target | ignore..., points: [[x, y], ...]}], text: [...], is_sentence: bool}
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax.data import drawing, layout, psalm, rle
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

IGNORED = 255


class ReasonSegSource(layout.Indexed[epath.Path]):
    """One sample per picture; `meta['ignore_mask']` u8[H, W] marks what no score may count."""

    def __init__(self, folder: epath.Path, split: str = "val", prompt: str = "",
                 reading: Reading = Reading()):
        """folder: ReasonSeg; split: train, val, test; prompt: default by the kind of text."""
        if prompt:
            psalm.question([], prompt)
        self.prompt = prompt
        path = layout.find(folder, f"split '{split}' of ReasonSeg", f"{split}/*.json").parent
        entries = [p for p in layout.pictures(path) if p.with_suffix(".json").exists()]
        if not entries:
            raise UserError(f"{path}: no picture beside its .json; looked for *.jpg with *.json")
        super().__init__(str(path), entries, reading)

    def from_(self, entry: epath.Path) -> str:
        return entry.with_suffix(".json").name

    def made(self, entry: epath.Path) -> Sample:
        record = _read(entry.with_suffix(".json"))
        image = self.reader.image(entry)
        labels = draw_shapes(record["shapes"], *image.shape[:2])
        texts = [record["text"]] if isinstance(record["text"], str) else list(record["text"])
        sentence = bool(record.get("is_sentence", True))
        question = psalm.question(texts[:1], self.prompt or ("reasoning" if sentence else "semantic"))
        return Sample(layout.turns(question), (image,), ((labels == 1).astype(np.uint8) * 255,),
                      {"files": [entry.name], "sents": texts[:1], "metric": "referring",
                       "kind": "long query" if sentence else "short query",
                       "ignore_mask": (labels == IGNORED).astype(np.uint8) * 255})


def draw_shapes(shapes: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """u8[H, W]: 1 inside of targets, IGNORED where a label says ignore; shapes of few pixels on top.

    As LISA's `get_mask_from_json`: points are cut to whole numbers, outlines belong to their shape, and
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
    content = path.read_bytes()
    try:
        try:
            return json.loads(content.decode())
        except UnicodeDecodeError:  # some of the published files are not UTF-8
            return json.loads(content.decode("cp1252"))
    except ValueError as error:
        raise SampleError(f"malformed JSON ({error})") from None
