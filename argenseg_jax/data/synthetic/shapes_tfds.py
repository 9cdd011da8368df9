"""The drawn scenes of data/synthetic/shapes.py, written to files by TFDS.

Shapes(config='full', data_dir=D, sizes={'train': 100_000}).download_and_prepare()
TfdsSource(D / 'shapes/full/1.1.0', 'train')[7]   # == ShapesSource('full', 'train')[7]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from argenseg_jax.data.sources.records import Samples
from argenseg_jax.data.synthetic import shapes


class Shapes(Samples):
    """The drawn scenes, one config per level.

    Args:
      config: 'simple' or 'full'.
      sizes: {split: number of samples}, for the splits that differ from the defaults.
      seed: as for ShapesSource.
    """

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in shapes.LEVELS]
    SIZES = {**shapes.SPLITS, "train": 100_000}

    def __init__(
        self,
        *,
        config: str,
        data_dir: epath.PathLike,
        sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ):
        sources = {
            split: shapes.ShapesSource(config, split, size=size, seed=seed)
            for split, size in {**self.SIZES, **(sizes or {})}.items()
        }
        super().__init__(sources=sources, data_dir=data_dir, config=config, **kwargs)
