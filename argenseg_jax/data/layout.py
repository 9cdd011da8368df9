"""What sources of published layouts share: finding files, naming faults, the words of a sample."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from etils import epath

from argenseg_jax.data.psalm import ANSWER
from argenseg_jax.data.reader import Reader, Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError, located

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
Entry = TypeVar("Entry")


class Indexed(Generic[Entry]):
    """Random access to samples that are made from entries of an index, faults named by entry.

    A source fills `entries` and says how a sample is `made` and where an entry comes `from_`. It reads
    images and masks by its `reader`.
    """

    what = "sample"  # what an entry should be, for messages

    def __init__(self, name: str, entries: Sequence[Entry], reading: Reading = Reading()):
        if not len(entries):
            raise UserError(f"{name}: no samples")
        self.name, self.entries, self.reader = name, entries, Reader(reading, self)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        return self.named(index, self.made)

    def named(self, index: int, made: Callable[[Entry], Sample]) -> Sample:
        """made(entries[index]) with its place in `meta` and in the message of any fault."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        entry = self.entries[index]
        where = self.where(entry)
        with located(where, self.what, faults=Exception):
            sample = made(entry)
            meta = {"source": self.name, "line": where, "id": index, **sample.meta}
            return dataclasses.replace(sample, meta=meta)

    def where(self, entry: Entry) -> str:
        """The file and the entry, for messages and reports."""
        return f"{self.name}: {self.from_(entry)}"

    def made(self, entry: Entry) -> Sample:
        raise NotImplementedError

    def from_(self, entry: Entry) -> str:
        raise NotImplementedError


def find(root: epath.Path, what: str, *candidates: str) -> epath.Path:
    """The first of root/candidate (patterns allowed) that exists; UserError says what was sought."""
    for candidate in candidates:
        if any(c in candidate for c in "*?["):
            if found := sorted(root.glob(candidate)):
                return found[0]
        elif (root / candidate).exists():
            return root / candidate
    raise UserError(f"{root}: no {what}; looked for {', '.join(candidates)}")


def frames(root: epath.Path, video: str, conversation: Sequence[Mapping[str, str]],
           most: int = 32) -> tuple[list[str], list[dict[str, str]]]:
    """A folder of frames as images: (paths below root, turns with `<video>` as InternVL writes it).

    At most `most` frames, evenly spaced. A text without `<video>` has it in front.
    """
    folder = root / video
    if not folder.is_dir():
        raise SampleError(f"video {video}: no folder of frames (video files must be unpacked first)")
    found = pictures(folder)
    if not found:
        raise SampleError(f"video {video}: no frames; looked for {', '.join(PICTURES)}")
    step = max(1.0, len(found) / most)
    chosen = [found[int(k * step)] for k in range(min(len(found), most))]
    written = "\n".join(f"Frame{k}: <image>" for k in range(1, len(chosen) + 1)) + "\n"
    talk = [dict(turn) for turn in conversation]
    if not any("<video>" in turn["value"] for turn in talk):
        talk[0]["value"] = f"<video>\n{talk[0]['value']}"
    for turn in talk:
        turn["value"] = turn["value"].replace("<video>\n", written).replace("<video>", written)
    return [f"{video}/{p.name}" for p in chosen], talk


def subfolders(folder: epath.Path) -> list[epath.Path]:
    """The folders in a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.is_dir())


def pictures(folder: epath.Path) -> list[epath.Path]:
    """The picture files of a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def turns(question: str, answer: str = ANSWER) -> list[dict[str, str]]:
    """A conversation of one question and one answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def records(content: Any, key: str, path: Any) -> list[Mapping[str, Any]]:
    """content[key], checked to be a list of objects."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(r, Mapping) for r in found):
        raise UserError(f"{path}: key `{key}` must be a list of objects")
    return found


def spoken(name: str) -> str:
    """A class name as words: 'trash_can' -> 'trash can', 'bicycle:wheel' -> 'wheel of the bicycle'."""
    whole, _, part = (" ".join(w.replace("_", " ").split()) for w in name.partition(":"))
    return f"{part} of the {whole}" if part else whole
