"""The other tasks on drawn scenes: every answer is right, held-out pairs stay out, and lists are whole."""

import re

import numpy as np
import pytest

from argenseg_jax.data import mixture
from argenseg_jax.data.sources import interactive
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.data.synthetic.shapes_tasks import LIST, TASKS, TaskSource
from argenseg_jax.errors import UserError

HELD_OUT = [" ".join(pair) for pair in shapes.LEVELS["full"].held_out]


def question(sample):
    return sample.conversations[0]["value"].replace("<image>", "").strip()


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_its_place(task):
    one, other = (TaskSource(task, "full", "test", size=60) for _ in range(2))
    again = mixture.open_source(f"shapes-{task}:full:test:60")
    for i in (0, 7, 59):
        a, b, c = one[i], other[i], again[i]
        assert a.conversations == b.conversations == c.conversations
        for x, y in zip((*a.images, *a.masks), (*b.images, *b.masks), strict=True):
            assert x.dtype == np.uint8 and np.array_equal(x, y)
    assert question(one[0]) != question(TaskSource(task, "full", "train")[0]) or task == "semantic"
    with pytest.raises(IndexError):
        one[60]


@pytest.mark.parametrize("task", ["object", "semantic", "instances", "chat"])
def test_held_out_pairs_are_named_in_unseen_only(task):
    train, unseen = TaskSource(task, "full", "train", 150), TaskSource(task, "full", "unseen", 150)
    named = lambda source: sum(bool(re.search("|".join(HELD_OUT), question(source[i]))) for i in range(150))
    assert named(train) == 0 and (named(unseen) > 0) == (task in ("object", "chat"))


def scene_of(monkeypatch, source, index):
    """The sample, and the scene that it was made from (the last one drawn)."""
    drawn, draw = [], shapes.scene
    monkeypatch.setattr(shapes, "scene", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    sample = source[index]
    monkeypatch.undo()
    return sample, drawn[-1]


def test_answers_of_the_chat_are_right(monkeypatch):
    source, kinds, counts = TaskSource("chat", "full", "test", 400), set(), []
    for i in range(400):
        sample, scene = scene_of(monkeypatch, source, i)
        text, answer, kind = question(sample), sample.conversations[1]["value"], sample.meta["kind"]
        kinds.add(kind)
        assert not sample.masks and sample.meta["reference"] == answer and sample.meta["metric"] == "exact"
        words = set(re.sub(r"s\b|\?", "", text).split())
        colours, names = words & set(shapes.COLOURS), words & set(shapes.SHAPES)
        fits = [o for o in scene.objects if colours <= {o.colour} and names <= {o.shape}]
        if kind == "count":
            assert answer == str(len(fits)), text
            counts.append(answer)
        elif kind == "exist":
            assert answer == ("yes" if fits else "no"), text
        else:
            assert answer in [getattr(o, kind) for o in fits], text
    assert kinds == {"count", "exist", "colour", "shape"}
    assert max(counts.count(c) for c in counts) < 0.5 * len(counts)  # no number is most often right


def test_a_class_and_its_list_are_the_same_objects(monkeypatch):
    source = TaskSource("instances", "full", "test", 30 * LIST)
    for i in range(0, 30 * LIST, LIST):
        sample, scene = scene_of(monkeypatch, source, i)
        rows = [sample, *(source[i + k] for k in range(1, LIST))]
        assert len({row.meta["files"][0] for row in rows}) == 1 and rows[1].images[0] is not sample.images[0]
        assert all(np.array_equal(row.images[0], sample.images[0]) for row in rows)
        full = [row.masks[0] > 0 for row in rows if row.masks[0].any()]
        of_class = [k for k, o in enumerate(scene.objects) if o.shape == sample.meta["kind"]]
        assert len(full) == len(of_class) and np.array_equal(np.any(full, 0), scene.union(of_class) > 0)
        across = [np.nonzero(mask)[1].mean() for mask in full]
        assert across == sorted(across) and not any(row.masks[0].any() for row in rows[len(full) :])


def test_semantic_names_absent_classes_too(monkeypatch):
    source, empty = TaskSource("semantic", "full", "test", 100), 0
    for i in range(100):
        sample, scene = scene_of(monkeypatch, source, i)
        of_class = [k for k, o in enumerate(scene.objects) if o.shape == sample.meta["kind"]]
        assert np.array_equal(sample.masks[0], scene.union(of_class))
        empty += not of_class
    assert 5 < empty < 40


def test_a_described_scene_is_drawn_where_it_says():
    source = TaskSource("draw", "full", "test", 60)
    for i in range(60):
        sample = source[i]
        parts = re.findall(r"a (small|large) (\w+) (?:at the ([a-z ]+)|in the (middle))", question(sample))
        assert not sample.images and sample.meta["kind"] == f"{len(parts)} objects" and parts
        used = np.zeros((64, 64), bool)
        for size, shape, where, _middle in parts:
            y = 0 if "top" in where else 2 if "bottom" in where else 1
            x = 0 if "left" in where else 2 if "right" in where else 1
            cell = (slice(y * 21, y * 21 + 22), slice(x * 21, x * 21 + 22))
            assert (sample.masks[0][cell] > 0).mean() > (0.3 if size == "large" else 0.14) * (
                0.5 if shape in ("ring", "star") else 1
            ), question(sample)
            used[cell] = True
        assert (sample.masks[0][~used] > 0).sum() < 60  # tips that leave their cell


def test_every_object_may_be_prompted_for():
    source = mixture.open_source("interactive:point-drawn:shapes-object:full:test:20")
    for i in range(20):
        sample = source[i]
        ink = (sample.images[0] == interactive.INK).all(-1)
        assert ink.any() and (sample.masks[0][ink] > 0).mean() > 0.4
        assert sample.meta["metric"] == "interactive" and "all_objects_mask" in sample.meta


@pytest.mark.parametrize(
    "name, says",
    [
        ("shapes-paint:full:test", "no such task"),
        ("shapes-chat:full:dev", "no split"),
        ("shapes-chat:huge:test", "no level"),
        ("shapes-chat:full:test:many", "shapes-TASK:LEVEL:SPLIT"),
    ],
)
def test_mistakes_are_named(name, says):
    with pytest.raises(UserError, match=says):
        mixture.open_source(name)
