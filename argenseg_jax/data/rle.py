"""COCO masks, run lengths (RLE) and polygons: the checked decoder and encoder of the package.

pycocotools does not check its input: a run length that ends early returns uninitialised memory, and some
sizes and coordinates crash the process. So run lengths are decoded here, and pycocotools draws polygons
only after they are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from argenseg_jax.errors import SampleError, brief

MAX_PIXELS = 2**28  # of a mask; sources first compare it with its image, whose limit is data.max_pixels
MAX_COORDINATE = 100_000  # of a point, in pixels
# Of all annotations of one sample:
MAX_PARTS = 50_000  # polygons and RLEs
MAX_POINTS = 1_000_000
MAX_OUTLINE = 2**25  # pixels of outline, inside of the image or not: pycocotools visits each of them
MAX_LENGTH = 2**22  # pixels of a single outline: pycocotools allocates more than 100 bytes for each
MAX_MASKS = 2**30  # pixels of all masks
_CHARS = 6  # of a number in compressed counts: 30 bits, enough for MAX_PIXELS
_NUMBERS = (int, float, np.integer, np.floating)


class Drawn(NamedTuple):
    """The union of annotations.

    Attributes:
      mask: u8[H, W] of 0 and 255.
      dropped: number of polygons of fewer than 3 points that were ignored.
    """

    mask: np.ndarray
    dropped: int

    def meta(self) -> dict[str, int]:
        """Its entries of `Sample.meta`."""
        return {"dropped_polygons": self.dropped} if self.dropped else {}


# ---------------------------------------------------------------------------------- run lengths


def decode_rle(rle: Any, size: Sequence[int] | None = None) -> np.ndarray:
    """bool[H, W] of a COCO run length.

    Args:
      rle: {size: [H, W], counts: compressed (str, bytes) or a list of whole numbers}.
      size: (H, W) that it must have.

    Raises:
      SampleError: invalid; says why in one line.
    """
    return _fill(*read_runs(rle, size))


def checked_rle(rle: Any, size: Sequence[int] | None = None) -> dict[str, Any]:
    """The same mask as {size, counts: bytes}, safe for all functions of pycocotools.

    They rely on what its encoder writes: no empty run except the first. Arguments and errors as for
    `decode_rle`.
    """
    counts, height, width = read_runs(rle, size)
    packed: Any = rle["counts"].encode() if isinstance(rle["counts"], str) else rle["counts"]
    if (counts[1:] == 0).any():
        packed = _compress(_counts(merge_runs(*_runs(counts)), height * width))
    elif not isinstance(packed, bytes):
        packed = _compress(counts)
    return {"size": [height, width], "counts": packed}


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool[H, W] -> {'size': [H, W], 'counts': str}, as pycocotools reads it."""
    from pycocotools import mask as coco

    rle: Any = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def read_runs(rle: Any, size: Sequence[int] | None) -> tuple[np.ndarray, int, int]:
    """(alternating runs i64[N] of background and foreground, height, width), checked to be consistent."""
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise SampleError(f"not a COCO run length {{size: [height, width], counts}}, but {brief(repr(rle), 60)}")
    height, width = _size(rle["size"])
    if size is not None and (height, width) != tuple(size):
        raise SampleError(f"an RLE of {[height, width]} for an image of {list(size)}")
    counts = rle["counts"]
    runs = _expand(counts) if isinstance(counts, (str, bytes)) else _count_list(counts)
    pixels = height * width
    if (runs < 0).any():
        raise SampleError(f"an RLE with a run of {runs.min():.15g} pixels")
    with np.errstate(over="ignore"):
        total = runs.sum()
    if total != pixels:
        raise SampleError(f"an RLE of {total:.15g} pixels, not {pixels} = {height}*{width}")
    return runs.astype(np.int64), height, width


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, np.ndarray):
        size = size.tolist()
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(map(_is_integer, size)):
        raise SampleError(f"an RLE of size {brief(repr(size), 60)}, where [height, width] is expected")
    height, width = map(int, size)
    check_size(height, width)
    return height, width


