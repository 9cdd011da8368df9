"""Text-to-image pairs: `<mask>` holds a picture. A caption beside each picture, or a folder per class.

FOLDER[/00000]/000.jpg with 000.txt (as img2dataset writes its `files` output)
FOLDER/CLASS/*.jpg, optionally LOC_synset_mapping.txt (`n01440764 tench, Tinca tinca`), as ImageNet
"""

from __future__ import annotations

from typing import NamedTuple

from etils import epath

from argenseg_jax import files
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, templates
from argenseg_jax.errors import SampleError, UserError

QUESTION = "Please generate a picture about {}."  # the wording of prompt.UNCONDITIONAL
ANSWER = "Sure, the picture: <mask>."
MAPPING = "LOC_synset_mapping.txt"
_LONGEST = 2**20  # bytes of a caption
_FILES = (*base.IMAGE_SUFFIXES, ".txt", ".json", ".parquet", ".tar")  # what img2dataset writes is no folder


class Pair(NamedTuple):
    """A picture with the file of its caption, or the name of its class."""

    picture: epath.Path
    caption: epath.Path | None
    name: str


class PairSource(base.Indexed[Pair]):
    """One sample per picture, its caption or class in the question. No image goes in.

    Args:
      folder: see the module's text.
      split: a folder below it, such as train; '' = the folder itself.
    """

    def __init__(self, folder: epath.Path, split: str = "", reading: Reading = Reading()):
        root = files.join(folder, split) if split else folder
        if files.kind_of(root) != "folder":
            raise UserError(f"{root}: no such folder of text-to-image pairs")
        first = files.listed(root)
        inner = [p for p in first if p.suffix.lower() not in _FILES and files.kind_of(p) == "folder"]
        paths = sorted([*first, *(p for f in inner for p in files.listed(f))])  # no layout is deeper
        found = [p for p in paths if p.suffix.lower() in base.IMAGE_SUFFIXES]
        captions = {(p.parent, base.stem(p)): p for p in paths if p.suffix == ".txt"}
        entries = [Pair(p, captions[p.parent, base.stem(p)], "") for p in found if (p.parent, base.stem(p)) in captions]
        if not entries:
            names = _class_names(root, folder)
            entries = [
                Pair(p, None, names.get(p.parent.name, base.sentence(p.parent.name))) for p in found if p.parent != root
            ]
        if not entries:
            raise UserError(f"{root}: no text-to-image pairs; looked for X.jpg beside X.txt, and for CLASS/*.jpg")
        super().__init__(str(root), entries, reading)

    def describe(self, entry: Pair) -> str:
        return str(entry.picture)

    def build(self, entry: Pair) -> Sample:
        caption = entry.caption
        text = files.read_text(caption, _LONGEST, SampleError) if caption else entry.name
        text = " ".join(text.split()).rstrip(".")
        if not text:
            raise SampleError(f"{caption.name if caption else 'the class name'} is empty")
        return Sample(
            templates.turns(QUESTION.format(text), ANSWER),
            (),
            (self.reader.image(entry.picture),),
            {"files": [entry.picture.name], "kind": entry.name or None, "sents": [text], "metric": "fidelity"},
        )


def _class_names(*folders: epath.Path) -> dict[str, str]:
    """{folder name: first class name} of ImageNet's mapping, where there is one."""
    for folder in folders:
        if files.kind_of(folder / MAPPING) == "file":
            rows = [line.split(" ", 1) for line in files.read_text(folder / MAPPING).splitlines()]
            return {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
    return {}
