"""Text-to-image pairs: `<mask>` holds a picture. A caption beside each picture, or a folder per class.

    FOLDER[/00000]/000.jpg with 000.txt (as img2dataset writes its `files` output)
    FOLDER/CLASS/*.jpg, optionally LOC_synset_mapping.txt (`n01440764 tench, Tinca tinca`), as ImageNet
"""
from __future__ import annotations

from etils import epath

from argenseg_jax.data import layout
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

QUESTION = "Please generate a picture about {}."  # the wording of prompt.NOTHING
ANSWER = "Sure, the picture: <mask>."
MAPPING = "LOC_synset_mapping.txt"


class PairSource(layout.Indexed[tuple]):
    """One sample per picture, its caption or class in the question. No image goes in.

    Args:
      folder: see the module's text.
      split: a folder below it, such as train; '' = the folder itself.
    """

    def __init__(self, folder: epath.Path, split: str = "", reading: Reading = Reading()):
        root = folder / split if split else folder
        if not root.is_dir():
            raise UserError(f"{root}: no such folder of text-to-image pairs")
        paths = sorted([*root.glob("*"), *root.glob("*/*")])  # no layout is deeper
        found = [p for p in paths if p.suffix.lower() in layout.PICTURES]
        captions = {p.with_suffix("") for p in paths if p.suffix == ".txt"}
        entries: list[tuple] = [(p, None) for p in found if p.with_suffix("") in captions]
        if not entries:
            names = _class_names(root, folder)
            entries = [(p, names.get(p.parent.name, layout.spoken(p.parent.name)))
                       for p in found if p.parent != root]
        if not entries:
            raise UserError(f"{root}: no text-to-image pairs; looked for X.jpg beside X.txt, "
                            "and for CLASS/*.jpg")
        super().__init__(str(root), entries, reading)

    def from_(self, entry: tuple) -> str:
        return str(entry[0])

    def made(self, entry: tuple) -> Sample:
        path, name = entry
        text = path.with_suffix(".txt").read_text() if name is None else name
        text = " ".join(text.split()).rstrip(".")
        if not text:
            raise SampleError(f"{path.with_suffix('.txt').name} is empty")
        return Sample(layout.turns(QUESTION.format(text), ANSWER), (), (self.reader.image(path),),
                      {"files": [path.name], "kind": name, "sents": [text], "metric": "fidelity"})


def _class_names(*folders: epath.Path) -> dict[str, str]:
    """{folder name: first class name} of ImageNet's mapping, where there is one."""
    for folder in folders:
        if (folder / MAPPING).exists():
            rows = [line.split(" ", 1) for line in (folder / MAPPING).read_text().splitlines()]
            return {row[0]: row[1].split(",")[0].strip() for row in rows if len(row) == 2}
    return {}
