"""How a data set's images and masks are read: by one Reader, with one window of values per data set.

Images of 8 bits per channel are unchanged. With more bits, the window [low, high] of the values is mapped
to [0, 255] and clipped. It is `data.window`; where that is (), it is determined once per data set, from
the values of up to 64 of its images, spread evenly over its samples:

  whole numbers   (0, 255), (0, 4095) or (0, 65535): the first that all values fit into; where one is
                  negative or larger, the 1st to the 99th percentile
  floats          (0, 1) where all values are inside; else the 1st to the 99th percentile

`train` saves the window of its data with the run, so that inference reads images in the same way. An image
without a data set (`segment`, the Python API) and without a saved window has its own window.
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

PROBED, MEASURED = 8, 64  # samples of a data set that show whether it has deep images; and their values
TOPS = (255, 4095, 65535)  # of 8, 12 and 16 bits
MIN_LIMIT = 32  # images, or masks, of a sample that may always be decoded
PER_SAMPLE = 4  # times max_pixels: pixels of all images, and of all masks, of one sample
_VALUES = 4096  # of one image, for percentiles

_EXACT = tuple((0, top) for top in TOPS)

_CHUNK = 2**20  # pixels that are scaled at a time

Window = tuple[float, float]


class Values(NamedTuple):
    """Statistics of the finite values of an image.

    Attributes:
      kind: 'i' or 'f'.
      low, high: their range.
      subset: up to _VALUES of them.
    """

    kind: str
    low: float
    high: float
    subset: np.ndarray

    @classmethod
    def from_array(cls, levels: np.ndarray) -> Values:
        """From the values of an image."""
        values, kind = levels.ravel(), _kind(levels)
        if kind == "f" and not np.isfinite(values).all():
            values = values[np.isfinite(values)]
        if not values.size:
            values = np.zeros(1, levels.dtype)
        return cls(kind, values.min().item(), values.max().item(), values[:: -(-values.size // _VALUES)])


class Reading(NamedTuple):
    """The settings of a config for reading files.

    Attributes:
      window: (low, high) of images of more than 8 bits per channel; () = determined once per data set.
      max_pixels: maximum number of pixels of an image; 0 = images.MAX_PIXELS.
      max_images: maximum number of images of a sample, checked before decoding; 0 = no limit.
      max_masks: maximum number of masks of a sample, likewise.
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
      reading: settings of the config.
      source: the data set, whose samples determine the window; None: each image has its own.
    """

    def __init__(self, reading: Reading = Reading(), source: Any = None):
        self.reading, self._source = reading, source
        self.max_pixels = reading.max_pixels or images.MAX_PIXELS
        self._windows: dict[str, Window] = {}  # by the kind of number
        self._logged: set[str] = set()

    def image(self, image: epath.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """u8[H, W, 3] of an image file, a PIL image, or an array (see `array_levels`).

        Raises:
          SampleError: a file that cannot be read or decoded, or is too large.
          UserError: an array that is no image.
        """
        return self._to_bytes(self.levels(image), image)

    def levels(self, image: epath.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """The image before the window is applied: see images.image_levels."""
        if isinstance(image, (str, os.PathLike)):
            opened = images.open_image(image, self.max_pixels)
            levels, orientation = images.read_levels(opened, image)
            if self._source is not None and orientation != 1:
                self._log_once(
                    "EXIF",
                    f"{images.describe_orientation(image, orientation)}, as every such image of this data set: "
                    "its masks belong to the upright image",
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
        """The values of a map of class numbers or ids: integers [H, W], or u8[H, W, 3] in colour."""
        return images.mask_values(images.open_image(path, self.max_pixels), path, ids=True)

    def images(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All images of a sample; their number and pixels are limited before decoding."""
        return self._all(paths, self.image, "images", self.reading.max_images)

    def masks(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All masks of a sample, likewise."""
        return self._all(paths, self.mask, "masks", self.reading.max_masks)

    def targets(self, paths: Sequence[epath.PathLike]) -> tuple[np.ndarray, ...]:
        """All target images of a sample to be generated: as `images`, but limited as `masks`."""
        return self._all(paths, self.image, "masks", self.reading.max_masks)

    def _all(self, paths: Sequence[epath.PathLike], read: Any, what: str, limit: int) -> tuple[np.ndarray, ...]:
        if 0 < limit < len(paths):
            raise SampleError(f"{len(paths)} {what}; at most {limit} are read here")
        remaining, found = PER_SAMPLE * self.max_pixels, []
        for path in paths:
            found.append(read(path))
            remaining -= found[-1].shape[0] * found[-1].shape[1]
            if remaining < 0:
                raise SampleError(
                    f"its {len(paths)} {what} have more than {PER_SAMPLE * self.max_pixels} pixels "
                    f"({PER_SAMPLE} x data.max_pixels)"
                )
        return tuple(found)

    # ------------------------------------------------------------------------------ the window

    def settle(self) -> Window | None:
        """The window of the data set, if its first samples include images of more than 8 bits."""
        if self._source is not None and not self.reading.window and not self._windows:
            if _probe(self._source, PROBED):
                self._find()
        found = set(self._windows.values())
        return found.pop() if len(found) == 1 else None

    def _to_bytes(self, levels: np.ndarray, image: Any) -> np.ndarray:
        if levels.dtype == np.uint8:
            return levels
        window = self.reading.window or self._window(levels)
        if not self.reading.window and window in _EXACT and levels.max() > window[1]:
            self._log_once(
                "window",
                f"{image}: has values up to {levels.max()}; those seen before end at {window[1]}, and "
                "larger ones become white: set data.window to the range of all",
            )
        return to_bytes(levels, window)

    def _log_once(self, what: str, text: str) -> None:
        """Writes a line to stderr, once per data set."""
        if what not in self._logged:
            self._logged.add(what)
            print(text, file=sys.stderr)

    def _window(self, levels: np.ndarray) -> Window:
        if self._source is None:
            return find_window([Values.from_array(levels)])
        kind = _kind(levels)
        if kind not in self._windows:
            self._find()
        return self._windows.setdefault(kind, (0, 1) if kind == "f" else (0, TOPS[-1]))

    def _find(self) -> None:
        """Determines the windows of the data set; they do not depend on the image that is being read."""
        seen = _probe(self._source, MEASURED)
        for kind in sorted({values.kind for values in seen}):
            of_kind = [values for values in seen if values.kind == kind]
            low, high = find_window(of_kind)
            self._windows[kind] = low, high
            name = getattr(self._source, "name", None) or getattr(self._source, "path", "")
            top = max(values.high for values in of_kind)
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
    """Replaces a data set's reader: collects the values of deep images, and decodes nothing else."""

    def __init__(self, reading: Reading):
        super().__init__(reading)
        self.seen: list[Values] = []

    def image(self, image: Any) -> np.ndarray:
        opened = images.open_image(image, self.max_pixels)
        if images.is_deep(opened):
            self.seen.append(Values.from_array(images.image_levels(opened, image)))
        raise SampleError("only probed")

    def mask(self, path: Any) -> np.ndarray:
        raise SampleError("only probed")

    ids = mask


def _probe(source: Any, count: int) -> list[Values]:
    """The values of the deep ones among the first images of up to `count` samples."""
    probe = _Probe(source.reader.reading)
    source = copy.copy(source)
    source.reader = probe
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        try:
            source[index]
        except UserError:  # the probe's own, or of an invalid sample that training will report
            pass
    return probe.seen


def _kind(levels: np.ndarray) -> str:
    return "f" if levels.dtype.kind == "f" else "i"


def find_window(seen: Sequence[Values]) -> Window:
    """(low, high) for images with these values, of one kind; see the module docstring."""
    low, high = min(values.low for values in seen), max(values.high for values in seen)
    for top in (1,) if seen[0].kind == "f" else TOPS:
        if low >= 0 and high <= top:
            return 0, top
    subset = np.concatenate([values.subset for values in seen]).astype(np.float64)
    low, high = (float(x) for x in np.percentile(subset, (1, 99)))
    return low, high if high > low else max(low + 1, float(np.nextafter(low, np.inf)))


def to_bytes(levels: np.ndarray, window: Window) -> np.ndarray:
    """Deep levels [H, W(, 3)] -> u8[H, W, 3]: low..high of the window becomes 0..255; NaN becomes 0."""
    low, high = window
    if levels.dtype == np.uint16:
        grey = _scaled(np.arange(65536), low, high)[levels]
    else:
        grey = np.empty(levels.shape, np.uint8)
        rows = max(_CHUNK // levels.shape[1], 1)
        for y in range(0, len(levels), rows):
            grey[y : y + rows] = _scaled(levels[y : y + rows], low, high)
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=-1)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # floats of any size
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(scaled, posinf=255, neginf=0), 0, 255)).astype(np.uint8)


def array_levels(array: Any) -> np.ndarray:
    """The values of an array from any image library, as those of a file of that mode.

    Args:
      array: u8[H, W, 3], RGB; also u8[H, W, 4] (alpha is dropped), grey u8 or bool [H, W] or
        [H, W, 1] or [H, W, 2] (grey and alpha), and of more bits u16, i32 or f32 [H, W] or u16[H, W, 3].
    """
    try:
        array = np.asarray(array)
    except ValueError as fault:  # nested lists of unequal length
        raise UserError(
            f"an image is an array, a PIL image or a file, not {brief(repr(array), 60)} ({brief(fault, 100)})"
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
        f"an image is u8[H, W, 3] (or grey, or u16, f32 [H, W]), a PIL image or a file, not "
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
