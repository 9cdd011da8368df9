"""Paths: gs:// opens everywhere, relative ones stay in their folder, names as other programs write them."""

import json
import os
import unicodedata

import numpy as np
import pytest
from etils import epath

from argenseg_jax.data import prepare
from argenseg_jax.data.mixture import open_mixture, open_source
from argenseg_jax.data.pipeline import DataConfig
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sources import base
from argenseg_jax.errors import SampleError, UserError
from tests import bucket
from tests.hostile.folders import COCO, IMAGE, LABELS, MASK, TURNS, fill, put


@pytest.fixture
def gs():
    with bucket.in_memory():
        yield "gs://bucket/data"


def same(one, other):
    assert len(one) == len(other)
    for k in range(len(one)):
        a, b = one[k], other[k]
        assert a.conversations == b.conversations
        for x, y in zip((*a.images, *a.masks), (*b.images, *b.masks), strict=True):
            assert np.array_equal(x, y)


def test_every_source_opens_in_a_bucket(gs, tmp_path):
    names = fill(gs)
    assert fill(tmp_path) == names
    for name, samples in names.items():
        local = open_source(name.format(tmp_path))
        assert len(local) == samples, name
        same(open_source(name.format(gs)), local)
        same(open_source(name.format("data"), root="gs://bucket"), local)
    parts = open_mixture([f"{gs}/meta.json*0.5", f"{gs}/flat/d.jsonl*0.5", f"own:{gs}/maps*2"])
    assert [(p.length, p.weight) for p in parts] == [(1, 0.5), (1, 1), (1, 0.5), (2, 4)]
    sample = open_source(f"jsonl:{gs}/flat/d.jsonl", image_root="gs://bucket/data/masks/images")
    with pytest.raises(SampleError, match="gs://bucket/data/masks/images/m.png"):
        sample[0]


def test_prepared_in_a_bucket_and_read_back(gs, tmp_path):
    names = fill(tmp_path)
    wanted = [n.format(tmp_path) for n in names if "every" not in n]
    for out in (f"{gs}/out", str(tmp_path / "out")):
        prepare.prepare(prepare.Job(tuple(wanted), out))
    for name in (f"{gs}/out", f"prepared:{gs}/out", f"tfds:{gs}/out"):
        same(open_source(name), open_source(str(tmp_path / "out")))
    assert len(open_mixture([f"prepared:{gs}/out*2"])) == len(open_mixture(wanted))
    for name in ("prepared.json", "plan.json"):
        (epath.Path(gs) / "out" / name).unlink()
    for name in (f"tfds:{gs}/out", f"tfds:{gs}/out:train"):
        same(open_source(name), open_source(str(tmp_path / "out")))
    assert len(open_source(f"tfds:{gs}/out:train[:3]")) == 3
    with pytest.raises(UserError, match="no split 'dev'; it has train"):
        open_source(f"tfds:{gs}/out:dev")


def test_what_is_not_in_a_bucket_is_one_line(gs):
    for name in (
        f"{gs}/none.jsonl",
        f"own:{gs}/none",
        f"prepared:{gs}/none",
        f"tfds:{gs}/none:train",
        "gs://none/x.json",
        f"coco:{gs}/none:val2017",
        "s3x://b/c.jsonl",
        "own:file://x",
    ):
        with pytest.raises(UserError) as caught:
            open_source(name)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- out of the folder


@pytest.fixture
def secret(tmp_path):
    put(tmp_path / "secret.png", IMAGE)
    put(tmp_path / "secret.jsonl", {"conversations": TURNS[:1], "image": "secret.png"})
    (tmp_path / "data").mkdir()
    return tmp_path


def test_relative_paths_stay_in_their_folder(secret):
    data = secret / "data"
    os.symlink(secret / "secret.png", data / "link.png")
    os.symlink(secret, data / "linked")
    put(data / "sub/a.png", IMAGE)
    for name, way in (
        ("../secret.png", "`..`"),
        ("sub/../../secret.png", "`..`"),
        ("link.png", "a symbolic link to"),
        ("linked/secret.png", "a symbolic link to"),
        ("linked/../../secret.png", ""),
    ):
        put(data / "d.jsonl", {"image": name, "conversations": TURNS[:1]})
        with pytest.raises(SampleError, match=rf"d.jsonl:1: {name}: leads out of .*{way}.*allow_outside"):
            open_source(f"{data}/d.jsonl")[0]
        if way:
            assert open_source(f"{data}/d.jsonl", reading=Reading(allow_outside=True))[0].images
    for name in (str(secret / "secret.png"), "sub/../sub/a.png", "./sub//a.png"):
        put(data / "d.jsonl", {"image": name, "conversations": TURNS[:1]})
        assert open_source(f"{data}/d.jsonl")[0].images
    assert (
        DataConfig.from_config({"allow_outside": True}).reading().allow_outside
        and not DataConfig().reading().allow_outside
    )


