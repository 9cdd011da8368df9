"""The page examples/own_data/README.md: its commands do what it says, at a few steps."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.data.mixture import open_source
from tests.cli.command import call

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "own_data"
SHORT = {
    "train": [
        "--config.vqvae.steps=1",
        "--config.train.steps=1",
        "--config.train.sample_every=0",
        "--config.mesh.data=-1",
        "--config.vqvae.batch=8",
        "--config.train.global_batch=8",
    ],
    "evaluate": ["--limit=3", "--previews=0", "--batch=4"],
}


def commands(folder):
    """The page's command lines as lists of words, with `mine` and `runs` inside the folder."""
    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        [re.sub(r"(^|[\":=])(mine|runs/|roof.png|overlay.png)", rf"\1{folder}/\2", word) for word in shlex.split(line)]
        for line in lines
    ]


def run(words, capfd):
    """The last line that a command prints."""
    if words[1].endswith(".py"):
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])
    command = words[3]
    code, out, err = call(capfd, command, *words[4:], *SHORT.get(command, []))
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_the_page(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = commands(tmp_path)
    assert [words[3] for words in listed[1:]] == ["prepare", "train", "evaluate", "segment"]
    drawn, prepared, trained, scores, answer = (run(words, capfd) for words in listed)
    assert drawn["train"] == 60 and prepared["broken"] == 0 and prepared["samples"] > 100
    summary = json.loads((tmp_path / "mine/prepared/summary.json").read_text())
    assert set(summary["classes"]) == {"water", "road", "roof"}
    assert trained["step"] == 2 and scores["n"] == 3 and "mIoU" in scores
    assert (tmp_path / "runs/mine/report.html").exists() and "masks" in answer
    if answer["masks"]:
        assert np.asarray(Image.open(tmp_path / "roof.png")).shape[:2] == (96, 96)


def test_the_forms_agree(tmp_path):
    """The same scenes as label maps, masks and polygons."""
    read = {}
    for form in ("labels", "masks", "polygons"):
        subprocess.run(
            [sys.executable, FOLDER / "draw.py", "--out", tmp_path / form, "--form", form],
            check=True,
            capture_output=True,
        )
        source = open_source(f"own:{tmp_path / form}/val")
        samples = [source[i] for i in range(len(source))]
        read[form] = {(s.meta["files"][0], s.meta["kind"]): s.masks[0] > 0 for s in samples}
    assert all(np.array_equal(mask, read["masks"][key]) for key, mask in read["labels"].items())
    assert read["labels"].keys() == read["masks"].keys() <= read["polygons"].keys()
    overlap = [
        (a & b).sum() / (a | b).sum()
        for a, b in ((mask, read["polygons"][key]) for key, mask in read["labels"].items() if key[1] == "roof")
    ]
    assert np.mean(overlap) > 0.85  # what lies below another shape is cut away in a label map
    assert sum(p.stat().st_size for p in FOLDER.rglob("*")) < 200_000
