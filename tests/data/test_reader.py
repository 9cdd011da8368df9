"""One window of levels for a data set: found once, saved with the run, the same in every room."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import mixture, prepare, reader, transforms
from argenseg_jax.data.pipeline import DataConfig, Geometry, SampleEncoder
from argenseg_jax.data.reader import Reading, Values, array_levels, find_window, read_image, to_bytes
from argenseg_jax.decode.predictor import Predictor, pixels
from argenseg_jax.errors import SampleError, UserError
from argenseg_jax.eval import evaluator
from argenseg_jax.train import run
from tests import tiny
from tests.cli import tiny_config
from tests.cli.command import call, refused

RNG = np.random.default_rng(0)


def levels(top, dtype=np.uint16, low=0):
    """[8, 8] from low to top."""
    return np.linspace(low, top, 64).reshape(8, 8).astype(dtype)


def own(folder, *arrays):
    """An own: folder with an image of each array."""
    for kind in ("images", "masks/roof"):
        (folder / kind).mkdir(parents=True)
    for k, array in enumerate(arrays):
        Image.fromarray(array).save(folder / "images" / f"{k}.tif")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / "masks" / "roof" / f"{k}.png")
    return f"own:{folder}"


def all_images(name, **reading):
    source = mixture.open_source(name, reading=Reading(**reading))
    return [source[k].images[0] for k in range(len(source))]


def scaled(array, low, high):
    grey = np.rint(np.clip((array.astype(float) - low) / (high - low), 0, 1) * 255)
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    "arrays, window",
    [
        ([levels(65535), levels(4000)], (0, 65535)),
        ([levels(4095), levels(300)], (0, 4095)),  # 12 bits; a dark image stays dark
        ([levels(200), levels(255)], (0, 255)),  # 8 bits in a container of 16
        ([levels(4096)], (0, 65535)),
        ([levels(60000, np.int32), levels(99, np.int32)], (0, 65535)),
        ([levels(1, np.float32), levels(0.5, np.float32)], (0, 1)),
    ],
    ids=["16", "12", "8", "above 12", "integers", "floats"],
)
def test_the_window_is_that_of_all_images(tmp_path, capsys, arrays, window):
    name = own(tmp_path / "x", *arrays)
    for got, array in zip(all_images(name), arrays, strict=True):
        np.testing.assert_array_equal(got, scaled(array, *window))
    messages = capsys.readouterr().err.strip().splitlines()
    assert len(messages) == 1 and f"{window[0]}..{window[1]} becomes 0..255" in messages[0]


@pytest.mark.parametrize("dtype, low, top", [(np.float32, -3, 900), (np.int32, -1000, 2000), (np.int32, 0, 10**6)])
def test_other_values_by_percentiles(tmp_path, dtype, low, top):
    arrays = [levels(top, dtype, low), levels(top / 2, dtype, low)]
    values = np.concatenate([a.ravel() for a in arrays])
    for got, array in zip(all_images(own(tmp_path / "x", *arrays)), arrays, strict=True):
        np.testing.assert_allclose(got, scaled(array, *np.percentile(values, (1, 99))), atol=3)


def test_a_window_of_the_config_overrides_for_deep_images_alone(tmp_path, capsys):
    deep, plain = levels(4095), levels(255, np.uint8)
    first, second = all_images(own(tmp_path / "x", deep, plain), window=(1000, 2000))
    np.testing.assert_array_equal(first, scaled(deep, 1000, 2000))
    np.testing.assert_array_equal(second, scaled(plain, 0, 255))
    assert capsys.readouterr().err == ""


def test_the_window_does_not_depend_on_who_asks_first(tmp_path, monkeypatch):
    """64 images are looked at, evenly spread; one that is beyond them is named and clipped."""
    monkeypatch.setattr(reader, "MEASURED", 3)
    arrays = [levels(4000), levels(60000), levels(100), levels(3000), levels(200)]  # seen: 0, 2, 4
    name = own(tmp_path / "x", *arrays)
    for order in ((0, 1, 2, 3, 4), (1, 0, 4, 3, 2)):
        source = pickle.loads(pickle.dumps(mixture.open_source(name)))  # as a worker process gets it
        for k in order:
            np.testing.assert_array_equal(source[k].images[0], scaled(arrays[k], 0, 4095))


def test_values_beyond_the_window_and_dark_data_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reader, "MEASURED", 2)
    all_images(own(tmp_path / "x", levels(4000), levels(60000), levels(100)))
    assert "1.tif: has values up to 60000; those seen before end at 4095" in capsys.readouterr().err
    all_images(own(tmp_path / "y", levels(5000)))
    assert "all are below 5000, so that they are dark: set data.window=(0, 5000)" in capsys.readouterr().err


def test_floats_that_are_no_numbers():
    values = np.array([[np.nan, 0, 0.5], [np.inf, -np.inf, 1]], np.float32)
    assert to_bytes(values, find_window([Values.from_array(values)]))[..., 0].tolist() == [[0, 0, 128], [255, 0, 255]]
    assert find_window([Values.from_array(np.full((2, 2), np.nan, np.float32))]) == (0, 1)
    assert find_window([Values.from_array(np.full((2, 2), 7.0, np.float32))]) == (7, 8)
    huge = np.array([[-3e38, 3e38]], np.float32)
    assert to_bytes(huge, (-1.0, 1.0))[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize(
    "array, want",
    [
        (levels(255, np.uint8), scaled(levels(255), 0, 255)),
        (levels(255, np.uint8)[..., None], scaled(levels(255), 0, 255)),
        (np.eye(4, dtype=bool), scaled(np.eye(4), 0, 1)),
        (levels(65535), scaled(levels(65535), 0, 65535)),
        (levels(4095), scaled(levels(4095), 0, 4095)),
        (levels(1, np.float32), scaled(levels(1, float), 0, 1)),
        (levels(1, np.float64), scaled(levels(1, float), 0, 1)),
        (levels(4095, np.int64), scaled(levels(4095), 0, 4095)),
        (levels(4095, np.uint32), scaled(levels(4095), 0, 4095)),
        (np.dstack([levels(255, np.uint8)] * 3 + [levels(9, np.uint8)]), scaled(levels(255), 0, 255)),
        (np.dstack([levels(255, np.uint8), levels(9, np.uint8)]), scaled(levels(255), 0, 255)),
        (np.dstack([levels(65535)] * 3), scaled(levels(65535), 0, 65535)),
    ],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_arrays_are_read_as_files_are(array, want):
    np.testing.assert_array_equal(pixels(array), want)


def test_a_constant_image_of_any_value_is_black():
    for value in (2**62, -(2**62), -5.0):  # steps of floats are far more than 1 there
        assert not pixels(np.full((2, 3), value)).any()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros(5, np.uint8),
        "x" * 0,
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((2, 2), complex),
        [["a"]],
        [[1], [2, 3]],
        object(),
    ],
)
def test_what_is_no_image(array):
    with pytest.raises(UserError):
        pixels(array)
    if isinstance(array, np.ndarray):
        with pytest.raises(UserError, match=r"an image is u8\[H, W, 3\]"):
            array_levels(array)


# ---------------------------------------------------------------------------------- agreement


def test_training_saves_its_window_and_every_use_reads_by_it(tmp_path, monkeypatch):
    """The run's own window counts in `prepare`, `evaluate` and for a single image, which alone has another."""
    name, array = own(tmp_path / "x", levels(60000), levels(3000)), levels(3000)
    Image.fromarray(array).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_image(tmp_path / "one.png"), scaled(array, 0, 4095))
    cfg = tiny_config.get_config().to_dict()
    cfg["data"]["sources"] = (name,)
    saved = {}
    monkeypatch.setattr(run, "phases", lambda *args: [])
    monkeypatch.setattr(run.loop, "run", lambda cfg, *args, **kw: saved.update(cfg))
    run.train(cfg, "unused")
    window = saved["data"]["window"]
    assert window == (0, 65535)
    predictor = Predictor(*tiny.made(), tiny.tokenizer(), {"data": {"system": "", "window": list(window)}})
    for image in (tmp_path / "one.png", str(tmp_path / "one.png"), Image.open(tmp_path / "one.png"), array):
        np.testing.assert_array_equal(pixels(image, predictor.reading), scaled(array, 0, 65535))


