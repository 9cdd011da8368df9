"""Where samples come from: random-access sources, opened by name.

    shapes:LEVEL:SPLIT[:SIZE][:KIND=W,...]  drawn scenes (data/shapes.py), such as
                                  shapes:simple:train; W: another weight for a kind of expression
    shapes:SPLIT, nano:SPLIT      the level that the shipped model was trained on
    shapes-TASK:LEVEL:SPLIT[:SIZE]  other tasks on them: object, semantic, instances, chat, draw
                                  (data/shapes_tasks.py)
    jsonl:F  or F.jsonl           official JSONL, one sample a line
    meta:F   or F.json            official meta JSON: a mixture of JSONL files
    psalm:F  or F.json            PSALM JSON, for evaluation (data/psalm.py)
    prepared:FOLDER or FOLDER     shards that `prepare` wrote (data/prepared.py)
    tfds:FOLDER[:SPLIT] or FOLDER a TFDS data set: shapes_tfds, or TFDS's ref_coco (split: train)
    refer:FOLDER[:SPLIT[:BY]]     RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO (data/refer.py)
    reasonseg:FOLDER[:SPLIT]      ReasonSeg (data/reasonseg.py)
    coco:FOLDER[:SPLIT]           COCO instances; paco: and pascalpart: classes (data/coco.py)
    ade20k:, cocostuff:FOLDER[:SPLIT[:ASKED]]  classes: one drawn, all `shown`, `every` (data/label_maps.py)
    panoptic:FOLDER[:SPLIT[:ASKED]]  COCO panoptic, likewise (data/panoptic.py)
    own:FOLDER                    pictures with masks, label maps or COCO polygons (data/own.py)
    mvtec:FOLDER[:SPLIT[:CATEGORY]]  anomaly detection (data/mvtec.py)
    t2i:FOLDER[:SPLIT]            text-to-image pairs (data/text_to_image.py)
    interactive:PROMPT:SOURCE     any of these with a point, box, ... as prompt (data/interactive.py)

A source has `__len__` and `__getitem__(i) -> Sample`, and `draw(i, rng)` where a sample leaves
something to chance. Opening one reads an index, not the samples.
"""
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from argenseg_jax.data import layout, panoptic, shapes, transforms
from argenseg_jax.data.coco import CocoSource
from argenseg_jax.data.interactive import Change, InteractiveSource
from argenseg_jax.data.label_maps import LabelMapSource
from argenseg_jax.data.mvtec import AnomalySource
from argenseg_jax.data.own import open_own
from argenseg_jax.data.psalm import PsalmSource
from argenseg_jax.data.reasonseg import ReasonSegSource
from argenseg_jax.data.refer import ReferSource
from argenseg_jax.data.reader import Reader, Reading, Window
from argenseg_jax.data.sample import Sample, is_generated
from argenseg_jax.data.shapes_tasks import TaskSource
from argenseg_jax.data.text_to_image import PairSource
from argenseg_jax.errors import SampleError, UserError

NANO_LEVEL = "full"  # what `shapes:SPLIT` and `nano:SPLIT` mean
ENDLESS = 2**31 - 1  # length of a source that is drawn on the fly


class Source(Protocol):
    """Random access to samples. `draw` is only needed where chance takes part."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Part(NamedTuple):
    """One part of a mixture: `length` samples are drawn in proportion to `weight`."""

    source: Source
    length: int
    weight: float


class Options(NamedTuple):
    """What `open_source` passes on to a family: prompt, directory of the pictures, how they are read."""

    prompt: str
    image_root: str
    reading: Reading


# Families of published layouts: name -> (opens (folder, words after it, options), most words).
# A family adds one line here and one file.
FAMILIES: dict[str, tuple[Callable[[epath.Path, list[str], Options], Source], int]] = {
    "refer": (lambda f, w, o: ReferSource(f, *w, image_root=o.image_root, prompt=o.prompt, reading=o.reading), 2),
    "reasonseg": (lambda f, w, o: ReasonSegSource(f, *w, reading=o.reading), 1),
    "mvtec": (lambda f, w, o: AnomalySource(f, *w, reading=o.reading), 2),
    "t2i": (lambda f, w, o: PairSource(f, *w, reading=o.reading), 1),
    **{name: (lambda f, w, o, name=name: CocoSource(f, name, *w, image_root=o.image_root,
                                                         reading=o.reading), 1)
       for name in ("coco", "paco", "pascalpart")},
    **{name: (lambda f, w, o, name=name: LabelMapSource(f, name, *w, reading=o.reading), 2)
       for name in ("ade20k", "cocostuff")},
    "panoptic": (lambda f, w, o: panoptic.PanopticSource(f, *w, image_root=o.image_root,
                                                               reading=o.reading), 2),
    "own": (lambda f, w, o: open_own(f, o.reading), 0),
}


def _open_family(kind: str, rest: str, root: str, options: Options) -> Source:
    """`rest` is FOLDER[:WORD[:WORD]]; the colon of gs:// separates nothing."""
    opens, most = FAMILIES[kind]
    folder, *words = re.split(r":(?!//)", rest)
    if not folder or len(words) > most:
        raise UserError(f"{kind}:{rest}: write {kind}:FOLDER and at most {most} words after it, "
                        "with colons between")
    path = epath.Path(root) / folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder (of {kind}:{rest})")
    return opens(path, words, options)


