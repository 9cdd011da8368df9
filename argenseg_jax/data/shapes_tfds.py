"""Samples in TFDS form, as ArrayRecord shards of PNGs: write any source, read it back at random.

TensorFlow is not needed for either. `Shapes` fixes the drawn scenes of data/shapes.py in files:

    Shapes(config='full', data_dir=D, sizes={'train': 100_000}).download_and_prepare()
    TfdsSource(D / 'shapes/full/1.0.0', 'train')[7]   # == ShapesSource('full', 'train')[7]
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

from argenseg_jax.data import shapes
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError, UserError

META_IMAGES = 'meta_images'


def features() -> tfds.features.FeaturesDict:
    """The columns of a record. Grey masks are kept as three equal channels."""
    text, images = tfds.features.Text(), tfds.features.Sequence(
        tfds.features.Image(encoding_format='png'))
    return tfds.features.FeaturesDict({
        'conversations': tfds.features.Sequence({'from': text, 'value': text}),
        'images': images,
        'masks': images,
        'meta': text,  # JSON
        META_IMAGES: images,  # the arrays of meta; the JSON names them under the same key
    })


def encode(sample: Sample) -> dict[str, Any]:
    """A sample -> a record of `features`; its pictures and masks become PNG bytes."""
    arrays = {name: value for name, value in sample.meta.items() if isinstance(value, np.ndarray)}
    meta = {name: value for name, value in sample.meta.items() if name not in arrays}
    if arrays:
        meta[META_IMAGES] = list(arrays)
    return {
        'conversations': [dict(turn) for turn in sample.conversations],
        'images': [_png(image) for image in sample.images],
        'masks': [_png(mask) for mask in sample.masks],
        'meta': json.dumps(meta, default=lambda value: value.item()),  # numpy scalars
        META_IMAGES: [_png(array) for array in arrays.values()],
    }


def decode(record: Mapping[str, Any]) -> Sample:
    """A record as read by TFDS -> the sample."""
    turns = record['conversations']
    meta = json.loads(record['meta'])
    meta.update(zip(meta.pop(META_IMAGES, ()), map(_grey, record[META_IMAGES])))
    return Sample(
        conversations=[{'from': who.decode(), 'value': value.decode()}
                       for who, value in zip(turns['from'], turns['value'])],
        images=tuple(record['images']),
        masks=tuple(map(_grey, record['masks'])),
        meta=meta,
    )


class Samples(tfds.core.GeneratorBasedBuilder):
    """Writes sources, one a split, to data_dir, in their order; broken samples are left out.

    Args:
      sources: {split: source}.
      data_dir: where the data set's folder is made.

    Attributes:
      samples: number of samples written so far.
      broken: the messages of those that could not be read.
    """

    VERSION = tfds.core.Version('1.0.0')
    url_infos = {}  # nothing is downloaded; to look for checksums TFDS would need a further package

    def __init__(self, *, sources: Mapping[str, Sequence[Sample]], data_dir: epath.PathLike,
                 **kwargs: Any):
        self.sources, self.samples, self.broken = dict(sources), 0, []
        super().__init__(data_dir=data_dir, file_format='array_record', **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features(),
                                     disable_shuffling=True)

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


class Shapes(Samples):
    """The drawn scenes, one config a level.

    Args:
      config: 'simple' or 'full'.
      sizes: {split: number of samples}, for the splits that differ from the defaults.
      seed: as for ShapesSource.
    """

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in shapes.LEVELS]
    SIZES = {**shapes.SPLITS, 'train': 100_000}

    def __init__(self, *, config: str, data_dir: epath.PathLike,
                 sizes: Mapping[str, int] | None = None, seed: int = 0, **kwargs: Any):
        sources = {split: shapes.ShapesSource(config, split, size=size, seed=seed)
                   for split, size in {**self.SIZES, **(sizes or {})}.items()}
        super().__init__(sources=sources, data_dir=data_dir, config=config, **kwargs)


class TfdsSource:
    """Random access to one split of a folder that `Samples` or `Shapes` has written.

    Args:
      path: the folder with dataset_info.json.
      split: a split's name; TFDS slices such as 'train[:10%]' also work.
    """

    def __init__(self, path: epath.PathLike, split: str = 'train'):
        if not (epath.Path(path) / 'dataset_info.json').exists():
            raise UserError(f'{path}: no dataset_info.json: name the version folder of a data set')
        builder = tfds.builder_from_directory(path)
        if split.partition('[')[0] not in builder.info.splits:
            raise UserError(f'{path}: no split {split!r}; it has {", ".join(builder.info.splits)}')
        self._records = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        return decode(self._records[int(index)])


def _png(image: np.ndarray) -> bytes:
    """u8[H, W] or u8[H, W, 3] -> a PNG of three channels."""
    file = io.BytesIO()
    Image.fromarray(image).convert('RGB').save(file, 'PNG')
    return file.getvalue()


def _grey(image: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] -> u8[H, W] where the channels are equal."""
    return image[..., 0].copy() if (image == image[..., :1]).all() else image
