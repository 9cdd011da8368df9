"""Augmentation: image and mask move together, left and right keep their meaning."""
import numpy as np
import pytest

from argenseg_jax.data.augment import Augment, recolour
from argenseg_jax.data.sample import Sample


def sample(text="Segment the car.", images=1):
    """A bright patch in the upper left, and its mask."""
    mask = np.zeros((60, 90), np.uint8)
    mask[10:40, 5:40] = 255
    image = np.repeat(mask[..., None], 3, -1) // 255 * 160 + 40
    return Sample(conversations=[{"from": "human", "value": text}], images=(image,) * images,
                  masks=(mask,))


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


def test_tiny_pictures():
    dot = Sample(conversations=[], images=(np.zeros((1, 1, 3), np.uint8),),
                 masks=(np.zeros((1, 1), np.uint8),))
    assert Augment()(dot, np.random.default_rng(0)).images[0].shape == (1, 1, 3)


def test_recolour_spares_texts_about_colours():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def painted(text, seed=1):
        sample = Sample([{"from": "human", "value": text}], images=(image,))
        return recolour(sample, np.random.default_rng(seed)).images[0]

    assert (painted("Segment the Red circle.") == image).all()
    red = [np.corrcoef(image[..., 0].ravel() - image.mean(-1).ravel(),
                       (x := painted("Segment all circles.", seed))[..., 0].ravel() - x.mean(-1).ravel()
                       )[0, 1] for seed in range(20)]
    assert painted("Segment all circles.").dtype == np.uint8
    assert min(red) < -0.9 and max(red) > 0.9  # some keep their colours, some get the complements


def test_recolour_leaves_greys_alone():
    grey = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, axis=2)
    out = recolour(Sample([], images=(grey,)), np.random.default_rng(0)).images[0]
    np.testing.assert_allclose(out, grey, atol=1)
