"""Saved predictions score as the run did, without the model; pycocotools reads them."""

import contextlib
import io
import json
import types

import numpy as np
import pytest
from pycocotools.coco import COCO

from argenseg_jax.data.rle import decode_rle, encode_rle
from argenseg_jax.data.sample import Sample
from argenseg_jax.errors import UserError
from argenseg_jax.eval import predictions
from argenseg_jax.eval.evaluator import Evaluator
from argenseg_jax.eval.predictions import coco_results, read_records, summary
from benchmarks import rescore

SIDE = 10


def stripe(left, right):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, left:right] = 255
    return mask


def sample(value, *masks, **meta):
    image = np.full((SIDE, SIDE, 3), value, np.uint8)
    return Sample(
        [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "<mask>" * len(masks) or "yes"}],
        (image,),
        masks,
        meta,
    )


def answering(answers):
    """An image of grey value v is answered by answers[v]: (text, masks)."""

    def predict(requests):
        out = []
        for request in requests:
            text, masks = answers[int(request.image[0, 0, 0])]
            out.append(
                types.SimpleNamespace(
                    text=text,
                    masks=[m > 0 for m in masks],
                    scores=[0.9, 0.5][: len(masks)],
                    scales=[],
                    images=[np.repeat(m[..., None], 3, -1) for m in masks],
                )
            )
        return out

    return predict


def through_a_file(result, path):
    path.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in result.records))
    return read_records(path)


def test_rescoring_equals_the_run(tmp_path):
    source = [
        sample(0, stripe(0, 5), kind="left", sents=["the left half"]),
        sample(1, stripe(0, 0)),
        sample(2, stripe(0, 1), ignore_mask=stripe(5, 10)),
    ]
    answers = {0: ("Sure", [stripe(0, 4)]), 1: ("No", []), 2: ("Sure", [stripe(0, 8)])}
    result = Evaluator(answering(answers)).run(source)
    rows = through_a_file(result, tmp_path / "p.jsonl")
    again = summary(rows)
    assert again == {
        k: v for k, v in result.scores.items() if k not in ("baseline_gIoU", "baseline_cIoU", "seconds_per_image")
    }
    assert again["gIoU"] == pytest.approx((0.8 + 1 + 0.2) / 3)  # what is ignored costs nothing
    assert again["by_kind"] == {"left": {"n": 1, "gIoU": pytest.approx(0.8)}}
    parts = again["breakdown"]
    assert parts["histogram"] == [0, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    assert {k: v["n"] for k, v in parts["by_size"].items()} == {"none": 1, "5-20 %": 1, "above 20 %": 1}
    assert {k: v["n"] for k, v in parts["by_length"].items()} == {"1-2 words": 2, "3-5 words": 1}
    assert summary(rows, "grefcoco")["metric"] == "grefcoco"
    halves = summary(rows[2:] + rows[:2])  # joined in another order
    assert {k: halves[k] for k in ("gIoU", "cIoU")} == {k: again[k] for k in ("gIoU", "cIoU")}


def test_pycocotools_reads_the_results(tmp_path):
    source = [
        sample(
            0,
            stripe(0, 5),
            stripe(6, 9),
            metric="instances",
            kind="dog",
            files=["a.jpg"],
            crowds=[stripe(9, 10)],
            image_id=42,
            category_id=18,
        )
    ]
    answers = {0: ("Sure", [stripe(0, 5), stripe(6, 9)])}
    result = Evaluator(answering(answers)).run(source)
    assert result.scores["AP"] == pytest.approx(1) and result.scores["gIoU"] == 1.0
    rows = through_a_file(result, tmp_path / "p.jsonl")
    assert [t["iscrowd"] for t in rows[0]["truths"]] == [0, 0, 1]
    (tmp_path / "r.json").write_text(json.dumps(list(coco_results(rows))))
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "images": [{"id": 42, "height": SIDE, "width": SIDE}],
            "annotations": [],
            "categories": [{"id": 18, "name": "dog"}],
        }
        data.createIndex()
        loaded = data.loadRes(str(tmp_path / "r.json"))
    anns = loaded.loadAnns(loaded.getAnnIds(imgIds=[42], catIds=[18]))
    assert [a["score"] for a in anns] == [0.9, 0.5]
    np.testing.assert_array_equal(loaded.annToMask(anns[1]) * 255, stripe(6, 9))
    assert (
        len(
            list(
                coco_results(
                    [
                        {"prediction": encode_rle(stripe(0, 5) > 0), "masks": 1, "index": 3},
                        {"prediction": encode_rle(stripe(0, 0) > 0), "masks": 0},
                    ]
                )
            )
        )
        == 1
    )


def test_questions_about_text(tmp_path):
    source = [sample(0, metric="pope", reference="yes"), sample(1, metric="pope", reference="no")]
    result = Evaluator(answering({0: ("Yes.", []), 1: ("yes", [])})).run(source)
    assert result.scores["accuracy"] == 0.5 and result.scores["yes_ratio"] == 1.0
    assert result.scores["metric"] == "pope" and "gIoU" not in result.scores
    assert summary(through_a_file(result, tmp_path / "p.jsonl"))["F1"] == result.scores["F1"]
    other = Evaluator(answering({0: ("Yes.", []), 1: ("no", [])}), metric="exact").run(source)
    assert other.scores["accuracy"] == 1.0
    with pytest.raises(UserError, match="'spelling' is unknown"):
        Evaluator(answering({}), metric="spelling")


def test_anomalies_and_interactive():
    source = [sample(0, stripe(0, 2), metric="anomaly"), sample(1, stripe(0, 0), metric="anomaly")]
    answers = {0: ("", [stripe(0, 1)]), 1: ("", [])}
    got = Evaluator(answering(answers)).run(source).scores
    assert got["image_AUROC"] == 1.0 and got["pixel_AUROC"] == pytest.approx(0.75)
    click = [sample(0, stripe(0, 2), metric="interactive")]
    got = Evaluator(answering(answers)).run(click).scores
    assert got["IoU@1"] == 0.5 and got["NoC@85"] == 20


def test_faulty_files_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    good = json.dumps({"prediction": encode_rle(stripe(0, 1) > 0), "truth": encode_rle(stripe(0, 1) > 0)})
    for content, fault in (
        ("", "no predictions"),
        (f"{good}\n{{", "p.jsonl:2 is no valid JSON"),
        ("[1]", "p.jsonl:1: not a prediction but list"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=fault):
            read_records(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="p.jsonl:1: metric 'pope' needs the key `answer`"):
        summary([json.loads(good)], "pope", "p.jsonl")
    with pytest.raises(UserError, match="not a COCO run length"):
        decode_rle({"size": [2, 2]})
    assert predictions.mask_image(json.loads(good)).sum() == 255 * SIDE


def test_rescoring_many_rows_takes_little_memory(tmp_path):
    """20,000 rows of 640x480 in a process of its own: all masks at once would be 12 GB."""
    sizes = {}
    for rows in (500, 20_000):
        path = tmp_path / f"{rows}.jsonl"
        rescore.write(path, rows)
        _, _, sizes[rows], scores = rescore.measure(path)
        assert scores["n"] == rows and sum(scores["breakdown"]["histogram"]) == rows
    assert sizes[20_000] - sizes[500] < 30 * 2**20 and sizes[20_000] < 2**30
    one = {"prediction": rescore.masks(3)[1], "truth": rescore.masks(3)[2]}
    pixels = [decode_rle(one[key]) for key in ("prediction", "truth")]
    assert summary([one])["cIoU"] == (pixels[0] & pixels[1]).sum() / (pixels[0] | pixels[1]).sum()