def draw(source: Source, index: int, rng: np.random.Generator, change: Change | None = None) -> Sample:
    """source[index], with the source's own chances (if it has any) decided by rng, and then changed.

    Args:
      source: of any kind.
      index: 0..len(source) - 1.
      rng: decides.
      change: (sample, rng) -> sample, as augmentation; comes before a prompt is made of the sample.
    """
    if isinstance(source, InteractiveSource):
        return source.draw(index, rng, change)
    sample = source.draw(index, rng) if hasattr(source, "draw") else source[index]
    return change(sample, rng) if change else sample


def window(parts: Sequence[Part]) -> Window | tuple[()]:
    """The window of levels (data/reader.py) that all data sets with images of more than 8 bits share.

    () where there are none, or where they differ: then it is found for each data set alone.
    """
    found = {_window(part.source) for part in parts} - {None}
    if len(found) > 1:
        print(f"the data sets have {len(found)} different windows of levels: each is read by its own; what is asked "
              "later needs data.window", file=sys.stderr)
    return found.pop() if len(found) == 1 else ()


def _window(source: Source) -> Window | None:
    inner = getattr(source, "inner", source)  # of an interactive one
    inner = getattr(inner, "source", inner)  # of a part of a prepared one
    if isinstance(reader := getattr(inner, "reader", None), Reader):
        return reader.settle()
    return getattr(inner, "window", None)  # of a prepared one


def name_of(source: Source) -> str:
    """What messages call a source."""
    return str(getattr(source, "name", None) or getattr(source, "path", None) or type(source).__name__)


def open_mixture(names: Sequence[str], root: str = "", prompt: str = "referring",
                 image_root: str = "", reading: Reading = Reading()) -> list[Part]:
    """Opens the sources of a training run.

    Args:
      names: names as above, each optionally with a trailing `*W`: W < 1 takes the first part of the
        samples, W > 1 repeats them (`repeat_time` of the official meta JSON).
      root: directory that relative paths start from.
      prompt, image_root, reading: as of `open_source`.

    Raises:
      UserError: no source, an unknown one, an empty one, or an endless one in a mixture.
    """
    parts = []
    for name in [names] if isinstance(names, str) else names:
        found = re.fullmatch(r"(.+)\*(\d+(?:\.\d+)?)", name)
        plain, repeat = (found[1], float(found[2])) if found else (name, 1.0)
        source = open_source(plain, root, prompt, image_root, reading)
        if isinstance(source, MetaSource):
            parts += [Part(p.source, p.length, p.weight * repeat) for p in source.parts]
        elif hasattr(source, "spans"):  # prepared from a mixture, perhaps
            parts += [_part(part, weight, repeat, name) for part, weight in source.spans()]
        else:
            parts.append(_part(source, len(source), repeat, name))
    if not parts:
        raise UserError("data.sources is empty: name a source, such as shapes:simple:train")
    if len(parts) > 1 and any(p.length >= ENDLESS for p in parts):
        raise UserError("data.sources: an endless source in a mixture needs a size, "
                        "such as shapes:simple:train:100000")
    return parts


