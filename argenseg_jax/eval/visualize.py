"""Images for people: masks drawn over images, tiles side by side, the scales of a mask."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

TRUTH, PREDICTION = (60, 220, 110), (255, 110, 40)  # edge colours of the two masks
GAP = 6  # pixels between tiles, transparent
MAX_ASPECT = 8  # a longer image is squeezed to this, or its tile would be endless


def overlay(image: np.ndarray, mask: np.ndarray, color: Sequence[int] = PREDICTION, edge: int = 1) -> np.ndarray:
    """u8[H, W, 3] with bool[H, W] highlighted: the rest grey and dim, an edge line in `color`.

    The line is `edge` pixels wide and is inside the mask.
    """
    mask = np.asarray(mask, bool)
    core = mask
    for _ in range(edge):
        around = np.pad(core, 1)  # a neighbour outside the image is not part of the mask
        core = core & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    grey = np.mean(image, axis=-1, keepdims=True) * 0.45 + 20
    lit = np.where(mask[..., None], image, np.broadcast_to(grey, image.shape))
    return np.where((mask & ~core)[..., None], np.asarray(color), lit).astype(np.uint8)


def tile(image: np.ndarray, height: int) -> Image.Image:
    """u8[H, W] or u8[H, W, 3] at a height in pixels; enlarged pixels stay visible."""
    h, w = image.shape[:2]
    width = min(max(1, round(w * height / h)), MAX_ASPECT * height)
    method = Image.Resampling.NEAREST if h < height else Image.Resampling.LANCZOS
    return Image.fromarray(image).convert("RGB").resize((width, height), method)


def strip(images: Iterable[np.ndarray], height: int = 192) -> Image.Image:
    """The images in a row on a transparent ground."""
    tiles = [tile(im, height) for im in images]
    canvas = Image.new("RGBA", (sum(t.width + GAP for t in tiles) - GAP, height))
    left = 0
    for t in tiles:
        canvas.paste(t, (left, 0))
        left += t.width + GAP
    return canvas


def comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """image | truth | prediction, about 192 pixels high; a small image by an integer factor."""
    height = min(image.shape[0] * max(1, round(192 / image.shape[0])), 256)
    # Masks are drawn on the enlarged image, so that the edge is thin beside an object.
    big = np.asarray(tile(image, height))
    masks = [
        np.asarray(Image.fromarray(m).resize(big.shape[1::-1], Image.Resampling.NEAREST)) for m in (truth, prediction)
    ]
    return strip([big, overlay(big, masks[0], TRUTH, edge=2), overlay(big, masks[1], edge=2)], height)


def encode_png(image: np.ndarray | Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
