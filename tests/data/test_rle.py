"""Run lengths and polygons: what is read equals pycocotools; what pycocotools misreads or dies of is one line."""

import numpy as np
import pytest
from pycocotools import mask as coco

from argenseg_jax.data import rle
from argenseg_jax.errors import SampleError

SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]
HALF = np.arange(12)[None].repeat(8, 0) < 6
FORMS = {  # all of them the same mask
    "counts": [0, 48, 48],
    "floats": [0.0, 48.0, 48.0],
    "zeros": [0, 20, 0, 28, 24, 0, 24],
    "text": "0`1`1",
    "bytes": b"0`1`1",
    "array": np.array([0, 48, 48]),
    "trailing": [0, 48, 48, 0],
}


def theirs(polygons, height=8, width=12):
    return coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [[8, 12], (8.0, 12), np.array([8, 12])], ids=["list", "float", "array"])
def test_forms_of_run_lengths(form, size):
    one = {"size": size, "counts": FORMS[form]}
    assert np.array_equal(rle.decode_rle(one), HALF) and rle.decode_rle(one).dtype == bool
    assert rle.checked_rle(one) == {"size": [8, 12], "counts": b"0`1`1"}
    assert np.array_equal(rle.decode_segmentation(one, 8, 12), HALF)
    assert np.array_equal(rle.decode_segmentation([one, one], 8, 12), HALF)