def open_source(name: str, root: str = "", prompt: str = "referring",
                image_root: str = "", reading: Reading = Reading()) -> Source:
    """Opens one source for reading in order.

    Args:
      name: see the module's text.
      root: directory that relative paths in `name` start from.
      prompt: of PSALM files: a name in psalm.PROMPTS or a text with `{sent}`.
      image_root: directory of the pictures; by default that of the annotation file.
      reading: how images and masks are read (data/reader.py).
    """
    kind, _, rest = name.partition(":")
    if kind in ("shapes", "nano"):
        return _open_shapes(name)
    if kind.startswith("shapes-"):
        return _open_task(name, kind.removeprefix("shapes-"), rest.split(":"))
    if kind == "interactive":
        prompted, _, inner = rest.partition(":")
        return InteractiveSource(open_source(inner, root, prompt, image_root, reading), prompted)
    if kind in FAMILIES:
        return _open_family(kind, rest, root, Options(prompt, str(image_root), reading))
    if kind not in ("jsonl", "meta", "psalm", "tfds", "prepared"):
        kind, rest = "", name
    path = epath.Path(root) / rest
    if kind in ("tfds", "prepared") or (not kind and path.is_dir()):
        return _open_shards(path, kind, prompt, reading)
    if not rest or not path.exists() or path.is_dir():
        raise UserError(f"{path}: no such source (known: shapes:LEVEL:SPLIT, X.jsonl, X.json, "
                        f"{', '.join(f'{k}:FOLDER' for k in FAMILIES)})")
    if kind == "jsonl" or (not kind and path.suffix != ".json"):
        return JsonlSource(path, image_root or path.parent, reading=reading)
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    if kind == "meta" or (not kind and isinstance(content, dict)):
        return MetaSource(path, content, reading)
    return PsalmSource(path, content, image_root or path.parent, prompt, reading)


def _open_shapes(name: str) -> shapes.ShapesSource:
    words = name.split(":")[1:]
    if words and words[0] in shapes.SPLITS:
        words = [NANO_LEVEL, *words]
    kinds = words.pop().split(",") if words and "=" in words[-1] else []
    if not 2 <= len(words) <= 3 or (len(words) == 3 and not words[2].isdigit()):
        raise UserError(f"{name}: write shapes:LEVEL:SPLIT, and then, if wanted, :SIZE and "
                        ":KIND=WEIGHT,KIND=WEIGHT")
    try:
        weights = {kind: float(weight) for kind, _, weight in (item.partition("=") for item in kinds)}
    except ValueError:
        raise UserError(f"{name}: weights of kinds are numbers, as in :alls=2,zs=0.5") from None
    if weights and words[0] in shapes.LEVELS:
        weights = {**shapes.LEVELS[words[0]].kinds, **weights}
    return shapes.ShapesSource(words[0], words[1], size=int(words[2]) if words[2:] else None,
                               kind_weights=weights or None)


def _open_task(name: str, task: str, words: list[str]) -> TaskSource:
    if words[0] in shapes.SPLITS:
        words = [NANO_LEVEL, *words]
    if not 2 <= len(words) <= 3 or (len(words) == 3 and not words[2].isdigit()):
        raise UserError(f"{name}: write shapes-TASK:LEVEL:SPLIT, and then, if wanted, :SIZE")
    return TaskSource(task, words[0], words[1], size=int(words[2]) if words[2:] else None)


def _open_shards(path: epath.Path, kind: str, prompt: str, reading: Reading) -> Source:
    from argenseg_jax.data import prepared, records, tfds_ref_coco  # slow to import, seldom needed
    most = Reader(reading).max_pixels
    if kind == "prepared" or prepared.is_prepared(path):
        return prepared.PreparedSource(path, most)
    folder, colon, split = str(path).rpartition(":")
    if not colon or path.exists():
        folder, split = path, "train"
    if tfds_ref_coco.is_ref_coco(folder):
        return tfds_ref_coco.RefCocoSource(folder, split, prompt, reading)
    return records.TfdsSource(folder, split, most)


