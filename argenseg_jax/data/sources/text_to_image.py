"""Text-to-image pairs: `<mask>` holds an image. A caption file per image, or a folder per class.

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
_FILES = (*base.IMAGE_SUFFIXES, ".txt", ".json", ".parquet", ".tar")  # files that img2dataset writes: not folders


class Captioned(NamedTuple):
    """An image with the file of its caption, or the name of its class."""

    image: epath.Path
    caption: epath.Path | None
    name: str


class PairSource(base.Indexed[Captioned]):
    """One sample per image, with its caption or class in the question and no input image.

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
        entries = [
            Captioned(p, captions[p.parent, base.stem(p)], "") for p in found if (p.parent, base.stem(p)) in captions
        ]
        if not entries:
            names = _class_names(root, folder)
            entries = [
                Captioned(p, None, names.get(p.parent.name, base.sentence(p.parent.name)))
                for p in found
                if p.parent != root
            ]
        if not entries:
            raise UserError(f"{root}: no text-to-image pairs; looked for X.jpg with X.txt, and for CLASS/*.jpg")
        super().__init__(str(root), entries, reading)

    def describe(self, entry: Captioned) -> str:
        return str(entry.image)

    def build(self, entry: Captioned) -> Sample:
        caption = entry.caption
        text = files.read_text(caption, _LONGEST, SampleError) if caption else entry.name
        text = " ".join(text.split()).rstrip(".")
        if not text:
            raise SampleError(f"{caption.name if caption else 'the class name'} is empty")
        return Sample(
            templates.turns(QUESTION.format(text), ANSWER),
            (),
            (self.reader.image(entry.image),),
            {"files": [entry.image.name], "kind": entry.name or None, "sents": [text], "metric": "fidelity"},
        )


def _class_names(*folders: epath.Path) -> dict[str, str]:
    """{folder name: first class name} of ImageNet's mapping, where there is one."""
    for folder in folders:
        if files.kind_of(folder / MAPPING) == "file":
            lines = [line.split(" ", 1) for line in files.read_text(folder / MAPPING).splitlines()]
            return {line[0]: line[1].split(",")[0].strip() for line in lines if len(line) == 2}
    return {}
