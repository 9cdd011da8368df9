"""Where samples come from: random-access sources, opened by name.

    shapes:LEVEL:SPLIT[:SIZE][:KIND=W,...]  synthetic scenes (data/synthetic/shapes.py), such as
                                  shapes:simple:train; W: another weight for a kind of expression
    shapes:SPLIT, nano:SPLIT      the level that the shipped model was trained on
    shapes-TASK:LEVEL:SPLIT[:SIZE]  other tasks on them: object, semantic, instances, chat, draw
                                  (data/synthetic/shapes_tasks.py)
    jsonl:F  or F.jsonl           official JSONL, one sample per line
    meta:F   or F.json            official meta JSON: a mixture of JSONL files
    psalm:F  or F.json            PSALM JSON, for evaluation (data/sources/psalm.py)
    prepared:FOLDER or FOLDER     shards that `prepare` wrote (data/sources/prepared.py)
    tfds:FOLDER[:SPLIT] or FOLDER a TFDS data set: shapes_tfds, or TFDS's ref_coco (split: train)
    refer:FOLDER[:SPLIT[:BY]]     RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO (data/sources/refer.py)
    reasonseg:FOLDER[:SPLIT]      ReasonSeg (data/sources/reasonseg.py)
    coco:FOLDER[:SPLIT]           COCO instances; paco: and pascalpart: classes (data/sources/coco.py)
    ade20k:, cocostuff:FOLDER[:SPLIT[:ASKED]]  classes: one drawn, all `shown`, `every` (data/sources/label_maps.py)
    panoptic:FOLDER[:SPLIT[:ASKED]]  COCO panoptic, likewise (data/sources/panoptic.py)
    own:FOLDER                    images with masks, label maps or COCO polygons (data/sources/own.py)
    mvtec:FOLDER[:SPLIT[:CATEGORY]]  anomaly detection (data/sources/mvtec.py)
    t2i:FOLDER[:SPLIT]            text-to-image pairs (data/sources/text_to_image.py)
    interactive:PROMPT:SOURCE     any of these with a point, box, ... as prompt (data/sources/interactive.py)

A source has `__len__` and `__getitem__(i) -> Sample`, and `draw(i, rng)` if its samples are random.
Opening one reads an index, not the samples.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.data.reader import Reader, Reading, Window
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources.base import MixtureComponent, Source
from argenseg_jax.data.sources.coco import CocoSource
from argenseg_jax.data.sources.interactive import Change, InteractiveSource
from argenseg_jax.data.sources.jsonl import JsonlSource, MetaSource
from argenseg_jax.data.sources.label_maps import LabelMapSource
from argenseg_jax.data.sources.mvtec import AnomalySource
from argenseg_jax.data.sources.own import open_own
from argenseg_jax.data.sources.panoptic import PanopticSource
from argenseg_jax.data.sources.psalm import PsalmSource
from argenseg_jax.data.sources.reasonseg import ReasonSegSource
from argenseg_jax.data.sources.refer import ReferSource
from argenseg_jax.data.sources.text_to_image import PairSource
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.synthetic.shapes_tasks import TaskSource
from argenseg_jax.errors import DATA_FAULTS, UserError, brief

NANO_LEVEL = "full"  # what `shapes:SPLIT` and `nano:SPLIT` mean
_SIZE = re.compile(r"[0-9]{1,10}")
ENDLESS = 2**31 - 1  # length of a source that generates samples without end


class Options(NamedTuple):
    """What `open_source` passes to the families that use it: prompt, directory of the images."""

    prompt: str
    image_root: str


def _coco(family: str) -> Callable[..., Source]:
    return lambda folder, *fields, **options: CocoSource(folder, family, *fields, **options)


def _label_maps(family: str) -> Callable[..., Source]:
    return lambda folder, *fields, **options: LabelMapSource(folder, family, *fields, **options)


# Families of published layouts: name -> (opens (folder, *fields, **options), maximum number of fields, options).
# A new family needs one line here and one file.
FAMILIES: dict[str, tuple[Callable[..., Source], int, tuple[str, ...]]] = {
    "refer": (ReferSource, 2, ("prompt", "image_root")),
    "reasonseg": (ReasonSegSource, 1, ("prompt",)),
    "mvtec": (AnomalySource, 2, ("prompt",)),
    "t2i": (PairSource, 1, ()),
    **{name: (_coco(name), 1, ("prompt", "image_root")) for name in ("coco", "paco", "pascalpart")},
    **{name: (_label_maps(name), 2, ("prompt",)) for name in ("ade20k", "cocostuff")},
    "panoptic": (PanopticSource, 2, ("prompt", "image_root")),
    "own": (open_own, 0, ("prompt",)),
}


def _open_family(kind: str, rest: str, root: str, options: Options, reading: Reading) -> Source:
    """`rest` is FOLDER[:FIELD[:FIELD]]; the colon of gs:// is no separator."""
    opens, most, used = FAMILIES[kind]
    folder, *fields = re.split(r":(?!//)", rest)
    if not folder or len(fields) > most:
        raise UserError(f"{kind}:{rest}: write {kind}:FOLDER and at most {most} words after it, with colons between")
    path = files.join(root, folder)
    if files.kind_of(path) != "folder":
        raise UserError(f"{path}: no such folder (of {kind}:{rest})")
    return opens(path, *fields, reading=reading, **{name: getattr(options, name) for name in used})