def test_prepared_images_are_those_that_training_reads(tmp_path, monkeypatch):
    """One window for all shards, told to a training on the result; soft masks stay soft."""
    soft = np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)
    arrays = [levels(60000), levels(3000), levels(65535)]
    name = own(tmp_path / "x", *arrays)
    Image.fromarray(soft).save(tmp_path / "x" / "masks" / "roof" / "1.png")
    prepare.prepare(prepare.Job((name,), str(tmp_path / "p"), shard_samples=1))
    direct, stored = mixture.open_source(name), mixture.open_source(f"prepared:{tmp_path / 'p'}")
    for k in range(3):
        np.testing.assert_array_equal(stored[k].images[0], direct[k].images[0])
        np.testing.assert_array_equal(stored[k].masks[0], direct[k].masks[0])
    np.testing.assert_array_equal(stored[1].masks[0], soft)
    assert mixture.window(mixture.open_mixture((f"prepared:{tmp_path / 'p'}",))) == (0, 65535)
    assert mixture.window(mixture.open_mixture((name, f"interactive:box:{name}"))) == (0, 65535)
    assert mixture.window(mixture.open_mixture((name, own(tmp_path / "y", levels(4000))))) == ()
    assert mixture.window(mixture.open_mixture(("shapes:simple:train:5",))) == ()
    small = prepare.resize_sample(direct[1], 4).masks[0]
    assert len(np.unique(small)) > 2 and set(np.unique(prepare.resize_sample(direct[0], 4).masks[0])) <= {0, 255}


