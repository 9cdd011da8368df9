"""The public API: pictures and texts in, masks at the picture's own size out, from any checkpoint."""

import jax
import numpy as np
import pytest
from PIL import Image

import argenseg_jax
from argenseg_jax.data import transforms
from argenseg_jax.data.pipeline import DataConfig, SampleEncoder
from argenseg_jax.data.sample import Sample
from argenseg_jax.decode.predictor import Predictor, Request, pixels
from argenseg_jax.decode.sampling import Sampling
from argenseg_jax.errors import UserError
from argenseg_jax.eval import evaluator
from argenseg_jax.train import run
from tests import tiny

WORDS = tiny.tokenizer()
GE, EOS = WORDS.vocab.ge_start, WORDS.vocab.eos
SURE, AND = WORDS.encode_text("It is")[0], WORDS.encode_text(".")[0]
SETTINGS = {"data": {"system": ""}, "decode": {"max_text_tokens": 6}}


ONCE = tiny.answers([SURE, GE], [AND, EOS])[1]


@pytest.fixture(scope="module")
def predictor():
    """A predictor whose every answer is known; see tiny.answers."""
    return Predictor(tiny.made()[0], ONCE, WORDS, SETTINGS)


@pytest.fixture
def twice(predictor):
    """The same predictor, with weights that write masks again and again."""
    predictor.engine.params = tiny.answers([SURE, GE], [AND, GE])[1]
    yield predictor
    predictor.engine.params = ONCE


def same(a, b):
    assert a.text == b.text and len(a.masks) == len(b.masks)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    for x, y in zip(a.masks, b.masks):
        assert x.shape == y.shape and np.mean(x != y) < 0.01  # a grey level may round the other way


def test_one_picture(predictor):
    image = tiny.picture(0, 50, 23)
    result = predictor.segment(image, "Segment the red circle.", previews=True)
    assert result.text == f"{WORDS.decode([SURE])}<mask>{WORDS.decode([AND])}".strip()
    assert [m.shape for m in result.masks] == [(50, 23)] and result.masks[0].dtype == bool
    assert 0 < result.scores[0] <= 1
    assert result.images[0].shape == (16, 16, 3) and result.scales[0].shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(result.masks[0], transforms.binarize(result.images[0], (23, 50)))
    other = predictor.segment(tiny.picture(1, 50, 23), "Segment the red circle.", previews=True)
    assert np.any(other.images[0] != result.images[0])


def test_a_batch_equals_its_rows(predictor):
    """Pictures of any size, questions of any length, and one without a picture."""
    requests = [
        Request(tiny.picture(0, 1, 1), "Segment the red circle."),
        Request(tiny.picture(1, 9, 200), "Segment the large blue square that is near."),
        Request(None, "What is a circle?"),
        Request(
            tiny.picture(2),
            [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A circle."},
                {"from": "human", "value": "Segment it."},
            ],
        ),
        Request(tiny.picture(3), "Segment it."),
    ]
    batch = predictor.segment_batch(requests)
    assert [r.masks[0].shape for r in batch] == [(1, 1), (9, 200), (16, 16), (40, 30), (40, 30)]
    for request, result in zip(requests, batch, strict=True):
        same(predictor.segment_batch([request])[0], result)
    assert predictor.segment_batch([]) == []


def test_several_masks(twice):
    result = twice.segment(tiny.picture(0), "Segment all.", max_masks=8)
    assert len(result.masks) == len(result.images) == len(result.scores) == 3
    assert result.text.count("<mask>") == 3
    assert len(twice.segment(tiny.picture(0), "Segment all.", max_masks=2).masks) == 2


def test_prompts_of_a_bucket_share_their_programs(predictor):
    phases = predictor.engine.phases
    programs = (phases.prefill, phases.text, phases.mask)
    predictor.segment(tiny.picture(0), "Segment it.")
    sizes = [p._cache_size() for p in programs]
    for text in ("Segment the red circle.", "What?", "Segment every blue square there is."):
        predictor.segment(tiny.picture(1, 80, 40), text)
    assert [p._cache_size() for p in programs] == sizes


def test_a_conversation_remembers_its_turns(predictor):
    """The history grows by question and answer; the second answer depends on the first turn."""
    image = tiny.picture(0)
    first, history = predictor.chat("Segment the red circle.", image)
    assert [t["from"] for t in history] == ["human", "gpt"] and history[1]["value"] == first.text
    second, longer = predictor.chat("And now?", image, history)
    assert longer[:2] == history and len(longer) == 4 and len(second.masks) == 1
    alone, _ = predictor.chat("And now?", image)
    assert np.any(second.images[0] != alone.images[0])


