"""Samples in TFDS form, as ArrayRecord shards of PNGs: write any source, read it back with random access.

TensorFlow is not needed for either. `Samples` is the builder that TFDS drives by itself; the command
`prepare` (data/prepare.py) writes the same records shard by shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from argenseg_jax import files
from argenseg_jax.data import images
from argenseg_jax.data.reader import PER_SAMPLE
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base, tfds_folder
from argenseg_jax.errors import SampleError, UserError, brief, located

META_IMAGES = "meta_images"
CODES = "codes"
COLOURS = "colour_masks"  # in meta: which masks have three channels, though these are equal


def features(num_codes: int = 0) -> tfds.features.FeaturesDict:
    """The columns of a record. Grey masks are stored as three equal channels.

    Args:
      num_codes: N, codes per mask, where the records hold them: i32[M, N] under `codes`.
    """
    text, pngs = tfds.features.Text(), tfds.features.Sequence(tfds.features.Image(encoding_format="png"))
    codes = {CODES: tfds.features.Tensor(shape=(None, num_codes), dtype=np.int32)} if num_codes else {}
    return tfds.features.FeaturesDict(
        {
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
            "images": pngs,
            "masks": pngs,
            "meta": text,  # JSON
            META_IMAGES: pngs,  # the arrays of meta; the JSON says {key: how many, None = not a list}
            **codes,
        }
    )


def encode(sample: Sample) -> dict[str, Any]:
    """A sample -> a record of `features`; its images and masks become PNG bytes."""
    arrays = {name: value for name, value in sample.meta.items() if _holds_arrays(value)}
    meta = {name: value for name, value in sample.meta.items() if name not in arrays}
    if arrays:
        meta[META_IMAGES] = {
            name: None if isinstance(value, np.ndarray) else len(value) for name, value in arrays.items()
        }
    if colours := [k for k, mask in enumerate(sample.masks) if mask.ndim == 3 and _grey(mask).ndim == 2]:
        meta[COLOURS] = colours
    flat = [a for value in arrays.values() for a in ([value] if isinstance(value, np.ndarray) else value)]
    record = {
        "conversations": [{key: turn[key] for key in ("from", "value")} for turn in sample.conversations],
        "images": [_png(image) for image in sample.images],
        "masks": [_png(mask) for mask in sample.masks],
        "meta": json.dumps(meta, default=lambda value: value.item()),  # numpy scalars
        META_IMAGES: [_png(array) for array in flat],
    }
    return record if sample.codes is None else {**record, CODES: sample.codes}


def decode(record: Mapping[str, Any], max_pixels: int = images.MAX_PIXELS) -> Sample:
    """A record, whose images are PNG bytes as from `encode` -> the sample."""
    turns = record["conversations"]
    meta = files.parse_json(record["meta"], "its `meta`", SampleError)
    arrays = iter([_grey(array) for array in _decode_images(record[META_IMAGES], META_IMAGES, max_pixels)])
    for name, count in meta.pop(META_IMAGES, {}).items():
        meta[name] = next(arrays) if count is None else [next(arrays) for _ in range(count)]
    colours = set(meta.pop(COLOURS, ()))
    decoded, masks = (tuple(_decode_images(record[c], c, max_pixels)) for c in ("images", "masks"))
    return Sample(
        conversations=[
            {"from": who.decode(), "value": value.decode()}
            for who, value in zip(turns["from"], turns["value"], strict=True)
        ],
        images=decoded,
        masks=tuple(mask if k in colours else _grey(mask) for k, mask in enumerate(masks)),
        meta=meta,
        codes=record.get(CODES),
    )


class _Info(tfds.core.DatasetInfo):
    """A description of a data set that is only local."""

    def initialize_from_bucket(self) -> None:
        """Does not query Google's bucket; TFDS would also leave an empty folder in /tmp each time."""


