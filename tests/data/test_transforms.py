"""Transforms: pixels equal to the official recordings; strangers' files are refused in one line."""

import io
import json
import pathlib
import zlib

import numpy as np
import pytest
from PIL import Image

from argenseg_jax import pixels
from argenseg_jax.data import transforms
from argenseg_jax.errors import SampleError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "G_preprocess"
CONFIG = json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "io.npz") as arrays:
        return dict(arrays)


def normalize(tile):
    x = (tile.astype(np.float32) / 255 - pixels.IMAGENET_MEAN) / pixels.IMAGENET_STD
    return x.transpose(2, 0, 1)


@pytest.mark.parametrize("size, first", [((90, 30), 1), ((90, 60), 0), ((30, 90), 0), ((30, 29), 1), ((30, 30), 0)])
def test_the_order_of_axes_is_no_matter_of_pillows_version(size, first):
    """Each alone is the same everywhere. Of an image 40 wide and 50 high."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    want = Image.fromarray(noise)
    for axis in (first, 1 - first):
        want = want.resize((size[0], want.height) if axis == 0 else (want.width, size[1]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(transforms.resize(noise, size), np.asarray(want))


@pytest.mark.parametrize("most", [6, 12])
def test_grids_come_in_the_official_order(most):
    assert [list(g) for g in transforms.target_ratios(most)] == CONFIG[f"target_ratios_max{most}"]


@pytest.mark.parametrize("case", CONFIG["tiling_cols_rows"], ids=lambda c: str(c["size"]))
def test_tile_grid(case):
    for most in (6, 12):
        cols, rows = transforms.tile_grid(tuple(case["size"]), 448, most)
        assert [cols, rows] == case[f"max{most}"]
        assert cols * rows == case[f"ntiles_max{most}_thumb0"]
        assert cols * rows + (cols * rows > 1) == case[f"ntiles_max{most}_thumb1"]


def test_tile_pixels(recorded):
    tiles = transforms.image_tiles(recorded["tile/input_u8"], 56, 6)
    np.testing.assert_array_equal(tiles, recorded["tile/tiles_u8"])
    assert len(transforms.image_tiles(recorded["tile/input_u8"], 56, 6, thumbnail=False)) == 6


def test_single_tile_pixels(recorded):
    def tile(name, side, **kw):
        return normalize(transforms.image_tiles(recorded[name], side, **kw)[0])

    large = tile("tf/input_u8", 448)
    np.testing.assert_allclose(large[:, ::4, ::4], recorded["tf/out448_s4"], atol=1e-6)
    moments = [large.mean(), large.std()]
    np.testing.assert_allclose(moments, recorded["tf/out448_mean_std"], rtol=1e-6)
    np.testing.assert_allclose(tile("tf/input_u8", 112), recorded["tf/out112"], atol=1e-6)
    np.testing.assert_allclose(tile("tf/input2_u8", 56), recorded["tf/out2_56"], atol=1e-6)
    np.testing.assert_allclose(tile("tf/input_u8", 112, pad=True), recorded["tf/out112_pad2square"], atol=1e-6)


@pytest.mark.parametrize(
    "case", CONFIG["smart_resize_with_padding"], ids=lambda c: f"{c['size'][0]}x{c['size'][1]}to{c['target']}"
)
def test_pad_box(case):
    x, y, w, h = transforms.pad_box(tuple(case["size"]), case["target"])
    assert ([w, h], [x, y]) == (case["new_wh"], case["pad_xy"])
    mask = np.full(case["size"][::-1], 255, np.uint8)
    rows, cols = transforms.resize_mask(mask, case["target"], pad=True)[..., 0].nonzero()
    assert [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1] == case["nonzero_bbox_xyxy"]


def test_mask_pixels(recorded):
    for mask in (recorded["mask/input01_u8"], recorded["mask/input01_u8"] * 255):
        plain = transforms.resize_mask(mask, 256)
        assert plain.shape == (256, 256, 3)
        for channel in range(3):
            np.testing.assert_array_equal(plain[..., channel], recorded["mask/train_path_512_then_256"])
        np.testing.assert_allclose(plain[128, :, 0] / 255 * 2 - 1, recorded["mask/train_path_float_row128"], atol=1e-6)
        padded = transforms.resize_mask(mask, 256, pad=True)
        np.testing.assert_array_equal(padded[..., 0], recorded["mask/pad_proc_256"])


@pytest.mark.parametrize("size", [(150, 97), (97, 150), (320, 200)])
def test_masks_on_the_way_back(recorded, size):
    pred, name = recorded["eval/pred_u8"], f"{size[0]}x{size[1]}"
    np.testing.assert_array_equal(transforms.grey_at(pred, size), recorded[f"eval/plain_L_{name}"])
    np.testing.assert_array_equal(transforms.binarize(pred, size), recorded[f"eval/plain_bin_{name}"].astype(bool))
    np.testing.assert_array_equal(transforms.grey_at(pred, size, pad=True), recorded[f"eval/unpad_L_{name}"])


def test_mask_of_the_right_size_is_untouched():
    mask = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (64, 64))
    np.testing.assert_array_equal(transforms.resize_mask(mask, 64)[..., 1], mask)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_extreme_sizes(size):
    image = np.full((size[1], size[0], 3), 255, np.uint8)
    assert transforms.image_tiles(image, 28, 12).shape[1:] == (28, 28, 3)
    for pad in (False, True):
        small = transforms.resize_mask(image[..., 0], 64, pad=pad)
        assert small.shape == (64, 64, 3) and small.any()
        assert transforms.binarize(small, size, pad=pad).all()


def test_mask_files_of_every_kind(tmp_path):
    want = np.zeros((4, 6), np.uint8)
    want[1:3, 2:5] = 255
    grey = Image.fromarray(want)
    files = {
        "one.png": grey.convert("1"),
        "grey.png": grey,
        "rgb.png": grey.convert("RGB"),
        "rgba.png": grey.convert("RGBA"),
        "palette.png": grey.convert("P"),
        "ones.png": Image.fromarray(want // 255),
        "i16.png": Image.fromarray(want.astype(np.uint16)),
    }
    for name, picture in files.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(transforms.read_mask(tmp_path / name), want, err_msg=name)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    size = width.to_bytes(4) + height.to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"IEND", b"")


def test_bad_files_are_named(tmp_path):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    bad = {
        "bomb.png": png_header(60000, 60000),
        "empty.png": b"",
        "text.jpg": b"hello",
        "cut.png": whole.getvalue()[:5000],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SampleError, match=name.replace(".", r"\.")) as caught:
            transforms.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(SampleError, match="cannot be read"):
            transforms.read_image(path)


def test_the_order_of_grids_is_that_of_the_official_loop():
    for most in (*range(1, 41), 100):
        grids = {
            (i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= most
        }
        assert transforms.target_ratios(most) == tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
    assert len(transforms.target_ratios(1024)) == 7262  # of data.max_tiles' limit, without minutes of work