def test_every_data_file_stays_in_its_folder(secret, tmp_path):
    data = secret / "data"
    fill(data)
    put(data / "meta.json", {"x": {"root": ".", "annotation": "../secret.jsonl"}})
    with pytest.raises(UserError, match="data set 'x': ../secret.jsonl: leads out of"):
        open_source(f"{data}/meta.json")
    put(data / "meta.json", {"x": {"root": "..", "annotation": "flat/d.jsonl"}})
    with pytest.raises(UserError, match=r"data set 'x': \.\.: leads out of"):
        open_source(f"{data}/meta.json")
    assert len(open_source(f"{data}/meta.json", reading=Reading(allow_outside=True))) == 1
    outside = "../../../secret.png"
    coco = {**COCO, "images": [{**COCO["images"][0], "file_name": outside}]}
    psalm = json.loads((data / "flat/p.json").read_text())
    psalm[0]["image_info"]["file_name"] = outside
    panoptic = json.loads((data / "panoptic/annotations/panoptic_val2017.json").read_text())
    maps = json.loads(json.dumps(panoptic))
    panoptic["images"][0]["file_name"] = maps["annotations"][0]["file_name"] = outside
    for place, content, name in (
        ("own/annotations.json", coco, "own:{}/own"),
        ("refer/instances.json", coco, "refer:{}/refer"),
        ("coco/annotations/instances_val2017.json", coco, "coco:{}/coco"),
        ("flat/p.json", psalm, "{}/flat/p.json"),
        ("panoptic/annotations/panoptic_val2017.json", panoptic, "panoptic:{}/panoptic"),
        ("panoptic/annotations/panoptic_val2017.json", maps, "panoptic:{}/panoptic"),
        ("flat/d.jsonl", {"video": "../..", "conversations": TURNS[:1]}, "{}/flat/d.jsonl"),
        ("flat/d.jsonl", {"image": "a.png", "mask": outside, "conversations": TURNS}, "{}/flat/d.jsonl"),
    ):
        put(data / place, content)
        with pytest.raises(SampleError, match="leads out of"):
            open_source(name.format(data))[0]


def test_a_bucket_has_no_way_out_either(gs):
    put("gs://bucket/secret.png", IMAGE)
    put(f"{gs}/d.jsonl", {"image": "../secret.png", "conversations": TURNS[:1]})
    with pytest.raises(SampleError, match="leads out of gs://bucket/data"):
        open_source(f"{gs}/d.jsonl")[0]
    assert open_source(f"{gs}/d.jsonl", reading=Reading(allow_outside=True))[0].images


def test_only_regular_files_are_read(secret):
    os.mkfifo(secret / "data/pipe.png")
    for name in ("/dev/zero", "pipe.png", "/dev/random", "/proc/self", "."):
        put(secret / "data/d.jsonl", {"image": name, "conversations": TURNS[:1]})
        with pytest.raises(SampleError, match="d.jsonl:1: "):
            open_source(f"{secret}/data/d.jsonl")[0]
    with pytest.raises(UserError):
        open_source("jsonl:/dev/zero")


@pytest.mark.parametrize(
    "name",
    (
        "\0",
        "a\0.png",
        "a" * 300,
        "\ud83d",
        "x/" * 3000,
        "",
        " ",
        "~",
        "*",
        "a.png/b",
        5,
        ["a.png"],
        {},
        "file://a.png",
        "https://x/a.png",
        "nope://a",
        "gs://",
        "://",
        "/",
        "..",
        "\\\\x\\a.png",
    ),
)
def test_odd_names_are_one_line(tmp_path, name):
    put(tmp_path / "a.png", IMAGE)
    put(
        tmp_path / "p.json",
        [{"image_info": {"file_name": name, "height": 8, "width": 12}, "instruction": [{"sent": "it"}], "anns": []}],
    )
    with pytest.raises(SampleError) as caught:
        open_source(f"{tmp_path}/p.json")[0]
    assert "p.json: entry 0: " in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------- names of other programs


@pytest.mark.parametrize(
    "name", ("a.png", "images/a.png", "images\\a.png", ".\\a.png", ".\\images\\a.png", "./images/a.png")
)
def test_names_with_backslashes_and_the_folder_in_front(tmp_path, name):
    fill(tmp_path)
    put(tmp_path / "own/annotations.json", {**COCO, "images": [{**COCO["images"][0], "file_name": name}]})
    assert open_source(f"own:{tmp_path}/own")[0].images


