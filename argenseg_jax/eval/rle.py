"""Masks as COCO's compressed run lengths, the form of every saved prediction."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from argenseg_jax.errors import UserError


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool[H, W] -> {'size': [H, W], 'counts': str}, as pycocotools reads it."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `encode_rle`; UserError where it is none."""
    try:
        return coco_mask.decode(dict(rle)).astype(bool)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"not a COCO run length ({type(error).__name__}: {error})") from None
