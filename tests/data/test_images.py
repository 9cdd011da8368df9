"""The gate for image files: the right pixels of every mode, limits before decoding, one line for the rest."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from argenseg_jax.data import images
from argenseg_jax.data.reader import MIN_LIMIT, Reader, Reading, read_ids, read_image, read_mask
from argenseg_jax.errors import SampleError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = np.where(np.arange(9) < 4, 0, 255).astype(np.uint8) * np.ones((6, 1), np.uint8)
SHAPE = np.where(ALPHA > 0, 255, 0).astype(np.uint8)  # what each mask below shows


def grey(array):
    return np.repeat(array[..., None], 3, axis=-1)


def palette(indices, colours):
    image = Image.new("P", indices.shape[::-1])
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours)
    return image


def deep_png(array):
    """A PNG of 16 bits a channel, u16[H, W, 1..4]: Pillow writes none in colour."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(array, planar=1):
    """An uncompressed little-endian TIFF of u16[H, W, 3]."""
    data = (array.transpose(2, 0, 1) if planar == 2 else array).astype("<u2").tobytes()
    (height, width, _), strips = array.shape, 3 if planar == 2 else 1
    at = 10 + 12 * 10 + 4
    lists, start = struct.pack("<3H", 16, 16, 16), at + 6 + 24 * (strips > 1)
    if strips > 1:
        size = len(data) // 3
        lists += struct.pack("<6I", *(start + k * size for k in range(3)), *[size] * 3)
    fields = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, strips, at + 6 if strips > 1 else start),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, strips, at + 18 if strips > 1 else len(data)),
        (284, 3, 1, planar),
    ]
    return (
        b"II*\0"
        + struct.pack("<IH", 8, len(fields))
        + b"".join(struct.pack("<HHII", *field) for field in fields)
        + bytes(4)
        + lists
        + data
    )


PALETTE = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
INDICES = RNG.integers(0, 16, (6, 9), dtype=np.uint8)
IMAGES = {
    "one.png": (Image.fromarray(GREY > 99), grey(np.where(GREY > 99, np.uint8(255), np.uint8(0)))),
    "grey.png": (Image.fromarray(GREY), grey(GREY)),
    "grey_alpha.png": (Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), grey(GREY)),
    "palette.png": (palette(INDICES, PALETTE.ravel().tolist()), PALETTE[INDICES]),
    "palette.gif": (palette(INDICES, PALETTE.ravel().tolist()), PALETTE[INDICES]),
    "colour.bmp": (Image.fromarray(COLOUR), COLOUR),
    "colour.tif": (Image.fromarray(COLOUR), COLOUR),
    "alpha.png": (Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR),
    "alpha.tiff": (Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR),
    "cmyk.tif": (Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
    "sixteen.png": (Image.fromarray(GREY.astype(np.uint16) * 257), grey(GREY)),
    "sixteen.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), grey(GREY)),
    "integer.tif": (Image.fromarray(GREY.astype(np.int32) * 257), grey(GREY)),
    "float.tif": (Image.fromarray(GREY.astype(np.float32) / 255), grey(GREY)),
    "byte_order.tif": (Image.frombytes("I;16B", (9, 6), (GREY.astype(">u2") * 257).tobytes()), grey(GREY)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_mode_from_file_pillow_and_bytes(tmp_path, name):
    image, want = IMAGES[name]
    image.save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), want)
    np.testing.assert_array_equal(Reader().image(image), want)
    np.testing.assert_array_equal(Reader().image(Image.open(tmp_path / name)), want)
    (tmp_path / "other.dat").write_bytes((tmp_path / name).read_bytes())  # by content, not by name
    np.testing.assert_array_equal(read_image(tmp_path / "other.dat"), want)


@pytest.mark.parametrize("make", [deep_png, deep_tiff])
def test_colours_of_16_bits_are_read_whole(tmp_path, make):
    """Pillow keeps the high bytes, of which 12-bit data has 16 levels."""
    levels = RNG.integers(0, 4096, (6, 9, 3), dtype=np.uint16)
    (tmp_path / "a").write_bytes(make(levels))
    np.testing.assert_array_equal(images.image_levels(images.open_image(tmp_path / "a")), levels)
    np.testing.assert_array_equal(read_image(tmp_path / "a"), np.rint(levels / 4095 * 255).astype(np.uint8))


