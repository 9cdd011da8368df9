"""PSALM evaluation files: expressions with polygon or RLE ground truth.

[{image_info: {file_name, height, width}, instruction: [{sent}], anns: [{segmentation}]}]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax.data import rle
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.errors import SampleError, UserError


class PsalmSource(base.Indexed[int]):
    """One sample per entry of a PSALM file; the mask is the union of an entry's anns.

    Entries without an expression are skipped, as by the reference's evaluation (gRefCOCO's published
    files have some); a line on stderr counts them.
    """

    what = "PSALM entry"
    takes_prompt = True

    def __init__(
        self,
        path: epath.Path,
        content: Sequence[Mapping[str, Any]],
        image_root,
        prompt: str = templates.DEFAULT,
        reading: Reading = Reading(),
    ):
        """Wraps the parsed file; image_root is the directory that file names start from."""
        if not isinstance(content, list):
            raise UserError(f"{path}: a PSALM file is a list of {{image_info, instruction, anns}}")
        templates.question([], prompt)
        self.path, self.prompt, self._content = path, prompt, content
        self._root = base.Root(epath.Path(image_root), reading.allow_outside)
        used = [k for k, entry in enumerate(content) if not _has_no_expression(entry)]
        if len(used) < len(content):
            print(
                f"{path}: {len(content) - len(used)} of {len(content)} entries have no expression and are left out",
                file=sys.stderr,
            )
        super().__init__(str(path), used, reading)

    def describe(self, entry: int) -> str:
        return f"entry {entry}"

    def build(self, entry: int) -> Sample:
        content = self._content[entry]
        if not isinstance(content, Mapping) or "image_info" not in content:
            raise SampleError(
                "not a PSALM entry, {image_info, instruction, anns}; data of one conversation each "
                "are JSONL: one sample per line, in a file that ends with .jsonl"
            )
        info, sents = content["image_info"], [base.text(i["sent"], "`sent`") for i in content["instruction"]]
        image, height, width = self.sized(info, self._root, "of image_info")
        drawn = rle.union([a["segmentation"] for a in content["anns"]], height, width)
        return Sample(
            templates.turns(templates.question(sents, self.prompt)),
            (image,),
            (drawn.mask,),
            {
                "id": entry,
                "files": [info["file_name"]],
                "sents": sents,
                **base.ids_of(image_id=info.get("id")),
                **drawn.meta(),
            },
        )


def _has_no_expression(entry: Any) -> bool:
    """Whether an entry has no expression."""
    asked = entry.get("instruction") if isinstance(entry, Mapping) else None
    return isinstance(asked, list) and not any(not isinstance(i, Mapping) or i.get("sent", "?") != "" for i in asked)
