"""predictions.jsonl, scores.json and metrics.jsonl of strangers: scores, or one line with file, line and key."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argenseg_jax.data.rle import encode_rle
from argenseg_jax.errors import UserError
from argenseg_jax.eval import predictions, report
from argenseg_jax.eval.metrics import registry
from argenseg_jax.eval.resume import Partial
from tests.hostile import mutated

REFERENCES = {
    "pope": "yes",
    "vqav2": ["2", "two"],
    "textvqa": ["stop"],
    "exact": "2",
    "mmmu": {"answer": "B", "options": {"A": "cat", "B": "dog"}},
}


def rle(left, right):
    mask = np.zeros((6, 10), bool)
    mask[:, left:right] = True
    return encode_rle(mask)


ROW = {
    "index": 0,
    "question": "Which?",
    "answer": "<box>[[0,0,500,1000]]</box>",
    "masks": 1,
    "iou": 0.5,
    "prediction": rle(0, 4),
    "truth": rle(0, 5),
    "ignore": rle(9, 10),
    "kind": "left",
    "id": 7,
    "image": "a.jpg",
    "expression": "the left half",
    "baseline": [3, 9],
    "levels": [[0, 20, 3], [200, 1, 36]],
    "ious": [0.5, 0.8],
    "psnr": 20.5,
    "ssim": 0.5,
    "instances": [{"segmentation": rle(0, 4), "score": 0.9}],
    "truths": [{"segmentation": rle(0, 5), "iscrowd": 0}],
}


def rescored(tmp_path, rows, metric):
    """The scores, or None where the file is refused, by a line that names the row or the file."""
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        scores = predictions.rescore(path, metric)
    except UserError as error:
        assert re.match(rf"{re.escape(str(path))}(:[123])?(:| is no)", str(error)) and "\n" not in str(error), error
        assert len(str(error)) < 800 and " at 0x" not in str(error)
        return None
    json.dumps(scores, allow_nan=False)
    return scores


@pytest.mark.parametrize("metric", registry.METRICS)
@given(data=st.data())
def test_rows(tmp_path_factory, metric, data):
    row = {**ROW, "reference": REFERENCES.get(metric, "yes"), "metric": metric}
    row = {k: row[k] for k in {*registry.METRICS[metric].needs, "metric", "kind", "baseline", "ignore", "expression"}}
    changed = data.draw(mutated(row))
    folder = tmp_path_factory.mktemp("r")
    assert rescored(folder, [row, row], metric)["n"] == 2
    rescored(folder, [row, changed, row], data.draw(st.sampled_from([metric, ""])))


@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_files(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("r") / "predictions.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="predictions.jsonl"):
        predictions.rescore(path)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("truth", {"size": [2147483648, 2], "counts": "04"}, "key `truth`.*pixels"),  # was signal 11
        ("truth", {"size": [2**40, 1], "counts": "04"}, "key `truth`.*pixels"),
        ("truth", {"size": [0, 10], "counts": ""}, "key `truth`.*pixels"),
        ("truth", {"size": [64, -64], "counts": "04"}, "key `truth`.*pixels"),
        ("truth", {**rle(0, 5), "counts": rle(0, 5)["counts"][:1]}, "key `truth`.*an RLE of"),  # was random pixels
        ("truth", {"size": [6, 10], "counts": [4106, -10]}, "key `truth`.*run of -10"),
        ("prediction", {"size": [6, 9], "counts": [54]}, "key `prediction`.*6, 9"),
        ("baseline", ["x", 1], "key `baseline`.*pixels of the intersection"),  # was 2**40 letters
        ("baseline", [5, 1], "key `baseline`"),
        ("kind", ["left"], "key `kind`.*a name"),
        ("metric", 5, "key `metric`.*a text"),
        ("metric", "spelling", "metric 'spelling' is unknown"),
    ],
)
def test_the_line_and_key_are_named(tmp_path, key, value, says):
    path = tmp_path / "predictions.jsonl"
    path.write_text("\ufeff\n" + json.dumps({**ROW, key: value}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"predictions.jsonl:2: {says}"):
        predictions.rescore(path)


def test_uncompressed_counts_of_other_tools_are_read(tmp_path):
    """As lists, with a byte order mark and CRLF."""
    path = tmp_path / "predictions.jsonl"
    row = {"prediction": {"size": [2, 2], "counts": [0, 3, 1]}, "truth": {"size": [2, 2], "counts": [0, 2, 2]}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n\r\n")
    assert predictions.rescore(path)["gIoU"] == pytest.approx(2 / 3)


SCORES = {
    "data": "val.jsonl",
    "checkpoint": "nano",
    "step": 3,
    "n": 2,
    "gIoU": 0.5,
    "cIoU": 0.25,
    "metric": "referring",
    "baseline_gIoU": 0.1,
    "by_kind": {"left": {"n": 1, "gIoU": 0.5}},
    "breakdown": {"histogram": [0, 2], "by_size": {"none": {"n": 1, "gIoU": 1.0}}, "by_length": {}},
    "pictures": [
        {
            "group": "scales",
            "file": "best_0.png",
            "question": "Which?",
            "answer": "Sure.",
            "iou": 0.5,
            "scales": "best_0.png",
        }
    ],
}
LINE = {"step": 2, "phase": "lm", "loss": 0.5, "gen_loss": None}
CONFIG = {"model": {"variant": "nano"}, "data": {"sources": ["shapes:simple:train"]}}


@given(scores=mutated(SCORES), line=mutated(LINE), config=mutated(CONFIG), other=mutated({"a": {**SCORES}}))
def test_the_report_is_made_of_what_is_whole(tmp_path_factory, scores, line, config, other):
    folder = tmp_path_factory.mktemp("w")
    for name, content in (("val", scores), ("test", other), ("whole", SCORES)):
        (folder / "eval" / name / "pictures").mkdir(parents=True)
        (folder / "eval" / name / "scores.json").write_text(json.dumps(content))
        (folder / "eval" / name / "pictures" / "best_0.png").write_bytes(b"\x89PNG")
    lines = [json.dumps(x) for x in ({**LINE, "step": 1}, line, {**LINE, "step": 3})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    (folder / "config.json").write_text(json.dumps(config))
    told = []
    page = report.write_report(folder, note=told.append).read_text()
    assert any(f"{folder}/metrics.jsonl:4 is no valid JSON" in text for text in told)
    assert all(text.startswith("left out: ") and len(text) < 800 for text in told)
    assert "<th scope=row>whole</th>" in page and "lm loss" in page
    assert "| whole |" in (folder / "table.md").read_text()


def test_a_report_embeds_no_file_from_elsewhere(tmp_path):
    for name in ("/etc/hostname", "../scores.json", "..", "a/b.png"):
        picture = {**SCORES["pictures"][0], "file": name}
        told = []
        (tmp_path / "eval" / "val").mkdir(parents=True, exist_ok=True)
        (tmp_path / "eval" / "val" / "scores.json").write_text(json.dumps({**SCORES, "pictures": [picture]}))
        assert "data:image" not in report.write_report(tmp_path, note=told.append).read_text()
        assert len(told) == 1 and "key `pictures`[0]" in told[0]


@pytest.mark.parametrize("content", ["", "{", "[1]\n", '{"k": 1}\n{"index": -1}\n', '{"k": 1}\n{"index": "0"}\n', "\0"])
def test_damaged_partial_answers_are_answered_again(tmp_path, content):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.jsonl").write_text(content)
    (tmp_path / "p" / "3.jsonl").write_text('{"k": 1}\n{"index": 3}\n')
    assert list(Partial(tmp_path / "p", {"k": 1}).open()) == [{"index": 3}]
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["3.jsonl"]