class Samples(tfds.core.GeneratorBasedBuilder):
    """Writes sources, one per split, to data_dir, in order; samples that cannot be read are skipped.

    Args:
      sources: {split: source}.
      data_dir: where the data set's folder is created.
      num_codes: as for `features`.

    Attributes:
      samples: number of samples written so far.
      broken: the messages of those that could not be read.
    """

    VERSION = tfds.core.Version("1.1.0")
    url_infos = {}  # nothing is downloaded; TFDS would need another package to look up checksums

    def __init__(
        self, *, sources: Mapping[str, base.Source], data_dir: epath.PathLike, num_codes: int = 0, **kwargs: Any
    ):
        self.sources, self.samples, self.broken = dict(sources), 0, []
        self.num_codes = num_codes
        super().__init__(data_dir=data_dir, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(builder=self, description=__doc__, disable_shuffling=True, features=features(self.num_codes))

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(source) for split, source in self.sources.items()}

    def _generate_examples(self, source: base.Source) -> Iterator[tuple[int, dict]]:
        for index in range(len(source)):
            try:
                record = encode(source[index])
            except SampleError as error:
                self.broken.append(str(error))
                continue
            self.samples += 1
            yield index, record


class TfdsSource:
    """Random access to one split of a folder that `Samples` or `prepare` has written.

    Args:
      path: the folder with dataset_info.json.
      split: a split's name; TFDS slices such as 'train[:10%]' also work.
      max_pixels: limit of the pixels of an image.
    """

    def __init__(self, path: epath.PathLike, split: str = "train", max_pixels: int = images.MAX_PIXELS):
        self.path, self._split, self._max_pixels = epath.Path(path), split, max_pixels
        self._records = tfds_folder.open_split(path, split)
        columns = tfds_folder.columns(path)
        if missing := set(features()) - set(columns):
            raise UserError(
                f"{path}: the records have no {', '.join(sorted(missing))}; looked for "
                f"{', '.join(features())}; they have {', '.join(columns)}"
            )
        self._num_codes = _num_codes(columns, self.path)
        self._raw = _raw_features(self._num_codes)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """SampleError where the record cannot be read, or holds something else."""
        base.check_index(index, len(self))
        with located(f"{self.path} ({self._split}): sample {index}", faults=Exception):
            return decode(
                cast(Mapping[str, Any], self._raw.deserialize_example_np(self._records[int(index)])), self._max_pixels
            )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_raw"}  # TFDS's features are not for pickling

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._raw = _raw_features(self._num_codes)


def _raw_features(num_codes: int) -> tfds.features.FeaturesDict:
    """As `features`, but images stay bytes: they are decoded here, with limits, and only as PNG."""
    encoded = tfds.features.Sequence(tfds.features.Text())
    return tfds.features.FeaturesDict(
        {
            name: encoded if name in ("images", "masks", META_IMAGES) else column
            for name, column in features(num_codes).items()
        }
    )


def _num_codes(columns: Mapping[str, Any], path: epath.Path) -> int:
    """N of the column `codes`; 0 where there is none."""
    if CODES not in columns:
        return 0
    with located(f"{path / tfds_folder.FEATURES}: column `{CODES}`", "column of codes", UserError):
        _, count = columns[CODES]["tensor"]["shape"]["dimensions"]
        if not 0 < int(count) < 2**20:
            raise ValueError(f"{brief(count, 40)} codes per mask")
        return int(count)


def _decode_images(contents: Sequence[bytes], column: str, max_pixels: int) -> list[np.ndarray]:
    """PNGs -> u8[H, W, 3] each; the pixels of a column together are bounded as in data/reader.py."""
    decoded, budget = [], PER_SAMPLE * max_pixels
    for k, content in enumerate(contents):
        decoded.append(decode_image(content, f"{column}[{k}]", min(budget, max_pixels), ("PNG",)))
        budget -= decoded[-1].shape[0] * decoded[-1].shape[1]
    return decoded


def decode_image(content: bytes, name: str, max_pixels: int, formats: Sequence[str]) -> np.ndarray:
    """The u8[H, W, 3] of an image in a record; SampleError where it is none of the formats."""
    image = images.open_bytes(content, name, max_pixels)
    if image.format not in formats or images.is_deep(image):
        raise SampleError(f"{name}: no {' or '.join(formats)} image of 8 bits")
    return images.image_levels(image, name, upright=False)


def _holds_arrays(value: Any) -> bool:
    listed = isinstance(value, (list, tuple)) and value and all(isinstance(v, np.ndarray) for v in value)
    return isinstance(value, np.ndarray) or bool(listed)


def _png(image: np.ndarray) -> bytes:
    """u8[H, W] or u8[H, W, 3] -> a PNG of three channels."""
    file = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _grey(image: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] -> u8[H, W] where the channels are equal."""
    return image[..., 0].copy() if (image == image[..., :1]).all() else image