def check_size(height: int, width: int) -> None:
    """SampleError unless this is a valid size of an image."""
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise SampleError(f"an image of {width}x{height} pixels; 1 to {MAX_PIXELS} are allowed")


def _is_integer(value: Any) -> bool:
    return bool(
        isinstance(value, _NUMBERS) and not isinstance(value, bool) and abs(value) < 2**63 and value == int(value)
    )


def _count_list(counts: Any) -> np.ndarray:
    """f64[N] of whole numbers."""
    counts = _numbers(counts, "the counts of an RLE")
    if not (np.isfinite(counts) & (counts == np.trunc(counts))).all():
        raise SampleError("an RLE whose counts are not whole numbers")
    return counts


def _numbers(values: Any, what: str) -> np.ndarray:
    """f64[N] of a list of numbers; SampleError begins with `what`."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise SampleError(f"{what}: a list of numbers expected, not {brief(repr(values), 60)}")
    if wrong := [t for t in set(map(type, values)) if not issubclass(t, _NUMBERS) or t is bool]:
        raise SampleError(f"{what}: a list of numbers expected, it holds {min(t.__name__ for t in wrong)}")
    try:
        return np.array(values, np.float64)
    except OverflowError:  # an integer of more than 300 digits
        raise SampleError(f"{what}: a number beyond 64 bits") from None


def _expand(counts: str | bytes) -> np.ndarray:
    """i64[N] of compressed counts.

    Each character is 48 + 5 bits of a number, lowest first, + 32 where more of it follow; the highest
    bit of the last one is its sign. From the fourth number on they are differences to the one two before.
    The numbers are not checked.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise SampleError("an RLE whose counts have invalid characters") from None
    codes = np.frombuffer(text, np.uint8)
    if codes.size and not 48 <= codes.min() <= codes.max() < 112:
        raise SampleError("an RLE whose counts have invalid characters")
    codes = codes.astype(np.int64) - 48
    last = np.flatnonzero(codes < 32)
    if codes.size and (not last.size or last[-1] != codes.size - 1):
        raise SampleError("an RLE whose counts end within a number")
    first = np.concatenate([[0], last[:-1] + 1]) if last.size else last
    digit = np.arange(codes.size) - np.repeat(first, last - first + 1)
    if codes.size and digit.max() >= _CHARS:  # pycocotools shifts longer ones out of its integers
        raise SampleError("an RLE with a run beyond 30 bits")
    numbers = np.add.reduceat((codes & 31) << 5 * digit, first) if codes.size else codes
    numbers -= np.where(codes[last] & 16, 32 << 5 * digit[last], 0)
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers


def _compress(counts: np.ndarray) -> bytes:
    """The inverse of `_expand`."""
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    columns, written = [], []
    more = np.ones(rest.shape, bool)
    while more.any():
        code, active = rest & 31, more
        rest = rest >> 5
        more = active & (rest != np.where(code & 16, -1, 0))
        columns.append(48 + code + 32 * more)
        written.append(active)
    characters = np.stack(columns, 1).astype(np.uint8)
    return characters[np.stack(written, 1)].tobytes()


