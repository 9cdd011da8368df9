"""Rooms agree: what training feeds the model of a sample is what evaluation, its commands and previews feed it."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import pipeline, transforms
from argenseg_jax.data.mixture import open_source
from argenseg_jax.data.reader import Reading
from argenseg_jax.decode.engine import Engine
from argenseg_jax.decode.predictor import Predictor
from argenseg_jax.errors import UserError
from argenseg_jax.eval.evaluator import Evaluator
from argenseg_jax.train import run
from tests import tiny
from tests.cli.command import call

SIZES = {"max_tokens": 512, "system": ""}
# Every key that changes what the model sees of a sample, with a value that does.
SEEN = {
    "system": "Be brief.",
    "image_last": True,
    "pad_to_square": True,
    "max_tiles": 5,
    "sample_tiles": 3,
    "window": (0, 30000),
    "max_pixels": 1,
}
# Keys that say where samples come from, how they are drawn and packed, and what is learned of them.
NOT_SEEN = {
    "sources",
    "root",
    "workers",
    "threads",
    "pack",
    "max_tokens",
    "max_labels",
    "max_masks",
    "augment",
    "recolour",
    "prompt_drop",
    "codes",
    "max_broken",
    "allow_outside",
}
CONFIGS = (
    {},
    {"system": None},
    {"system": SEEN["system"], "image_last": True},
    {"pad_to_square": True},
    {"max_tiles": 5},
    {"max_tiles": 8, "sample_tiles": 3},
    {"max_tiles": 8, "sample_tiles": 1},
    {"max_tiles": 5, "pad_to_square": True},
    {"window": SEEN["window"]},
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.workdir(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def data(tmp_path):
    """val.jsonl with one line, and meta.json that allows its image two tiles: 16 bits, 90 x 40."""
    values = np.random.default_rng(0).integers(0, 30000, (40, 90), np.uint16)
    Image.fromarray(values).save(tmp_path / "image.png")
    Image.fromarray((values > 9000).astype(np.uint8)).save(tmp_path / "mask.png")
    turns = [{"from": "human", "value": "<image>\nSegment the red circle."}, {"from": "gpt", "value": "It is <mask>."}]
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "image.png", "mask": "mask.png", "conversations": turns}))
    (tmp_path / "meta.json").write_text(
        json.dumps(
            {
                "set": {
                    "root": str(tmp_path),
                    "annotation": str(tmp_path / "val.jsonl"),
                    "repeat_time": 1,
                    "length": 1,
                    "max_dynamic_patch": 2,
                }
            }
        )
    )
    return tmp_path


@pytest.fixture
def fed(monkeypatch):
    """The request to the engine: (prompt, tiles) of its first sequence, instead of an answer."""
    seen = []

    def generate(self, tokens, lengths, tiles, **options):
        seen.append((tokens[0, : lengths[0]], None if tiles is None else tiles[0]))
        raise UserError("stopped")

    monkeypatch.setattr(Engine, "generate", generate)
    return seen


def trained(name, config):
    """(prompt, tiles) of the one sample of a data set, from a batch of training."""
    model, _ = tiny.made()
    with contextlib.closing(
        pipeline.train_iterator(
            {**SIZES, **config, "sources": (str(name),)}, tiny.tokenizer(), run.geometry(model), seed=0, batch_size=1
        )
    ) as batches:
        batch = next(batches)
    tokens, tiles = batch["tokens"][0], batch["tiles"][0]
    tokenizer = tiny.tokenizer()
    start = tokenizer.encode([tokenizer.im_start, "assistant\n"])
    end = next(k for k in range(len(tokens)) if tokens[k : k + len(start)].tolist() == start) + len(start)
    count = (tokens == tokenizer.vocab.img_context).sum() // model.image_tokens
    assert not tiles[count:].any()
    return tokens[:end], tiles[:count]


def same(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize(
    "name, config",
    [*(("val.jsonl", c) for c in CONFIGS), ("meta.json", CONFIGS[4]), ("meta.json", CONFIGS[5])],
    ids=str,
)
def test_evaluate_feeds_what_training_fed(data, fed, workdir, tmp_path, capfd, name, config):
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**saved, "data": {**SIZES, **config}}))
    code, _, err = call(
        capfd, "evaluate", "--workdir", workdir, "--data", data / name, "--out", tmp_path / "out", "--previews", 0
    )
    assert code == 2 and err[-1] == "error: stopped", err
    same(fed[0], trained(data / name, config))


def test_previews_of_a_run_and_the_python_api_feed_the_same(data, fed):
    config = {**SIZES, "max_tiles": 8, "sample_tiles": 3, "image_last": True, "window": SEEN["window"]}
    model, weights = tiny.made()
    component = run.open_data({"data": {**config, "sources": (str(data / "meta.json"),)}})[0]
    draw = run.sampler({"data": config, "train": {"lora": {}}}, model, tiny.tokenizer(), component)
    with pytest.raises(UserError, match="stopped"):
        draw(weights)
    predictor = Predictor(model, weights, tiny.tokenizer(), {"data": config})
    with pytest.raises(UserError, match="stopped"):
        predictor.segment(str(data / "image.png"), "Segment the red circle.")
    same(fed[0], trained(data / "meta.json", config))
    same(fed[1], trained(data / "val.jsonl", config))


def test_every_key_of_the_data_is_seen_or_not():
    """A new key is put into one of the lists above; what the model sees comes to the predictor too."""
    keys = {field.name for field in dataclasses.fields(pipeline.DataConfig)}
    assert set(SEEN) <= keys <= {*SEEN, *NOT_SEEN}
    model, weights = tiny.made()
    plain = vars(Predictor(model, weights, tiny.tokenizer(), {"data": dict(SIZES)}))
    for key, value in SEEN.items():
        other = vars(Predictor(model, weights, tiny.tokenizer(), {"data": {**SIZES, key: value}}))
        assert any(plain[k] != other[k] for k in ("system", "image_last", "tiling", "reading")), key


@pytest.mark.parametrize("low, high", [(0, 1), (0, 127), (0, 255), (3, 9), (0, 65535)])
def test_evaluation_marks_the_pixels_that_training_learns(data, low, high):
    """Whatever two values a mask is written with."""
    inside = np.random.default_rng(1).random((40, 90)) < 0.3
    Image.fromarray(np.where(inside, high, low).astype(np.uint8 if high < 256 else np.uint16)).save(data / "mask.png")
    sample = open_source(str(data / "val.jsonl"), reading=Reading())[0]
    record = (
        Evaluator(lambda requests: [type("R", (), dict(masks=[inside], text="", scores=[1.0], scales=[]))])
        .run([sample])
        .records[0]
    )
    assert record.iou == 1.0
    np.testing.assert_array_equal(transforms.targets(sample)[0], inside * 255)


@pytest.mark.parametrize("pad", [False, True])
def test_a_picture_is_compared_with_what_training_learns(pad):
    """A wide image to be generated: a model that draws exactly the target of training is right."""
    sample = dataclasses.replace(
        tiny.sample(), images=(), masks=(tiny.picture(3, 20, 60),), meta={"metric": "fidelity"}
    )
    (target,) = tiny.encoder(tiny.made()[0], pad_to_square=pad)._masks(sample)
    answer = type("R", (), dict(masks=[], text="", scores=[], scales=[], images=[target]))
    got = Evaluator(lambda requests: [answer], pad=pad).run([sample]).scores
    assert got["PSNR"] == 100 and got["SSIM"] == pytest.approx(1)
