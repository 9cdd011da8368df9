"""PSALM evaluation files: expressions with polygon or RLE ground truth.

    [{image_info: {file_name, height, width}, instruction: [{sent}], anns: [{segmentation}]}]
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax.data import rle, transforms
from argenseg_jax.data.reader import Reader, Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

# {sents} is every expression as " s."; {sent} has them as "s. s", fit for the middle of a sentence.
PROMPTS = {
    "referring": "<image>\n Given the following instructions: {sents}; please perform referring "
                 "segmentation on this image.",
    "semantic": "<image>\n Please segment {sent} in this image.",
    "reasoning": "<image>\n Please perform instance segmentation following the instructions below: "
                 "{sents}.",
}
ANSWER = "Sure, the segmentation result: <mask>."


def question(sents: Sequence[str], prompt: str = "referring") -> str:
    """The human turn: `prompt` is a name in PROMPTS, or a text with {sent} or {sents}."""
    template = PROMPTS.get(prompt, prompt)
    if not re.search(r"\{sents?\}", template):
        raise UserError(f"eval.prompt: '{prompt}' is none of {', '.join(PROMPTS)} "
                        "and has no {sent}")
    whole = "".join(f" {s}." for s in sents)
    return template.replace("{sents}", whole).replace("{sent}", ". ".join(sents))


class PsalmSource:
    """Random access to the entries of a PSALM file; the mask is the union of an entry's anns."""

    def __init__(self, path: epath.Path, content: Sequence[Mapping[str, Any]], image_root,
                 prompt: str = "referring", reading: Reading = Reading()):
        """Wraps the parsed file; image_root is the directory that file names start from."""
        if not isinstance(content, list):
            raise UserError(f"{path}: a PSALM file is a list of {{image_info, instruction, anns}}")
        question([], prompt)
        self.path, self.root, self.prompt = path, epath.Path(image_root), prompt
        self._entries, self.reader = content, Reader(reading, self)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        where = f"{self.path}: entry {index}"
        try:
            entry = self._entries[index]
            info, sents = entry["image_info"], [i["sent"] for i in entry["instruction"]]
            height, width = int(info["height"]), int(info["width"])
            path = self.root / info["file_name"]
            image = self.reader.image(path)
            transforms.check_shape(image, (height, width), "(height, width of image_info)", path)
            drawn = rle.union([a["segmentation"] for a in entry["anns"]], height, width)
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SampleError(f"{where}: not a PSALM entry ({reason})") from None
        turns = [{"from": "human", "value": question(sents, self.prompt)},
                 {"from": "gpt", "value": ANSWER}]
        return Sample(conversations=turns, images=(image,), masks=(drawn.mask,),
                      meta={"source": str(self.path), "line": where, "id": index,
                            "files": [info["file_name"]], "sents": sents, **drawn.meta()})
