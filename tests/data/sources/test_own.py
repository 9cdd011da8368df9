"""Own images and masks: the three forms give the same samples; errors name what is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data.mixture import open_source
from argenseg_jax.data.statistics import Statistics, format_summary
from argenseg_jax.errors import SampleError, UserError

WIDTH, HEIGHT = 12, 8
MAP = np.repeat([[1, 1, 1, 1, 3, 3, 3, 3, 0, 0, 255, 255]], HEIGHT, axis=0).astype(np.uint8)
NAMES = {1: "road", 3: "traffic light"}


@pytest.fixture
def forms(tmp_path):
    """{form: folder}; every folder holds the same image and the same two classes."""
    for form in ("masks", "labels", "polygons"):
        (tmp_path / form / "images").mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(tmp_path / form / "images" / "street.jpg")
    for value, name in NAMES.items():
        path = tmp_path / "masks/masks" / name.replace(" ", "_") / "street.png"
        path.parent.mkdir(parents=True)
        Image.fromarray((MAP == value).astype(np.uint8)).save(path)
    (tmp_path / "labels/labels").mkdir()
    Image.fromarray(MAP).save(tmp_path / "labels/labels/street.png")
    (tmp_path / "labels/classes.txt").write_text("road\npavement\ntraffic_light\n")
    boxes = {1: [0, 0, 4, 0, 4, 8, 0, 8], 3: [4, 0, 8, 0, 8, 8, 4, 8]}
    (tmp_path / "polygons/annotations.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "street.jpg", "height": HEIGHT, "width": WIDTH}],
                "categories": [{"id": k, "name": n.replace(" ", "_")} for k, n in NAMES.items()],
                "annotations": [
                    {"id": k, "image_id": 1, "category_id": k, "segmentation": [box]} for k, box in boxes.items()
                ],
            }
        )
    )
    return tmp_path


@pytest.mark.parametrize("form", ["masks", "labels", "polygons"])
def test_forms(forms, form):
    source = open_source(f"own:{form}", root=str(forms))
    assert len(source) == 2
    for k, (value, name) in enumerate(NAMES.items()):
        sample = source[k]
        np.testing.assert_array_equal(sample.masks[0], (MAP == value) * np.uint8(255))
        assert sample.conversations[0]["value"] == f"<image>\n Please segment {name} in this image."
        assert (sample.meta["kind"], sample.meta["metric"]) == (name, "semantic")


@pytest.mark.parametrize("written, read", [(1.0, 1), ("1", "1"), (2**62, 2**62), (-1, -1)])
def test_ids_of_any_kind_are_kept(forms, written, read):
    path = forms / "polygons/annotations.json"
    content = json.loads(path.read_text())
    content["images"][0]["id"] = written  # pandas writes 1.0
    for annotation in content["annotations"]:
        annotation["image_id"] = written
    path.write_text(json.dumps(content))
    meta = open_source(f"own:{forms}/polygons")[0].meta
    assert meta["image_id"] == read and type(meta["image_id"]) is type(read)


def test_a_black_mask_teaches_absence(forms):
    Image.new("L", (WIDTH, HEIGHT)).save(forms / "masks/masks/road/street.png")
    assert not open_source(f"own:{forms}/masks")[0].masks[0].any()


def test_faults(forms):
    cases = {
        "no annotations; looked for one of masks/CLASS": lambda: (forms / "masks/masks").rename(forms / "m"),
        "several annotations; .*found annotations.json, labels": lambda: (forms / "polygons/labels").mkdir(),
        "no class names of own; looked for classes.txt": lambda: (forms / "labels/classes.txt").unlink(),
    }
    for (says, damage), form in zip(cases.items(), ("masks", "polygons", "labels")):
        damage()
        with pytest.raises(UserError, match=says):
            open_source(f"own:{forms}/{form}")
    with pytest.raises(UserError, match="no images; looked for images"):
        (forms / "labels/images").rename(forms / "pictures")
        (forms / "labels/classes.txt").write_text("road\n")
        open_source(f"own:{forms}/labels")


def test_faulty_files_are_named(forms):
    Image.new("L", (WIDTH, HEIGHT), 1).save(forms / "masks/masks/road/alley.png")
    with pytest.raises(UserError, match="alley.png: no image of this name in .*images"):
        open_source(f"own:{forms}/masks")
    Image.fromarray(MAP + (MAP == 3)).save(forms / "labels/labels/street.png")
    with pytest.raises(SampleError, match="street.png: value 4 has no class name"):
        open_source(f"own:{forms}/labels")[0]


def replace_mask(forms, segmentation, **more):
    path = forms / "polygons/annotations.json"
    content = json.loads(path.read_text())
    content["annotations"][0] = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation, **more}
    path.write_text(json.dumps(content))
    return open_source(f"own:{forms}/polygons")


@pytest.mark.parametrize(
    "segmentation,fault",
    [
        ([], "annotation 1 has no mask"),
        (None, "annotation 1 has no mask"),
        ([[1, 2]], "a polygon of 2 numbers"),
        ([[50, 50, 60, 50, 60, 60]], "annotation 1 is empty"),
        ([[2, 2, 4, 4, 2, 2]], "annotation 1 is empty"),
        ({"size": [8, 12], "counts": "0"}, "an RLE of 0 pixels, not 96"),
        ({"size": [8, 12], "counts": [106, -10]}, "a run of -10 pixels"),
        ([[-(2**63), 5, 20, 5, 20, 20]], "each below 100000"),
    ],
)
def test_annotations_without_a_mask_are_broken_samples(forms, segmentation, fault):
    """A box alone would teach that the class is absent."""
    source = replace_mask(forms, segmentation, bbox=[0, 0, 4, 8])
    with pytest.raises(SampleError, match=rf"annotations.json: image 1, category 1: .*{fault}"):
        source[0]
    assert source[1].masks[0].any()


def test_stray_points_are_counted(forms):
    sample = replace_mask(forms, [[0, 0, 4, 0, 4, 8, 0, 8], [7.0, 7.0]])[0]
    assert sample.meta["dropped_polygons"] == 1
    np.testing.assert_array_equal(sample.masks[0], (MAP == 1) * np.uint8(255))
    statistics = Statistics()
    statistics.add(sample)
    summary = statistics.summary()
    assert summary["dropped_polygons"] == 1
    assert "1 polygons of fewer than 3 points were left out" in format_summary(summary).splitlines()
