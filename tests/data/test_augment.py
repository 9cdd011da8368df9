"""Augmentation: image and mask move together, left and right keep their meaning."""

import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import mixture
from argenseg_jax.data.augment import Augment, recolour, recompress
from argenseg_jax.data.pipeline import DataConfig, Geometry, SampleEncoder
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources.interactive import InteractiveSource
from argenseg_jax.errors import SampleError


def sample(text="Segment the car.", images=1):
    """A bright patch in the upper left, and its mask."""
    mask = np.zeros((60, 90), np.uint8)
    mask[10:40, 5:40] = 255
    image = np.repeat(mask[..., None], 3, -1) // 255 * 160 + 40
    return Sample(conversations=[{"from": "human", "value": text}], images=(image,) * images, masks=(mask,))


@pytest.mark.parametrize("seed", range(20))
def test_mask_stays_on_the_object(seed):
    out = Augment()(sample(), np.random.default_rng(seed))
    image, mask = out.images[0], out.masks[0]
    assert image.shape[:2] == mask.shape and set(np.unique(mask)) <= {0, 255}
    if 0 < mask.mean() < 255:
        assert image[mask > 0].min() > image[mask == 0].max()
    share = mask.size / sample().masks[0].size
    assert 0.25 < share <= 1


def test_left_and_right_are_never_mirrored():
    still = Augment(flip=1.0, scale=(1, 1), ratio=(1, 1), jitter=0)
    for text in ("the left car", "the rightmost car", "Left-hand side", "car on the right."):
        out = still(sample(text), np.random.default_rng(0))
        np.testing.assert_array_equal(out.images[0], sample().images[0])
    for text in ("the car", "a bright thing", "what is cleft?"):
        out = still(sample(text), np.random.default_rng(0))
        np.testing.assert_array_equal(out.images[0], sample().images[0][:, ::-1])
        np.testing.assert_array_equal(out.masks[0], sample().masks[0][:, ::-1])


def test_same_rng_same_sample_and_several_images_stay():
    one, two = (Augment()(sample(), np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one.images[0], two.images[0])
    pair = sample(images=2)
    assert Augment()(pair, np.random.default_rng(0)) is pair


@pytest.mark.parametrize(
    "text",
    [
        "the left car",
        "the rightmost car",
        "Left-hand side",
        "the TOP shelf",
        "the lower half",
        "in the middle",
        "at the centre",
        "in the corner",
        "the eastern wing",
        "请分割左边的圆形。",
        "右上角的车",
        "中间的人",
        "What is in <box>[[1,2,3,4]]</box>?",
        "the object at [[500, 20]]",
        "the object at (120, 80)",
        "within [0.1, 0.2, 0.5, 0.6]",
    ],
)
def test_nothing_moves_where_a_text_speaks_of_places(text):
    moved = Augment(jitter=0)
    asked, answered = (
        sample(text),
        dataclasses.replace(
            sample(), conversations=[{"from": "user", "value": "Where is it?"}, {"from": "gpt", "value": text}]
        ),
    )
    for each in (asked, answered):
        for seed in range(5):
            out = moved(each, np.random.default_rng(seed))
            np.testing.assert_array_equal(out.images[0], each.images[0])
            np.testing.assert_array_equal(out.masks[0], each.masks[0])


def test_nothing_moves_without_a_mask():
    """An answer in words may be about what a crop removes, or about writing."""
    chat = dataclasses.replace(sample("How many cars are there?"), masks=())
    np.testing.assert_array_equal(Augment(jitter=0)(chat, np.random.default_rng(0)).images[0], chat.images[0])


def test_recompression_is_jpegs():
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60)))
    first = Sample([{"from": "human", "value": "the left car"}], (image, image), (image[..., 0],), {})
    seen = [recompress(first, np.random.default_rng(seed)) for seed in range(40)]
    assert all(s.masks is first.masks and s.images[0].shape == image.shape for s in seen)
    known = {np.asarray(Image.open(jpeg(image, quality))).tobytes(): quality for quality in range(75, 101)}
    qualities = [known[each.tobytes()] for s in seen for each in s.images]
    assert len(set(qualities)) > 20 and {75, 100} <= set(qualities)


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file


