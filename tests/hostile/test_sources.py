"""Indexes of strangers, each value of them replaced by odd ones: samples, or one line that names the file."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argenseg_jax.data import prompt
from argenseg_jax.data.mixture import draw, open_mixture, open_source
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.pipeline import DataConfig, Geometry, SampleEncoder
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.synthetic import shapes
from argenseg_jax.errors import SampleError, UserError
from tests.hostile import mutated
from tests.hostile.folders import TURNS, fill, put

INDEXES = {  # file -> the sources that read it
    "flat/d.jsonl": ("{}/flat/d.jsonl",),
    "meta.json": ("{}/meta.json",),
    "flat/p.json": ("{}/flat/p.json",),
    "own/annotations.json": ("own:{}/own",),
    "coco/annotations/instances_val2017.json": ("coco:{}/coco",),
    "refer/instances.json": ("refer:{}/refer",),
    "refer/refs(unc).p": ("refer:{}/refer",),
    "panoptic/annotations/panoptic_val2017.json": (
        "panoptic:{}/panoptic",
        "panoptic:{}/panoptic:val2017:shown",
        "panoptic:{}/panoptic:val2017:every",
    ),
    "reason/val/a.json": ("reasonseg:{}/reason",),
}
LINES = {
    "chat": {"id": 3, "image": "a.png", "mask": "m.png", "kind": "box", "conversations": TURNS, "reference": ["x"]},
    "classes": {
        "image": "a.png",
        "mask": "p.png",
        "seg_info": [{"id": 1, "category_id": 45}, {"id": 2, "category_id": 0}],
        "conversations": [{"from": "user", "value": "<image>\nSegment {}."}, TURNS[1]],
    },
    "video": {
        "video": "clip",
        "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "a"}],
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    fill(folder)
    put(folder / "flat/clip/0.png", (folder / "flat/a.png").read_bytes())
    put(folder / "flat/p.png", (folder / "maps/labels/a.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def encoder():
    """What training does with a sample, as far as it reads its texts."""
    config = {"max_tokens": 512, "system": "", "augment": True, "recolour": 0.5, "max_masks": 4, "max_tiles": 4}
    return SampleEncoder(DataConfig.from_config(config), Geometry(32, 16, 64, 21), nano_tokenizer(16, shapes.corpus()))


def read(name, root, encoder, reading=Reading()):
    """Opens a source and reads it as evaluation and training do; only one-line errors are let through."""
    try:
        source = open_source(name, reading=reading)
        open_mixture([f"{name}*0.5"], reading=reading)
        for index in range(min(len(source), 3)):
            try:
                sample = source[index]
                prompt.check(sample.conversations, len(sample.images), len(sample.masks))
                rng = np.random.default_rng(0)
                encoder.example(draw(source, index, rng, encoder.change), rng)
            except SampleError as error:
                check(error, root)
    except UserError as error:
        check(error, root)


def check(error, root):
    text = str(error)
    assert "\n" not in text and " at 0x" not in text and len(text) < 2100 and text.isprintable(), text


@pytest.mark.parametrize("file", INDEXES)
@settings(max_examples=max(40, settings.default.max_examples // 2))
@given(data=st.data())
def test_mutated_indexes(root, encoder, file, data):
    import pickle

    path, pickled = root / file, file.endswith(".p")
    whole = path.read_bytes()
    try:
        document = data.draw(mutated(pickle.loads(whole) if pickled else json.loads(whole)))
        put(path, pickle.dumps(document) if pickled else document)
        for name in INDEXES[file]:
            read(name.format(root), root, encoder)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", LINES)
@given(data=st.data())
def test_mutated_lines(root, encoder, kind, data):
    put(root / "flat/y.jsonl", data.draw(mutated(LINES[kind])))
    read(f"{root}/flat/y.jsonl", root, encoder)


@given(st.binary(max_size=60), st.sampled_from((b"", b"\xff\xfe", b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe\0\0")))
def test_texts_of_any_bytes(root, encoder, content, mark):
    kept = {
        name: (root / name).read_bytes()
        for name in (
            "maps/classes.txt",
            "t2i/a.txt",
            "ade/objectInfo150.txt",
            "reason/val/a.json",
            "flat/d.jsonl",
            "meta.json",
        )
    }
    try:
        for name, sources in {
            "maps/classes.txt": ("own:{}/maps",),
            "t2i/a.txt": ("t2i:{}/t2i",),
            "ade/objectInfo150.txt": ("ade20k:{}/ade",),
            **INDEXES,
        }.items():
            if name in kept:
                (root / name).write_bytes(mark + content)
                for source in sources:
                    read(source.format(root), root, encoder)
    finally:
        for name, whole in kept.items():
            (root / name).write_bytes(whole)


@given(
    st.text(alphabet=":*/.~²{}[]?\0\ud83d\n aso,=1-", max_size=20),
    st.sampled_from(
        (
            "",
            "shapes:",
            "shapes:simple:train:",
            "shapes-object:full:",
            "reasonseg:{}/reason:",
            "own:{}/own:",
            "refer:{}/refer:",
            "mvtec:{}/mvtec:",
            "t2i:{}/t2i:",
            "interactive:",
            "interactive:box:",
            "tfds:{}",
            "jsonl:",
            "coco:{}/coco:",
        )
    ),
)
def test_odd_source_names(root, encoder, name, start):
    if "train:" not in start or len(name) < 3:  # an endless source has samples
        read(start.format(root) + name, root, encoder)


@pytest.mark.parametrize(
    "name, why",
    (
        ("shapes:simple:train:²", "write shapes:LEVEL:SPLIT"),
        ("shapes:simple:train:" + "9" * 5000, "write shapes"),
        ("shapes:simple:train:alls=nan", "finite"),
        ("shapes:simple:train:alls=-1", "not below 0"),
        ("shapes-object:simple:train:²", "write shapes-TASK"),
        ("reasonseg:{}/reason:**", "no split"),
        ("reasonseg:{}/reason:*", "no split"),
        ("interactive:point:" * 2000 + "shapes:test", "one prompt only"),
        ("coco:{}/coco:[", "no annotations of coco"),
        (5, "is no name of a source"),
        ("own:{}/own:x", "at most 0 words"),
        ("jsonl:{}/flat", "no such source"),
        ("\0", "no name of a file"),
        ("{}/" + "x" * 300, "no such source"),
    ),
)
def test_source_names(root, name, why):
    with pytest.raises(UserError, match=why) as caught:
        open_mixture((name.format(root) if isinstance(name, str) else name,))
    assert len(str(caught.value)) < 2100 and "\n" not in str(caught.value)
