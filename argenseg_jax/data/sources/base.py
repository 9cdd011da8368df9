"""What the sources share: the protocol, random access with located errors, finding files, ids and class names."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reader, Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import DATA_FAULTS, SampleError, UserError, brief, located

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
MOST_TIMES = 1e9  # limit of repeat_time; sums of weights stay finite and no weight is rounded away
Entry = TypeVar("Entry")
Built = TypeVar("Built")


class Source(Protocol):
    """Random access to samples. A source whose samples depend on chance also has `draw(index, rng)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class MixtureComponent(NamedTuple):
    """One component of a mixture: `length` samples are drawn in proportion to `weight`."""

    source: Source
    length: int
    weight: float

    def repeated(self, times: float, name: str) -> MixtureComponent:
        """The component with `times` times its weight; below 1 only the first fraction of its samples is used."""
        if not 1 / MOST_TIMES <= times <= MOST_TIMES:
            raise UserError(
                f"{name}: the weight (repeat_time) must be above 0 (from {1 / MOST_TIMES:g} to "
                f"{MOST_TIMES:g}), not {times:g}"
            )
        length = min(self.length, max(1, int(self.length * times))) if times < 1 else self.length
        return MixtureComponent(self.source, length, self.weight * times)


def check_index(index: int, length: int) -> None:
    """IndexError unless 0 <= index < length: a source has no negative indices."""
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside of 0..{length - 1}")


class Indexed(Generic[Entry]):
    """Random access to samples that are built from the entries of an index; errors name the entry.

    A subclass passes `entries` and defines `build` (entry -> sample) and `describe` (entry -> text for
    messages). It reads images and masks by its `reader`.
    """

    what = "sample"  # what an entry should be, for messages

    def __init__(self, name: str, entries: Sequence[Entry], reading: Reading = Reading()):
        if not len(entries):
            raise UserError(f"{name}: no samples")
        self.name, self.entries, self.reader = name, entries, Reader(reading, self)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        return self.with_meta(index, self.build)

    def with_meta(self, index: int, build: Callable[[Entry], Sample]) -> Sample:
        """build(entries[index]) with its source, line and id in `meta`, and the line in the message of any error."""
        check_index(index, len(self))
        entry = self.entries[index]
        where = self.where(entry)
        with located(where, self.what, faults=Exception):
            sample = build(entry)
            meta = {"source": self.name, "line": where, "id": index, **sample.meta}
            return dataclasses.replace(sample, meta=meta)

    def sized(self, info: Mapping[str, Any], root: Root, where: str) -> tuple[np.ndarray, int, int]:
        """(image u8[H, W, 3], H, W) of an entry {file_name, height, width}; SampleError if it has another size."""
        height, width = int(info["height"]), int(info["width"])
        path = root.file(info["file_name"])
        image = self.reader.image(path)
        transforms.check_shape(image, (height, width), f"(height, width {where})", path)
        return image, height, width

    def where(self, entry: Entry) -> str:
        """The file and the entry, for messages and reports."""
        return f"{self.name}: {self.describe(entry)}"

    def build(self, entry: Entry) -> Sample:
        """The sample of an entry."""
        raise NotImplementedError

    def describe(self, entry: Entry) -> str:
        """What tells the entry from others of the source, such as its file or line."""
        raise NotImplementedError


def find(root: epath.Path, what: str, *candidates: str) -> epath.Path:
    """The first of root/candidate that exists; UserError lists the candidates."""
    for candidate in candidates:
        if files.kind_of(path := files.join(root, candidate)):
            return path
    raise UserError(f"{root}: no {what}; looked for {', '.join(candidates)}")


class Root(NamedTuple):
    """The folder that the file names of a data file start from.

    Attributes:
      folder: local or in a bucket.
      allow_outside: whether a relative name may lead out of it.
    """

    folder: epath.Path
    allow_outside: bool = False

    def file(self, name: Any) -> epath.Path:
        """The file of a name; SampleError where it is none, or leads out of the folder.

        Where there is no such file, it is looked for as other programs write the name: with Windows'
        backslashes, with the folder's own name in front, with another Unicode normalization (NFC, NFD).
        """
        if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
            raise SampleError(f"a file name is expected, not {brief(repr(name), 80)}")
        paths = [
            files.inside(self.folder, spelling, self.allow_outside, SampleError)
            for spelling in self._spellings(os.fspath(name))
        ]
        return next((p for p in paths if files.kind_of(p, SampleError)), paths[0]) if len(paths) > 1 else paths[0]

    def _spellings(self, name: str) -> list[str]:
        if files.is_remote(name) or os.path.isabs(name):
            return [name]
        plain = name.replace("\\", "/").removeprefix("./")
        found = [name, plain] if "\\" in name else [name]
        front, _, rest = plain.partition("/")
        if rest and front == self.folder.name:
            found.append(rest)
        if not name.isascii():
            found += [unicodedata.normalize(form, n) for n in list(found) for form in ("NFC", "NFD")]
        return list(dict.fromkeys(found))


def frames(
    root: Root, video: str, conversation: Sequence[Mapping[str, str]], max_frames: int = 32
) -> tuple[list[str], list[dict[str, str]]]:
    """A folder of frames as images: (paths below root, turns with `<video>` as InternVL writes it).

    At most `max_frames` frames, evenly spaced. Where no turn has `<video>`, it is put before the first one.
    """
    folder = root.file(video)
    if files.kind_of(folder, SampleError) != "folder":
        raise SampleError(f"video {video}: no folder of frames (video files must be unpacked first)")
    found = image_files(folder, SampleError)
    if not found:
        raise SampleError(f"video {video}: no frames; looked for {', '.join(IMAGE_SUFFIXES)}")
    step = max(1.0, len(found) / max_frames)
    selected = [found[int(k * step)] for k in range(min(len(found), max_frames))]
    frame_tags = "\n".join(f"Frame{k}: <image>" for k in range(1, len(selected) + 1)) + "\n"
    turns = [dict(turn) for turn in conversation]
    if not any("<video>" in turn["value"] for turn in turns):
        turns[0]["value"] = f"<video>\n{turns[0]['value']}"
    for turn in turns:
        turn["value"] = turn["value"].replace("<video>\n", frame_tags).replace("<video>", frame_tags)
    return [f"{video}/{p.name}" for p in selected], turns


def subfolders(folder: epath.Path) -> list[epath.Path]:
    """The folders in a folder, by name; without hidden ones."""
    return [p for p in files.listed(folder) if files.kind_of(p) == "folder"]


def image_files(folder: epath.Path, error: type[UserError] = UserError) -> list[epath.Path]:
    """The image files of a folder, by name; without hidden ones (macOS's ._a.png)."""
    return [p for p in files.listed(folder, error) if p.suffix.lower() in IMAGE_SUFFIXES]


def by_stem(paths: Sequence[epath.Path]) -> dict[str, epath.Path]:
    """{stem: path}; a .png takes precedence over others of the same name."""
    ordered = sorted(paths, key=lambda p: (p.suffix.lower() != ".png", p))
    return {stem(p): p for p in reversed(ordered)}


def stem(path: epath.Path) -> str:
    """The name without its suffix, in NFC: macOS decomposes letters (NFD), other systems do not."""
    return unicodedata.normalize("NFC", path.stem)


def records(content: Any, key: str, path: Any) -> list[Mapping[str, Any]]:
    """content[key], checked to be a list of objects."""
    found = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(found, list):
        raise UserError(f"{path}: key `{key}` must be a list of objects")
    if (wrong := next((k for k, r in enumerate(found) if not isinstance(r, Mapping)), None)) is not None:
        raise UserError(
            f"{path}: key `{key}` must be a list of objects; entry {wrong} is {brief(repr(found[wrong]), 60)}"
        )
    return found


def each(entries: Sequence[Any], make: Callable[[Any], Built], where: str) -> list[Built]:
    """make(entry) of all; UserError names `where` and the index of the first entry that `make` rejects."""
    try:
        return [make(entry) for entry in entries]
    except (UserError, *DATA_FAULTS):
        for k, entry in enumerate(entries):
            with located(f"{where}[{k}]", "usable entry", UserError):
                make(entry)
        raise


def an_id(value: Any) -> int | str:
    """An id: an integer, also one written as 139.0 (pandas does), or a string; ValueError otherwise."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is int or type(value) is str:
        return value
    raise ValueError(f"{brief(repr(value), 40)} is no id, which is a whole number or a text")


def by_id(entries: Sequence[Mapping[str, Any]], where: str) -> dict[int | str, Mapping[str, Any]]:
    """{id: entry}; UserError names an entry without an id, or with that of another entry."""
    ids = each(entries, lambda entry: an_id(entry["id"]), where)
    found = dict(zip(ids, entries, strict=True))
    if len(found) < len(ids):
        for k, (key, entry) in enumerate(zip(ids, entries, strict=True)):
            if found[key] != entry:
                raise UserError(f"{where}[{k}]: the id {brief(repr(key), 40)} is that of another entry too")
    return found


def classes(
    categories: Sequence[Mapping[str, Any]], where: str
) -> tuple[dict[int | str, str], dict[int | str, int | str]]:
    """({category id: name}, {category id: the first id of that name}): categories of the same name are one class."""
    known = by_id(categories, where)
    names = each(list(known.values()), lambda c: sentence(text(c["name"], "the name")), where)
    return dict(zip(known, names, strict=True)), firsts(dict(zip(known, names, strict=True)))


def firsts(names: Mapping[Any, str]) -> dict[Any, Any]:
    """{key: the first key of the same name}."""
    first = {name: key for key, name in reversed(list(names.items()))}
    return {key: first[name] for key, name in names.items()}


def look_up(found: Mapping[Any, Entry], key: Any, what: str) -> Entry:
    """found[key]; SampleError if there is no such `what`."""
    try:
        return found[key]
    except (KeyError, TypeError):
        raise SampleError(f"there is no {what} {brief(repr(key), 40)}") from None


def in_order(key: Any) -> tuple[Any, ...]:
    """Sort key of ids and tuples of ids that may mix numbers and strings: numbers first."""
    return tuple(map(in_order, key)) if isinstance(key, tuple) else (isinstance(key, str), key)


def text(value: Any, what: str) -> str:
    """The value, unchanged, if it is a string that is not blank; ValueError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} {brief(repr(value), 60)} is no text")
    return value


def ids_of(**ids: Any) -> dict[str, int | str]:
    """The data set's own image_id and category_id for `Sample.meta`; values that are no ids are omitted."""
    found = {}
    for key, value in ids.items():
        with contextlib.suppress(ValueError):
            found[key] = an_id(value)
    return found


def sentence(name: str) -> str:
    """A class name as words of a sentence: 'trash_can' -> 'trash can', 'bicycle:wheel' -> 'wheel of the bicycle'."""
    name = unicodedata.normalize("NFC", name)
    thing, _, part = (" ".join(w.replace("_", " ").split()) for w in name.partition(":"))
    return f"{part} of the {thing}" if part else thing
