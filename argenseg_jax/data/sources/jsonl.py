"""The official data: JSONL, one sample per line, and meta JSON, which mixes such files."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data import transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample, is_generated
from argenseg_jax.data.sources import base, panoptic
from argenseg_jax.errors import SampleError, UserError, brief, located

_BLANK = tuple(b" \t\r\n\v\f")
# Encodings by the first bytes of a file: (name, bytes of a unit). UTF-16's mark is a prefix of UTF-32's.
_MARKS = {
    codecs.BOM_UTF32_LE: ("utf-32-le", 4),
    codecs.BOM_UTF32_BE: ("utf-32-be", 4),
    codecs.BOM_UTF16_LE: ("utf-16-le", 2),
    codecs.BOM_UTF16_BE: ("utf-16-be", 2),
}
_HINT = '; a JSONL file has one sample per line, {"conversations": ...}'


class JsonlSource(base.Indexed[int]):
    """The official JSONL: `image`, `mask` (each a path or a list), `conversations`, `seg_info`.

    Also InternVL's chat data, whose `video` is a folder of frames; for evaluation `reference` (what
    the metrics of text compare with) and `metric` (a name in eval/metrics/registry.py) may be given. UTF-8, or
    UTF-16 and UTF-32 with a byte order mark; blank lines are skipped. Only the byte offset of every
    line is held in memory.

    Args:
      path: the annotation file.
      image_root: directory that `image` and `mask` start from.
      extra: entries for every sample's meta (max_tiles, augment).
      reading: see data/reader.py.
    """

    def __init__(
        self,
        path: epath.PathLike,
        image_root: epath.PathLike,
        extra: Mapping[str, Any] | None = None,
        reading: Reading = Reading(),
    ):
        self.path, self.extra = files.to_path(path), dict(extra or {})
        self._root = base.Root(files.to_path(image_root), reading.allow_outside)
        self._encoding, self._offsets, self._lines = _index_lines(self.path)
        super().__init__(str(path), range(len(self._lines)), reading)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng selects the class where the mask is a panoptic map."""
        return self.with_meta(index, lambda entry: self._sample(self._record(entry), rng))

    def where(self, entry: int) -> str:
        return f"{self.path}:{self._lines[entry]}"

    def _record(self, entry: int) -> Mapping[str, Any]:
        """The parsed line."""
        start, end = (int(offset) for offset in self._offsets[entry])
        if end - start > files.MAX_LINE:
            raise SampleError(f"the line is longer than {files.MAX_LINE} bytes")
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            content = line if self._encoding == "utf-8" else _text(line, self._encoding)
            record = files.parse_json(content, "the line", SampleError)
        except SampleError as error:
            text = _text(line, self._encoding).strip()
            is_part = text[:1] == "[" or text[-1:] in (",", "[", "{") or len(text) < 3
            reason = str(error).removeprefix("the line is no valid JSON: ")
            raise SampleError(f"malformed JSON ({reason}){_HINT if is_part else ''}") from None
        if not isinstance(record, Mapping):
            raise SampleError(f"not a sample, but {brief(repr(record), 40)}{_HINT}")
        return record

    def _sample(self, record: Mapping[str, Any], rng: np.random.Generator) -> Sample:
        turns = record["conversations"]
        if not isinstance(turns, list) or not turns:
            raise ValueError("`conversations` must be a list of turns")
        names, targets = as_list(record.get("image"), "image"), as_list(record.get("mask"), "mask")
        if record.get("video"):
            names, turns = base.frames(self._root, record["video"], turns)
        image_paths, mask_paths = [self._root.file(n) for n in names], [self._root.file(n) for n in targets]
        images = self.reader.images(image_paths)
        for key in ("kind", "metric"):
            if record.get(key) is not None:
                base.text(record[key], f"`{key}`")
        meta = {
            "source": str(self.path),
            "id": record.get("id"),
            "kind": record.get("kind"),
            "files": names,
            "reference": record.get("reference"),
            "metric": record.get("metric"),
            **self.extra,
            **base.ids_of(image_id=record.get("image_id"), category_id=record.get("category_id")),
        }
        if record.get("seg_info"):
            mask, name = panoptic.draw_official(self.reader.ids(mask_paths[0]), record["seg_info"], rng)
            masks, turns = (mask,), panoptic.fill(turns, name)
            meta["kind"] = name
        elif is_generated(images, meta):
            masks = self.reader.targets(mask_paths)
        else:
            masks = self.reader.masks(mask_paths)
        if len(images) == 1:
            transforms.check_sizes(images[0], masks, targets, [*image_paths, *mask_paths])
        return Sample(conversations=turns, images=images, masks=masks, meta=meta)


