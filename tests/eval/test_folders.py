"""Each data set has a folder of results of its own, and keeps it."""

import json
import os

import pytest

from argenseg_jax.eval import folders


@pytest.fixture
def place(tmp_path, monkeypatch):
    """refcoco/val.json, refcocog/val.json, x/refcoco/val.json and two folders pre.1, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("refcoco", "refcocog", "x/refcoco"):
        os.makedirs(f"{name}/pre.1")
        open(f"{name}/val.json", "w").close()
    return tmp_path


def chosen(*names):
    return [folder.name for folder in folders.choose("out", names)]


def evaluated(folder, name, partial=False):
    """Leaves what `evaluate` does."""
    path = f"out/eval/{folder}/" + ("partial/0.jsonl" if partial else "scores.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(json.dumps({"data": name, folders.SOURCE: folders.identity(name)}) + "\n")


def test_names(place):
    assert chosen("refcoco/val.json") == ["val"]
    assert chosen("refcoco/val.json", "refcocog/val.json") == ["refcoco-val", "refcocog-val"]
    assert chosen("refcoco/val.json", "x/refcoco/val.json")[1] == "x-refcoco-val"
    assert chosen("refcoco/pre.1", "refcocog/pre.1") == ["refcoco-pre.1", "refcocog-pre.1"]
    assert chosen("refcoco/val.json", "grefcoco@refcoco/val.json") == ["val", "grefcoco-val"]
    assert chosen("shapes:simple:test") == ["shapes-simple-test"]
    assert len(set(chosen("own:a/b", "own:a-b"))) == 2  # both would be own-a-b
    assert chosen("refcoco/val.json", "./refcoco/../refcoco/val.json") == ["val", "val"]  # one data set
    for name in ("..", "/", "x" * 5000, "own:..", "a\0b"):
        (folder,) = folders.choose("out", [name])
        assert folder.parent.name == "eval" and not folder.name.startswith(".") and len(folder.name) < 100


@pytest.mark.parametrize("partial", [False, True])
def test_one_after_the_other(place, partial):
    evaluated("val", "refcoco/val.json", partial)
    assert chosen("refcocog/val.json") == ["refcocog-val"]
    assert chosen("refcoco/val.json") == ["val"]
    evaluated("refcocog-val", "refcocog/val.json")
    assert chosen("refcocog/val.json", "refcoco/val.json") == ["refcocog-val", "val"]
    assert chosen("x/refcoco/val.json") == ["refcoco-val"]


def test_a_folder_is_kept(place):
    """Of two in one call, one comes back alone, and from another working directory."""
    for name in ("refcoco", "refcocog"):
        evaluated(f"{name}-val", f"{name}/val.json")
    os.chdir("refcoco")
    (folder,) = folders.choose("../out", ["val.json"])
    assert folder.name == "refcoco-val"


def test_results_of_earlier_versions_and_damaged_ones(place):
    os.makedirs("out/eval/val")
    with open("out/eval/val/scores.json", "w") as file:
        file.write('{"data": "refcoco/val.json"}')
    assert chosen("refcoco/val.json") == ["val"] and chosen("refcocog/val.json") == ["refcocog-val"]
    with open("out/eval/val/scores.json", "w") as file:
        file.write("{")
    assert chosen("refcocog/val.json") == ["val"]  # what is written there now mends it
