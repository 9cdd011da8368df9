"""Drawn scenes: what they may hold, what their phrases mean, and that they are reproducible."""

import dataclasses
import math
import statistics
import time

import numpy as np
import pytest

from argenseg_jax.data.sample import Sample
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.synthetic.shapes import LEVELS, ShapesSource
from argenseg_jax.errors import SampleError, UserError

BOTH = pytest.mark.parametrize("level", ["simple", "full"])


def scenes(level, count=150, held_out=False):
    rng = np.random.default_rng(7)
    return [shapes.scene(rng, level, held_out) for _ in range(count)]


def assert_same(one: Sample, two: Sample):
    assert one.conversations == two.conversations
    for a, b in zip(one.images + one.masks, two.images + two.masks, strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert one.meta.keys() == two.meta.keys()
    assert all(np.array_equal(value, two.meta[key]) for key, value in one.meta.items())


# ---------------------------------------------------------------------------------- scenes


@BOTH
def test_objects_keep_to_the_rules(level):
    rules = LEVELS[level]
    counts, covered = set(), 0
    for scene in scenes(level):
        counts.add(len(scene.objects))
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert scene.masks.sum(0).max() == 1  # visible parts are disjoint
        for i, obj in enumerate(scene.objects):
            low, high = shapes.SIZES[obj.size]
            assert obj.colour in rules.colours and obj.shape in rules.shapes
            assert (obj.colour, obj.shape) not in rules.held_out
            assert low <= obj.r <= high and abs(obj.angle) <= 0.5
            assert min(obj.x, obj.y) >= obj.r and max(obj.x, obj.y) <= 63 - obj.r
            for other in scene.objects[:i]:
                gap = math.hypot(obj.x - other.x, obj.y - other.y)
                assert gap >= 0.88 * (obj.r + other.r)
            alone = dataclasses.replace(obj, x=31.5, y=31.5)
            covered += scene.masks[i].sum() < 0.97 * _area(alone)
    assert counts == set(range(2, rules.max_objects + 1))
    assert covered  # some objects do lie behind others


@BOTH
def test_later_objects_cover_earlier_ones(level):
    """The last object of a scene is whole: its mask is what it covers when drawn alone."""
    for scene in scenes(level):
        obj = scene.objects[-1]
        y, x = np.ogrid[:64, :64]
        inside = shapes._inside(obj, (x - obj.x).astype(np.float32), (y - obj.y).astype(np.float32))
        assert (scene.masks[-1] != inside).sum() <= 2  # float32 rounding at the edge


def _area(obj) -> int:
    y, x = np.ogrid[:64, :64]
    return int(shapes._inside(obj, x - obj.x, y - obj.y).sum())


@pytest.mark.parametrize(
    "shape,area",
    [
        ("circle", math.pi),
        ("ring", math.pi * (1 - 0.45**2)),
        ("square", (2 * 0.885) ** 2),
        ("triangle", 3 * math.sqrt(3) / 4 * 1.24**2),
        ("star", 5 * 1.15**2 * 0.5 * math.sin(math.pi / 5)),
    ],
)
def test_area_of_a_shape(shape, area):
    obj = shapes.Object("red", shape, "large", 31.3, 31.7, 13.0, 0.3)
    assert _area(obj) == pytest.approx(area * 13.0**2, rel=0.03)


def test_shapes_stand_upright_at_angle_zero():
    y, x = np.ogrid[:64, :64]
    for shape in ("triangle", "star"):
        obj = shapes.Object("red", shape, "large", 31.5, 31.5, 12.0, 0.0)
        rows = shapes._inside(obj, x - obj.x, y - obj.y).sum(1)
        assert rows[31 - 12] > 0 and rows[31 + 13] == 0  # one tip, and it points up


@BOTH
def test_pixels(level):
    """An object's colour is one draw around the named colour; the noise of a pixel has sd 8."""
    offsets, noise = [], []
    for scene in scenes(level):
        for obj, mask in zip(scene.objects, scene.masks):
            pixels = scene.image[mask].astype(float)
            offsets.append(pixels.mean(0) - shapes.COLOURS[obj.colour])
            dull = (pixels > 30).all(0) & (pixels < 225).all(0)  # channels that are not clipped
            noise += list(pixels.std(0)[dull])
    assert np.std(offsets, axis=0) == pytest.approx([10] * 3, abs=2)
    assert statistics.mean(noise) == pytest.approx(8, abs=0.2)
    back = [s.image[~s.masks.any(0)].astype(float) for s in scenes(level, 60)]
    assert np.mean([b.mean() for b in back]) == pytest.approx(125, abs=10)
    assert np.mean([b.std(0).mean() for b in back]) == pytest.approx(11, abs=2)


# ---------------------------------------------------------------------------------- expressions


def hand_made(level="full"):
    """A red circle over a red star, on the left; a blue star and a green ring, on the right."""
    objects = [
        shapes.Object("red", "circle", "small", 10, 10, 7, 0),
        shapes.Object("red", "star", "large", 15, 45, 11, 0),
        shapes.Object("blue", "star", "small", 50, 20, 7, 0),
        shapes.Object("green", "ring", "small", 49, 50, 7, 0),
    ]
    masks = np.zeros((4, 64, 64), bool)
    for i, obj in enumerate(objects):
        masks[i, int(obj.y), int(obj.x)] = True
    return shapes.Scene(LEVELS[level], np.zeros((64, 64, 3), np.uint8), tuple(objects), masks)


def test_meaning_of_every_kind():
    found = {e.text: e for e in shapes.expressions(hand_made())}
    for text, kind, targets in [
        ("the red star", "cs", (1,)),
        ("the large red star", "zcs", (1,)),
        ("the small star", "zs", (2,)),
        ("the bottommost star", "ext", (1,)),
        ("the bottommost object", "ext", (3,)),
        ("all red shapes", "allc", (0, 1)),
        ("all stars", "alls", (1, 2)),
        ("all circles", "alls", (0,)),
        ("everything except the stars", "exc", (0, 3)),
        ("the blue shape above the green one", "rel", (2,)),
        ("the red shape above the blue one", "rel", (0,)),
        ("the red shape above the green one", "rel", None),  # two are
        ("the green shape right of the red one", "rel", None),  # which red one?
        ("the red shape left of the blue one", "rel", None),  # two are
        ("the leftmost circle", "ext", None),
        ("the rightmost object", "ext", None),  # 1 pixel
        ("the blue ring", "none", ()),
        ("the red star", "cs", (1,)),
    ]:
        if targets is None:
            assert text not in found or found[text].kind != kind, text
            continue
        assert found[text].kind == kind and found[text].targets == targets, text
        mask = hand_made().masks[list(targets)].any(0) * 255
        assert found[text].mask.dtype == np.uint8 and np.array_equal(found[text].mask, mask)


@BOTH
def test_the_means_exactly_one(level):
    for scene in scenes(level):
        for expression in shapes.expressions(scene):
            if expression.kind == "none":
                assert not expression.targets and not expression.mask.any()
                colour, shape = expression.text.split()[1:]
                assert (colour, shape) not in {(o.colour, o.shape) for o in scene.objects}
                continue
            assert expression.mask.any()
            assert set(np.unique(expression.mask)) <= {0, 255}
            if expression.text.startswith("the "):
                assert len(expression.targets) == 1
            if expression.kind in ("cs", "zcs", "zs"):
                words = set(expression.text.split()[1:])
                meant = [o for o in scene.objects if words <= {o.size, o.colour, o.shape}]
                assert meant == [scene.objects[expression.targets[0]]]


def test_simple_has_no_relations_and_no_empty_targets():
    kinds = {e.kind for scene in scenes("simple") for e in shapes.expressions(scene)}
    assert kinds == {"cs", "zcs", "zs", "ext", "allc", "alls", "exc"}


def test_corpus_holds_every_phrase():
    corpus = set(shapes.corpus())
    for level in LEVELS:
        for scene in scenes(level, 60):
            assert {e.text for e in shapes.expressions(scene)} <= corpus
    assert {"<image>\nSegment the object.", "Sure, the segmentation result: <mask>."} <= corpus


# ---------------------------------------------------------------------------------- the source


@BOTH
@pytest.mark.parametrize("split", list(shapes.SPLITS))
def test_access_is_random_and_repeatable(level, split):
    one, two = ShapesSource(level, split), ShapesSource(level, split)
    two[3]
    for index in (5, 0, 123):
        assert_same(one[index], two[index])
    assert not np.array_equal(one[5].images[0], one[6].images[0])
    with pytest.raises(IndexError):
        one[len(one)]


def test_splits_levels_and_seeds_are_disjoint():
    drawn = [
        ShapesSource(level, split, seed=seed)[index].images[0].tobytes()
        for level in LEVELS
        for split in shapes.SPLITS
        for seed in (0, 1)
        for index in range(5)
    ]
    assert len(set(drawn)) == len(drawn)


def test_default_sizes():
    sizes = {split: len(ShapesSource("simple", split)) for split in shapes.SPLITS}
    assert sizes == {"train": 2**31 - 1, "val": 200, "test": 500, "unseen": 500}
    assert len(ShapesSource(size=7)) == 7
    ShapesSource()[2**31 - 2]


@BOTH
def test_held_out_pairs_are_named_in_unseen_only(level):
    held_out = [" ".join(pair) for pair in LEVELS[level].held_out]
    train = [_phrase(ShapesSource(level)[i]) for i in range(600)]
    assert not any(pair in phrase for phrase in train for pair in held_out)
    unseen = ShapesSource(level, "unseen")
    samples = [unseen[i] for i in range(150)]
    pairs = {p for p in held_out for s in samples if s.meta["kind"] == "cs" and p in _phrase(s)}
    assert pairs == set(held_out)
    assert all(s.masks[0].any() for s in samples)


@BOTH
def test_unseen_targets_hold_a_held_out_pair(level):
    rng, rules = np.random.default_rng(3), LEVELS[level]
    for scene in scenes(level, held_out=True):
        strange = [(o.colour, o.shape) in rules.held_out for o in scene.objects]
        assert sum(strange) == 1
        expression = shapes.draw_expression(rng, scene, rules.kinds, "unseen")
        assert expression is None or strange.index(True) in expression.targets


@BOTH
def test_agrees_with_the_reference_set(level):
    """Loose bounds around what 60 expressions drawn by another program measure."""
    kinds = {
        "simple": dict(cs=16, ext=11, allc=11, alls=11, zcs=6, zs=3, exc=2),
        "full": dict(exc=11, zcs=10, cs=10, ext=10, alls=5, zs=4, none=4, rel=3, allc=3),
    }[level]
    blind = {"simple": 0.47, "full": 0.35}[level]  # gIoU of answering with all objects
    source = ShapesSource(level, "test")
    samples = [source[i] for i in range(400)]
    found = [s.meta["kind"] for s in samples]
    for kind, count in kinds.items():
        assert found.count(kind) / 400 == pytest.approx(count / 60, abs=0.07), kind
    single = [s.masks[0] for s in samples if s.meta["kind"] == "cs"]
    assert np.mean([(m > 0).sum() for m in single]) == pytest.approx(243, abs=60)
    ious = [(s.masks[0] > 0).sum() / (s.meta["all_objects_mask"] > 0).sum() for s in samples]
    assert np.mean(ious) == pytest.approx(blind, abs=0.06)


def test_absent_pairs_mostly_share_a_colour_or_shape_with_the_scene():
    rng, near = np.random.default_rng(0), []
    for scene in scenes("full"):
        text = shapes.draw_expression(rng, scene, {"none": 1}, "train").text
        near.append(any(o.colour in text or o.shape in text for o in scene.objects))
    assert 0.75 < np.mean(near) < 1


def test_prompt_and_answer():
    sample, last = ShapesSource()[0], ShapesSource(image_last=True)[0]
    ask, answer = (turn["value"] for turn in sample.conversations)
    assert ask.startswith("<image>\nSegment ") and ask.endswith(".")
    assert last.conversations[0]["value"] == ask.removeprefix("<image>\n") + "\n<image>"
    assert answer == "Sure, the segmentation result: <mask>."


def test_kind_weights():
    source = ShapesSource("full", kind_weights={"none": 1, "rel": 1, "cs": 0})
    assert {source[i].meta["kind"] for i in range(30)} == {"none", "rel"}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(level="hard"),
        dict(split="dev"),
        dict(kind_weights={"rel": 1}),
        dict(kind_weights={}),
        dict(kind_weights={"cs": -1}),
        dict(kind_weights={"cs": 0}),
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(UserError, match="shapes: "):
        ShapesSource(**arguments)


def test_speed():
    """A training step on a CPU must not wait for images (bound: ten times the usual)."""
    source = ShapesSource("full")
    start = time.process_time()
    for index in range(200):
        source[index]
    assert time.process_time() - start < 200 * 4e-3


def _phrase(sample) -> str:
    return sample.conversations[0]["value"].removeprefix("<image>\nSegment ").removesuffix(".")


# ---------------------------------------------------------------------------------- TFDS


def test_tfds_round_trip(tmp_path):
    from argenseg_jax.data.sources.records import TfdsSource
    from argenseg_jax.data.synthetic.shapes_tfds import Shapes

    sizes = dict(train=9, val=3, test=3, unseen=2)
    Shapes(config="full", data_dir=tmp_path, sizes=sizes).download_and_prepare()
    folder = tmp_path / "shapes" / "full" / "1.1.0"
    assert list(folder.glob("*train.array_record*"))
    for split, size in sizes.items():
        read, drawn = TfdsSource(folder, split), ShapesSource("full", split, size=size)
        assert len(read) == size
        for index in reversed(range(size)):
            assert_same(read[index], drawn[index])
    with pytest.raises(UserError, match="no split"):
        TfdsSource(folder, "dev")
    with pytest.raises(UserError, match="looked for dataset_info.json"):
        TfdsSource(tmp_path, "train")


def test_tfds_of_any_source(tmp_path):
    """Odd sizes, no image, a mask in colour, non-ASCII text; a broken sample is left out."""
    from argenseg_jax.data.sources.records import Samples, TfdsSource

    rng = np.random.default_rng(0)
    image, colours = rng.integers(0, 256, (2, 5, 7, 3), np.uint8)
    grey = np.where(rng.random((5, 7)) < 0.5, 0, 255).astype(np.uint8)
    ask = [{"from": "human", "value": "Où est <image>?"}, {"from": "gpt", "value": "<mask><mask>"}]
    written = [Sample(ask, (image,), (grey, colours), {"id": np.int64(3)}), Sample(ask[:1])]

    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise SampleError("bad.jsonl:2: unreadable")
            return written[index // 2]

    builder = Samples(sources={"train": Source()}, data_dir=tmp_path)
    builder.download_and_prepare()
    assert builder.samples == 2 and builder.broken == ["bad.jsonl:2: unreadable"]
    read = TfdsSource(tmp_path / "samples" / "1.1.0")
    assert len(read) == 2
    for index in (0, 1):
        assert_same(read[index], written[index])
