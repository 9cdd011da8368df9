"""Run lengths and polygons of strangers: a mask equal to pycocotools' and the same every time, or one line."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from argenseg_jax.data import rle
from argenseg_jax.data.sources.reasonseg import draw_shapes
from argenseg_jax.errors import SampleError, UserError
from argenseg_jax.eval.metrics.instances import instance_scores
from tests.hostile import ODD, mutated

HEIGHT, WIDTH = 9, 7
GOOD = {"size": [HEIGHT, WIDTH], "counts": "96Y1"}
SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 4.0, 1.0, 4.0]
MASKS = st.lists(st.booleans(), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH).map(
    lambda pixels: np.reshape(pixels, (HEIGHT, WIDTH))
)
COORDINATES = st.one_of(st.floats(-20, 30), st.integers(-20, 30), st.floats(), st.integers(), st.sampled_from(ODD))
POINTS = st.lists(st.floats(-20, 30, width=32), min_size=6, max_size=16).map(lambda p: p[: len(p) // 2 * 2])


def outcome(function, *values):
    """What a call gives: a value, or the line that it is refused with; any other exception is a fault."""
    try:
        return function(*values)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400 and " at 0x" not in str(error)
        return str(error)


def check_rle(value):
    first, again = outcome(rle.decode_rle, value), outcome(rle.decode_rle, value)
    packed = outcome(rle.checked_rle, value)
    if isinstance(first, str):
        assert first == again == packed
        return
    assert np.array_equal(first, again)
    assert np.array_equal(first, coco.decode(packed) > 0)
    assert coco.area(packed) == first.sum() and coco.iou([packed], [packed], [False])[0, 0] in (0, 1)
    assert np.array_equal(coco.decode(coco.merge([packed])) > 0, first)


@given(MASKS)
def test_whole_masks(mask):
    packed = coco.encode(np.asfortranarray(mask, np.uint8))
    assert np.array_equal(rle.decode_rle(packed), mask) and rle.checked_rle(packed) == packed
    assert np.array_equal(rle.union([packed], HEIGHT, WIDTH).mask, mask * np.uint8(255))


@given(
    st.one_of(
        st.text(st.characters(min_codepoint=46, max_codepoint=114), max_size=12),
        st.text(max_size=8),
        st.binary(max_size=8),
        st.lists(st.integers(-3, 64), max_size=6),
        st.lists(COORDINATES, max_size=4),
    ),
    st.sampled_from([(HEIGHT, WIDTH), (1, 1), (3, 2), (64, 1)]),
)
def test_any_counts(counts, size):
    check_rle({"size": list(size), "counts": counts})


@given(MASKS, st.data())
def test_damaged_counts(mask, data):
    """F4: counts that are cut or changed by a character; a short one was filled with memory of others."""
    counts = bytearray(coco.encode(np.asfortranarray(mask, np.uint8))["counts"])
    index = data.draw(st.integers(0, len(counts) - 1))
    if data.draw(st.booleans()):
        del counts[index:]
    else:
        counts[index] = data.draw(st.integers(0, 255))
    check_rle({"size": [HEIGHT, WIDTH], "counts": bytes(counts)})


@given(mutated(GOOD))
def test_any_values_in_a_run_length(value):
    check_rle(value)


@given(st.lists(POINTS, min_size=1, max_size=4))
def test_whole_polygons(polygons):
    theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, HEIGHT, WIDTH))) > 0
    assert np.array_equal(rle.decode_segmentation(polygons, HEIGHT, WIDTH), theirs)


@given(st.recursive(COORDINATES, lambda inner: st.lists(inner, max_size=8), max_leaves=24))
def test_any_polygons(segmentation):
    first, again = (outcome(rle.decode_segmentation, segmentation, HEIGHT, WIDTH) for _ in range(2))
    assert np.array_equal(first, again)
    outcome(rle.objects, [{"segmentation": segmentation}], HEIGHT, WIDTH)
    outcome(draw_shapes, [{"label": "target", "points": segmentation}], HEIGHT, WIDTH)


@given(mutated([{"segmentation": [SQUARE, [3.0, 3.0]], "id": 1}, {"segmentation": GOOD}, {"segmentation": [GOOD]}]))
def test_any_values_in_annotations(anns):
    if isinstance(anns, list) and all(isinstance(a, dict) for a in anns):
        first, again = (outcome(rle.objects, anns, HEIGHT, WIDTH) for _ in range(2))
        assert type(first) is type(again)
        outcome(rle.each, anns, HEIGHT, WIDTH)


@given(
    mutated(
        {
            "image": "a.jpg",
            "kind": "cat",
            "truths": [{"segmentation": GOOD, "iscrowd": 0}],
            "instances": [{"segmentation": GOOD, "score": 0.5}],
        }
    )
)
def test_any_values_in_rows_of_instances(row):
    if isinstance(row, dict) and {"image", "kind", "truths", "instances"} <= set(row):
        outcome(instance_scores, [row])


CRASHES = """
import numpy as np
from argenseg_jax.data import rle
from argenseg_jax.errors import UserError
from argenseg_jax.eval.metrics.instances import instance_scores
def refused(function, *values):
    try:
        function(*values)
    except UserError as error:
        return
    raise AssertionError(values)
good = {"size": [8, 8], "counts": [64]}
for size, counts in [([2**31, 2], "1"), ([2**40, 1], "1"), ([1, 2**63], "1"), ([8, 8], "nan"), ([0, 8], ""),
                     ([8, 0], "0"), ([64, -64], "0")]:
    bad = {"size": size, "counts": counts}
    refused(rle.decode_rle, bad)
    refused(rle.decode_segmentation, [bad], 8, 8)
    for key in ("truths", "instances"):
        masks = {name: [{"segmentation": bad if name == key else good, "score": 1}] for name in ("truths", "instances")}
        refused(instance_scores, [{"image": "a", "kind": "b", **masks}])
for number in (-2**63, 2**63 - 1, 2**31, -2**31, 1e300, float("nan"), float("inf")):
    for index in range(6):
        polygon = [1, 5, 20, 5, 20, 20]
        polygon[index] = number
        refused(rle.decode_segmentation, [polygon], 40, 30)
print("alive")
"""


def test_what_killed_the_process():
    """F3: signals 6, 8 and 11 in pycocotools; in a process of its own, so that a fault shows as one."""
    done = subprocess.run([sys.executable, "-c", CRASHES], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_short_run_lengths_do_not_show_memory():
    """F4: the freed memory held the mask that was decoded just before."""
    whole = {"size": [40, 30], "counts": [0, 1200]}
    for counts in ("", "0", "1", "5`0"):
        assert rle.decode_rle(whole).all()
        with pytest.raises(SampleError, match="pixels, not 1200"):
            rle.decode_rle({"size": [40, 30], "counts": counts})