class MetaSource:
    """The official meta JSON {name: {root, annotation, repeat_time, length, ...}}: a mixture.

    `root` and `annotation` are relative to the meta file or, where nothing is there, to the working
    directory (as in the released example). Reading it in order yields the components one after the other;
    `parts` is for training.
    """

    def __init__(self, path: epath.Path, content: Any, reading: Reading = Reading()):
        self.path, self.parts = path, []
        if not isinstance(content, dict) or not all(isinstance(e, dict) for e in content.values()):
            raise UserError(
                f"{path}: a meta JSON is an object {{name: {{root, annotation, ...}}}}; samples are "
                "JSONL: one per line, in a file that ends with .jsonl"
            )
        for name, entry in content.items():
            with located(f"{path}: data set '{brief(name, 60)}'", "entry {root, annotation, ...}", UserError):
                self.parts.append(self._part(name, entry, reading))
        if not self.parts:
            raise UserError(f"{path}: names no data set")
        self._ends = np.cumsum([part.length for part in self.parts])

    def _part(self, name: str, entry: Mapping[str, Any], reading: Reading) -> base.MixtureComponent:
        repeat, length = entry.get("repeat_time", 1), entry.get("length") or 0
        if type(repeat) not in (int, float):
            raise UserError(f"repeat_time {brief(repr(repeat), 40)} is no number")
        if type(length) is not int or not 0 <= length < 2**40:
            raise UserError(f"length {brief(repr(length), 40)} is no number of samples")
        extra: dict[str, Any] = {"data_set": name}
        if max_tiles := entry.get("max_dynamic_patch"):
            if type(max_tiles) is not int or not 0 < max_tiles < 2**16:
                raise UserError(f"max_dynamic_patch {brief(repr(max_tiles), 40)} is no number of tiles")
            extra["max_tiles"] = max_tiles
        if (augment := entry.get("data_augment") or False) not in (True, False):
            raise UserError(f"data_augment {brief(repr(augment), 40)} is neither true nor false")
        if augment:
            extra["augment"] = True  # data_augment: JPEG re-compression, see augment.recompress
        annotation = self._found(entry["annotation"], "file", reading)
        source = JsonlSource(annotation, self._found(entry["root"], "folder", reading), extra, reading)
        return base.MixtureComponent(source, len(source), length or len(source)).repeated(repeat, "repeat_time")

    def _found(self, name: Any, kind: str, reading: Reading) -> epath.Path:
        """A file or folder that an entry names."""
        if not isinstance(name, str):
            raise UserError(f"{brief(repr(name), 60)} is no path of a {kind}")
        candidates = [files.inside(self.path.parent, name, reading.allow_outside)]
        if not files.is_remote(self.path):
            candidates.append(files.inside("", name, reading.allow_outside))
        for candidate in candidates:
            if files.kind_of(candidate) == kind:
                return candidate
        if kind == "folder":  # a data set without file names needs no folder
            return candidates[0]
        found = files.kind_of(candidates[0])
        raise UserError(f"{candidates[0]} is a folder" if found else f"{candidates[0]} does not exist")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        base.check_index(index, len(self))
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[k].source[int(index - (self._ends[k - 1] if k else 0))]


def as_list(value: Any, key: str) -> list[str]:
    if value in (None, ""):
        return []
    if not isinstance(value, (str, list)):
        raise SampleError(
            f"not a sample: `{key}` is {brief(repr(value), 60)}, where a file name or a list of them is expected"
        )
    return [value] if isinstance(value, str) else value


def _index_lines(path: epath.Path, block: int = 1 << 24) -> tuple[str, np.ndarray, np.ndarray]:
    """(encoding, (start, end) i64[n, 2], line number i64[n]) of every line that is not blank."""
    remaining = files.check_regular(path)  # bytes; files of /proc (kmsg) report none and may be endless
    breaks, first, size, start = [np.array([-1])], [], 0, 0
    with path.open("rb") as file:
        mark = file.read(min(4, remaining))
        encoding, unit = next((found for bom, found in _MARKS.items() if mark.startswith(bom)), ("utf-8", 1))
        file.seek(0)
        while content := file.read(min(block * unit, remaining)):
            remaining -= len(content)
            units = np.frombuffer(content, f"{'>' if encoding.endswith('be') else '<'}u{unit}", len(content) // unit)
            at = np.flatnonzero(units == ord("\n")) + size
            starts = np.concatenate([[start], at + 1])
            first.append(units[starts[(starts >= size) & (starts < size + units.size)] - size])
            breaks.append(at)
            size, start = size + units.size, starts[-1]
        stops = np.concatenate([*breaks, [size]])
        spans = np.stack([stops[:-1] + 1, stops[1:]], axis=1) * unit
        not_empty = spans[:, 0] < spans[:, 1]
        # Only lines that begin with a blank are decoded here, and the first, which may begin with a mark.
        maybe_blank = np.flatnonzero(np.isin(np.concatenate([*first, [1][:0]]), _BLANK))
        for k in {0, *maybe_blank.tolist()} if not_empty.size else ():
            file.seek(int(spans[k, 0]))
            line = _text(file.read(int(spans[k, 1] - spans[k, 0])), encoding)
            not_empty[k] &= bool(line.strip("\ufeff \t\r\v\f"))
    return encoding, spans[not_empty], np.flatnonzero(not_empty) + 1


def _text(line: bytes, encoding: str) -> str:
    return line.decode(encoding, "replace")