class JsonlSource:
    """The official JSONL: `image`, `mask` (each a path or a list), `conversations`, `seg_info`.

    Also InternVL's chat data, whose `video` is a folder of frames; for evaluation `reference` (what
    the metrics of text compare with) and `metric` (a name in eval/table.py) may be given. Only the byte offset of every line is kept in memory.

    Args:
      path: the annotation file.
      image_root: directory that `image` and `mask` start from.
      extra: entries for every sample's meta (max_tiles, augment).
      reading: see data/reader.py.
    """

    def __init__(self, path, image_root, extra: Mapping[str, Any] | None = None,
                 reading: Reading = Reading()):
        self.path, self.root = epath.Path(path), epath.Path(image_root)
        self.extra, self.reader = dict(extra or {}), Reader(reading, self)
        self._offsets, self._lines = _index_lines(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index, np.random.default_rng(index))

    def draw(self, index: int, rng: np.random.Generator) -> Sample:
        """The sample; rng picks the class where the mask is a panoptic map."""
        record, where = self.record(index), self._where(index)
        try:
            return self._sample(record, where, rng)
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SampleError(f"{where}: not a sample ({type(error).__name__}: {error})") from None

    def record(self, index: int) -> dict[str, Any]:
        """The parsed line at `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        start, end = self._offsets[index]
        with self.path.open("rb") as file:
            file.seek(int(start))
            line = file.read(int(end - start))
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SampleError(f"{self._where(index)}: malformed JSON ({error})") from None

    def _where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"

    def _sample(self, record: Mapping[str, Any], where: str, rng: np.random.Generator) -> Sample:
        turns = record["conversations"]
        if not isinstance(turns, list) or not turns:
            raise ValueError("`conversations` must be a list of turns")
        files = _listed(record.get("image"))
        if record.get("video"):
            files, turns = layout.frames(self.root, record["video"], turns)
        pictures, paths = [self.root / p for p in files], _listed(record.get("mask"))
        images, targets = self.reader.images(pictures), [self.root / p for p in paths]
        meta = {"source": str(self.path), "line": where, "id": record.get("id"),
                "kind": record.get("kind"), "files": files, "reference": record.get("reference"),
                "metric": record.get("metric"), **self.extra}
        if record.get("seg_info"):
            ids = self.reader.ids(targets[0])
            mask, name = panoptic.draw_class(ids, record["seg_info"], rng)
            masks, turns = (mask,), panoptic.fill(turns, name)
            meta["kind"] = name
        elif is_generated(images, meta):
            masks = self.reader.targets(targets)
        else:
            masks = self.reader.masks(targets)
        if len(images) == 1:
            transforms.check_sizes(images[0], masks, paths, [*pictures, *targets])
        return Sample(conversations=turns, images=images, masks=masks, meta=meta)


class MetaSource:
    """The official meta JSON {name: {root, annotation, repeat_time, length, ...}}: a mixture.

    `root` and `annotation` are relative to the meta file. Reading it in order yields the parts one
    after the other; `parts` is for training.
    """

    def __init__(self, path: epath.Path, content: Mapping[str, Mapping[str, Any]],
                 reading: Reading = Reading()):
        self.parts: list[Part] = []
        if not isinstance(content, dict):
            raise UserError(f"{path}: a meta JSON is an object {{name: {{root, annotation, ...}}}}")
        for name, entry in content.items():
            where = f"{path}: data set '{name}'"
            try:
                annotation, root = path.parent / entry["annotation"], path.parent / entry["root"]
                repeat, length = float(entry.get("repeat_time", 1)), int(entry.get("length") or 0)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{where}: {type(error).__name__} {error}") from None
            if not annotation.exists():
                raise UserError(f"{where}: {annotation} does not exist")
            extra = {"data_set": name}
            if entry.get("max_dynamic_patch"):
                extra["max_tiles"] = int(entry["max_dynamic_patch"])
            if entry.get("data_augment"):
                extra["augment"] = True  # data_augment: JPEG re-compression, see augment.recompress
            source = JsonlSource(annotation, root, extra, reading)
            self.parts.append(_part(source, length or len(source), repeat, where))
        self._ends = np.cumsum([part.length for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[k].source[int(index - (self._ends[k - 1] if k else 0))]


def _part(source: Source, length: int, repeat: float, name: str) -> Part:
    """A source's share: its length counts `repeat` times; below 1 only the first part is used."""
    if repeat <= 0:
        raise UserError(f"{name}: the weight (repeat_time) must be above 0, not {repeat:g}")
    used = min(len(source), max(1, int(len(source) * repeat))) if repeat < 1 else len(source)
    if not len(source):
        raise UserError(f"{name}: no samples")
    return Part(source, used, length * repeat)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value in (None, "") else [value] if isinstance(value, str) else list(value)


def _index_lines(path: epath.Path, block: int = 1 << 24) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) i64[n, 2] and line number i64[n] of every line that is not blank."""
    breaks, size = [np.array([-1])], 0
    with path.open("rb") as file:
        while content := file.read(block):
            breaks.append(np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")) + size)
            size += len(content)
    stops = np.concatenate([*breaks, [size]])
    spans = np.stack([stops[:-1] + 1, stops[1:]], axis=1)
    full = spans[:, 1] - spans[:, 0] > 1  # not "" and not "\r"
    return spans[full], np.flatnonzero(full) + 1