def test_planes_of_16_bits_are_refused_not_scrambled(tmp_path):
    (tmp_path / "a.tif").write_bytes(deep_tiff(np.zeros((6, 9, 3), np.uint16), planar=2))
    with pytest.raises(SampleError, match=r"a\.tif: .*planes of more than 8 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("form, more", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_of_animated_files_the_first_frame_counts(tmp_path, form, more):
    frames = [Image.new("RGB", (9, 6), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:], **more)
    assert (read_image(tmp_path / "a") == (255, 0, 0)).all()


# ---------------------------------------------------------------------------------- masks

VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]
HALF = np.where(SHAPE > 0, 1, 0).astype(np.uint8)
MASKS = {
    "palette": palette(HALF, VOC),
    "palette of white": palette(HALF, [255, 255, 255, 255, 255, 255]),
    "0 and 1": Image.fromarray(HALF),
    "0 and 127": Image.fromarray(HALF * 127),
    "0 and 255": Image.fromarray(SHAPE),
    "class 3": Image.fromarray(HALF * 3),
    "100 and 200": Image.fromarray(HALF * 100 + 100),
    "one bit": Image.fromarray(SHAPE > 0),
    "16 bits": Image.fromarray(SHAPE.astype(np.uint16) * 257),
    "16 bits, 0 and 1": Image.fromarray(HALF.astype(np.uint16)),
    "integers": Image.fromarray(HALF.astype(np.int32)),
    "floats": Image.fromarray(HALF.astype(np.float32)),
    "colour": Image.fromarray(grey(SHAPE)),
    "red on black": Image.fromarray(grey(SHAPE) * np.array([1, 0, 0], np.uint8)),
    "alpha": Image.fromarray(np.dstack([grey(np.full((6, 9), 255, np.uint8)), ALPHA])),
    "alpha of black": Image.fromarray(np.dstack([np.zeros((6, 9, 3), np.uint8), ALPHA])),
    "alpha of grey": Image.merge("LA", [Image.new("L", (9, 6), 255), Image.fromarray(ALPHA)]),
    "photograph cut out": Image.fromarray(np.dstack([COLOUR, ALPHA])),
    "opaque": Image.fromarray(np.dstack([grey(SHAPE), np.full((6, 9), 255, np.uint8)])),
    "grey, opaque": Image.merge("LA", [Image.fromarray(SHAPE), Image.new("L", (9, 6), 255)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_mode(tmp_path, name):
    MASKS[name].save(tmp_path / "m", "TIFF" if MASKS[name].mode in "IF" else "PNG")
    np.testing.assert_array_equal(read_mask(tmp_path / "m"), SHAPE)


@pytest.mark.parametrize("make", [deep_png, deep_tiff])
@pytest.mark.parametrize("high", [1, 200, 4095, 65535])
def test_grey_masks_in_colours_of_16_bits(tmp_path, make, high):
    """Pillow keeps the high bytes, of which values below 256 have none."""
    values = np.where(SHAPE > 0, high, 0).astype(np.uint16)
    (tmp_path / "m").write_bytes(make(np.dstack([values] * 3)))
    np.testing.assert_array_equal(read_mask(tmp_path / "m"), SHAPE)
    np.testing.assert_array_equal(images.mask_values(images.open_image(tmp_path / "m"), ids=True), values)


def test_masks_keep_soft_edges_and_dark_ones_are_stretched():
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None]
    np.testing.assert_array_equal(images.stretch(ramp), ramp)
    np.testing.assert_array_equal(images.stretch(ramp.astype(np.uint16) * 257), ramp)
    few = np.array([[0, 1, 2, 126]], np.uint8)  # the reference's rule: all below 127
    assert images.stretch(few).tolist() == [[0, 255, 255, 255]]
    assert images.stretch(np.array([[0, 1, 127]], np.uint8)).tolist() == [[0, 1, 127]]
    for constant, want in ((0, 0), (1, 255), (200, 200), (255, 255)):
        assert (images.stretch(np.full((2, 2), constant, np.uint8)) == want).all()
    with pytest.raises(SampleError, match="mask values 0..70000"):
        images.stretch(np.array([[0, 5, 70000]], np.int32))


def test_ids_are_the_values_of_the_file(tmp_path):
    ids = np.arange(54, dtype=np.uint16).reshape(6, 9) * 300
    cases = {
        "16": (Image.fromarray(ids), ids),
        "palette": (palette(INDICES, PALETTE.ravel().tolist()), INDICES),
        "grey": (Image.fromarray(INDICES), INDICES),
        "bit": (Image.fromarray(HALF > 0), HALF),
        "panoptic": (Image.fromarray(COLOUR), COLOUR),
        "opaque": (Image.fromarray(np.dstack([COLOUR, ALPHA])), COLOUR),
    }
    for name, (image, want) in cases.items():
        image.save(tmp_path / "m", "PNG")
        np.testing.assert_array_equal(read_ids(tmp_path / "m"), want, err_msg=name)
    # 4 bits a pixel: Pillow spreads the numbers 0..15 over 0..255.
    rows = b"".join(b"\0" + bytes([a << 4 | b for a, b in zip(row[::2], [*row[1::2], 0])]) for row in INDICES.tolist())
    whole = deep_png(np.zeros((6, 9, 1), np.uint16))
    data, header = zlib.compress(rows), whole[12:24] + bytes([4, 0, 0, 0, 0])
    nibbles = (
        whole[:12]
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", len(data))
        + b"IDAT"
        + data
        + struct.pack(">I", zlib.crc32(b"IDAT" + data))
        + whole[-12:]
    )
    (tmp_path / "m").write_bytes(nibbles)
    np.testing.assert_array_equal(read_ids(tmp_path / "m"), INDICES)


@pytest.mark.parametrize(
    "values, says",
    [
        (np.array([[0, np.nan]], np.float32), "NaN"),
        (np.array([[0, np.inf]], np.float32), "infinite"),
        (np.array([[0, 2.5]], np.float32), "0..2.5"),
        (np.array([[-1, 5]], np.int32), "-1..5"),
    ],
)
def test_masks_of_senseless_values(tmp_path, values, says):
    Image.fromarray(values).save(tmp_path / "m.tif")
    with pytest.raises(SampleError, match=rf"m\.tif: .*{says}"):
        read_mask(tmp_path / "m.tif")


# ---------------------------------------------------------------------------------- EXIF


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_are_rotated_upright(tmp_path, orientation, form):
    exif = Image.Exif()
    exif[0x112] = orientation
    image, mask = Image.fromarray(COLOUR), Image.fromarray(SHAPE)
    for name, stored in (("i.png", image), ("m.png", mask)):
        stored.save(tmp_path / name, form, exif=exif, lossless=True)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "i.png")))
    np.testing.assert_array_equal(read_image(tmp_path / "i.png"), want)
    np.testing.assert_array_equal(Reader().image(Image.open(tmp_path / "i.png")), want)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png"), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "m.png")).convert("L"))
    )
    message = images.orientations(tmp_path / "i.png", tmp_path / "absent.png")
    assert (
        message == "" if orientation == 1 else message.startswith(f"i.png has EXIF orientation {orientation} and was")
    )


