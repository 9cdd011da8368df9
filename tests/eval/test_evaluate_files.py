"""evaluate: where results go, when mistakes are found, and which answers of a stopped evaluation count."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from argenseg_jax import files
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.decode.predictor import Predictor
from argenseg_jax.errors import UserError
from tests import tiny
from tests.cli.command import call, refused

OPTIONS = ("--previews=0", "--baseline=false", "--save_every=0")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.workdir(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """refcoco/val.jsonl of one sample and refcocog/val.jsonl of two, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("refcoco", 1), ("refcocog", 2)):
        os.mkdir(name)
        write(f"{name}/val.jsonl", [line(seed) for seed in range(count)])
        for seed in range(count):
            Image.fromarray(tiny.picture(seed)).save(f"{name}/{seed}.png")
            Image.fromarray(np.eye(40, 30, dtype=np.uint8) * 255).save(f"{name}/m{seed}.png")
    return tmp_path


def line(seed, **more):
    return {
        "image": f"{seed}.png",
        "mask": f"m{seed}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nSegment it."},
            {"from": "gpt", "value": "It is <mask>."},
        ],
        **more,
    }


def write(path, lines):
    with open(path, "w") as file:
        file.write("".join(json.dumps(x) + "\n" for x in lines))


@pytest.fixture
def model(monkeypatch):
    """In place of the model: answers by masks of nothing (of all: `fill`), and stops after `most` samples."""
    noted = types.SimpleNamespace(asked=[], most=100, fill=False)

    def answer(self, requests, **options):
        if len(noted.asked) >= noted.most:
            raise UserError("stopped")
        noted.asked += [request.name for request in requests]
        return [
            types.SimpleNamespace(
                masks=[np.full(r.image.shape[:2], noted.fill)], scores=[1.0], images=[], text="It is <mask>.", scales=[]
            )
            for r in requests
        ]

    monkeypatch.setattr(Predictor, "segment_batch", answer)
    return noted


def evaluate(capfd, *args):
    code, out, err = call(capfd, "evaluate", *OPTIONS, *args)
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), "\n".join(err)


def test_two_data_sets_of_one_file_name(place, workdir, model, capfd):
    said, table = evaluate(
        capfd, "--workdir", workdir, "--data", "refcoco/val.jsonl", "--data", "refcocog/val.jsonl", "--out", "out"
    )
    first, second = said["data"].values()
    assert (first["n"], second["n"]) == (1, 2) and first["predictions"] != second["predictions"]
    for scores in (first, second):
        with open(scores["predictions"]) as file:
            assert len(file.readlines()) == scores["n"]
    assert "| refcoco-val |  | refcocog-val |  |" in table and "refcocog-val" in open("out/report.html").read()
    again, _ = evaluate(capfd, "--workdir", workdir, "--data", "refcocog/val.jsonl", "--out", "out")
    assert again["predictions"] == second["predictions"] and sorted(os.listdir("out/eval")) == [
        "refcoco-val",
        "refcocog-val",
    ]
    scores = files.read_json("out/eval/refcoco-val/scores.json")
    assert (scores["checkpoint"], scores["step"], len(scores["weights"])) == (str(workdir), 1, 16)
    assert scores["coco_results"] == "image_id is the index of the sample and category_id is 1: the data names none"


@pytest.mark.parametrize(
    "args, says",
    [
        (("--metric=vqav2",), "val.jsonl:1: metric 'vqav2' needs the key `reference`"),
        (("--out=refcoco/val.jsonl",), "Not a directory"),
        (("--out=/proc/none",), "cannot be written"),
        (("--out", "x" * 300), "File name too long"),
        (("--data=pope@refcocog/val.jsonl",), "metric 'pope' needs the key `reference`"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(place, workdir, capfd, monkeypatch, args, says):
    monkeypatch.setattr(Predictor, "load", None)
    message = refused(capfd, "evaluate", "--workdir", workdir, "--data", "refcoco/val.jsonl", "--out", "out", *args)
    assert says in message and not os.path.exists("out")


def test_answers_of_other_weights_are_not_used(place, workdir, model, capfd):
    """Stopped after the first of two samples, twice; the second time the step is trained anew meanwhile."""
    run = shutil.copytree(workdir, "run")
    args = ("--workdir", run, "--data", "refcocog/val.jsonl", "--batch=1")
    one, two = "refcocog/val.jsonl:1", "refcocog/val.jsonl:2"

    def asked(most):
        model.asked, model.most = [], most
        code, _, err = call(capfd, "evaluate", *OPTIONS, *args)
        assert code == (2 if most == 1 else 0), err
        return model.asked

    assert asked(1) == [one] and asked(100) == [two]
    assert asked(1) == [one]
    orbax_io.save_params("run/checkpoints/1", tiny.params(tiny.made()[0], seed=1), force=True)
    assert asked(100) == [one, two]


def test_a_full_disk_at_the_end_loses_no_answer(place, workdir, model, capfd, monkeypatch):
    def full(path, content):
        if str(path).endswith("predictions.jsonl"):
            raise UserError(f"{path} cannot be written (No space left on device)")
        real(path, content)

    real = files.write
    monkeypatch.setattr(files, "write", full)
    args = ("--workdir", workdir, "--data", "refcoco/val.jsonl", "--out", "out")
    code, _, err = call(capfd, "evaluate", *OPTIONS, *args)
    assert code == 2 and "No space left" in err[-1] and '"gIoU": 0.0' in err[-2]  # the scores at least
    monkeypatch.setattr(files, "write", real)
    model.asked.clear()
    assert evaluate(capfd, *args)[0]["n"] == 1 and not model.asked


def test_results_of_coco_are_read_beside_coco(place, workdir, model, capfd):
    """Ids of pictures and categories that are not 1, 2, 3: pycocotools finds each mask at its own place."""
    os.makedirs("coco/val2017")
    os.mkdir("coco/annotations")
    for image_id in (139, 785):
        Image.fromarray(tiny.picture(image_id)).save(f"coco/val2017/{image_id}.jpg")
    annotations = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": 40, "width": 30} for k in (139, 785)],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": category,
                "iscrowd": 0,
                "area": 100,
                "bbox": [2, 3, 10, 10],
                "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]],
            }
            for n, (image, category) in enumerate(((139, 17), (139, 18), (785, 17)), 1)
        ],
    }
    write("coco/annotations/instances_val2017.json", [annotations])
    model.fill = True
    said, _ = evaluate(capfd, "--workdir", workdir, "--data", "coco:coco", "--out", "out", "--batch", "3")
    folder = os.path.dirname(said["predictions"])
    truth = COCO("coco/annotations/instances_val2017.json")
    found = truth.loadRes(f"{folder}/coco_results.json")
    assert {(a["image_id"], a["category_id"]) for a in found.anns.values()} == {(139, 17), (139, 18), (785, 17)}
    assert all(found.annToMask(a).all() for a in found.anns.values())
    assert files.read_json(f"{folder}/scores.json")["coco_results"] == "image_id and category_id are those of the data"