def _fill(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[H, W] of checked runs, columns first."""
    return np.repeat(np.arange(counts.size) % 2 == 1, counts).reshape(width, height).T


def _runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, end) of the foreground's runs, as pixel indices in column-major order."""
    ends = np.cumsum(counts)
    return ends[:-1:2], ends[1::2]


def merge_runs(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The union of runs given by any i64[N] of first pixel and end: i64[R, 2], sorted and disjoint."""
    order = np.argsort(first, kind="stable")
    order = order[first[order] < end[order]]
    if not order.size:
        return np.zeros((0, 2), np.int64)
    first, end = first[order], np.maximum.accumulate(end[order])
    new = np.flatnonzero(np.append(True, first[1:] > end[:-1]))
    return np.stack([first[new], end[np.append(new[1:] - 1, -1)]], 1)


def _counts(runs: np.ndarray, pixels: int) -> np.ndarray:
    """The counts of a run length from merged runs."""
    counts = np.diff(np.concatenate([[0], runs.ravel(), [pixels]]))
    return counts if counts[-1] else counts[:-1]


# ---------------------------------------------------------------------------------- annotations


def objects(anns: Sequence[Mapping[str, Any]], height: int, width: int) -> Drawn:
    """The union of COCO annotations, each of them an object in the image; see `union`.

    Raises:
      SampleError: an annotation without a mask (only a box), or no pixel of any in the image: training
        on either would teach that the object is absent.
    """
    _check_masks(anns)
    drawn = union([ann["segmentation"] for ann in anns], height, width)
    if anns and not drawn.mask.any():
        raise SampleError(_empty_message(anns))
    return drawn


def each(anns: Sequence[Mapping[str, Any]], height: int, width: int) -> list[Drawn]:
    """As `objects`, one mask per annotation, largest first; those without a pixel are dropped if others have some."""
    _check_masks(anns)
    check_size(height, width)
    if len(anns) * height * width > MAX_MASKS:
        raise SampleError(f"{len(anns)} masks of {width}x{height} pixels: more than {MAX_MASKS} pixels in one sample")
    found = [segmentation.draw(height, width) for segmentation in _parse([ann["segmentation"] for ann in anns])]
    if anns and not any(one.mask.any() for one in found):
        raise SampleError(_empty_message(anns))
    return sorted((one for one in found if one.mask.any()), key=lambda one: -np.count_nonzero(one.mask))


def _check_masks(anns: Sequence[Mapping[str, Any]]) -> None:
    for ann in anns:
        if is_empty(ann.get("segmentation")):
            raise SampleError(f"annotation {brief(repr(ann.get('id')), 30)} has no mask (`segmentation` is empty)")


def _empty_message(anns: Sequence[Mapping[str, Any]]) -> str:
    ids = ", ".join(brief(repr(ann.get("id")), 30) for ann in anns[:5])
    return f"annotation {ids} is empty: no pixel of its mask is inside of the image"


def union(segmentations: Sequence[Any], height: int, width: int) -> Drawn:
    """All segmentations of one sample together, drawn as pycocotools does; empty where there are none.

    Args:
      segmentations: each a list of polygons [x, y, x, y, ...], one such polygon, pairs [[x, y], ...],
        an RLE or a list of RLEs.
      height, width: of the image.

    Raises:
      SampleError: says in one line which part is invalid and why.
    """
    check_size(height, width)
    parsed = _parse(segmentations)
    rles = [rle for one in parsed for rle in one.rles]
    polygons = [polygon for one in parsed for polygon in one.polygons]
    return _Segmentation(rles, polygons, sum(one.dropped for one in parsed)).draw(height, width)


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """bool[H, W] of COCO polygons, of an RLE (compressed or not), or of a list of RLEs; see `union`."""
    return union([segmentation], height, width).mask > 0


def is_empty(segmentation: Any) -> bool:
    """Whether an annotation has no mask at all: none, `[]`, or only empty polygons."""
    return segmentation is None or (
        isinstance(segmentation, (list, tuple))
        and all(isinstance(part, (list, tuple)) and not part for part in segmentation)
    )


class _Segmentation(NamedTuple):
    """A segmentation: RLEs unchanged, polygons as f64[2N], and the number of dropped ones (fewer than 3 points)."""

    rles: list[Mapping[str, Any]]
    polygons: list[np.ndarray]
    dropped: int

    def draw(self, height: int, width: int) -> Drawn:
        from pycocotools import mask as coco

        outlines = [p.tolist() for p in self.polygons]
        rles = [*self.rles, *(coco.frPyObjects(outlines, height, width) if outlines else ())]
        counts = [read_runs(rle, (height, width))[0] for rle in rles]
        if len(counts) != 1:
            ends = [_runs(c) for c in counts] or [(np.zeros(0, np.int64),) * 2]
            counts = [_counts(merge_runs(*map(np.concatenate, zip(*ends, strict=True))), height * width)]
        mask = np.ascontiguousarray(_fill(counts[0], height, width))
        return Drawn(mask.view(np.uint8) * np.uint8(255), self.dropped)


def _parse(segmentations: Iterable[Any]) -> list[_Segmentation]:
    """All segmentations of one sample; SampleError where they are too many to draw."""
    found = [_parse_one(segmentation) for segmentation in segmentations]
    check_amounts([p for one in found for p in one.polygons], sum(len(one.rles) + 1 for one in found))
    return found


def check_amounts(polygons: Sequence[np.ndarray], others: int = 0) -> None:
    """SampleError where the polygons of one sample, f64[2N] each, and other parts are too many to draw."""
    parts, points = len(polygons) + others, sum(p.size for p in polygons) // 2
    if parts > MAX_PARTS or points > MAX_POINTS:
        raise SampleError(
            f"{parts} polygons and RLEs of {points} points in one sample; at most {MAX_PARTS} of "
            f"{MAX_POINTS} points are drawn"
        )
    lengths = [0.0]
    for polygon in polygons:
        corners = polygon.reshape(-1, 2)
        lengths.append(np.abs(corners - np.roll(corners, 1, 0)).max(1).sum())
    if max(lengths) > MAX_LENGTH or sum(lengths) > MAX_OUTLINE:
        raise SampleError(
            f"polygons whose outlines are {sum(lengths):.0f} pixels long, one of them "
            f"{max(lengths):.0f}; at most {MAX_OUTLINE} and {MAX_LENGTH} are drawn"
        )


def _parse_one(segmentation: Any) -> _Segmentation:
    if isinstance(segmentation, np.ndarray):
        segmentation = segmentation.tolist()
    if isinstance(segmentation, Mapping):
        return _Segmentation([segmentation], [], 0)
    if not isinstance(segmentation, (list, tuple)):
        raise SampleError(f"a segmentation of {brief(repr(segmentation), 60)}; polygons or an RLE expected")
    single = segmentation and (isinstance(segmentation[0], _NUMBERS) or all(map(_is_pair, segmentation)))
    parts = [segmentation] if single else segmentation
    rles = [p for p in parts if isinstance(p, Mapping)]
    polygons = [_polygon(p) for p in parts if not isinstance(p, Mapping)]
    good = [p for p in polygons if p.size >= 6]
    if parts and not rles and not good:
        raise SampleError(f"a polygon of {polygons[0].size} numbers: 6 or more expected, x and y of 3 points")
    return _Segmentation(rles, good, len(polygons) - len(good))


def _is_pair(point: Any) -> bool:
    return isinstance(point, (list, tuple)) and len(point) == 2 and all(isinstance(v, _NUMBERS) for v in point)


def points(pairs: Any) -> np.ndarray:
    """f64[N, 2], N >= 1, of [[x, y], ...]; SampleError where it is invalid, or a point is not finite or too far."""
    if not isinstance(pairs, (list, tuple)) or not pairs or not all(map(_is_pair, pairs)):
        raise SampleError(f"points {brief(repr(pairs), 60)}, where [[x, y], ...] is expected")
    return _polygon(pairs).reshape(-1, 2)


def _polygon(part: Any) -> np.ndarray:
    """f64[2N] of [x, y, x, y, ...] or pairs [[x, y], ...], checked except for the number of points."""
    if isinstance(part, (list, tuple)) and part and all(map(_is_pair, part)):
        part = [value for point in part for value in point]
    values = _numbers(part, "a polygon")
    if values.size % 2:
        raise SampleError(f"a polygon of {values.size} numbers: x and y of every point expected")
    if not (np.abs(values) < MAX_COORDINATE).all():  # also False for nan
        raise SampleError(f"a polygon of {values.size} numbers: each below {MAX_COORDINATE} expected")
    return values
