"""ARGenSeg in JAX: image segmentation as image generation by a multimodal LLM.

import argenseg_jax
predictor = argenseg_jax.load("nano")
result = predictor.segment("photo.jpg", "Segment the red car.")  # .masks .scores .text .scales
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argenseg_jax.decode.predictor import Predictor

__version__ = "0.1.0"


def load(path: str = "nano", dtype: str = "float32", *, checksums: bool = True) -> Predictor:
    """A predictor from a workdir, an Orbax step, an HF folder, or the shipped `nano`.

    Args:
      dtype: 'float32', 'bfloat16', or 'int8' (matrices of the language model in eight bits).
      checksums: checks the files of an Orbax step before they are read.
    """
    from argenseg_jax.decode.predictor import Predictor  # here, so that the import itself is quick

    return Predictor.load(path, dtype, checksums=checksums)
