"""Polygons as OpenCV 4.8 to 4.10 draws them: masks that its 4.8.0 and 4.10.0 made, and LISA's order of shapes."""

import hashlib

import numpy as np
import pytest

from argenseg_jax.data.rle import encode_rle
from argenseg_jax.data.sources.reasonseg import IGNORED, draw_shapes
from argenseg_jax.errors import SampleError

DRAWN = [  # points, height, width, counts of cv2.polylines + cv2.fillPoly
    (
        [[1, 22], [0, 39], [26, 34], [29, 0], [19, 36], [23, 1]],
        42,
        32,
        "o09h09O1O001O1O1O1O001O1O100O1O001O1O1O1O1O00DKE441ONI7;92M4L4MM2I9FP3",
    ),
    (
        [[44, 27], [7, 37], [7, 19], [38, 19]],
        50,
        50,
        "a;c0o000O1000000O1000000O10000O1000000O1000000O1000000O10000O1000001N2O2N1O1N3No6",
    ),
    (
        [[1, 9], [38, 4], [21, 16], [8, 16], [14, 10], [-6, 9], [0, 10], [28, 4], [26, 0]],
        14,
        38,
        "92<000O01000O100O2O000O1JK35LL47O10000O10000O100O1000c00WO152M3M1O100O1O00100O1OM",
    ),
    (
        [[-2, 48], [16, -9], [60, 25], [64, -21], [2, 43], [25, 39], [-1, -8], [28, 47], [0, -23], [6, 0]],
        29,
        36,
        "d16a08I3GB1d0O31N3M3N2M5M3IBM;4FM67JI3;LE2=NC0?OBNb0160h11TN3M1O1O1O1O2N2N2N1O2N2N2N2NJ",
    ),
    ([[5, 5]], 8, 9, "]11j0"),
    ([[2, 1], [30, 6]], 8, 9, "a017010O00010O0M"),
    ([[-900, 3], [400, 900], [12, -700]], 20, 20, "0`<"),  # all of it
    ([[2.9, 2.9], [7.99, 3.2], [5.5, 8.9], [-0.9, 6.1]], 10, 10, "5262O2O0010O0N2Nc0"),  # cut, not rounded
]
# Pixels of 60 polygons around (320, 240) of 640x480 for each radius, as ../shared/cases/polygon_truth.py makes them.
PIXELS = {10: 13611, 30: 112171, 80: 784209, 200: 4716956}


def drawn(points, height, width):
    return draw_shapes([{"label": "target", "points": points}], height, width) == 1


def around(radius, rng, count=60):
    for _ in range(count):
        n = rng.integers(5, 40)
        angle = np.sort(rng.random(n) * 2 * np.pi)
        far = radius * (0.7 + 0.3 * rng.random(n))
        yield [[320 + x, 240 + y] for x, y in zip(far * np.cos(angle), far * np.sin(angle))]


@pytest.mark.parametrize("points,height,width,counts", DRAWN)
def test_masks_of_opencv(points, height, width, counts):
    assert encode_rle(drawn(points, height, width))["counts"] == counts


def test_many_masks_of_opencv():
    """400 polygons of whole numbers, half of them reach out of the image; the digest is of OpenCV's masks."""
    rng, digest, pixels = np.random.default_rng(11), hashlib.sha256(), 0
    for k in range(400):
        height, width = rng.integers(1, 60, 2).tolist()
        margin = (0, 5, 60, 2000)[k % 4]
        points = rng.integers((-margin, -margin), (width + margin, height + margin), (rng.integers(1, 14), 2))
        mask = drawn(points.tolist(), height, width)
        digest.update(np.packbits(mask).tobytes())
        pixels += int(mask.sum())
    assert pixels == 116005
    assert digest.hexdigest() == "e38fb6d06a08e39711986c02c03ad7993715b9032e5a94ad70e5de950eee94af"


def test_truth_of_reasonseg_has_the_published_size():
    rng = np.random.default_rng(0)
    for radius, pixels in PIXELS.items():
        assert sum(int(drawn(points, 480, 640).sum()) for points in around(radius, rng)) == pixels


def test_beside_an_installed_opencv():
    """Equal to 4.8 to 4.10; older and newer ones leave out pixels at right edges."""
    cv2 = pytest.importorskip("cv2")
    same = (4, 8) <= tuple(map(int, cv2.__version__.split(".")[:2])) <= (4, 10)
    rng = np.random.default_rng(1)
    for points in (p for radius in PIXELS for p in around(radius, rng, 15)):
        theirs, whole = np.zeros((480, 640), np.uint8), np.array([points], np.int32)
        cv2.polylines(theirs, whole, True, 1, 1)
        cv2.fillPoly(theirs, whole, 1)
        ours = drawn(points, 480, 640)
        assert not (theirs.astype(bool) & ~ours).any()
        assert theirs.sum() == ours.sum() if same else theirs.sum() > 0.95 * ours.sum()


def square(label, first, last):
    return {"label": label, "points": [[first, first], [last, first], [last, last], [first, last]]}


def test_order_and_labels_as_in_lisa():
    """Few drawn pixels on top; only the label `flag` itself is left out; `ignore` anywhere in a label counts."""
    got = draw_shapes(
        [
            square("target", 3, 5),
            square("Ignore_1", 2, 6),
            square("target", 1, 9),
            square("FLAG", 0, 9),
            square("red flag", 8, 9),
        ],
        10,
        10,
    )
    assert got[0].tolist() == [0] * 10
    assert got[4].tolist() == [0, 1, IGNORED, 1, 1, 1, IGNORED, 1, 1, 1]
    assert got[9].tolist() == [0] + [1] * 9
    same = [square("target", 1, 3), square("ignore", 1, 3)]  # of one size: the first in the file on top
    assert draw_shapes(same, 5, 5)[2, 2] == 1 and draw_shapes(same[::-1], 5, 5)[2, 2] == IGNORED
    line = {"label": "ignore", "points": [[0, 4], [9, 4]]}  # 10 pixels, though its area is 0
    assert draw_shapes([line, square("target", 4, 6)], 10, 10)[4, 4] == 1


@pytest.mark.parametrize(
    "points,fault",
    [
        ([], "points "),
        (None, "points None"),
        ([[1, 2, 3]], "points "),
        ([1, 2, 3, 4], "points "),
        ([["1", "2"]], "points "),
        ([[float("nan"), 1]], "each below"),
        ([[1e300, 1]], "each below"),
        ([[-(2**63), 1]], "each below"),
        ([[10**400, 1]], "beyond 64 bits"),
        ([[True, 1]], "it holds bool"),
        ([[0, 0], [99_999, 99_999]] * 25, "outlines are"),
    ],
)
def test_faulty_shapes(points, fault):
    with pytest.raises(SampleError, match=fault) as caught:
        draw_shapes([{"label": "target", "points": points}], 8, 8)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_shapes_that_would_fill_the_image_too_often():
    assert draw_shapes([square("t", -9, 2100)] * 200, 2048, 2048).all()
    with pytest.raises(SampleError, match="allowed in one sample"):
        draw_shapes([square("t", -9, 2100)] * 300, 2048, 2048)
