"""Reads image files: six formats, limits that are checked before decoding, and every pixel mode of Pillow.

An image becomes an array of values: u8[H, W, 3] for 8 bits (palettes are applied, alpha is dropped); u16,
i32 or f32 [H, W] or u16[H, W, 3] for more bits, which data/reader.py maps to 8; or the values of a mask.
Of an animated file the first frame is used. Images and masks are rotated upright by the EXIF orientation
in their own file.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import pathlib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from argenseg_jax import files
from argenseg_jax.errors import SampleError, brief

MAX_PIXELS = 64 * 2**20  # default of data.max_pixels; a larger image is taken for a decompression bomb
MAX_SCANS = 32  # of a progressive JPEG; encoders write about 10, and each costs a pass over the image
ORIENTATIONS = {  # EXIF orientation: (stored array -> upright array, description)
    2: (lambda a: a[:, ::-1], "mirrored"),
    3: (lambda a: a[::-1, ::-1], "rotated by 180 degrees"),
    4: (lambda a: a[::-1], "mirrored top to bottom"),
    5: (lambda a: a.swapaxes(0, 1), "mirrored and rotated by 90 degrees"),
    6: (lambda a: np.rot90(a, -1), "rotated by 90 degrees clockwise"),
    7: (lambda a: a[::-1, ::-1].swapaxes(0, 1), "mirrored and rotated by 270 degrees"),
    8: (lambda a: np.rot90(a), "rotated by 90 degrees counterclockwise"),
}
# By content, never by name; other decoders of Pillow (EPS starts Ghostscript) are not used. Image.open is
# avoided because its limit of pixels is a setting of the process.
_FORMATS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"II[*+]\0|MM\0[*+]|II\0\*|MM\*\0"), TiffImagePlugin.TiffImageFile),
)
FORMATS = "PNG, JPEG, WebP, BMP, GIF, TIFF"
_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the next marker within JPEG's coded data
_DEEP = re.compile(r"RGB[AX]?;16([BLN])")  # Pillow's name of 16 bits in each of several channels

# A file with odd metadata and intact pixels is read without a warning; a damaged one is one error line.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
for _library in pathlib.Path(Image.__file__).parent.parent.glob("pillow.libs/libtiff*"):  # of Pillow's wheels
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(str(_library)).TIFFSetErrorHandler(None)  # it would write to stderr itself


# ---------------------------------------------------------------------------------- opening


def open_image(path: epath.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a regular file, its pixels not yet decoded; SampleError names the path.

    Args:
      path: local or gs://.
      max_pixels: maximum number of pixels, checked in the header.
    """
    return open_bytes(files.read_bytes(path, error=SampleError), path, max_pixels)