def test_flags_of_the_commands(tmp_path, capfd):
    name = own(tmp_path / "x", levels(4000))
    for flags, window in (
        ((), (0, 4095)),
        (["--window=0,65535"], (0, 65535)),
        (["--window=(1000,2000)"], (1000, 2000)),
    ):
        out = tmp_path / f"p{window[1]}"
        assert call(capfd, "prepare", "--source", name, "--out", out, *flags)[0] == 0
        got = mixture.open_source(str(out))[0].images[0]
        np.testing.assert_array_equal(got, scaled(levels(4000), *window))
    for bad in ("--window=5", "--window=9,3", "--window=a,b", "--window=0,nan", "--max_pixels=-1"):
        message = refused(capfd, "prepare", "--source", name, "--out", tmp_path / "q", bad)
        assert bad.partition("=")[0].strip("-") in message
    message = refused(capfd, "prepare", "--source", name, "--out", tmp_path / "q", "--max_pixels=63")
    assert "8x8 pixels; at most 63 are read" in message


def test_turned_images_are_said_once(tmp_path, capsys):
    """Of a mask at 180 degrees, or of a square, no size tells that it was drawn on the stored image."""
    exif = Image.Exif()
    exif[0x112] = 3
    name = own(tmp_path / "x", levels(255, np.uint8), levels(255, np.uint8))
    for k in range(2):
        Image.fromarray(levels(255, np.uint8)).save(tmp_path / "x" / "images" / f"{k}.tif", exif=exif)
    np.testing.assert_array_equal(all_images(name)[1], scaled(levels(255, np.uint8)[::-1, ::-1], 0, 255))
    assert capsys.readouterr().err.splitlines() == [
        "0.tif has EXIF orientation 3 and was rotated by 180 degrees, as every such image of this data set: its masks "
        "belong to the upright image"
    ]


def test_sizes_that_disagree_name_the_orientation(tmp_path):
    """The rule: everything is rotated upright by its own file; a mask of the stored pixels does not fit."""
    exif = Image.Exif()
    exif[0x112] = 6
    image = np.zeros((6, 9, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "i.jpg", exif=exif)
    for name, shape in (("stored", (6, 9)), ("upright", (9, 6))):
        Image.fromarray(np.eye(*shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "It."}, {"from": "gpt", "value": "<mask>"}]
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"image": "i.jpg", "mask": f"{name}.png", "conversations": turns}) + "\n"
        )
    assert mixture.open_source(str(tmp_path / "upright.jsonl"))[0].masks[0].shape == (9, 6)
    with pytest.raises(SampleError, match="mask stored.png is 9x6, its image 6x9 pixels .i.jpg has EXIF orientation 6"):
        mixture.open_source(str(tmp_path / "stored.jsonl"))[0]


# ---------------------------------------------------------------------------------- what is generated


def test_images_to_be_generated_pass_unchanged(tmp_path):
    """Dark ones were stretched to white; a mask with the same values still is. In every form, prepared too."""
    dark = np.where(np.eye(8) > 0, 90, 30).astype(np.uint8)
    (tmp_path / "t" / "cat").mkdir(parents=True)
    for name in ("d.png", "t/cat/0.png"):
        Image.fromarray(dark).save(tmp_path / name)
    turns = [{"from": "human", "value": "A cat."}, {"from": "gpt", "value": "<mask>"}]
    lines = [
        {"mask": "d.png"},
        {"image": "d.png", "mask": "d.png", "metric": "fidelity"},
        {"image": "d.png", "mask": "d.png"},
    ]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps({**line, "conversations": turns}) + "\n" for line in lines))
    prepare.prepare(prepare.Job((str(tmp_path / "j.jsonl"),), str(tmp_path / "p")))
    encoder = SampleEncoder(DataConfig(max_masks=1, codes=False), Geometry(8, 4, 8, 4))
    for name in (str(tmp_path / "j.jsonl"), str(tmp_path / "p")):
        drawn, edited, masked = (mixture.open_source(name)[k] for k in range(3))
        for sample, want in ((drawn, dark), (edited, dark), (masked, np.eye(8) * 255)):
            np.testing.assert_array_equal(encoder.mask_example(sample, RNG)["masks"], scaled(want, 0, 255))
        assert len(np.unique(prepare.resize_sample(drawn, 16).masks[0])) > 3  # no mask: not cut at 128
    target = mixture.open_source(f"t2i:{tmp_path / 't'}")[0]
    np.testing.assert_array_equal(encoder.mask_example(target, RNG)["masks"], scaled(dark, 0, 255))
    answer = transforms.resize(scaled(dark, 0, 255), (16, 16))
    assert evaluator._likeness([answer], target, False)["ssim"] == pytest.approx(1)
