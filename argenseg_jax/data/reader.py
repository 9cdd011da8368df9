"""How a data set's images and masks are read: by one Reader, with one window of levels for all of it.

Images of 8 bits a channel are as they are. Of more bits, [low, high] of the values becomes [0, 255], and
what is outside is clipped. This window is `data.window`; where that is (), it is found once per data set,
from the values of up to 64 of its images, spread evenly over its samples:

  whole numbers   (0, 255), (0, 4095) or (0, 65535): the first that all values fit into; where one is
                  negative or larger, the 1st to the 99th percentile
  floats          (0, 1) where all values are inside; else the 1st to the 99th percentile

`train` saves the window of its data with the run, so that whatever uses the run reads alike. An image
without a data set (`segment`, the Python API) and without a saved window is a data set of its own.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from argenseg_jax.data import images
from argenseg_jax.errors import SampleError, UserError, brief

LOOKED_AT, SEEN = 8, 64  # samples of a data set: for whether it has deep images; for their values
TOPS = (255, 4095, 65535)  # of 8, 12 and 16 bits
FEW = 32  # images, or masks, that are decoded before anybody counts them
PER_SAMPLE = 4  # times max_pixels: pixels of all images, and of all masks, of one sample
_VALUES = 4096  # of one image that percentiles are made of

_EXACT = tuple((0, top) for top in TOPS)

_ROWS = 2**20  # pixels that are scaled at a time

Window = tuple[float, float]


class Values(NamedTuple):
    """What is known of the values of an image: kind 'i' or 'f', extremes, and up to _VALUES in between.

    Only finite ones count.
    """

    kind: str
    low: float
    high: float
    some: np.ndarray

    @classmethod
    def from_array(cls, levels: np.ndarray) -> Values:
        """Of the levels of an image."""
        values, kind = levels.ravel(), _kind(levels)
        if kind == "f" and not np.isfinite(values).all():
            values = values[np.isfinite(values)]
        if not values.size:
            values = np.zeros(1, levels.dtype)
        return cls(kind, values.min().item(), values.max().item(), values[:: -(-values.size // _VALUES)])


class Reading(NamedTuple):
    """What a config says about reading.

    Attributes:
      window: (low, high) of images of more than 8 bits a channel; () = found once per data set.
      max_pixels: most pixels of an image; 0 = images.MAX_PIXELS.
      max_images: more images of a sample are refused before one is decoded; 0 = any number.
      max_masks: more masks of a sample likewise.
      allow_outside: a relative path in a data file may lead out of the folder that it starts from.
    """

    window: Window | tuple[()] = ()
    max_pixels: int = 0
    max_images: int = 0
    max_masks: int = 0
    allow_outside: bool = False

    @classmethod
    def from_config(cls, data: Mapping[str, Any], **limits: int) -> Reading:
        """From the config section `data`."""
        return cls(
            tuple(data.get("window") or ()),
            data.get("max_pixels") or 0,
            allow_outside=bool(data.get("allow_outside")),
            **limits,
        )


class Reader:
    """Reads the images and masks of one data set.

    Args:
      reading: what the config says.
      source: the data set, whose samples show what its values are; None: each image is one by itself.
    """

    def __init__(self, reading: Reading = Reading(), source: Any = None):
        self.reading, self._source = reading, source
        self.max_pixels = reading.max_pixels or images.MAX_PIXELS
        self._windows: dict[str, Window] = {}  # by the kind of number
        self._told: set[str] = set()

    def image(self, image: epath.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """u8[H, W, 3] of an image file, a PIL image, or an array (see `array_levels`).

        Raises:
          SampleError: a file that cannot be read or decoded, or is too large.
          UserError: an array that is no image.
        """
        return self._to_bytes(self.levels(image), image)

    def levels(self, image: epath.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """The image before the window: see images.image_levels."""
        if isinstance(image, (str, os.PathLike)):
            opened = images.open_image(image, self.max_pixels)
            levels, turned = images.read_levels(opened, image)
            if self._source is not None and turned != 1:
                self._tell(
                    "EXIF",
                    f"{images.turned(image, turned)}, as every such image of this data set: its masks "
                    "belong to the upright image",
                )
            return levels
        if isinstance(image, Image.Image):
            return images.image_levels(image)
        return array_levels(image)

    def mask(self, path: epath.PathLike) -> np.ndarray:
        """Grey levels u8[H, W] (u8[H, W, 3] where the channels differ) of a mask file; see images.stretch."""
        values = images.mask_values(images.open_image(path, self.max_pixels), path)
        try:
            return images.stretch(values)
        except SampleError as fault:
            raise SampleError(f"{path}: {fault}") from None

    def ids(self, path: epath.PathLike) -> np.ndarray:
        """The values of a map of class numbers or ids: whole numbers [H, W], or u8[H, W, 3] in colour."""
        return images.mask_values(images.open_image(path, self.max_pixels), path, ids=True)

    def images(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All images of a sample; their number and pixels are bounded before they are decoded."""
        return self._all(paths, self.image, "images", self.reading.max_images)

    def masks(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All masks of a sample, likewise."""
        return self._all(paths, self.mask, "masks", self.reading.max_masks)

    def targets(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All images that a sample asks to be generated: as `images`, but bounded as `masks`."""
        return self._all(paths, self.image, "masks", self.reading.max_masks)

    def _all(self, paths: Sequence[epath.PathLike], read: Any, what: str, most: int) -> tuple[np.ndarray, ...]:
        if 0 < most < len(paths):
            raise SampleError(f"{len(paths)} {what}; at most {most} are read here")
        room, found = PER_SAMPLE * self.max_pixels, []
        for path in paths:
            found.append(read(path))
            room -= found[-1].shape[0] * found[-1].shape[1]
            if room < 0:
                raise SampleError(
                    f"its {len(paths)} {what} have more than {PER_SAMPLE * self.max_pixels} pixels "
                    f"({PER_SAMPLE} x data.max_pixels)"
                )
        return tuple(found)

    # ------------------------------------------------------------------------------ the window

    def settle(self) -> Window | None:
        """The window that the data set's images need, where some samples show images of more than 8 bits."""
        if self._source is not None and not self.reading.window and not self._windows:
            if _look(self._source, LOOKED_AT):
                self._find()
        found = set(self._windows.values())
        return found.pop() if len(found) == 1 else None

    def _to_bytes(self, levels: np.ndarray, image: Any) -> np.ndarray:
        if levels.dtype == np.uint8:
            return levels
        window = self.reading.window or self._window(levels)
        if not self.reading.window and window in _EXACT and levels.max() > window[1]:
            self._tell(
                "window",
                f"{image}: has values up to {levels.max()}; those seen before end at {window[1]}, and "
                "larger ones become white: set data.window to the range of all",
            )
        return to_bytes(levels, window)

    def _tell(self, what: str, text: str) -> None:
        """A line on stderr, once per data set."""
        if what not in self._told:
            self._told.add(what)
            print(text, file=sys.stderr)

    def _window(self, levels: np.ndarray) -> Window:
        if self._source is None:
            return find_window([Values.from_array(levels)])
        kind = _kind(levels)
        if kind not in self._windows:
            self._find()
        return self._windows.setdefault(kind, (0, 1) if kind == "f" else (0, TOPS[-1]))

    def _find(self) -> None:
        """Looks at the values of the data set; the same whatever image asked for it."""
        seen = _look(self._source, SEEN)
        for kind in sorted({values.kind for values in seen}):
            mine = [values for values in seen if values.kind == kind]
            low, high = find_window(mine)
            self._windows[kind] = low, high
            name = getattr(self._source, "name", None) or getattr(self._source, "path", "")
            top = max(values.high for values in mine)
            dark = (
                f"; all are below {top:g}, so that they are dark: set data.window=(0, {top:g})"
                if (top < high / 4)
                else ""
            )
            print(
                f"{name}: its images have {'float' if kind == 'f' else 'more than 8 bit'} values; {low:g}..{high:g} "
                f"becomes 0..255 (data.window){dark}",
                file=sys.stderr,
            )


class _Probe(Reader):
    """Stands in for a data set's reader: keeps the values of deep images, and decodes nothing else."""

    def __init__(self, reading: Reading):
        super().__init__(reading)
        self.seen: list[Values] = []

    def image(self, image: Any) -> np.ndarray:
        opened = images.open_image(image, self.max_pixels)
        if images.is_deep(opened):
            self.seen.append(Values.from_array(images.image_levels(opened, image)))
        raise SampleError("only looked at")

    def mask(self, path: Any) -> np.ndarray:
        raise SampleError("only looked at")

    ids = mask


def _look(source: Any, most: int) -> list[Values]:
    """The values of the first image of up to `most` samples, of those that are deep."""
    probe = _Probe(source.reader.reading)
    source = copy.copy(source)
    source.reader = probe
    for index in np.unique(np.linspace(0, len(source) - 1, most).astype(int)).tolist():
        try:
            source[index]
        except UserError:  # the probe's own, or of a sample that training will name
            pass
    return probe.seen


def _kind(levels: np.ndarray) -> str:
    return "f" if levels.dtype.kind == "f" else "i"


def find_window(seen: Sequence[Values]) -> Window:
    """(low, high) for images with these values, of one kind; see the module's text."""
    low, high = min(values.low for values in seen), max(values.high for values in seen)
    for top in (1,) if seen[0].kind == "f" else TOPS:
        if low >= 0 and high <= top:
            return 0, top
    some = np.concatenate([values.some for values in seen]).astype(np.float64)
    low, high = (float(x) for x in np.percentile(some, (1, 99)))
    return low, high if high > low else max(low + 1, float(np.nextafter(low, np.inf)))


def to_bytes(levels: np.ndarray, window: Window) -> np.ndarray:
    """Deep levels [H, W(, 3)] -> u8[H, W, 3]: low..high of the window becomes 0..255; NaN becomes 0."""
    low, high = window
    if levels.dtype == np.uint16:
        grey = _scaled(np.arange(65536), low, high)[levels]
    else:
        grey = np.empty(levels.shape, np.uint8)
        rows = max(_ROWS // levels.shape[1], 1)
        for y in range(0, len(levels), rows):
            grey[y : y + rows] = _scaled(levels[y : y + rows], low, high)
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=-1)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # floats of any size
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(scaled, posinf=255, neginf=0), 0, 255)).astype(np.uint8)