def test_damaged_metadata_is_no_reason_to_lose_an_image(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), COLOUR)


# ---------------------------------------------------------------------------------- limits


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    whole = deep_png(np.zeros((1, 1, 1), np.uint16))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[-12:]


def test_a_limit_of_pixels_that_can_be_raised(tmp_path, recwarn):
    for width, height in ((9000, 9000), (12000, 12000), (60000, 60000)):  # Pillow warns of the second
        (tmp_path / "a.png").write_bytes(png_header(width, height))
        with pytest.raises(SampleError, match=rf"a\.png: {width}x{height} pixels; .*raise data.max_pixels") as caught:
            read_image(tmp_path / "a.png")
        assert "\n" not in str(caught.value)
    assert not [w for w in recwarn if "bomb" in str(w.message)]
    with pytest.raises(SampleError, match="not a readable image"):  # the limit is passed, pixels are missing
        read_image(tmp_path / "a.png", Reading(max_pixels=2**32))
    Image.fromarray(COLOUR).save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", Reading(max_pixels=54)).shape == (6, 9, 3)
    for read in (read_image, read_mask, read_ids):
        with pytest.raises(SampleError, match="at most 53 are read"):
            read(tmp_path / "b.png", Reading(max_pixels=53))


def progressive(scans):
    """A small progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "a.jpg").write_bytes(progressive(3))
    assert read_image(tmp_path / "a.jpg").shape == (6, 9, 3)
    (tmp_path / "a.jpg").write_bytes(progressive(200))
    with pytest.raises(SampleError, match=r"a\.jpg: .*more than 32 scans"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(progressive(1) + b"\xff\xda" * 500)  # a video after a photograph
    assert read_image(tmp_path / "a.jpg").shape == (6, 9, 3)


def test_the_images_of_a_sample_are_bounded_before_they_are_decoded(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png"]
    limited = Reader(Reading(max_pixels=10**4, max_images=MIN_LIMIT, max_masks=MIN_LIMIT))
    assert len(limited.images(paths * 4)) == len(limited.masks(paths * 4)) == 4
    for read, what in ((limited.images, "images"), (limited.masks, "masks"), (limited.targets, "masks")):
        with pytest.raises(SampleError, match=f"^2000 {what}; at most 32"):
            read(paths * 2000)
        with pytest.raises(SampleError, match="more than 40000 pixels"):
            read(paths * 5)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_what_is_no_image_is_one_line(tmp_path, monkeypatch):
    """A file that is EPS inside starts no Ghostscript, devices and pipes are not read."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\n/bin/touch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "eps.png").write_bytes(EPS)
    (tmp_path / "ppm.png").write_bytes(b"P6 2 2 255\n" + bytes(12))
    cases = {
        "eps.png": "not a readable image",
        "ppm.png": "known formats: PNG, JPEG",
        "absent.png": "No such file",
        "fifo.png": "a device, pipe or socket",
        "": "Is a directory",
        "a\0b.png": "null byte",
    }
    for name, says in cases.items():
        for read in (read_image, read_mask, read_ids):
            with pytest.raises(SampleError, match=says):
                read(f"{tmp_path}/{name}")
    with pytest.raises(SampleError, match="/dev/zero: cannot be read"):
        read_image("/dev/zero")
    assert not (tmp_path / "started").exists()
