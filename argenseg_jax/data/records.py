"""Samples in TFDS form, as ArrayRecord shards of PNGs: write any source, read it back at random.

TensorFlow is not needed for either. `Samples` is the builder that TFDS drives by itself; the command
`prepare` (data/prepare.py) writes the same records shard by shard.
"""
from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

META_IMAGES = "meta_images"
CODES = "codes"


def features(num_codes: int = 0) -> tfds.features.FeaturesDict:
    """The columns of a record. Grey masks are kept as three equal channels.

    Args:
      num_codes: N, codes of a mask, where the records hold them: i32[M, N] under `codes`.
    """
    text, images = tfds.features.Text(), tfds.features.Sequence(
        tfds.features.Image(encoding_format="png"))
    codes = {CODES: tfds.features.Tensor(shape=(None, num_codes), dtype=np.int32)} if num_codes else {}
    return tfds.features.FeaturesDict({
        "conversations": tfds.features.Sequence({"from": text, "value": text}),
        "images": images,
        "masks": images,
        "meta": text,  # JSON
        META_IMAGES: images,  # the arrays of meta; the JSON says {key: how many, None = not a list}
        **codes,
    })


def encode(sample: Sample) -> dict[str, Any]:
    """A sample -> a record of `features`; its pictures and masks become PNG bytes."""
    arrays = {name: value for name, value in sample.meta.items() if _holds_arrays(value)}
    meta = {name: value for name, value in sample.meta.items() if name not in arrays}
    if arrays:
        meta[META_IMAGES] = {name: None if isinstance(value, np.ndarray) else len(value)
                             for name, value in arrays.items()}
    flat = [a for value in arrays.values() for a in ([value] if isinstance(value, np.ndarray) else value)]
    record = {
        "conversations": [{key: turn[key] for key in ("from", "value")} for turn in sample.conversations],
        "images": [_png(image) for image in sample.images],
        "masks": [_png(mask) for mask in sample.masks],
        "meta": json.dumps(meta, default=lambda value: value.item()),  # numpy scalars
        META_IMAGES: [_png(array) for array in flat],
    }
    return record if sample.codes is None else {**record, CODES: sample.codes}


def decode(record: Mapping[str, Any]) -> Sample:
    """A record as read by TFDS -> the sample."""
    turns = record["conversations"]
    meta = json.loads(record["meta"])
    arrays = iter([_grey(array) for array in record[META_IMAGES]])
    for name, count in meta.pop(META_IMAGES, {}).items():
        meta[name] = next(arrays) if count is None else [next(arrays) for _ in range(count)]
    return Sample(
        conversations=[{"from": who.decode(), "value": value.decode()}
                       for who, value in zip(turns["from"], turns["value"])],
        images=tuple(record["images"]),
        masks=tuple(map(_grey, record["masks"])),
        meta=meta,
        codes=record.get(CODES),
    )


class Samples(tfds.core.GeneratorBasedBuilder):
    """Writes sources, one a split, to data_dir, in their order; broken samples are left out.

    Args:
      sources: {split: source}.
      data_dir: where the data set's folder is made.
      num_codes: as for `features`.

    Attributes:
      samples: number of samples written so far.
      broken: the messages of those that could not be read.
    """

    VERSION = tfds.core.Version("1.1.0")
    url_infos = {}  # nothing is downloaded; to look for checksums TFDS would need a further package

    def __init__(self, *, sources: Mapping[str, Sequence[Sample]], data_dir: epath.PathLike,
                 num_codes: int = 0, **kwargs: Any):
        self.sources, self.samples, self.broken = dict(sources), 0, []
        self.num_codes = num_codes
        super().__init__(data_dir=data_dir, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=__doc__, disable_shuffling=True,
                                     features=features(self.num_codes))

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(source) for split, source in self.sources.items()}

    def _generate_examples(self, source: Sequence[Sample]) -> Iterator[tuple[int, dict]]:
        for index in range(len(source)):
            try:
                record = encode(source[index])
            except SampleError as error:
                self.broken.append(str(error))
                continue
            self.samples += 1
            yield index, record


def open_split(path: epath.PathLike, split: str) -> tuple[tfds.core.DatasetBuilder, Sequence[Any]]:
    """A TFDS folder's builder, and random access to the records of a split.

    `split` may also be a slice, such as 'train[:10%]'. UserError where there is no such folder, split,
    or no random access.
    """
    if not (epath.Path(path) / "dataset_info.json").exists():
        raise UserError(f"{path}: no data set; looked for dataset_info.json (the version folder of a "
                        "TFDS data set) and prepared.json (of `prepare`); other layouts need their name "
                        "in front, such as own:FOLDER")
    builder = tfds.builder_from_directory(path)
    if split.partition("[")[0] not in builder.info.splits:
        raise UserError(f"{path}: no split {split!r}; it has {', '.join(builder.info.splits)}")
    try:
        return builder, builder.as_data_source(split=split)
    except (NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no random access ({reason}); build it with "
                        "file_format='array_record'") from None


class TfdsSource:
    """Random access to one split of a folder that `Samples` or `prepare` has written.

    Args:
      path: the folder with dataset_info.json.
      split: a split's name; TFDS slices such as 'train[:10%]' also work.
    """

    def __init__(self, path: epath.PathLike, split: str = "train"):
        builder, self._records = open_split(path, split)
        if missing := set(features()) - set(builder.info.features):
            raise UserError(f"{path}: the records have no {', '.join(sorted(missing))}; looked for "
                            f"{', '.join(features())}; they have {', '.join(builder.info.features)}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        return decode(self._records[int(index)])


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