def test_data_augment_of_a_meta_json_is_the_references():
    """JPEG of the image only; data.augment is our own; stored codes work with the first only."""
    geometry, rng = Geometry(32, 16, 64, 64), np.random.default_rng(0)
    marked = dataclasses.replace(sample(), meta={"augment": True})
    same = SampleEncoder(DataConfig(), geometry).change(sample(), rng)
    assert same.images[0] is not None and (same.images[0] == sample().images[0]).all()
    changed = SampleEncoder(DataConfig(codes=True), geometry).change(marked, rng)
    assert (changed.masks[0] == marked.masks[0]).all() and changed.images[0].shape == marked.images[0].shape
    assert 0 < np.abs(changed.images[0].astype(int) - marked.images[0]).max() < 60
    assert SampleEncoder(DataConfig(augment=True), geometry).change(sample(), rng).images[0].shape != (60, 90, 3)
    with pytest.raises(SampleError, match="data.augment or data.codes"):
        SampleEncoder(DataConfig(augment=True, codes=True), geometry).change(sample(), rng)


@pytest.mark.parametrize("prompt", ["box", "point", "box-drawn", "mask"])
def test_an_interactive_prompt_is_made_of_the_changed_sample(prompt):
    source = InteractiveSource([sample("Please segment car in this image.")], prompt)
    sizes = set()
    for seed in range(30):
        out = mixture.draw(source, 0, np.random.default_rng(seed), Augment(jitter=0))
        mask, (height, width) = out.masks[0] >= 128, out.masks[0].shape
        sizes.add((height, width))
        numbers = [int(n) for n in re.findall(r"\d+", out.conversations[0]["value"])]
        if prompt == "box":
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            want = (xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height)
            np.testing.assert_allclose(numbers, np.multiply(want, 1000), atol=0.51)
        elif prompt == "point":
            assert mask[int(numbers[1] / 1000 * height), int(numbers[0] / 1000 * width)]
        else:
            assert ((out.images[0] == (255, 0, 0)).all(-1)).any()
    assert len(sizes) > 20


def test_a_crop_that_loses_the_object_is_not_taken():
    far = Augment(scale=(0.01, 0.02), jitter=0)
    source = InteractiveSource([sample()], "point")
    shapes = [mixture.draw(source, 0, np.random.default_rng(seed), far).masks[0].shape for seed in range(30)]
    assert (60, 90) in shapes and len(set(shapes)) > 2


def test_tiny_pictures():
    dot = Sample(conversations=[], images=(np.zeros((1, 1, 3), np.uint8),), masks=(np.zeros((1, 1), np.uint8),))
    assert Augment()(dot, np.random.default_rng(0)).images[0].shape == (1, 1, 3)


def test_recolour_spares_texts_about_colours():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def painted(text, seed=1):
        sample = Sample([{"from": "human", "value": text}], images=(image,))
        return recolour(sample, np.random.default_rng(seed)).images[0]

    for text in ("Segment the Red circle.", "分割红色的圆形", "the violet one", "Which colour is it?"):
        assert (painted(text) == image).all()
    answer = Sample(
        [{"from": "user", "value": "Describe it."}, {"from": "gpt", "value": "It is blue."}], images=(image,)
    )
    assert recolour(answer, np.random.default_rng(1)).images[0] is image
    red = [
        np.corrcoef(
            image[..., 0].ravel() - image.mean(-1).ravel(),
            (x := painted("Segment all circles.", seed))[..., 0].ravel() - x.mean(-1).ravel(),
        )[0, 1]
        for seed in range(20)
    ]
    assert painted("Segment all circles.").dtype == np.uint8
    assert min(red) < -0.9 and max(red) > 0.9  # some keep their colours, some get the complements


def test_recolour_leaves_greys_alone():
    grey = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2)
    out = recolour(Sample([], images=(grey,)), np.random.default_rng(0)).images[0]
    np.testing.assert_allclose(out, grey, atol=1)