def test_compressed_counts_are_pycocotools():
    rng = np.random.default_rng(0)
    for k in range(300):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < (0, 0.02, 0.5, 0.98, 1)[k % 5]
        if k % 2:
            mask[:, : width // 2] = k % 4 == 1
        packed = rle.encode_rle(mask)
        assert np.array_equal(rle.decode_rle(packed), mask)
        counts = rle.read_runs(packed, None)[0].tolist()
        assert rle.checked_rle({"size": [height, width], "counts": counts})["counts"].decode() == packed["counts"]


def test_long_runs():
    """Counts of several characters, negative differences: a large image."""
    mask = np.zeros((3000, 2000), bool)
    mask[5:, 3:] = True
    mask[100:2990, 1000:1700] = False
    packed = rle.encode_rle(mask)
    assert np.array_equal(rle.decode_rle(packed), mask)
    assert rle.checked_rle(packed)["counts"].decode() == packed["counts"]


BAD = [
    ({"size": [64, 64], "counts": ""}, "an RLE of 0 pixels, not 4096"),
    ({"size": [64, 64], "counts": "l>6g"}, "an RLE whose counts end within a number|an RLE of"),
    ({"size": [8, 8], "counts": "nan"}, "counts end within a number"),
    ({"size": [8, 8], "counts": [63]}, "an RLE of 63 pixels, not 64"),
    ({"size": [8, 8], "counts": [30, 35]}, "an RLE of 65 pixels, not 64"),
    ({"size": [8, 8], "counts": [-5, 69]}, "a run of -5 pixels"),
    ({"size": [64, 64], "counts": [4106, -10]}, "a run of -10 pixels"),
    ({"size": [8, 8], "counts": [1e300, 1e300]}, r"an RLE of 2e\+300 pixels"),
    ({"size": [8, 8], "counts": [2**63, 2**63]}, "pixels, not 64"),
    ({"size": [8, 8], "counts": [10**400]}, "beyond 64 bits"),
    ({"size": [8, 8], "counts": [float("nan")]}, "not whole numbers"),
    ({"size": [8, 8], "counts": [63.5, 0.5]}, "not whole numbers"),
    ({"size": [8, 8], "counts": [True, 63]}, "it holds bool"),
    ({"size": [8, 8], "counts": ["1", "63"]}, "it holds str"),
    ({"size": [8, 8], "counts": [[1, 63]]}, "it holds list"),
    ({"size": [8, 8], "counts": None}, "a list of numbers expected"),
    ({"size": [8, 8], "counts": {"0": 64}}, "a list of numbers expected"),
    ({"size": [8, 8], "counts": "oooooooooooooooo0"}, "beyond 30 bits"),
    ({"size": [8, 8], "counts": "ooooo?"}, "an RLE of 536870911 pixels, not 64"),
    ({"size": [8, 8], "counts": "é"}, "invalid characters"),
    ({"size": [8, 8], "counts": b"\xff"}, "invalid characters"),
    ({"size": [8, 8], "counts": "\x00"}, "invalid characters"),
    ({"size": [0, 8], "counts": []}, "an image of 8x0 pixels"),
    ({"size": [64, -64], "counts": [0]}, "an image of -64x64 pixels"),
    ({"size": [-64, -64], "counts": [4096]}, "an image of -64x-64 pixels"),
    ({"size": [2**31, 2], "counts": "1"}, "pixels"),
    ({"size": [2**40, 1], "counts": "1"}, "pixels"),
    ({"size": [1, 2**63], "counts": "1"}, "of size"),
    ({"size": [10**400, 1], "counts": "1"}, "of size"),
    ({"size": [float("nan"), 1], "counts": "1"}, "of size"),
    ({"size": [float("inf"), 1], "counts": "1"}, "of size"),
    ({"size": [8.5, 8], "counts": [68]}, "of size"),
    ({"size": [True, 64], "counts": [64]}, "of size"),
    ({"size": ["8", "8"], "counts": [64]}, "of size"),
    ({"size": "88", "counts": [64]}, "of size"),
    ({"size": [64], "counts": [64]}, "of size"),
    ({"size": [8, 8, 1], "counts": [64]}, "of size"),
    ({"size": None, "counts": [64]}, "of size"),
    ({"size": [8, 8]}, "not a COCO run length"),
    ({}, "not a COCO run length"),
    (None, "not a COCO run length"),
    ("`1", "not a COCO run length"),
    ([[8, 8], [64]], "not a COCO run length"),
]


@pytest.mark.parametrize("bad,fault", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("function", [rle.decode_rle, rle.checked_rle])
def test_faulty_run_lengths(function, bad, fault):
    with pytest.raises(SampleError, match=fault) as caught:
        function(bad)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_another_size_is_named():
    with pytest.raises(SampleError, match=r"an RLE of \[8, 12\] for an image of \[12, 8\]"):
        rle.decode_rle({"size": [8, 12], "counts": [96]}, (12, 8))


# ------------------------------------------------------------------------------------ polygons


@pytest.mark.parametrize(
    "polygons",
    [
        [SQUARE],
        [SQUARE, [6.3, 2.7, 11.2, 3, 9, 7.5]],
        [[1, 1, 9, 7, 9, 1, 1, 7]],
        [[-5, -5, 30, 2, 3, 20]],
        [SQUARE, SQUARE, [3, 3, 10, 3, 10, 6, 3, 6]],
        [[-900, -900, -800, -900, -800, -800]],
        [[2, 2, 2, 2, 2, 2]],
    ],
)
def test_polygons_are_pycocotools(polygons):
    assert np.array_equal(rle.decode_segmentation(polygons, 8, 12), theirs(polygons))


def test_many_polygons():
    rng = np.random.default_rng(0)
    polygons = (rng.random((300, 8)) * 60 - 5).tolist()
    assert np.array_equal(rle.decode_segmentation(polygons, 50, 45), theirs(polygons, 50, 45))


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        [SQUARE],
        [[1, 1], [5, 1], [5, 4], [1, 4]],
        [[[1, 1], [5, 1], [5, 4], [1, 4]]],
        tuple(SQUARE),
        [np.array(SQUARE)],
        np.array([SQUARE]),
    ],
    ids=["flat", "polygons", "pairs", "list of pairs", "tuple", "array", "table"],
)
def test_forms_of_polygons(segmentation):
    assert np.array_equal(rle.decode_segmentation(segmentation, 8, 12), theirs([SQUARE]))


def test_stray_points_are_dropped_beside_others():
    """Detectron drops polygons of fewer than 6 numbers; here they are counted."""
    packed = {"size": [8, 12], "counts": "0`1`1"}
    for parts, dropped in (([SQUARE, [3, 3]], 1), ([[], SQUARE, [1, 2, 3, 4]], 2), ([SQUARE, [[3, 3]]], 1)):
        got = rle.union([parts], 8, 12)
        assert got.dropped == dropped and got.meta() == {"dropped_polygons": dropped}
        assert np.array_equal(got.mask > 0, theirs([SQUARE])) and got.mask.max() == 255
    assert rle.union([[packed, [3, 3]], [SQUARE, []]], 8, 12).dropped == 2
    assert rle.union([[SQUARE]], 8, 12).meta() == {}
    assert not rle.union([], 8, 12).mask.any() and not rle.union([[]], 8, 12).mask.any()