def test_guidance_and_sampling_change_the_picture_and_a_seed_repeats_it(predictor):
    draw = lambda seed: dict(code_sampling=Sampling(temperature=2.0, top_k=12, top_p=0.9, seed=seed))
    codes = lambda out: out.images[0].tolist()
    image, text = tiny.picture(0), "Segment the red circle."
    greedy = predictor.segment(image, text, max_masks=1)
    drawn = [predictor.segment(image, text, max_masks=1, **draw(s)) for s in (3, 3, 4)]
    assert codes(drawn[0]) == codes(drawn[1]) != codes(drawn[2]) and codes(drawn[0]) != codes(greedy)
    guided = predictor.segment(image, text, max_masks=1, guidance=4.0)
    assert codes(guided) != codes(greedy) and guided.text == greedy.text


def test_whatever_is_a_picture(predictor, tmp_path):
    image = tiny.picture(7)
    Image.fromarray(image).save(tmp_path / "a.png")
    for same_image in (image, Image.fromarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(pixels(same_image), image)
    assert pixels(None) is None
    with pytest.raises(UserError, match=r"u8\[H, W, 3\]"):
        predictor.segment(image / 255, "Segment it.")


def test_settings_of_the_run_are_used():
    """image_last and the system message change the prompt; tiles and padding the picture."""
    model, params = tiny.made()
    image = tiny.picture(0, 32, 96)
    encode = lambda **data: Predictor(model, params, WORDS, {"data": {"system": "", **data}})._encode(
        Request(image, "Segment it.")
    )
    tokens, tiles = encode()
    assert tiles.shape == (1, 32, 32, 3)
    last, _ = encode(image_last=True)
    slots = lambda t: np.flatnonzero(t == WORDS.vocab.img_context)
    assert len(slots(tokens)) == len(slots(last)) == 4 and slots(last)[0] > slots(tokens)[0]
    assert len(encode(system="Be brief.")[0]) > len(tokens)
    tokens, tiles = encode(max_tiles=4)
    assert tiles.shape == (4, 32, 32, 3) and len(slots(tokens)) == 16  # 3 and the thumbnail
    assert np.any(encode(pad_to_square=True)[1] != encode()[1])


@pytest.mark.parametrize(
    "data, own, tiles",
    [
        ({}, 0, 1),
        ({"max_tiles": 2}, 0, 1),
        ({"max_tiles": 8}, 0, 7),
        ({"max_tiles": 8, "sample_tiles": 1}, 0, 1),
        ({"max_tiles": 8, "sample_tiles": 5}, 0, 5),
        ({"max_tiles": 5, "sample_tiles": 8}, 0, 5),
        ({"max_tiles": 8}, 1, 1),
        ({"max_tiles": 8}, 4, 5),
        ({"max_tiles": 8, "pad_to_square": True}, 0, 5),
    ],
    ids=str,
)
def test_tiles_are_those_of_training(data, own, tiles):
    """640x480, as README's packing recipe sets it; `own`: max_dynamic_patch of the data set's meta JSON."""
    model, params = tiny.made()
    config = {"system": "", "max_tokens": 256, **data}
    sample = Sample(
        [{"from": "human", "value": "<image>\nSegment it."}, {"from": "gpt", "value": "It is."}],
        (tiny.picture(0, 480, 640),),
        (),
        {"max_tiles": own} if own else {},
    )
    piece = SampleEncoder(DataConfig(**config), run.geometry(model), WORDS).example(sample, np.random.default_rng(0))
    words, cut = Predictor(model, params, WORDS, {"data": config})._encode(evaluator.request(sample))
    assert len(cut) == tiles
    np.testing.assert_array_equal(cut, piece["tiles"])
    np.testing.assert_array_equal(words, piece["tokens"][: len(words)])


@pytest.mark.parametrize(
    "request_, text",
    [
        (Request(None, "Segment it. " * 2000), "prompt of .* tokens .* the model has 2048"),
        (Request(None, "<image>\nSegment it."), "request 0: 1 <image> placeholders in the questions for 0 images"),
        (Request(None, [{"from": "gpt", "value": "Yes."}]), "request 0: a query ends with a human turn"),
    ],
    ids=["long", "image", "turns"],
)
def test_requests_that_cannot_be_used_are_named(predictor, request_, text):
    with pytest.raises(UserError, match=text):
        predictor.segment_batch([request_])


def test_a_workdir_and_an_hf_folder_answer_alike(tmp_path, predictor):
    run = tiny.workdir(tmp_path / "run", ONCE, **SETTINGS)
    image = tiny.picture(5)
    want = predictor.segment(image, "Segment the red circle.")
    for path in (run, run / "checkpoints" / "1", tiny.hf(tmp_path / "hf", run)):
        loaded = argenseg_jax.load(str(path))
        assert (loaded.model, loaded.system, loaded.max_text) == (predictor.model, "", 6)
        jax.tree.map(np.testing.assert_array_equal, loaded.engine.params, predictor.engine.params)
        loaded.engine = predictor.engine  # its programs are compiled
        got = loaded.segment(image, "Segment the red circle.")
        assert (got.text, got.scores) == (want.text, want.scores)
        np.testing.assert_array_equal(got.masks, want.masks)
