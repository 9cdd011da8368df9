"""Public bug reports about reading data, and their siblings: the right value of each."""

import json

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data import prepare
from argenseg_jax.data.mixture import open_mixture, open_source, takes_prompt
from argenseg_jax.errors import SampleError, UserError
from tests.hostile.folders import COCO, IMAGE, LABELS, MASK, TURNS, fill, put

RIGHT = [[6, 0, 12, 0, 12, 8, 6, 8]]


@pytest.fixture
def root(tmp_path):
    fill(tmp_path)
    return tmp_path


def asked(source):
    return [source[k].conversations[0]["value"].removeprefix("<image>\n ") for k in range(len(source))]


# ---------------------------------------------------------------------------- texts of other editors

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32")


def encoded(text, encoding):
    if encoding.endswith("-bom"):
        return ("\ufeff" + text).encode(encoding.removesuffix("-bom"))
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_texts_of_any_editor(root, encoding, end):
    """Notepad writes a byte order mark and CRLF: class 1 was called "\\ufeffsky"."""
    for content in (
        f"left bank{end}{end}Füße, rot{end}",
        f"1: left bank{end}2: Füße, rot",
        f"0: none{end}2: Füße, rot{end}1: left bank",
    ):
        put(root / "maps/classes.txt", encoded(content, encoding))
        assert asked(open_source(f"own:{root}/maps")) == [
            "Please segment left bank in this image.",
            "Please segment Füße, rot in this image.",
        ]
    put(root / "ade/objectInfo150.txt", encoded(f"Idx\tName{end}1\tleft, links{end}2\tright;rechts{end}", encoding))
    assert asked(open_source(f"ade20k:{root}/ade:validation:every")) == [
        "Please segment left in this image.",
        "Please segment right in this image.",
    ]
    put(root / "t2i/a.txt", encoded(f"a grey{end}field.{end}", encoding))
    assert (
        open_source(f"t2i:{root}/t2i")[0].conversations[0]["value"] == "Please generate a picture about a grey field."
    )
    for name in (
        "meta.json",
        "flat/p.json",
        "own/annotations.json",
        "coco/annotations/instances_val2017.json",
        "reason/val/a.json",
        "refer/instances.json",
        "panoptic/annotations/panoptic_val2017.json",
    ):
        text = json.dumps(json.loads((root / name).read_bytes()), indent=2).replace("\n", end)
        put(root / name, encoded(text, encoding))
    for name, samples in fill_names(root).items():
        assert len(open_source(name)) == samples and open_source(name)[0].conversations