@pytest.mark.parametrize(
    "segmentation,fault",
    [
        ([[3, 3]], "a polygon of 2 numbers: 6 or more"),
        ([[5, 5, 9, 9]], "a polygon of 4 numbers: 6 or more"),
        ([[5, 5], [9, 9]], "a polygon of 4 numbers"),
        ([[]], "a polygon of 0 numbers"),
        ([3, 3], "a polygon of 2 numbers"),
        ([[*SQUARE, 7]], "a polygon of 9 numbers: x and y"),
        ([SQUARE, [1, 2, 3]], "a polygon of 3 numbers: x and y"),
        ([[-(2**63), 5, 9, 5, 9, 9]], "each below 100000"),
        ([[2**63, 5, 9, 5, 9, 9]], "each below"),
        ([[1e30, 5, 9, 5, 9, 9]], "each below"),
        ([[float("nan"), 5, 9, 5, 9, 9]], "each below"),
        ([[float("-inf"), 5, 9, 5, 9, 9]], "each below"),
        ([[10**400, 5, 9, 5, 9, 9]], "beyond 64 bits"),
        ([["5", "5", "9", "5", "9", "9"]], "it holds str"),
        ([[None] * 6], "it holds NoneType"),
        ([[True, 5, 9, 5, 9, 9]], "it holds bool"),
        ([[[1, 1], [5, 1], [5, 4, 4]]], "it holds list"),
        (None, "a segmentation of None"),
        (5, "a segmentation of 5"),
        ("a.png", "a segmentation of 'a.png'"),
        (["a.png"], "a polygon: a list of numbers expected, not 'a.png'"),
        ([{"size": [9, 9], "counts": [81]}], r"an RLE of \[9, 9\] for an image of \[8, 12\]"),
        ([{"size": [8, 12], "counts": "0"}], "an RLE of 0 pixels, not 96"),
        ([SQUARE] * 50_001, "at most 50000 of"),
        ([SQUARE * 250_001], "of 1000004 points"),
        ([[-99_999, 0, 99_999, 0, 5, 5] * 11], "outlines are"),
        ([[0, 0, 9e4, 0, 9e4, 9e4, 0, 9e4]] * 99, "outlines are"),
    ],
)
def test_faulty_polygons(segmentation, fault):
    with pytest.raises(SampleError, match=fault) as caught:
        rle.decode_segmentation(segmentation, 8, 12)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("height,width", [(0, 5), (-4, -4), (2**40, 1), (2**15, 2**15)])
def test_impossible_images(height, width):
    with pytest.raises(SampleError, match="pixels"):
        rle.union([[SQUARE]], height, width)


# ------------------------------------------------------------------------------------ annotations


def ann(segmentation, **more):
    return {"id": 7, "segmentation": segmentation, **more}


def test_objects():
    outside = ann([[-9, -9, -8, -9, -8, -8]])
    got = rle.objects([ann([SQUARE]), ann({"size": [8, 12], "counts": [48, 48]}), outside], 8, 12)
    assert np.array_equal(got.mask > 0, theirs([SQUARE]) | ~HALF)
    assert not rle.objects([], 8, 12).mask.any()  # an expression without a target


@pytest.mark.parametrize(
    "anns", [[ann([])], [ann(None)], [ann([[]])], [{"id": 7, "bbox": [1, 1, 5, 5]}], [ann([SQUARE]), ann([])]]
)
def test_objects_without_a_mask(anns):
    """A box alone would teach that the class is absent, or that there is less of it."""
    for function in (rle.objects, rle.each):
        with pytest.raises(SampleError, match="annotation 7 has no mask"):
            function(anns, 8, 12)


@pytest.mark.parametrize(
    "segmentation",
    [[[-9, -9, -8, -9, -8, -8]], [[3, 3, 3, 3, 3, 3]], {"size": [8, 12], "counts": [96]}],
    ids=["outside", "of no area", "empty RLE"],
)
def test_objects_without_a_pixel(segmentation):
    for function in (rle.objects, rle.each):
        with pytest.raises(SampleError, match="annotation 7 is empty: no pixel"):
            function([ann(segmentation)], 8, 12)


def test_each():
    small = [6, 6, 8, 6, 8, 8, 6, 8]
    found = rle.each([ann([small]), ann([SQUARE, [1, 1]]), ann([[-9, -9, -8, -9, -8, -8]])], 8, 12)
    assert [one.dropped for one in found] == [1, 0]
    assert np.array_equal(found[0].mask > 0, theirs([SQUARE])) and np.array_equal(found[1].mask > 0, theirs([small]))
    with pytest.raises(SampleError, match="17 masks of 8192x8192 pixels"):
        rle.each([ann([SQUARE])] * 17, 8192, 8192)