def test_letters_composed_otherwise(tmp_path):
    """macOS takes é apart (NFD); lists that were made elsewhere do not."""
    whole, apart = (unicodedata.normalize(form, "née.png") for form in ("NFC", "NFD"))
    fill(tmp_path)
    for on_disk, in_list in ((whole, apart), (apart, whole)):
        put(tmp_path / f"own/images/{on_disk}", IMAGE)
        put(tmp_path / "own/annotations.json", {**COCO, "images": [{**COCO["images"][0], "file_name": in_list}]})
        assert open_source(f"own:{tmp_path}/own")[0].images
        os.unlink(tmp_path / f"own/images/{on_disk}")
        put(tmp_path / f"masks/images/{on_disk}", IMAGE)
        put(tmp_path / f"masks/masks/left/{in_list}", MASK)
        put(tmp_path / f"maps/images/{on_disk}", IMAGE)
        put(tmp_path / f"maps/labels/{in_list}", LABELS)
        put(tmp_path / f"t2i/{on_disk}", IMAGE)
        put(tmp_path / f"t2i/{in_list[:-4]}.txt", b"words")
        put(tmp_path / f"reason/val/{on_disk}", IMAGE)
        put(tmp_path / f"reason/val/{in_list[:-4]}.json", (tmp_path / "reason/val/a.json").read_bytes())
        for name, samples in (("own:{}/masks", 2), ("own:{}/maps", 4), ("t2i:{}/t2i", 2), ("reasonseg:{}/reason", 2)):
            source = open_source(name.format(tmp_path))
            assert len(source) == samples and [source[k].masks for k in range(samples)]
            for p in (
                (
                    f"masks/images/{on_disk}",
                    f"masks/masks/left/{in_list}",
                    f"maps/images/{on_disk}",
                    f"maps/labels/{in_list}",
                    f"t2i/{on_disk}",
                    f"t2i/{in_list[:-4]}.txt",
                    f"reason/val/{on_disk}",
                    f"reason/val/{in_list[:-4]}.json",
                )
                if name.startswith("reason")
                else ()
            ):
                os.unlink(tmp_path / p)
    put(tmp_path / f"masks/masks/{unicodedata.normalize('NFD', 'été')}/a.png", MASK)
    asked = open_source(f"own:{tmp_path}/masks")[1].conversations[0]["value"]
    assert unicodedata.normalize("NFC", "été") in asked


def test_two_images_of_the_same_name(tmp_path):
    fill(tmp_path)
    put(tmp_path / "masks/images/a.jpg", IMAGE)
    with pytest.raises(UserError, match="masks/left/a.png: several images of this name"):
        open_source(f"own:{tmp_path}/masks")


def test_meta_json_from_the_working_directory(tmp_path, monkeypatch):
    """The released example names its files from the folder above its own."""
    fill(tmp_path / "example")
    put(tmp_path / "example/meta.json", {"x": {"root": "example/flat", "annotation": "example/flat/d.jsonl"}})
    with pytest.raises(UserError, match="example/example/flat/d.jsonl does not exist"):
        open_source(f"{tmp_path}/example/meta.json")
    monkeypatch.chdir(tmp_path)
    assert open_source(f"{tmp_path}/example/meta.json")[0].masks[0].any()


def test_folders_of_images_may_be_links(tmp_path):
    """What a user links into a published layout is found there; PACO's names start above train2017/."""
    fill(tmp_path / "disk")
    (tmp_path / "paco").mkdir()
    os.symlink(tmp_path / "disk/coco/val2017", tmp_path / "paco/val2017")
    image = {**COCO["images"][0], "file_name": "val2017/a.png"}
    put(tmp_path / "paco/annotations/paco_lvis_v1_val.json", {**COCO, "images": [image]})
    assert open_source(f"paco:{tmp_path}/paco")[0].masks[0].any()
    put(tmp_path / "paco/annotations/instances_val2017.json", COCO)
    assert open_source(f"coco:{tmp_path}/paco")[0].masks[0].any()
    os.symlink(tmp_path / "disk", tmp_path / "link")
    assert open_source(f"{tmp_path}/link/flat/d.jsonl")[0].images


def test_candidates_of_published_layouts_may_lead_up(tmp_path):
    fill(tmp_path)
    root = base.find(epath.Path(tmp_path / "coco"), "images", "../panoptic/val2017", "val2017")
    assert (root / "a.png").exists() and "panoptic" in str(root)