def takes_prompt(source: Source) -> bool:
    """Whether `prompt` sets the wording of a source's questions; other sources contain them."""
    return getattr(source, "takes_prompt", False)


def draw(source: Source, index: int, rng: np.random.Generator, change: Change | None = None) -> Sample:
    """source[index], with the randomness of the source (if any) from rng, then augmented.

    Args:
      source: of any kind.
      index: 0..len(source) - 1.
      rng: source of randomness.
      change: (sample, rng) -> sample, as augmentation; applied before an interactive prompt is made.
    """
    if isinstance(source, InteractiveSource):
        return source.draw(index, rng, change)
    random: Any = source if hasattr(source, "draw") else None
    sample = random.draw(index, rng) if random else source[index]
    return change(sample, rng) if change else sample


def window(components: Sequence[MixtureComponent]) -> Window | tuple[()]:
    """The window of values (data/reader.py) that all data sets with images of more than 8 bits share.

    () where there are none, or where they differ: then each data set has its own.
    """
    found = {found for c in components if (found := _window(c.source)) is not None}
    if len(found) > 1:
        print(
            f"the data sets have {len(found)} different windows of values: each is read with its own; inference "
            "needs data.window",
            file=sys.stderr,
        )
    return found.pop() if len(found) == 1 else ()


def _window(source: Source) -> Window | None:
    inner = getattr(source, "inner", source)  # of an interactive source
    inner = getattr(inner, "source", inner)  # of a component of a prepared source
    if isinstance(reader := getattr(inner, "reader", None), Reader):
        return reader.settle()
    return getattr(inner, "window", None)  # of a prepared source


def name_of(source: Source) -> str:
    """The name of a source in messages."""
    return str(getattr(source, "name", None) or getattr(source, "path", None) or type(source).__name__)


def open_mixture(
    names: Sequence[str], root: str = "", prompt: str = "referring", image_root: str = "", reading: Reading = Reading()
) -> list[MixtureComponent]:
    """Opens the sources of a training run.

    Args:
      names: names as above, each optionally with a trailing `*W`: W < 1 uses the first samples only,
        W > 1 repeats them (`repeat_time` of the official meta JSON).
      root: directory of relative paths.
      prompt, image_root, reading: as of `open_source`.

    Raises:
      UserError: no source, an unknown or empty one, or an endless one in a mixture.
    """
    components = []
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str):
            raise UserError(f"data.sources: {brief(repr(name), 60)} is no name of a source")
        found = re.fullmatch(r"(.+)\*(\d+(?:\.\d+)?)", name)
        plain, repeat = (found[1], float(found[2])) if found else (name, 1.0)
        source = open_source(plain, root, prompt, image_root, reading)
        if isinstance(source, MetaSource):
            components += [component.repeated(repeat, name) for component in source.parts]
        elif spans := getattr(source, "spans", None):  # prepared, perhaps from a mixture
            components += [MixtureComponent(span, len(span), weight).repeated(repeat, name) for span, weight in spans()]
        elif not len(source):
            raise UserError(f"{name}: no samples")
        else:
            components.append(MixtureComponent(source, len(source), len(source)).repeated(repeat, name))
    if not components:
        raise UserError("data.sources is empty: name a source, such as shapes:simple:train")
    if len(components) > 1 and any(c.length >= ENDLESS for c in components):
        raise UserError("data.sources: an endless source in a mixture needs a size, such as shapes:simple:train:100000")
    return components