def open_bytes(content: bytes, name: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As open_image, for the content of a file; `name` is for messages."""
    kind = next((kind for magic, kind in _FORMATS if magic.match(content)), None)
    if kind is None:
        raise SampleError(f"{name}: not a readable image (known formats: {FORMATS})")
    if kind is JpegImagePlugin.JpegImageFile and _scans(content) > MAX_SCANS:
        raise SampleError(f"{name}: not a readable image (a JPEG of more than {MAX_SCANS} scans)")
    try:
        image = kind(io.BytesIO(content), str(name))
        width, height = image.size
        _check_planes(image)
    except Exception as fault:  # decoders raise exceptions of any type
        raise _unreadable(name, fault) from None
    if width * height > max_pixels:
        raise SampleError(
            f"{name}: {width}x{height} pixels; at most {max_pixels} are read: raise data.max_pixels (--max_pixels)"
        )
    return image


def _check_planes(image: Image.Image) -> None:
    """ValueError for a TIFF of several planes of more than 8 bits, which Pillow decodes wrongly."""
    tags = getattr(image, "tag_v2", {})
    several = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 1
    if (
        several
        and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
        and max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    ):
        raise ValueError("planes of more than 8 bits; store the channels of each pixel together (PLANARCONFIG=CONTIG)")


def _scans(content: bytes) -> int:
    """An upper bound of the scans of a JPEG file; exact where there are many."""
    if content.count(b"\xff\xda") <= MAX_SCANS:  # those in thumbnails and trailers counted too
        return 0
    at, count = 2, 0
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xD9:
            break
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
        if marker == 0xDA:
            count += 1
            found = _SCAN.search(content, at)
            at = found.start() if found else len(content)
    return count


def _unreadable(name: Any, fault: Exception) -> SampleError:
    reason = brief(fault, 100) or type(fault).__name__
    return SampleError(f"{name}: not a readable image ({reason})")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged block of metadata
        return 1
    return value if value in ORIENTATIONS else 1


def orientations(*paths: epath.PathLike) -> str:
    """Describes which of these files have an EXIF orientation, for a message about sizes; '' where none has."""
    found = []
    for path in paths:
        try:
            value = orientation(open_image(path))
        except SampleError:
            continue
        if value != 1:
            found.append(describe_orientation(path, value))
    return "; ".join(found)


def describe_orientation(path: epath.PathLike, value: int) -> str:
    """Describes the effect of an orientation, 2..8, on an image."""
    return f"{epath.Path(path).name} has EXIF orientation {value} and was {ORIENTATIONS[value][1]}"


# ---------------------------------------------------------------------------------- pixels


def is_deep(image: Image.Image) -> bool:
    """Whether a pixel may have more than 8 bits per channel."""
    return image.mode.startswith("I") or image.mode == "F" or bool(_DEEP.fullmatch(_raw_mode(image)))


def image_levels(image: Image.Image, name: Any = "the image", upright: bool = True) -> np.ndarray:
    """Values of an image: u8[H, W, 3], or where `is_deep` u16, i32, f32 [H, W] or u16[H, W, 3].

    Args:
      image: as Pillow opened it.
      name: for messages.
      upright: apply the EXIF orientation; False keeps it as stored (except TIFF, which Pillow rotates).
    """
    return read_levels(image, name, upright)[0]


def read_levels(image: Image.Image, name: Any, upright: bool = True) -> tuple[np.ndarray, int]:
    """(`image_levels`, the EXIF orientation that it was stored in)."""
    try:
        low = _low_bytes(image)
        deep = image.mode.startswith("I") or image.mode == "F"
    except Exception as fault:
        raise _unreadable(name, fault) from None
    return _upright(
        image,
        name,
        _native
        if deep
        else _colours
        if low is None
        else (lambda image: _colours(image).astype(np.uint16) << 8 | _colours(low)),
        upright,
    )


def mask_values(image: Image.Image, name: Any = "the mask", ids: bool = False) -> np.ndarray:
    """Values of a mask, upright: u8, u16 or i32 [H, W], or u8[H, W, 3] where the channels differ.

    For a palette the indices; for colour with alpha the alpha channel, if the colour is uniform.

    Args:
      image: as Pillow opened it.
      name: for messages.
      ids: the values are class numbers or ids, not an outline: colours that vary are never replaced
        by alpha, and values of 1, 2 or 4 bits are not spread over 0..255.
    """
    return _upright(image, name, (lambda image, raw=_raw_mode(image): _ids(image, raw)) if ids else _outline)[0]


def _upright(
    image: Image.Image, name: Any, decode: Callable[[Image.Image], np.ndarray], upright: bool = True
) -> tuple[np.ndarray, int]:
    """(decoded and rotated array, the orientation as stored)."""
    try:
        stored = orientation(image) if image.format == "TIFF" else 1  # Pillow rotates TIFF itself when it decodes
        array = decode(image)
        left = orientation(image)  # PNG may store it after the pixels
    except SampleError as fault:
        raise SampleError(f"{name}: {fault}") from None
    except Exception as fault:  # of any decoder, MemoryError too
        raise _unreadable(name, fault) from None
    if upright and left in ORIENTATIONS:
        array = np.ascontiguousarray(ORIENTATIONS[left][0](array))
    return array, left if left in ORIENTATIONS else stored


def _colours(image: Image.Image) -> np.ndarray:
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _native(image: Image.Image) -> np.ndarray:
    """The unchanged values, in the native byte order."""
    array = np.array(image)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, by Pillow's name; '' after decoding."""
    tiles = getattr(image, "tile", None)
    args = tiles[0].args if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """For a file with several channels of 16 bits an image of their low bytes, else None.

    Pillow's modes keep the high bytes only; read in the other byte order it decodes the low ones.
    """
    if not (found := _DEEP.fullmatch(_raw_mode(image))):
        return None
    is_big = found[1] == "B" or (found[1] == "N" and sys.byteorder == "big")
    mode = found[0][:-1] + ("L" if is_big else "B")
    file: Any = image
    low = type(file)(io.BytesIO(file.fp.getvalue()), file.filename)
    low.tile = [
        tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode) for tile in low.tile
    ]
    return low


