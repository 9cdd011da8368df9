"""Sources: every form of annotation, the shares of a mixture, and faults named by file and line."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from argenseg_jax.data import mixture
from argenseg_jax.data.mixture import open_mixture, open_source
from argenseg_jax.data.sources import jsonl, panoptic, templates
from argenseg_jax.errors import SampleError, UserError

SIZE = (12, 8)  # width, height
TURNS = [{"from": "human", "value": "<image>\nSegment the {}."}, {"from": "gpt", "value": "<mask>"}]


def picture(path, value):
    Image.fromarray(np.full((SIZE[1], SIZE[0], 3), value, np.uint8)).save(path)


def lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def folder(tmp_path):
    """Images a.png, b.png and the mask m.png (left half, 0 and 1)."""
    for k, name in enumerate("ab"):
        picture(tmp_path / f"{name}.png", 10 * k)
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[:, :6] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    return tmp_path


def test_jsonl(folder):
    path = lines(
        folder / "d.jsonl",
        [
            {"id": 7, "image": "a.png", "mask": "m.png", "conversations": TURNS},
            "",
            {"image": ["a.png", "b.png"], "mask": ["m.png", "m.png"], "conversations": TURNS},
            {"conversations": TURNS[:1]},
        ],
    )
    source = open_source(str(path))
    assert len(source) == 3 and len(open_source("jsonl:d.jsonl", root=str(folder))) == 3
    one, two, chat = (source[i] for i in range(3))
    assert one.images[0].shape == (8, 12, 3) and one.conversations == TURNS
    np.testing.assert_array_equal(one.masks[0][:, :6], 255)
    assert not one.masks[0][:, 6:].any()
    assert (one.meta["id"], one.meta["line"]) == (7, f"{path}:1")
    assert (len(two.images), len(two.masks), two.meta["line"]) == (2, 2, f"{path}:3")
    assert two.images[1].max() == 10
    assert (chat.images, chat.masks) == ((), ())
    with pytest.raises(IndexError):
        source[3]


def test_jsonl_with_another_image_root(folder):
    (folder / "lists").mkdir()
    path = lines(folder / "lists" / "d.jsonl", [{"image": "a.png", "conversations": TURNS}])
    with pytest.raises(SampleError, match="lists/a.png: cannot be read"):
        open_source(str(path))[0]
    assert open_source(str(path), image_root=str(folder))[0].images


@pytest.mark.parametrize(
    "record,fault",
    [
        ("{not json}", "malformed JSON"),
        ("[1, 2]", "not a sample"),
        ('"text"', "not a sample"),
        ("[" * 100_000, "malformed JSON"),
        ({"image": "a.png"}, "conversations"),
        ({"image": "a.png", "conversations": "hi"}, "not a sample"),
        ({"image": 5, "conversations": TURNS}, "not a sample"),
        ({"image": "none.png", "conversations": TURNS}, "none.png: cannot be read"),
        ({"image": "d.jsonl", "conversations": TURNS}, "d.jsonl: not a readable image"),
        ({"image": "a.png", "mask": "small.png", "conversations": TURNS}, "mask small.png is 3x3, its image 12x8"),
        ({"image": "a.png", "seg_info": [{"id": 1}], "conversations": TURNS}, "not a sample"),
    ],
)
def test_faulty_lines_are_named(folder, record, fault):
    Image.new("L", (3, 3)).save(folder / "small.png")
    path = lines(folder / "d.jsonl", ["", {"image": "a.png", "conversations": TURNS}, record])
    source = open_source(str(path))
    assert source[0].images
    with pytest.raises(SampleError, match=fault) as caught:
        source[1]
    assert f"{path}:3" in str(caught.value) and "\n" not in str(caught.value)


def test_line_index(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n{"b": 2}\n\n\n{"c": "\xc3\xa9"}')
    for block in (1, 7, 1 << 20):
        _, spans, numbers = jsonl._index_lines(path, block)
        content = [json.loads(path.read_bytes()[a:b]) for a, b in spans]
        assert content == [{"a": 1}, {"b": 2}, {"c": "é"}] and numbers.tolist() == [1, 3, 6]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="d.jsonl: no samples"):
        open_source(str(path))


def test_meta_mixture(folder):
    records = [{"id": k, "conversations": TURNS[:1]} for k in range(10)]
    for name in ("half", "whole", "twice"):
        lines(folder / f"{name}.jsonl", records)
    meta = folder / "meta.json"
    entry = {"root": "."}
    meta.write_text(
        json.dumps(
            {
                "half": entry | {"annotation": "half.jsonl", "repeat_time": 0.5, "length": 10},
                "whole": entry | {"annotation": "whole.jsonl", "length": 0, "data_augment": True},
                "twice": entry | {"annotation": "twice.jsonl", "repeat_time": 2, "max_dynamic_patch": 6},
            }
        )
    )
    parts = open_mixture((f"{meta}*3", "shapes:simple:train:7*0.5"))
    assert [(p.length, p.weight) for p in parts] == [(5, 15), (10, 30), (10, 60), (3, 3.5)]
    in_order = open_source(str(meta))
    assert len(in_order) == 25
    assert [in_order[i].meta["id"] for i in range(25)] == [*range(5), *range(10), *range(10)]
    assert in_order[5].meta["augment"] and "augment" not in in_order[4].meta
    assert in_order[24].meta["max_tiles"] == 6


def test_sources_that_cannot_be_opened(folder):
    bad = folder / "bad.json"
    cases = {
        "{": "bad.json is no valid JSON",
        '{"x": {"root": "."}}': "bad.json: data set 'x': .*KeyError: 'annotation'",
        '{"x": {"root": ".", "annotation": "none.jsonl"}}': "'x': .*none.jsonl does not exist",
        '{"x": 3}': "a meta JSON is an object",
    }
    for content, fault in cases.items():
        bad.write_text(content)
        with pytest.raises(UserError, match=fault):
            open_source(str(bad))
    (folder / "empty.jsonl").write_text("\n")
    for names, fault in (
        ((), "data.sources is empty"),
        (("none.jsonl",), "none.jsonl: no such source"),
        (("empty.jsonl",), "empty.jsonl: no samples"),
        (("jsonl:",), "no such source"),
        (("shapes:huge:train",), "no level 'huge'"),
        (("shapes:simple",), "write shapes"),
        (("shapes:simple:train:alls=x",), "are numbers"),
        (("shapes:simple:train:rel=1",), "kind_weights"),
        (("shapes:simple:train", "shapes:simple:test"), "needs a size"),
        (("shapes:simple:test*0",), "above 0"),
    ):
        with pytest.raises(UserError, match=fault):
            open_mixture(names, str(folder))


def test_named_shapes():
    assert len(open_source("shapes:simple:train")) == mixture.ENDLESS
    assert len(open_source("shapes:full:train:99")) == 99
    asked = open_source("shapes:simple:train:alls=30,zs=0")
    assert asked.weights == {**asked.level.kinds, "alls": 30, "zs": 0}
    assert len(open_source("shapes:simple:train:9:alls=30")) == 9
    assert open_source("nano:test")[3].conversations == open_source("shapes:test")[3].conversations


def test_panoptic(folder):
    ids = np.zeros((8, 12, 3), np.uint8)
    ids[:4, :, 0], ids[4:, :6, 1], ids[4:, 6:, 2] = 7, 1, 1  # ids 7, 256, 65536
    Image.fromarray(ids).save(folder / "p.png")
    info = [
        {"id": 7, "category_id": 0},
        {"id": 256, "category_id": 0},
        {"id": 65536, "category_id": 119},
        {"id": 9, "category_id": 3},
    ]
    path = lines(folder / "d.jsonl", [{"image": "a.png", "mask": "p.png", "seg_info": info, "conversations": TURNS}])
    source = open_source(str(path))
    seen = {}
    for k in range(20):
        sample = source.draw(0, np.random.default_rng(k))
        seen[sample.conversations[0]["value"]] = sample.masks[0]
    assert set(seen) == {"<image>\nSegment the person.", "<image>\nSegment the sky."}
    sky = (ids[..., 2] == 1) * np.uint8(255)
    np.testing.assert_array_equal(seen["<image>\nSegment the sky."], sky)
    np.testing.assert_array_equal(seen["<image>\nSegment the person."], 255 - sky)
    with pytest.raises(SampleError, match=r"category_id 133 is none of the contiguous ids 0..132"):
        panoptic.draw_official(ids, [{"id": 7, "category_id": 133}], np.random.default_rng(0))
    # Contiguous, as detectron2 numbers them, not COCO's own ids: the released example has 45 for a bowl.
    names = {
        0: "person",
        1: "bicycle",
        16: "dog",
        44: "spoon",
        45: "bowl",
        46: "banana",
        79: "toothbrush",
        80: "banner",
        132: "rug",
    }
    for category, name in names.items():
        assert panoptic.draw_official(ids, [{"id": 7, "category_id": category}], np.random.default_rng(0))[1] == name
    own = [{"id": 7, "category_id": 500, "name": "teapot"}]
    assert panoptic.draw_official(ids, own, np.random.default_rng(0))[1] == "teapot"
    with pytest.raises(SampleError, match="no segment"):
        panoptic.draw_class(ids, info[3:], np.random.default_rng(0))
    assert len(panoptic.COCO_NAMES) == 133
    assert (panoptic.COCO_NAMES[90], panoptic.COCO_NAMES[200]) == ("toothbrush", "rug")


def entry(anns, sents=("the left part",), size=SIZE):
    return {
        "image_info": {"file_name": "a.png", "height": size[1], "width": size[0]},
        "instruction": [{"sent": s} for s in sents],
        "anns": anns,
    }


def test_psalm(folder):
    half = np.zeros(SIZE[::-1], np.uint8)
    half[:, :6] = 1
    packed = coco.encode(np.asfortranarray(half))
    packed["counts"] = packed["counts"].decode()
    forms = {
        "polygon": [[0, 0, 6, 0, 6, 8, 0, 8]],
        "packed": packed,
        "plain": {"size": [8, 12], "counts": [0, 48, 48]},
        "several": [packed, packed],
    }
    path = folder / "p.json"
    entries = [entry([{"segmentation": s}]) for s in forms.values()]
    path.write_text(json.dumps([*entries, entry([])]))
    source = open_source(str(path))
    assert len(source) == 5
    for k in range(4):
        np.testing.assert_array_equal(source[k].masks[0], half * 255, err_msg=list(forms)[k])
    assert not source[4].masks[0].any()
    right = {"segmentation": [[9, 0, 12, 0, 12, 8, 9, 8]]}
    path.write_text(json.dumps([entry([{"segmentation": packed}, right], ["a", "b c"])]))
    sample = open_source(str(path))[0]
    half[:, 9:] = 1
    np.testing.assert_array_equal(sample.masks[0], half * 255)
    assert sample.conversations[0]["value"] == (
        "<image>\n Given the following instructions:  a. b c.; please perform referring segmentation on this image."
    )
    other = open_source(f"psalm:{path}", prompt="Segment the {sent} in the image.")
    assert other[0].conversations[0]["value"] == "Segment the a. b c in the image."
    assert templates.question(["sky"], "semantic") == "<image>\n Please segment sky in this image."
    with pytest.raises(UserError, match="eval.prompt"):
        open_source(str(path), prompt="nonsense")


@pytest.mark.parametrize(
    "bad,fault",
    [
        ({}, "not a PSALM entry"),
        (3, "not a PSALM entry"),
        (entry([{}]), "not a PSALM entry"),
        (entry([], size=(5, 5)), "is 5x5, its image 12x8"),
        (entry([], size=(10**6, 10**6)), "is 1000000x1000000, its image 12x8"),
        (entry([{"segmentation": [[1, 2]]}]), "a polygon of 2 numbers"),
        (entry([{"segmentation": [[0, 0, 1e30, 0, 1, 1]]}]), "each below"),
        (entry([{"segmentation": {"size": [8, 12], "counts": [5]}}]), "RLE of 5 pixels"),
        (entry([{"segmentation": {"size": [9, 9], "counts": [81]}}]), r"RLE of \[9, 9\]"),
        (entry([{"segmentation": {"size": [8, 12], "counts": "ZZZ"}}]), "end within a number"),
    ],
)
def test_faulty_psalm_entries_are_named(folder, bad, fault):
    path = folder / "p.json"
    path.write_text(json.dumps([entry([]), bad]))
    with pytest.raises(SampleError, match=fault) as caught:
        open_source(str(path))[1]
    assert "p.json: entry 1" in str(caught.value)


@pytest.mark.parametrize(
    "key, value, fault",
    [
        ("repeat_time", 1e308, "must be above 0"),
        ("repeat_time", 1e-300, "must be above 0"),
        ("repeat_time", 0, "must be above 0"),
        ("data_augment", "false", "'false' is neither true nor false"),
    ],
)
def test_entries_of_a_meta_json_that_mean_nothing(tmp_path, key, value, fault):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": ".", "annotation": "a.jsonl", key: value}}))
    with pytest.raises(UserError, match=f"data set 'a': .*{fault}"):
        open_source(f"{tmp_path}/meta.json")


def test_weights_of_a_mixture_stay_finite():
    with pytest.raises(UserError, match="must be above 0"):
        open_mixture([f"shapes:simple:test:4*{10**300}", "shapes:simple:val:4"])
