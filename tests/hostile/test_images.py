"""Untrusted image files: any bytes give an array of the right form or one error line, and no other output."""

import io
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tests.hostile  # noqa: F401  (its profile of hypothesis)
from argenseg_jax.data.reader import Reader, Reading
from argenseg_jax.errors import SampleError
from tests.data.test_images import EPS, PALETTE, deep_png, deep_tiff, palette, png_header, progressive

RNG = np.random.default_rng(0)
COLOUR = np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 5, 3), np.uint8)).resize((31, 24)))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as in commands; pytest has filters of its own
READER = Reader(Reading(max_pixels=10**6))
UPRIGHT = Image.Exif()
UPRIGHT[0x112] = 6


def saved(form, image=None, **options):
    file = io.BytesIO()
    (Image.fromarray(COLOUR) if image is None else image).save(file, form, **options)
    return file.getvalue()


GREY = Image.fromarray(COLOUR[..., 0])
DEEP = Image.fromarray(COLOUR[..., 0].astype(np.uint16) * 257)
INDEXED = palette(COLOUR[..., 0] % 16, PALETTE.ravel().tolist())
FRAMES = {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]}
FILES = {
    "png": saved("PNG"),
    "png, palette": saved("PNG", INDEXED),
    "png, 1 bit": saved("PNG", GREY.convert("1")),
    "png, 16 bits": saved("PNG", DEEP),
    "png, deep colour": deep_png(COLOUR.astype(np.uint16) * 257),
    "png, alpha": saved("PNG", GREY.convert("LA")),
    "png, frames": saved("PNG", **FRAMES),
    "jpeg": saved("JPEG", exif=UPRIGHT),
    "jpeg, progressive": progressive(2),
    "jpeg, cmyk": saved("JPEG", Image.fromarray(COLOUR).convert("CMYK")),
    "webp": saved("WEBP", exif=UPRIGHT),
    "webp, lossless": saved("WEBP", lossless=True),
    "webp, frames": saved("WEBP", **FRAMES),
    "bmp": saved("BMP"),
    "bmp, palette": saved("BMP", INDEXED),
    "gif": saved("GIF", INDEXED),
    "gif, frames": saved("GIF", **FRAMES),
    "tiff": saved("TIFF"),
    "tiff, lzw": saved("TIFF", compression="tiff_lzw"),
    "tiff, jpeg": saved("TIFF", compression="jpeg"),
    "tiff, deflate": saved("TIFF", DEEP, compression="tiff_deflate"),
    "tiff, deep colour": deep_tiff(COLOUR.astype(np.uint16)),
    "tiff, float": saved("TIFF", Image.fromarray(COLOUR[..., 0] / np.float32(255))),
    "tiff, fax": saved("TIFF", GREY.convert("1"), compression="group4"),
}


def read(content):
    """Reads the bytes as image, mask and ids: each an array, or one line."""
    path.write_bytes(content)
    for kind, most in ((READER.image, 3), (READER.mask, 3), (READER.ids, 3)):
        try:
            array = kind(path)
        except SampleError as fault:
            text = str(fault)
            assert str(path) in text and "\n" not in text and " at 0x" not in text and len(text) < 500
            continue
        assert array.size and array.shape[:2] != (0, 0) and (array.ndim == 2 or array.shape[2] == most)
        assert array.dtype == np.uint8 or (kind == READER.ids and array.dtype in (np.uint16, np.int32))
        assert kind != READER.image or array.ndim == 3


@pytest.fixture(autouse=True, scope="module")
def _path(tmp_path_factory):
    global path
    path = tmp_path_factory.mktemp("images") / "x"


def test_the_whole_files_are_read():
    for name, content in FILES.items():
        path.write_bytes(content)
        image = READER.image(path)
        assert image.shape == {"jpeg": (31, 24, 3), "webp": (31, 24, 3), "jpeg, progressive": (6, 9, 3)}.get(
            name, (24, 31, 3)
        ), name


@given(st.sampled_from(sorted(FILES)), st.integers(0, 2**32 - 1))
def test_mutated_files(name, seed):
    rng, content = random.Random(seed), bytearray(FILES[name])
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(min(len(content), rng.choice((64, 200, len(content)))))
        content[at : at + rng.choice((1, 1, 2, 4))] = rng.choice(
            (rng.randbytes(1), bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", struct.pack("<I", rng.randrange(2**16)))
        )
    read(bytes(content[: rng.choice((len(content), rng.randrange(len(content))))]))


@given(st.sampled_from(sorted(FILES)), st.sampled_from(sorted(FILES)), st.integers(0, 400))
def test_the_beginning_of_one_file_and_the_end_of_another(first, second, at):
    read(FILES[first][:at] + FILES[second][at:])


@given(st.binary(max_size=200))
def test_noise_behind_every_magic(noise):
    for magic in (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\x40\0\0\0WEBPVP8 ",
        b"BM",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"P6 ",
        b"qoif",
        b"DDS ",
        b"\0\0\0\x20ftypavif",
        b"",
    ):
        read(magic + noise)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_headers_that_lie_about_the_size(width, height):
    """None of it is allocated: a million pixels are the limit here."""
    read(png_header(width, height))
    bmp, gif = bytearray(FILES["bmp"]), bytearray(FILES["gif"])
    bmp[18:26], gif[6:10] = struct.pack("<II", width, height), struct.pack("<HH", width % 65536, height % 65536)
    read(bytes(bmp)), read(bytes(gif))
    tiff = bytearray(FILES["tiff, deep colour"])
    tiff[18:22], tiff[30:34] = struct.pack("<I", width), struct.pack("<I", height)
    read(bytes(tiff))
    jpeg = bytearray(FILES["jpeg, cmyk"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", height % 65536, width % 65536)
    read(bytes(jpeg))


def test_faults_of_the_attack(capfd):
    """F2, F13, F18: formats that nobody asked for; scans; cut and empty files. The libraries say nothing."""
    for content in (
        EPS,
        b"",
        b"\x89PNG\r\n\x1a\n",
        FILES["jpeg"][:200],
        progressive(500),
        FILES["tiff, jpeg"][:-90],
        FILES["tiff, lzw"].replace(b"\x80", b"\xff"),
        png_header(50_000, 50_000),
    ):
        read(content)
        with pytest.raises(SampleError):
            READER.image(path)
    assert capfd.readouterr() == ("", "")