def open_source(
    name: str, root: str = "", prompt: str = "referring", image_root: str = "", reading: Reading = Reading()
) -> Source:
    """Opens one source for reading in order.

    Args:
      name: see the module's text.
      root: directory of relative paths in `name`.
      prompt: of PSALM files: a name in templates.PROMPTS or a text with `{sent}`.
      image_root: directory of the images; by default that of the annotation file.
      reading: how images and masks are read (data/reader.py).
    """
    try:
        return _open(name, root, Options(prompt, str(image_root)), reading)
    except UserError:
        raise
    except (OSError, ImportError, RuntimeError, *DATA_FAULTS) as error:
        raise UserError(f"{brief(name)}: cannot be opened ({type(error).__name__}: {brief(error)})") from None


def _open(name: str, root: str, options: Options, reading: Reading) -> Source:
    kind, _, rest = name.partition(":")
    if kind in ("shapes", "nano"):
        return _open_shapes(name)
    if kind.startswith("shapes-"):
        return _open_task(name, kind.removeprefix("shapes-"), rest.split(":"))
    if kind == "interactive":
        prompted, _, inner = rest.partition(":")
        if inner.startswith("interactive:"):
            raise UserError(f"{brief(name)}: one prompt only; an interactive source is made from another kind")
        return InteractiveSource(_open(inner, root, options, reading), prompted)
    if kind in FAMILIES:
        return _open_family(kind, rest, root, options, reading)
    if kind not in ("jsonl", "meta", "psalm", "tfds", "prepared"):
        kind, rest = "", name
    path = files.join(root, rest)
    found = files.kind_of(path)
    if kind in ("tfds", "prepared") or (not kind and found == "folder"):
        return _open_shards(path, kind, options.prompt, reading)
    if not rest or found != "file":
        raise UserError(
            f"{brief(path)}: no such source (known: shapes:LEVEL:SPLIT, X.jsonl, X.json, "
            f"{', '.join(f'{k}:FOLDER' for k in FAMILIES)})"
        )
    image_root = options.image_root or path.parent
    if kind == "jsonl" or (not kind and path.suffix != ".json"):
        return JsonlSource(path, image_root, reading=reading)
    content = files.read_json(path)
    if kind == "meta" or (not kind and isinstance(content, dict)):
        return MetaSource(path, content, reading)
    return PsalmSource(path, content, image_root, options.prompt, reading)


def _open_shapes(name: str) -> shapes.ShapesSource:
    fields = name.split(":")[1:]
    if fields and fields[0] in shapes.SPLITS:
        fields = [NANO_LEVEL, *fields]
    kinds = fields.pop().split(",") if fields and "=" in fields[-1] else []
    if not 2 <= len(fields) <= 3 or (len(fields) == 3 and not _SIZE.fullmatch(fields[2])):
        raise UserError(f"{name}: write shapes:LEVEL:SPLIT, and then, if wanted, :SIZE and :KIND=WEIGHT,KIND=WEIGHT")
    try:
        weights = {kind: float(weight) for kind, _, weight in (item.partition("=") for item in kinds)}
    except ValueError:
        raise UserError(f"{name}: weights of kinds are numbers, as in :alls=2,zs=0.5") from None
    if not all(0 <= weight < math.inf for weight in weights.values()):
        raise UserError(f"{name}: weights of kinds are finite and not below 0")
    if weights and fields[0] in shapes.LEVELS:
        weights = {**shapes.LEVELS[fields[0]].kinds, **weights}
    return shapes.ShapesSource(
        fields[0], fields[1], size=int(fields[2]) if fields[2:] else None, kind_weights=weights or None
    )


def _open_task(name: str, task: str, fields: list[str]) -> TaskSource:
    if fields[0] in shapes.SPLITS:
        fields = [NANO_LEVEL, *fields]
    if not 2 <= len(fields) <= 3 or (len(fields) == 3 and not _SIZE.fullmatch(fields[2])):
        raise UserError(f"{name}: write shapes-TASK:LEVEL:SPLIT, and then, if wanted, :SIZE")
    return TaskSource(task, fields[0], fields[1], size=int(fields[2]) if fields[2:] else None)


def _open_shards(path: epath.Path, kind: str, prompt: str, reading: Reading) -> Source:
    from argenseg_jax.data.sources import prepared, records, tfds_ref_coco  # slow to import, rarely needed

    most = Reader(reading).max_pixels
    if kind == "prepared" or prepared.is_prepared(path):
        return prepared.PreparedSource(path, most)
    named = re.fullmatch(r"(.*[^:/]):([^:/\[\]]+(?:\[[^\]]*\])?)", os.fspath(path))
    folder, split = (files.to_path(named[1]), named[2]) if named and not files.kind_of(path) else (path, "train")
    if tfds_ref_coco.is_ref_coco(folder):
        return tfds_ref_coco.RefCocoSource(folder, split, prompt, reading)
    return records.TfdsSource(folder, split, most)