def _ids(image: Image.Image, raw: str) -> np.ndarray:
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    if raw in ("L;2", "L;4"):  # Pillow spreads them over 0..255
        return np.array(image) // {"L;2": 85, "L;4": 17}[raw]
    return _mask_values(image, ids=True)


def _outline(image: Image.Image) -> np.ndarray:
    return _mask_values(image, ids=False)


def _mask_values(image: Image.Image, ids: bool) -> np.ndarray:
    mode = image.mode
    if mode == "P":
        return np.array(image)
    if mode == "PA":
        return np.array(image)[..., 0]
    if mode in ("1", "L"):
        return np.array(image.convert("L"))
    if mode == "F":
        return _to_integers(np.array(image))
    if mode.startswith("I"):
        values = _native(image)
        if values.min() < 0:
            raise SampleError(f"mask values {values.min()}..{values.max()}; none below 0 expected")
        return values
    low = _low_bytes(image)
    alpha = image.has_transparency_data or mode in ("LA", "La", "RGBA", "RGBa")
    values = np.array(image.convert("RGBA" if alpha else "RGB"))
    if low is not None and (not alpha or values[..., 3].min() == 255):
        deep = values[..., :3].astype(np.uint16) << 8 | _colours(low)
        if (deep == deep[..., :1]).all():
            return deep[..., 0].copy()
    return _by_alpha(values, ids) if alpha else _one_channel(values)


def _to_integers(values: np.ndarray) -> np.ndarray:
    """f32 -> i32 of whole numbers; fractions of 0..1 -> grey levels u8."""
    if not np.isfinite(values).all():
        raise SampleError("the mask holds NaN or infinite values")
    low, high = values.min(), values.max()
    if 0 <= low and high < 2**31 and (values == np.rint(values)).all():
        return values.astype(np.int32)
    if 0 <= low and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    raise SampleError(f"mask values {low:g}..{high:g}; whole numbers from 0, or 0..1 expected")


def _one_channel(colours: np.ndarray) -> np.ndarray:
    """u8[H, W, 3] -> u8[H, W] where the channels are equal."""
    return colours[..., 0].copy() if (colours == colours[..., :1]).all() else colours


def _by_alpha(values: np.ndarray, ids: bool) -> np.ndarray:
    """u8[H, W, 4] -> the alpha channel if the colour is uniform, else the colour."""
    colours, alpha = _one_channel(values[..., :3]), values[..., 3]
    if alpha.min() == 255:
        return colours
    plain = (colours == colours[:1, :1]).all()
    cut_out = not ids and colours.ndim == 3 and alpha.min() == 0  # a photograph on a transparent background
    return alpha.copy() if plain or cut_out else colours


# ---------------------------------------------------------------------------------- masks


def stretch(mask: np.ndarray) -> np.ndarray:
    """The grey levels u8[H, W] of a mask's values; u8[H, W, 3] for several colours.

    Two values only: the lower becomes 0, the higher 255; one colour on black likewise. All below 127 (the
    reference's rule; 127 x 257 in 16 bits): 255 where it is not 0. Else unchanged (16 bits divided by
    257): soft edges stay grey.
    """
    if mask.ndim == 3:
        drawn = mask.any(axis=-1)
        colours = mask[drawn]
        if (colours == colours[:1]).all():  # one colour on black
            return np.where(drawn, np.uint8(255), np.uint8(0))
    low, high = int(mask.min()), int(mask.max())
    if low == 0 and high == 255:  # most masks
        return mask.astype(np.uint8, copy=False)
    if mask.ndim == 2 and low < high and ((mask == low) | (mask == high)).all():
        return np.where(mask == high, np.uint8(255), np.uint8(0))
    scale = 1 if high <= 255 else 257
    if high < 127 * scale:
        return np.where(mask > 0, np.uint8(255), np.uint8(0))
    if high > 65535:
        raise SampleError(f"mask values {low}..{high}; at most 65535 expected")
    return (mask if scale == 1 else np.rint(mask / scale)).astype(np.uint8)
