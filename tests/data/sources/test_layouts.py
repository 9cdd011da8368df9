"""Published layouts, each in a miniature of exactly its folders and files; what is missing is named."""

import json
import pickle

import numpy as np
import pytest
from etils import epath
from PIL import Image

from argenseg_jax.data.mixture import open_mixture, open_source
from argenseg_jax.data.sources import base, label_maps, panoptic, reasonseg, templates
from argenseg_jax.errors import SampleError, UserError

WIDTH, HEIGHT = 12, 8
LEFT = [[0, 0, 6, 0, 6, 8, 0, 8]]
RIGHT = [[9, 0, 12, 0, 12, 8, 9, 8]]


def put_image(path, value=0, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def columns(mask):
    """The columns that a mask fills; it must fill them completely."""
    filled = np.flatnonzero(mask.any(axis=0))
    assert set(np.unique(mask)) <= {0, 255} and (mask[:, filled] == 255).all()
    return filled.tolist()


# ----------------------------------------------------------------------- referring expressions


@pytest.fixture
def refer(tmp_path):
    """refer_seg with refcoco, refcocog (two splits) and grefcoco, and the images of COCO."""
    root = tmp_path / "refer_seg"
    name = "COCO_train2014_000000000007.jpg"
    put_image(root / "images/mscoco/images/train2014" / name)
    instances = {
        "images": [{"id": 7, "file_name": name, "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": LEFT},
            {"id": 2, "image_id": 7, "category_id": 1, "segmentation": RIGHT},
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    ref = {
        "ref_id": 5,
        "ann_id": 2,
        "image_id": 7,
        "category_id": 1,
        "split": "testA",
        "file_name": "COCO_train2014_000000000007_2.jpg",
        "sent_ids": [8, 9],
        "sentences": [
            {"sent_id": k, "sent": s, "raw": s, "tokens": s.split()} for k, s in ((8, "right man"), (9, "man"))
        ],
    }
    other = {**ref, "ref_id": 6, "ann_id": 1, "split": "val", "sentences": ref["sentences"][:1]}
    for data_set, split_bys in (("refcoco", ["unc"]), ("refcocog", ["google", "umd"])):
        text(root / data_set / "instances.json", instances)
        for split_by in split_bys:
            (root / data_set / f"refs({split_by}).p").write_bytes(pickle.dumps([ref, other], 0))
    general = [
        {**ref, "ann_id": [1, 2], "no_target": False},
        {**other, "ann_id": [-1], "no_target": True, "split": "testA"},
    ]
    text(root / "grefcoco" / "grefs(unc).json", general)
    text(root / "grefcoco" / "instances.json", instances)
    return root


def test_refcoco(refer):
    source = open_source(f"refer:{refer}/refcoco:testA")
    assert len(source) == 2
    sample = source[1]
    assert sample.images[0].shape == (HEIGHT, WIDTH, 3) and columns(sample.masks[0]) == [9, 10, 11]
    assert "instructions:  man.;" in sample.conversations[0]["value"]
    assert sample.meta["metric"] == "referring" and sample.meta["line"].endswith("refs(unc).p: ref 5")
    assert columns(open_source(f"refer:{refer}/refcoco")[0].masks[0]) == [0, 1, 2, 3, 4, 5]
    named = open_source(f"refer:{refer}/refcoco:val", prompt="semantic")
    assert named[0].conversations[0]["value"] == "<image>\n Please segment right man in this image."


def test_refcocog_needs_the_name_of_its_split(refer):
    assert len(open_source("refer:refcocog:val:umd", root=str(refer))) == 1
    with pytest.raises(UserError, match="split by google, umd; name one"):
        open_source(f"refer:{refer}/refcocog:val")


def test_grefcoco(refer):
    source = open_source(f"refer:{refer}/grefcoco:testA")
    assert columns(source[0].masks[0]) == [*range(6), 9, 10, 11]  # several objects
    assert not source[2].masks[0].any() and source[2].meta["metric"] == "grefcoco"


def test_faults_of_refer(refer):
    cases = [
        ("refcoco:test", "no split 'test'; there are testA, val"),
        ("nothing", "no such folder"),
        ("images", r"looked for refs\(\*\).p, grefs\(\*\).json"),
        ("refcoco:val:unc:more", "at most 2 words"),
    ]
    for name, fault in cases:
        with pytest.raises(UserError, match=fault):
            open_source(f"refer:{refer}/{name}")
    (refer / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([{"split": "val"}]))
    with pytest.raises(UserError, match=r"refs\(unc\).p: refs\[0\]: not a usable entry \(KeyError: 'ann_id'\)"):
        open_source(f"refer:{refer}/refcoco")
    (refer / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([range(3)]))
    with pytest.raises(UserError, match=r"refs\(unc\).p: the pickle holds more"):
        open_source(f"refer:{refer}/refcoco")
    put_image(refer / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg", size=(3, 3))
    with pytest.raises(SampleError, match="ref 5: mask .* is 12x8, its image 3x3"):
        open_source(f"refer:{refer}/grefcoco:testA")[0]
    (refer / "grefcoco" / "instances.json").unlink()
    with pytest.raises(UserError, match="no instances; looked for instances.json"):
        open_source(f"refer:{refer}/grefcoco")
    (refer / "images").rename(refer / "elsewhere")
    with pytest.raises(UserError, match="no images; looked for ../images/mscoco"):
        open_source(f"refer:{refer}/refcocog:val:umd")
    root = refer / "elsewhere/mscoco/images/train2014"
    assert len(open_source(f"refer:{refer}/refcocog:val:umd", image_root=str(root))) == 1


# ------------------------------------------------------------------------------------ ReasonSeg


def square(label, left, right):
    return {"label": label, "points": [[left, 0], [right, 0], [right, HEIGHT], [left, HEIGHT]]}


def test_reasonseg(tmp_path):
    for name in ("a", "b"):
        put_image(tmp_path / "val" / f"{name}.jpg")
    put_image(tmp_path / "val" / "without.jpg")
    text(
        tmp_path / "val/a.json",
        {
            "is_sentence": True,
            "text": ["what gives light?", "more"],
            "shapes": [square("target", 1, 9), square("ignore2", 2, 4), square("flag", 0, 11)],
        },
    )
    (tmp_path / "val/b.json").write_bytes(
        json.dumps(
            {"is_sentence": False, "text": "café", "shapes": [square("target", 0, 3)]}, ensure_ascii=False
        ).encode("cp1252")
    )
    source = open_source(f"reasonseg:{tmp_path}")
    assert len(source) == 2
    a, b = source[0], source[1]
    assert columns(a.masks[0]) == [1, 5, 6, 7, 8, 9]  # the smaller shape lies on top; edges belong
    assert columns(a.meta["ignore_mask"]) == [2, 3, 4]
    assert a.conversations[0]["value"].endswith("the instructions below:  what gives light?..")
    assert b.conversations[0]["value"] == "<image>\n Please segment café in this image."
    with pytest.raises(UserError, match="split 'test' of ReasonSeg; looked for test/"):
        open_source(f"reasonseg:{tmp_path}:test")
    for bad, fault in (
        ("{", "no valid JSON"),
        ({"shapes": []}, "KeyError: 'text'"),
        ({"text": "x", "shapes": [square("t", 0, 1e9)]}, "each below 100000 expected"),
        ({"text": "x", "shapes": [{"label": "t", "points": []}]}, r"points \[\], where \[\[x, y\]"),
    ):
        text(tmp_path / "val/a.json", bad)
        with pytest.raises(SampleError, match=f"val: a.json: .*{fault}"):
            open_source(f"reasonseg:{tmp_path}")[0]
    assert not reasonseg.draw_shapes([], 2, 2).any()


# ------------------------------------------------------------------ instances, parts, label maps


def coco_file(names, file_name, more=()):
    return {
        "images": [{"id": 3, "file_name": file_name, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": k, "name": n} for k, n in enumerate(names, 1)],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "segmentation": RIGHT, "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 1, "segmentation": LEFT, "iscrowd": 0},
            *more,
        ],
    }


def test_coco_instances(tmp_path):
    crowd = {"image_id": 3, "iscrowd": 1, "segmentation": {"size": [8, 12], "counts": [8 * 7, 8, 8 * 4]}}
    text(
        tmp_path / "annotations/instances_val2017.json",
        coco_file(
            ["dog", "cat"],
            "000000000003.jpg",
            [{**crowd, "id": 3, "category_id": 1}, {**crowd, "id": 4, "category_id": 2}],
        ),
    )
    put_image(tmp_path / "val2017/000000000003.jpg")
    source = open_source(f"coco:{tmp_path}")
    assert len(source) == 1  # of the cats there is only a crowd
    sample = source[0]
    assert [columns(m) for m in sample.masks] == [[*range(6)], [9, 10, 11]]  # largest first
    assert [columns(m) for m in sample.meta["crowds"]] == [[7]]
    assert sample.conversations[1]["value"].count("<mask>") == 2
    assert (sample.meta["kind"], sample.meta["metric"]) == ("dog", "instances")
    with pytest.raises(UserError, match="annotations of coco; looked for annotations/instances_x.json"):
        open_source(f"coco:{tmp_path}:x")
    text(tmp_path / "annotations/instances_val2017.json", {"images": []})
    with pytest.raises(UserError, match="key `categories` must be a list"):
        open_source(f"coco:{tmp_path}")


def test_paco_lvis(tmp_path):
    text(
        tmp_path / "paco/annotations/paco_lvis_v1_val.json",
        coco_file(["trash_can:rim", "dog_(pet)"], "val2017/000000000003.jpg"),
    )
    put_image(tmp_path / "coco/val2017/000000000003.jpg")
    sample = open_source(f"paco:{tmp_path}/paco")[0]
    assert sample.meta["kind"] == "rim of the trash can" and len(sample.masks) == 1
    assert columns(sample.masks[0]) == [*range(6), 9, 10, 11]
    assert "Please segment rim of the trash can in" in sample.conversations[0]["value"]


def test_pascal_part(tmp_path):
    text(tmp_path / "vlpart/pascal_part/train.json", coco_file(["aeroplane:body"], "2008_000003.jpg"))
    put_image(tmp_path / "VOCdevkit/VOC2010/JPEGImages/2008_000003.jpg")
    sample = open_source(f"pascalpart:{tmp_path}")[0]
    assert sample.meta["kind"] == "body of the aeroplane" and sample.meta["metric"] == "semantic"


def stripes(*values):
    return np.repeat(np.repeat(values, WIDTH // len(values))[None], HEIGHT, 0)


@pytest.fixture
def panoptic_folder(tmp_path):
    """COCO panoptic: two things of a class, stuff, a crowd."""
    ids = stripes(0, 7, 256, 65536, 9, 9)
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1)
    put_image(tmp_path / "val2017/000000000139.jpg")
    grey(tmp_path / "annotations/panoptic_val2017/000000000139.png", colours)
    segments = [
        {"id": i, "category_id": c, "iscrowd": crowd, "area": 16, "bbox": [0, 0, 2, 8]}
        for i, c, crowd in ((7, 1, 0), (256, 1, 0), (65536, 200, 0), (9, 1, 1))
    ]
    text(
        tmp_path / "annotations/panoptic_val2017.json",
        {
            "images": [{"id": 139, "file_name": "000000000139.jpg", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}],
            "categories": [
                {"id": 1, "name": "person", "isthing": 1},
                {"id": 2, "name": "bicycle", "isthing": 1},
                {"id": 200, "name": "rug-merged", "isthing": 0},
            ],
        },
    )
    return tmp_path


def test_coco_panoptic(panoptic_folder):
    source = open_source(f"panoptic:{panoptic_folder}")
    drawn = {s.meta["kind"]: columns(s.masks[0]) for s in (source.draw(0, np.random.default_rng(k)) for k in range(9))}
    assert len(source) == 1 and drawn == {"person": [2, 3, 4, 5], "rug-merged": [6, 7]}
    shown = open_source(f"panoptic:{panoptic_folder}:val2017:shown")
    assert [s.meta["kind"] for s in (shown[i] for i in range(len(shown)))] == ["person", "rug-merged"]
    assert columns(shown[0].meta["ignore_mask"]) == [8, 9, 10, 11]
    assert shown[0].conversations[0]["value"] == "<image>\n Please segment person in this image."
    every = open_source(f"panoptic:{panoptic_folder}:val2017:every")
    assert len(every) == 3 and not every[1].masks[0].any() and every[1].meta["kind"] == "bicycle"


def test_coco_panoptic_has_plainer_names(panoptic_folder):
    path = panoptic_folder / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": k, "name": f"{n}-merged"} for k, n in panoptic.COCO_NAMES.items()]
    text(path, content)
    assert open_source(f"panoptic:{panoptic_folder}:val2017:shown")[1].meta["kind"] == "rug"


def test_faults_of_coco_panoptic(panoptic_folder):
    for name, says in (
        ("train2017", "no panoptic annotations; looked for annotations/panoptic_train2017.json"),
        ("val2017:all", "third word is `every`, `shown` or absent"),
    ):
        with pytest.raises(UserError, match=says):
            open_source(f"panoptic:{panoptic_folder}:{name}")
    (panoptic_folder / "annotations/panoptic_val2017/000000000139.png").unlink()
    with pytest.raises(SampleError, match="000000000139.png: cannot be read"):
        open_source(f"panoptic:{panoptic_folder}")[0]
    (panoptic_folder / "annotations/panoptic_val2017").rmdir()
    with pytest.raises(UserError, match="no panoptic maps; looked for annotations/panoptic_val2017,"):
        open_source(f"panoptic:{panoptic_folder}")


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    text(
        root / "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
        "1\t0.15\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t1\tdoor, double door\n"
        "3\t0.1\t8265\t796\t1\tsky\n",
    )
    put_image(root / "images/validation/ADE_val_00000001.jpg")
    grey(root / "annotations/validation/ADE_val_00000001.png", stripes(0, 1, 2))
    source = open_source(f"ade20k:{root}")
    drawn = {s.meta["kind"]: columns(s.masks[0]) for s in (source.draw(0, np.random.default_rng(k)) for k in range(9))}
    assert drawn == {"wall": [4, 5, 6, 7], "door": [8, 9, 10, 11]}
    assert columns(source[0].meta["ignore_mask"]) == [0, 1, 2, 3]
    every = open_source(f"ade20k:{root}:validation:every")
    assert [s.meta["kind"] for s in (every[i] for i in range(len(every)))] == ["wall", "door", "sky"]
    assert not every[2].masks[0].any()  # an absent class is asked too
    shown = open_source(f"ade20k:{root}:validation:shown")
    assert [s.meta["kind"] for s in (shown[i] for i in range(len(shown)))] == ["wall", "door"]
    grey(root / "annotations/validation/ADE_val_00000001.png", stripes(0, 9))
    with pytest.raises(SampleError, match="ADE_val_00000001.jpg: .*value 9 has no class name"):
        source[0]
    with pytest.raises(UserError, match="third word is `every`"):
        open_source(f"ade20k:{root}:validation:all")
    with pytest.raises(UserError, match="no label maps of ade20k; looked for annotations/training"):
        open_source(f"ade20k:{root}:training")


def test_coco_stuff(tmp_path):
    text(tmp_path / "labels.txt", "0: unlabeled\n1: person\n2: sky-other\n")
    put_image(tmp_path / "val2017/000000000001.jpg")
    grey(tmp_path / "stuffthingmaps/val2017/000000000001.png", stripes(0, 1, 255))
    every = open_source(f"cocostuff:{tmp_path}:val2017:every")
    assert {s.meta["kind"]: columns(s.masks[0]) for s in (every[0], every[1])} == {
        "person": [0, 1, 2, 3],
        "sky-other": [4, 5, 6, 7],
    }
    assert columns(every[0].meta["ignore_mask"]) == [8, 9, 10, 11]
    assert label_maps.read_names(text(tmp_path / "n.txt", "a_b\nc\n"), 0) == {0: "a b", 1: "c"}
    (tmp_path / "labels.txt").unlink()
    with pytest.raises(UserError, match="class names of cocostuff; looked for labels.txt"):
        open_source(f"cocostuff:{tmp_path}")


# ------------------------------------------------------------------------ anomalies, generation


def test_mvtec(tmp_path):
    for path in ("train/good/000.png", "test/good/000.png", "test/broken_large/000.png"):
        put_image(tmp_path / "metal_nut" / path)
    grey(tmp_path / "metal_nut/ground_truth/broken_large/000_mask.png", stripes(0, 255, 0))
    for source in (
        open_source(f"mvtec:{tmp_path}"),
        open_source(f"mvtec:{tmp_path}/metal_nut"),
        open_source(f"mvtec:{tmp_path}:test:metal_nut"),
    ):
        assert [columns(source[k].masks[0]) for k in range(len(source))] == [[4, 5, 6, 7], []]
        assert source[0].meta["kind"] == "metal nut, broken large"
    assert len(open_source(f"mvtec:{tmp_path}:train")) == 1
    with pytest.raises(UserError, match=r"looked for bottle/test/good/\*.png"):
        open_source(f"mvtec:{tmp_path}:test:bottle")
    (tmp_path / "metal_nut/ground_truth/broken_large/000_mask.png").unlink()
    with pytest.raises(SampleError, match="000.png: .*000_mask.png: cannot be read"):
        open_source(f"mvtec:{tmp_path}")[0]


def test_captions_to_images(tmp_path):
    put_image(tmp_path / "00000/000000001.jpg", 9)
    text(tmp_path / "00000/000000001.txt", "a dog\n on grass.")
    sample = open_source(f"t2i:{tmp_path}")[0]
    assert sample.images == () and sample.masks[0].shape == (HEIGHT, WIDTH, 3)
    assert sample.conversations[0]["value"] == "Please generate a picture about a dog on grass."
    assert sample.conversations[1]["value"].count("<mask>") == 1
    text(tmp_path / "00000/000000001.txt", " ")
    with pytest.raises(SampleError, match="000000001.txt is empty"):
        open_source(f"t2i:{tmp_path}")[0]


def test_classes_to_images(tmp_path):
    put_image(tmp_path / "train/n01440764/n01440764_1.JPEG")
    put_image(tmp_path / "train/sea_lion/1.png")
    text(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\n")
    source = open_source(f"t2i:{tmp_path}:train")
    assert [source[k].meta["kind"] for k in range(2)] == ["tench", "sea lion"]
    with pytest.raises(UserError, match="no text-to-image pairs; looked for X.jpg"):
        open_source(f"t2i:{tmp_path}/train/sea_lion")


# ---------------------------------------------------------------------------------- interactive


@pytest.mark.parametrize("prompt", ["point", "box", "point-drawn", "box-drawn", "scribble", "mask"])
def test_interactive_prompts(prompt):
    inner, source = open_source("shapes:full:train:60"), open_source(f"interactive:{prompt}:shapes:full:train:60")
    assert len(source) == 60
    k = next(k for k in range(60) if (inner[k].masks[0]).any())
    plain, sample = inner[k], source[k]
    np.testing.assert_array_equal(sample.masks[0], plain.masks[0])
    inside = sample.masks[0] > 0
    changed = (sample.images[0] != plain.images[0]).any(-1)
    question = sample.conversations[0]["value"]
    assert question.startswith("<image>") and sample.meta["kind"] == prompt
    if prompt in ("point", "box"):
        assert not changed.any()
        numbers = json.loads(question[question.index("[[") : question.index("]]") + 2])[0]
        at = np.array(numbers) * 64 / 1000
        if prompt == "point":
            assert inside[int(at[1]), int(at[0])]
        else:
            ys, xs = np.nonzero(inside)
            np.testing.assert_allclose(at, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=0.05)
    else:
        assert changed.any() and (sample.images[0][changed] == (255, 0, 0)).all()
        if prompt in ("scribble", "mask"):
            assert not (changed & ~inside).any()
    np.testing.assert_array_equal(source[k].images[0], sample.images[0])  # the same each time
    rng = np.random.default_rng(0)
    texts = {source.draw(k, rng).conversations[0]["value"] for _ in range(9)}
    assert (len(texts) > 1) == (prompt == "point")


def test_faults_of_interactive(tmp_path):
    with pytest.raises(UserError, match="no prompt 'shout'; there are point"):
        open_source("interactive:shout:shapes:test")
    chat = text(tmp_path / "c.jsonl", json.dumps({"conversations": templates.turns("Hi", "Hello")}))
    with pytest.raises(SampleError, match="c.jsonl:1: an interactive prompt needs one image"):
        open_source(f"interactive:box:{chat}")[0]


def test_families_mix(refer):
    parts = open_mixture([f"refer:{refer}/refcoco:testA*2", "interactive:point:shapes:full:train:5"])
    assert [(p.length, p.weight) for p in parts] == [(2, 4), (5, 5)]


# ----------------------------------------------------------------------------- InternVL chat data


def test_internvl_chat_data(tmp_path):
    """The meta JSON and annotation lines of InternVL: one image, several, a video's frames, none."""
    for path in ("coco/1.jpg", "coco/2.jpg", "clips/v/0001.jpg", "clips/v/0002.jpg"):
        put_image(tmp_path / "playground" / path)
    ask = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    talk = [
        {"id": 0, "image": "coco/1.jpg", "width": WIDTH, "height": HEIGHT, "conversations": ask},
        {
            "id": 1,
            "image": ["coco/1.jpg", "coco/2.jpg"],
            "width_list": [WIDTH] * 2,
            "height_list": [HEIGHT] * 2,
            "conversations": [{"from": "human", "value": "Image-1: <image>\nImage-2: <image>\nCompare."}, ask[1]],
        },
        {"id": 2, "video": "clips/v", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}, ask[1]]},
        {
            "id": 3,
            "conversations": [{"from": "human", "value": "Hello"}, ask[1]],
            "reference": "A dog.",
            "metric": "exact",
        },
    ]
    text(tmp_path / "chat.jsonl", "".join(json.dumps(t) + "\n" for t in talk))
    text(
        tmp_path / "meta.json",
        {
            "chat": {
                "root": "playground",
                "annotation": "chat.jsonl",
                "data_augment": False,
                "max_dynamic_patch": 6,
                "repeat_time": 1,
                "length": 4,
            }
        },
    )
    source = open_source(str(tmp_path / "meta.json"))
    assert [len(source[k].images) for k in range(4)] == [1, 2, 2, 0]
    assert source[2].conversations[0]["value"] == "Frame1: <image>\nFrame2: <image>\nWhat happens?"
    assert source[0].meta["max_tiles"] == 6 and "augment" not in source[0].meta
    assert (source[3].meta["reference"], source[3].meta["metric"]) == ("A dog.", "exact")
    text(tmp_path / "chat.jsonl", json.dumps({"video": "clips/w.mp4", "conversations": ask}))
    with pytest.raises(SampleError, match="chat.jsonl:1: video clips/w.mp4: no folder of frames"):
        open_source(f"jsonl:{tmp_path}/chat.jsonl")[0]


def test_frames_are_thinned_evenly(tmp_path):
    for k in range(10):
        put_image(tmp_path / f"v/{k}.jpg")
    chosen, talk = base.frames(base.Root(epath.Path(tmp_path)), "v", templates.turns("What?"), max_frames=4)
    assert chosen == ["v/0.jpg", "v/2.jpg", "v/5.jpg", "v/7.jpg"]
    assert talk[0]["value"].startswith("Frame1: <image>") and talk[0]["value"].endswith("<image>\nWhat?")