def fill_names(root):
    return {
        f"{root}/meta.json": 2,
        f"{root}/flat/p.json": 1,
        f"own:{root}/own": 1,
        f"coco:{root}/coco": 1,
        f"reasonseg:{root}/reason": 1,
        f"refer:{root}/refer": 1,
        f"panoptic:{root}/panoptic": 1,
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_jsonl_of_any_editor(root, encoding):
    """Blank lines are skipped, and count as lines; Ċ is a line break's byte in UTF-16."""
    line = json.dumps(
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nĊ ਊ é"}]}, ensure_ascii=False
    )
    text = f"{line}\r\n   \t \r\n\n\t\n{line}\r\n{' ' * 5000}\r\n  {line}\n \n"
    put(root / "flat/d.jsonl", encoded(text, encoding))
    source = open_source(f"{root}/flat/d.jsonl")
    assert [source[k].meta["line"].rsplit(":")[-1] for k in range(len(source))] == ["1", "5", "7"]
    assert all(source[k].conversations[0]["value"].endswith("Ċ ਊ é") and source[k].images for k in range(3))


def test_texts_that_are_no_unicode_are_one_line(root):
    for name, source in (
        ("maps/classes.txt", "own:{}/maps"),
        ("ade/objectInfo150.txt", "ade20k:{}/ade"),
        ("meta.json", "{}/meta.json"),
        ("own/annotations.json", "own:{}/own"),
    ):
        put(root / name, "Idx\tName\n1\tStraße".encode("latin-1"))
        with pytest.raises(UserError, match=r"byte 15 is no UTF-8 text; save the file as UTF-8"):
            open_source(source.format(root))
    put(root / "t2i/a.txt", "Straße".encode("latin-1"))
    with pytest.raises(SampleError, match="a.txt: byte 4 is no UTF-8 text"):
        open_source(f"t2i:{root}/t2i")[0]
    put(root / "flat/d.jsonl", b'{"image": "\xe9.png"}\n')
    with pytest.raises(SampleError, match="d.jsonl:1: .*no UTF-8 text"):
        open_source(f"{root}/flat/d.jsonl")[0]


@pytest.mark.parametrize(
    "content, why",
    (
        ("1: a\n1: b", "class 1 has two names"),
        ("a\n_\n", "class 2 has no name"),
        ("\n \n", "no class names"),
        ("1: a\n" + "9" * 5000 + ": b", ""),
    ),
)
def test_odd_lists_of_classes(root, content, why):
    put(root / "maps/classes.txt", content.encode())
    if why:
        with pytest.raises(UserError, match=f"classes.txt: {why}"):
            open_source(f"own:{root}/maps")
    else:
        open_source(f"own:{root}/maps")


def test_one_sample_a_line(root):
    sample = {"image": "a.png", "conversations": TURNS[:1]}
    for text in (json.dumps([sample, sample]), json.dumps([sample], indent=1), json.dumps(sample, indent=1), "[]", "5"):
        put(root / "flat/d.jsonl", text.encode())
        with pytest.raises(SampleError, match="d.jsonl:1: .*one sample per line"):
            open_source(f"{root}/flat/d.jsonl")[0]
    put(root / "flat/list.json", [sample])
    with pytest.raises(SampleError, match="entry 0: not a PSALM entry.*one sample per line"):
        open_source(f"{root}/flat/list.json")[0]
    put(root / "flat/one.json", sample)
    with pytest.raises(UserError, match="one.json: a meta JSON is an object.*one per line"):
        open_source(f"{root}/flat/one.json")


# ------------------------------------------------------------------------------------ ids and names


def test_ids_of_the_data_reach_the_samples(root):
    """COCO.loadRes compares (image_id, category_id) with the annotations."""
    for name in (
        "coco:{}/coco",
        "own:{}/own",
        "refer:{}/refer",
        "panoptic:{}/panoptic",
        "panoptic:{}/panoptic:val2017:every",
    ):
        meta = open_source(name.format(root))[0].meta
        assert (meta["image_id"], meta["category_id"]) == (7, 3), name
    assert open_source(f"{root}/flat/p.json")[0].meta["image_id"] == 9
    put(root / "flat/d.jsonl", {"image": "a.png", "image_id": "x1", "category_id": 4, "conversations": TURNS[:1]})
    assert open_source(f"{root}/flat/d.jsonl")[0].meta["image_id"] == "x1"


def coco(**changes):
    return json.loads(json.dumps({**COCO, **changes}))


def test_ids_of_several_types(root):
    """Sorting numbers and texts was a traceback."""
    images = [{**COCO["images"][0], "id": k} for k in ("b", 7, "a")]
    anns = [{**COCO["annotations"][0], "image_id": k, "id": n} for n, k in enumerate(("b", 7, "a"))]
    put(root / "own/annotations.json", coco(images=images, annotations=anns))
    source = open_source(f"own:{root}/own")
    assert [source[k].meta["image_id"] for k in range(3)] == [7, "a", "b"]
    for change, why in (
        ({"annotations": [{**COCO["annotations"][0], "category_id": None}]}, r"annotations\[0\].*None is no id"),
        (
            {"annotations": [COCO["annotations"][0], {**COCO["annotations"][0], "image_id": [7]}]},
            r"annotations\[1\].*\[7\] is no id",
        ),
        ({"categories": [{"id": 3}]}, r"categories\[0\].*KeyError: 'name'"),
        ({"categories": [{"id": 3, "name": 5}]}, r"categories\[0\].*the name 5 is no text"),
        (
            {"images": [*COCO["images"], {**COCO["images"][0], "file_name": "b.png"}]},
            r"images\[0\]: the id 7 is that of another entry",
        ),
        ({"images": [*COCO["images"], 5]}, "key `images` must be a list of objects; entry 1 is 5"),
    ):
        put(root / "own/annotations.json", coco(**change))
        with pytest.raises(UserError, match=f"annotations.json: .*{why}"):
            open_source(f"own:{root}/own")
    put(root / "own/annotations.json", coco(annotations=[{**COCO["annotations"][0], "image_id": "7"}]))
    with pytest.raises(SampleError, match="image 7, category 3: there is no image '7'"):
        open_source(f"own:{root}/own")[0]


def test_two_categories_of_one_name_are_one_question(root):
    anns = [COCO["annotations"][0], {**COCO["annotations"][0], "id": 2, "category_id": 5, "segmentation": RIGHT}]
    names = [{"id": 3, "name": "box"}, {"id": 5, "name": "box"}]
    put(root / "own/annotations.json", coco(categories=names, annotations=anns))
    source = open_source(f"own:{root}/own")
    assert len(source) == 1 and source[0].masks[0].all() and source[0].meta["category_id"] == 3
    put(root / "maps/classes.txt", b"bank\nbank\n")
    maps = open_source(f"own:{root}/maps")
    assert len(maps) == 1 and maps[0].masks[0].all()
    panoptic = json.loads((root / "panoptic/annotations/panoptic_val2017.json").read_text())
    panoptic["categories"].append({"id": 5, "name": "box"})
    panoptic["annotations"][0]["segments_info"].append({"id": 2, "category_id": 5})
    put(root / "panoptic/annotations/panoptic_val2017.json", panoptic)
    for how in ("", ":val2017:shown", ":val2017:every"):
        source = open_source(f"panoptic:{root}/panoptic{how}")
        assert len(source) == 1 and source[0].masks[0].all() and source[0].meta["category_id"] == 3


def test_hidden_files_are_no_data(root):
    """Jupyter's and macOS's droppings became a class, and stopped evaluations."""
    before = {
        name.format(root): [open_source(name.format(root))[k].conversations for k in range(n)]
        for name, n in fill(root).items()
    }
    for folder in (
        "masks/masks/.ipynb_checkpoints",
        "mvtec/bolt/test/.ipynb_checkpoints",
        "mvtec/.hidden/test/good",
        "t2i/.cache",
    ):
        put(root / folder / "a.png", MASK)
    for folder in (
        "masks/masks/left",
        "masks/images",
        "maps/images",
        "maps/labels",
        "own/images",
        "reason/val",
        "t2i",
        "ade/images/validation",
        "mvtec/bolt/test/cut",
        "flat/clip",
    ):
        put(root / folder / "._a.png", b"Mac OS X")
        put(root / folder / ".DS_Store", b"Mac OS X")
    for folder in ("reason/val", "t2i", "refer"):
        for name in ("._a.json", "._a.txt", "._refs(unc).p"):
            put(root / folder / name, b"Mac OS X")
    for name, texts in before.items():
        assert [open_source(name)[k].conversations for k in range(len(open_source(name)))] == texts, name
    put(root / "flat/clip/0.png", IMAGE)
    put(root / "flat/d.jsonl", {"video": "clip", "conversations": [{"from": "human", "value": "<video>\nWhat?"}]})
    assert open_source(f"{root}/flat/d.jsonl")[0].meta["files"] == ["clip/0.png"]


def test_tiff_pictures_masks_and_maps(root):
    for folder, content in (
        ("maps/images", IMAGE),
        ("maps/labels", LABELS),
        ("masks/images", IMAGE),
        ("masks/masks/left", MASK),
    ):
        Image.open(root / folder / "a.png").save(root / folder / "a.tif")
        (root / folder / "a.png").unlink()
        assert content
    assert len(asked(open_source(f"own:{root}/maps"))) == 2 and len(asked(open_source(f"own:{root}/masks"))) == 1


# ------------------------------------------------------------------------------ what is asked, and when


def test_entries_without_an_expression_are_left_out(root, capfd):
    entry = json.loads((root / "flat/p.json").read_text())[0]
    silent = {**entry, "instruction": []}
    put(root / "flat/grefcoco.json", [silent, entry, {**entry, "instruction": [{"sent": ""}]}])
    source = open_source(f"{root}/flat/grefcoco.json")
    assert len(source) == 1 and source[0].meta["id"] == 1 and source[0].meta["line"].endswith("entry 1")
    assert "grefcoco.json: 2 of 3 entries have no expression and are left out" in capfd.readouterr().err
    put(root / "flat/grefcoco.json", [silent])
    with pytest.raises(UserError, match="no samples"):
        open_source(f"{root}/flat/grefcoco.json")


def test_the_prompt_reaches_every_source_that_words_its_questions(root):
    for name in fill(root):
        name = name.format(root)
        source = open_source(name, prompt="Show me the {sent}.")
        holds = name.startswith(("jsonl:", "meta:", "t2i:", "interactive:")) or name.endswith((".jsonl", "meta.json"))
        assert takes_prompt(source) != holds, name
        assert source[0].conversations[0]["value"].startswith("Show me the ") != holds, name
        if not holds:
            with pytest.raises(UserError, match="eval.prompt"):
                open_source(name, prompt="nonsense")
    for name, text in (
        ("own:{}/masks", "Please segment left in this image."),
        ("mvtec:{}/mvtec", "Please segment the defect of the bolt in this image."),
        ("coco:{}/coco", "Please segment every box in this image, one by one."),
    ):
        assert asked(open_source(name.format(root))) == [text]
    with pytest.raises(UserError, match="changes nothing: these sources contain their own questions"):
        prepare.prepare(prepare.Job((f"{root}/flat/d.jsonl",), str(root / "out"), prompt="semantic"))


def test_the_first_part_of_a_meta_json(root):
    """`*0.5` scaled the weight only; of a JSONL it uses the first samples."""
    put(
        root / "flat/d.jsonl",
        "\n".join(
            json.dumps({"id": k, "conversations": [{"from": "human", "value": "?"}]}) for k in range(11)
        ).encode(),
    )
    put(
        root / "meta.json",
        {
            "x": {"root": "flat", "annotation": "flat/d.jsonl"},
            "y": {"root": "flat", "annotation": "flat/d.jsonl", "repeat_time": 0.5, "length": 100},
        },
    )
    assert [p[1:] for p in open_mixture([f"{root}/meta.json*0.5"])] == [(5, 5.5), (2, 25)]
    assert [p[1:] for p in open_mixture([f"{root}/flat/d.jsonl*0.5"])] == [(5, 5.5)]
    assert [p[1:] for p in open_mixture([f"{root}/meta.json*3"])] == [(11, 33), (5, 150)]
    prepare.prepare(prepare.Job((f"{root}/meta.json*0.5",), str(root / "out")))
    assert [open_source(str(root / "out"))[k].meta["id"] for k in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    "change, why",
    (
        ({"repeat_time": "2"}, "repeat_time '2' is no number"),
        ({"repeat_time": True}, "is no number"),
        ({"repeat_time": -1}, "above 0"),
        ({"length": -1}, "length -1 is no number of samples"),
        ({"length": 1.5}, "length 1.5"),
        ({"length": "9"}, "length '9'"),
        ({"max_dynamic_patch": "x"}, "max_dynamic_patch 'x' is no number of tiles"),
        ({"max_dynamic_patch": -1}, "max_dynamic_patch"),
        ({"annotation": "flat"}, "flat is a folder"),
        ({"annotation": 5}, "5 is no path of a file"),
        ({"root": None}, "is no path of a folder"),
        ({"annotation": "none.jsonl"}, "none.jsonl does not exist"),
    ),
)
def test_odd_entries_of_a_meta_json(root, change, why):
    put(root / "meta.json", {"x": {"root": "flat", "annotation": "flat/d.jsonl", **change}})
    with pytest.raises(UserError, match=f"meta.json: data set 'x': .*{why}"):
        open_source(f"{root}/meta.json")


def test_infinity_is_no_number_of_json(root):
    for name, source in (
        ("meta.json", "{}/meta.json"),
        ("flat/p.json", "{}/flat/p.json"),
        ("own/annotations.json", "own:{}/own"),
        ("reason/val/a.json", "reasonseg:{}/reason"),
        ("flat/d.jsonl", "{}/flat/d.jsonl"),
    ):
        for bad in ("Infinity", "NaN", "1e999", "1" + "0" * 400, "[" * 10**5):
            put(root / name, f'{{"x": [{bad}]}}'.encode())
            with pytest.raises(UserError, match=f"{name.split('/')[-1]}.*JSON"):
                open_source(source.format(root))[0]


def test_masks_of_several_segments(root):
    """The official meaning of category ids, and of ids of segments."""
    put(root / "flat/p.png", LABELS)
    turns = [{"from": "human", "value": "<image>\nPlease segment {}."}, TURNS[1]]
    put(
        root / "flat/d.jsonl",
        {
            "image": "a.png",
            "mask": "p.png",
            "conversations": turns,
            "seg_info": [{"id": 1, "category_id": 45}, {"id": 2, "category_id": 45}],
        },
    )
    sample = open_source(f"{root}/flat/d.jsonl")[0]
    assert sample.conversations[0]["value"] == "<image>\nPlease segment bowl." and sample.masks[0].all()
    assert np.unique(sample.masks[0]).tolist() == [255] and sample.meta["kind"] == "bowl"