def array_levels(array: Any) -> np.ndarray:
    """The levels of an array as image libraries give them, as of a file of that mode.

    Args:
      array: u8[H, W, 3], RGB; also u8[H, W, 4] (alpha is dropped), grey u8 or bool [H, W] or
        [H, W, 1] or [H, W, 2] (grey and alpha), and of more bits u16, i32 or f32 [H, W] or u16[H, W, 3].
    """
    try:
        array = np.asarray(array)
    except ValueError as fault:  # rows of unlike length
        raise UserError(
            f"a picture is an array, a PIL image or a file, not {brief(repr(array), 60)} ({brief(fault, 100)})"
        ) from None
    plain = array[..., 0] if array.ndim == 3 and array.shape[2] in (1, 2) else array
    plain = plain[..., :3] if plain.ndim == 3 and plain.shape[2] == 4 else plain
    grey, colour = plain.ndim == 2, plain.ndim == 3 and plain.shape[2] == 3
    kind = plain.dtype.kind
    if plain.size and plain.dtype == np.uint8 and (grey or colour):
        return plain if colour else np.repeat(plain[..., None], 3, axis=-1)
    if (plain.size and grey and kind in "bif") or (plain.size and kind == "u" and (grey or colour)):
        if kind == "b":
            return np.repeat(plain[..., None], 3, axis=-1) * np.uint8(255)
        return (
            plain.astype(np.float32 if kind == "f" else np.uint16 if plain.dtype.itemsize < 3 else np.int64)
            if kind in "fu"
            else plain
        )
    raise UserError(
        f"a picture is u8[H, W, 3] (or grey, or u16, f32 [H, W]), a PIL image or a file, not "
        f"{array.dtype}{list(array.shape)}"
    )


def read_image(path: epath.PathLike, reading: Reading = Reading()) -> np.ndarray:
    """u8[H, W, 3] of an image file that belongs to no data set."""
    return Reader(reading).image(path)


def read_mask(path: epath.PathLike, reading: Reading = Reading()) -> np.ndarray:
    """u8[H, W] (u8[H, W, 3] where the channels differ) of a mask file; see images.stretch."""
    return Reader(reading).mask(path)


def read_ids(path: epath.PathLike, reading: Reading = Reading()) -> np.ndarray:
    """Class numbers or ids of a mask file; see Reader.ids."""
    return Reader(reading).ids(path)
