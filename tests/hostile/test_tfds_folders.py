"""Prepared and TFDS folders of strangers: nothing is imported, and damaged files are one line each."""

import io
import json
import random
import shutil
import sys

import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from argenseg_jax.data import mixture, prepare
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sources import records
from argenseg_jax.errors import SampleError, UserError
from tests.hostile import mutated

SHARD = "samples-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "whole"
    prepare.prepare(prepare.Job(sources=("shapes:simple:test:4",), out=str(out)))
    return out


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def as_tfds(folder):
    """Without what makes a prepared folder of it."""
    for name in ("prepared.json", "plan.json"):
        (folder / name).unlink()
    return folder


def read(name):
    """All that opening and reading a source gives; only one-line errors are let through."""
    try:
        source = mixture.open_source(name)
        for index in range(min(len(source), 4)):
            try:
                source[index]
            except SampleError as error:
                assert "\n" not in str(error)
    except UserError as error:
        assert "\n" not in str(error) and " at 0x" not in str(error)


@pytest.mark.parametrize("kind", ("prepared", "tfds"))
@pytest.mark.parametrize("key", ("pythonClassName", "python_class_name", "type"))
def test_a_class_that_features_json_names_is_not_imported(folder, monkeypatch, kind, key):
    """F1: with the working directory on sys.path, TFDS imported and ran downloaded/evil.py."""
    if kind == "tfds":
        as_tfds(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').write('x')\n")
    monkeypatch.chdir(folder.parent)
    monkeypatch.syspath_prepend(str(folder.parent))
    text = (folder / "features.json").read_text()
    for tree in (
        json.loads(text.replace("tensorflow_datasets.core.features.text_feature.Text", "copy.evil.Text")),
        {key: "copy.evil.Text", "featuresDict": json.loads(text)["featuresDict"]},
        {**json.loads(text), "extra": [{key: "copy.evil.Text"}]},
    ):
        if key != "pythonClassName":
            tree = json.loads(json.dumps(tree).replace("pythonClassName", key))
        (folder / "features.json").write_text(json.dumps(tree))
        with pytest.raises(UserError, match="features.json: names the class 'copy.evil.Text'"):
            mixture.open_source(f"{kind}:{folder}")
    assert not (folder / "ran").exists() and "copy.evil" not in sys.modules


def test_modules_that_dataset_info_names_are_not_imported(folder):
    info = json.loads((as_tfds(folder) / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "moduleName": "evil", "configName": "evil.X"}))
    assert len(mixture.open_source(f"tfds:{folder}")) == 4 and "evil" not in sys.modules


@pytest.mark.parametrize("template", ("../{SPLIT}", "/etc/{SPLIT}", "{SPLIT:>99999999999}", "{SPLIT.__class__}", 5))
def test_shards_stay_in_their_folder(folder, template):
    info = json.loads((as_tfds(folder) / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = template
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="dataset_info.json: filepathTemplate"):
        mixture.open_source(f"tfds:{folder}")


@given(st.data())
@pytest.mark.parametrize("name", ("features.json", "dataset_info.json", "prepared.json"))
def test_mutated_descriptions(whole, name, data):
    document = data.draw(mutated(json.loads((whole / name).read_text())))
    copy = whole.parent / "mutated"
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    (copy / name).write_text(json.dumps(document))
    read(f"prepared:{copy}")
    read(f"tfds:{as_tfds(copy)}")


@given(st.integers(0, 2**32 - 1))
def test_damaged_shards(whole, seed):
    rng, content = random.Random(seed), bytearray((whole / SHARD).read_bytes())
    used = [k for k, byte in enumerate(content) if byte]
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.choice(used)] = rng.randrange(256)
    copy = whole.parent / "damaged"
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    (copy / SHARD).write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
    read(f"tfds:{as_tfds(copy)}")


def png(mode="RGB", size=(8, 8), form="PNG"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
BOMB = png("1", (9000, 900))
TURNS = {"from": [b"human", b"gpt"], "value": [b"<image>\nhi", b"<mask>"]}
GOOD = {"conversations": TURNS, "images": [png()], "masks": [png()], "meta": b"{}", "meta_images": []}


@pytest.mark.parametrize(
    "bad, why",
    (
        ({"images": [EPS]}, r"images\[0\]: not a readable image"),
        ({"images": [png(form="GIF")]}, "no PNG image"),
        ({"masks": [BOMB]}, r"masks\[0\]: 9000x900 pixels; at most 1000000 are read"),
        ({"images": [png("1", (1000, 1000))] * 9}, r"images\[4\]: 1000x1000 pixels; at most 0 are read"),
        ({"meta": b"["}, "its `meta` is no valid JSON"),
        ({"meta": b"[" * 10**5}, "its `meta` is no valid JSON"),
        ({"meta": b"[]"}, "not a sample"),
        ({"meta": b'{"meta_images": {"a": 5}}'}, "not a sample"),
        ({"conversations": {"from": [b"human"], "value": [b"\xff"]}}, "not a sample"),
    ),
)
def test_records_of_strangers(tmp_path, whole, bad, why):
    as_tfds(shutil.copytree(whole, tmp_path / "x"))
    features = records._raw_features(0)
    example = tfds.core.ExampleSerializer(features.get_serialized_info())
    record = example.get_tf_example(features.encode_example({**GOOD, **bad})).SerializeToString()
    (tmp_path / "x" / SHARD).unlink()
    tfds.core.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD).write(tmp_path / "x" / SHARD, [(0, record)] * 4)
    source = mixture.open_source(f"tfds:{tmp_path / 'x'}", reading=Reading(max_pixels=10**6))
    with pytest.raises(SampleError, match=why) as caught:
        source[0]
    assert f"{tmp_path / 'x'} (train): sample 0: " in str(caught.value)
