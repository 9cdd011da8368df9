"""Images and masks as arrays: tiling, resizing, and the inverse to a boolean mask.

All resizing uses Pillow, as in the reference, so pixels are equal to the official ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from argenseg_jax.data.images import MAX_PIXELS, orientations, stretch
from argenseg_jax.data.reader import read_ids as read_raw_mask
from argenseg_jax.data.reader import read_image, read_mask
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import SampleError
from argenseg_jax.pixels import IMAGENET_MEAN

__all__ = ["MAX_PIXELS", "read_image", "read_mask", "read_raw_mask", "stretch"]  # re-exported from images and reader
FOREGROUND = 128  # least grey level of a foreground pixel in a predicted mask: L / 255 > 0.5
MASK_STEP = 512  # the reference resizes masks to this side first

Size = tuple[int, int]  # (width, height), Pillow's order


# ---------------------------------------------------------------------------------- images


def resize(image: np.ndarray, size: Size, resample=Image.Resampling.BICUBIC) -> np.ndarray:
    """u8[H, W(, 3)] -> u8[h, w(, 3)] for size (w, h)."""
    return np.array(resize_pil(Image.fromarray(image), size, resample))


def resize_pil(image: Image.Image, size: Size, resample: Image.Resampling) -> Image.Image:
    """A PIL image at size (w, h), with the same pixels in every version of Pillow.

    Pillow resizes one axis after the other and rounds in between: the horizontal one first, but since 13
    (its pull request 9549) the vertical one if the height shrinks by more than twice as much as the width.
    """
    shrunk = image.height - size[1]
    if shrunk > max(0, 2 * (image.width - size[0])):
        image = image.resize((image.width, size[1]), resample)
    return image.resize(size, resample)


def image_tiles(
    image: np.ndarray, side: int, max_tiles: int = 1, thumbnail: bool = True, pad: bool = False
) -> np.ndarray:
    """Dynamic tiling (InternVL `dynamic_preprocess`): u8[H, W, 3] -> u8[P, S, S, 3].

    Args:
      image: at its own size.
      side: S, the side of a tile.
      max_tiles: maximum number of tiles; 1 resizes the image to a single one, as segmentation does.
      thumbnail: appends the image at tile size if there are several tiles.
      pad: first pads the image to a square with the mean colour (`pad2square`).
    """
    if pad:
        image = pad_square(image)
    height, width = image.shape[:2]
    cols, rows = tile_grid((width, height), side, max_tiles)
    grid = resize(image, (side * cols, side * rows))
    tiles = [grid[y * side : (y + 1) * side, x * side : (x + 1) * side] for y in range(rows) for x in range(cols)]
    if thumbnail and len(tiles) > 1:
        tiles.append(resize(image, (side, side)))
    return np.stack(tiles)


class Tiling(NamedTuple):
    """How the images of a sample become tiles, in training and inference.

    Attributes:
      side: S, the side of a tile.
      max_tiles: data.max_tiles, tiles of a sequence.
      sample_tiles: data.sample_tiles, maximum number of tiles of a sample; 0 = max_tiles.
      pad: data.pad_to_square.
    """

    side: int
    max_tiles: int = 1
    sample_tiles: int = 0
    pad: bool = False

    def __call__(
        self, images: Sequence[np.ndarray], own: int = 0, name: str = "sample"
    ) -> tuple[np.ndarray, list[int]]:
        """(tiles u8[p, S, S, 3] of all images, thumbnails included; tiles of each image).

        Args:
          images: u8[H, W, 3] each.
          own: maximum number of tiles of an image's grid in this data set (`max_dynamic_patch`); 0 = any.
          name: names the sample in the SampleError where there are more images than tiles.
        """
        key = "sample_tiles" if self.sample_tiles else "max_tiles"
        limit = min(self.sample_tiles or self.max_tiles, self.max_tiles)
        if len(images) > limit:
            raise SampleError(f"{name}: {len(images)} images, data.{key} is {limit}")
        share = limit // max(len(images), 1)
        # The thumbnail is an additional tile; a grid of one tile has none.
        most = max(min(share - 1, own or share), 1)
        per_image = [image_tiles(image, self.side, most, pad=self.pad) for image in images]
        tiles = [tile for image in per_image for tile in image]
        return np.asarray(tiles, np.uint8).reshape(-1, self.side, self.side, 3), [len(image) for image in per_image]


@functools.lru_cache
def target_ratios(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) of 1..max_tiles tiles, in the official order.

    The official code sorts a Python set by the number of tiles, so ties keep the iteration order of the set:
    it matters, because the first of two equally close grids is chosen. Grids are inserted in the order of
    the official loop over n, i and j up to n, without its duplicates.
    """
    grids = {
        grid
        for n in range(1, max_tiles + 1)
        for grid in (
            *((i, n) for i in range(1, min(n - 1, max_tiles // n) + 1)),
            *((n, j) for j in range(1, min(n, max_tiles // n) + 1)),
        )
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_grid(size: Size, side: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is closest to that of an image of `size`."""
    width, height = size
    best, best_distance = (1, 1), float("inf")
    for cols, rows in target_ratios(max_tiles):
        distance = abs(width / height - cols / rows)
        large = width * height > 0.5 * side * side * cols * rows
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (cols, rows), distance
    return best


def pad_square(image: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] -> u8[L, L, 3], L = max(H, W): centred on the mean colour (`expand2square`)."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in IMAGENET_MEAN]
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = image
    return square


# ---------------------------------------------------------------------------------- masks


def pad_box(size: Size, side: int) -> tuple[int, int, int, int]:
    """(x, y, w, h) of an image of `size` resized into a square of `side` with its aspect ratio."""
    width, height = size
    scale = min(side / width, side / height)
    w, h = max(int(width * scale), 1), max(int(height * scale), 1)
    return (side - w) // 2, (side - h) // 2, w, h


def resize_mask(mask: np.ndarray, side: int, pad: bool = False) -> np.ndarray:
    """Mask u8[H, W(, 3)] of 0 and 255 (or 0 and 1, see `stretch`) -> as `resize_target`."""
    return resize_target(stretch(mask), side, pad)


def resize_target(mask: np.ndarray, side: int, pad: bool = False) -> np.ndarray:
    """Grey levels of a mask, or an image to be generated, u8[H, W(, 3)] -> what the VQ-VAE reads, u8[R, R, 3].

    The official sides (256, 512) take the reference's two bicubic steps, over 512; other sides one.

    Args:
      mask: see above; its levels are not stretched.
      side: R.
      pad: keeps the aspect ratio and pads with black, in one step (`pad2square`).
    """
    height, width = mask.shape[:2]
    if pad:
        x, y, w, h = pad_box((width, height), side)
        square = np.zeros((side, side, *mask.shape[2:]), np.uint8)
        square[y : y + h, x : x + w] = resize(mask, (w, h))
        mask = square
    elif side in (256, MASK_STEP):
        mask = resize(resize(mask, (MASK_STEP, MASK_STEP)), (side, side))
    elif (height, width) != (side, side):
        mask = resize(mask, (side, side))
    return mask if mask.ndim == 3 else np.repeat(mask[..., None], 3, axis=-1)


def check_sizes(
    image: np.ndarray, masks: Sequence[np.ndarray], names: Sequence[str], paths: Sequence[epath.PathLike] = ()
) -> None:
    """SampleError where a mask has another size than its image.

    Args:
      image, masks: as read.
      names: of the masks, for the message.
      paths: the files of image and masks: the message names those rotated by EXIF.
    """
    for mask, name in zip(masks, names):
        check_shape(image, mask.shape[:2], name, *paths)


def check_shape(image: np.ndarray, shape: tuple[int, ...], name: str, *paths: epath.PathLike) -> None:
    """SampleError where the shape (H, W) of a mask is not its image's; see `check_sizes`."""
    if tuple(shape) != image.shape[:2]:
        (h, w), (mh, mw) = image.shape[:2], shape
        turned = orientations(*paths)
        raise SampleError(
            f"mask {name} is {mw}x{mh}, its image {w}x{h} pixels"
            + (f" ({turned}: masks belong to the upright image)" if turned else "")
        )


def targets(sample: Sample) -> list[np.ndarray]:
    """Training targets of the VQ-VAE, u8[H, W(, 3)] each: grey levels of masks, other images unchanged."""
    return list(sample.masks) if sample.generated else [stretch(mask) for mask in sample.masks]


def grey_at(pred: np.ndarray, size: Size, pad: bool = False) -> np.ndarray:
    """A decoded mask u8[R, R, 3] at an image's size (w, h): u8[h, w] (bilinear, then grey).

    Args:
      pred: output of the VQ-VAE.
      size: of the image that was segmented.
      pad: crops the padding of `resize_mask(pad=True)` first.
    """
    image = Image.fromarray(pred)
    if pad:
        x, y, w, h = pad_box(size, pred.shape[0])
        image = image.crop((x, y, x + w, y + h))
    return np.array(resize_pil(image, size, Image.Resampling.BILINEAR).convert("L"))


def binarize(pred: np.ndarray, size: Size, pad: bool = False) -> np.ndarray:
    """`grey_at`, thresholded: bool[h, w]."""
    return grey_at(pred, size, pad) >= FOREGROUND
