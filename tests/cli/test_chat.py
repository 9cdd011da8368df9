"""chat: turns from flags and from the terminal, one file a mask, the last line counts the turns."""

import io
import json
import types

import numpy as np
import pytest
from PIL import Image

import argenseg_jax
from argenseg_jax.decode.predictor import Result
from tests import tiny
from tests.cli.command import call, refused

WORDS = tiny.tokenizer()
SURE, EOS = WORDS.encode_text("It is")[0], WORDS.vocab.eos


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose every answer holds one mask."""
    return tiny.workdir(tmp_path_factory.mktemp("run"), tiny.answers([SURE, WORDS.vocab.ge_start], [EOS])[1])


@pytest.fixture
def image(tmp_path):
    Image.fromarray(tiny.picture(0, 50, 23)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_turns_from_flags(run, image, tmp_path, capfd):
    code, out, err = call(
        capfd,
        "chat",
        "--workdir",
        run,
        "--image",
        image,
        "--prompt",
        "Segment it.",
        "--prompt",
        "Again.",
        "--out",
        tmp_path / "masks",
        "--max_masks",
        1,
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["turns"] == 2 and all("<mask>" in a for a in result["answers"])
    assert result["files"] == [str(tmp_path / "masks" / f"turn_{t}.png") for t in range(2)]
    masks = [np.asarray(Image.open(file)) for file in result["files"]]
    assert masks[0].shape == (50, 23) and np.any(masks[0] != masks[1])  # the first turn is remembered
    assert "> Again." in err


def test_turns_from_the_terminal_end_at_an_empty_line(tmp_path, capfd, monkeypatch):
    """With a predictor that draws nothing and repeats the number of turns before."""
    result = lambda text: Result([], [], text, [], [])
    chat = lambda text, image, history, **options: (result(f"{len(history)}"), [*history, text])
    monkeypatch.setattr(argenseg_jax, "load", lambda path, dtype, **more: types.SimpleNamespace(chat=chat))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\nAnd that?\n\nnever read\n"))
    code, out, _ = call(capfd, "chat", "--out", tmp_path)
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"turns": 2, "answers": ["0", "1"], "files": []}


def test_mistakes(run, tmp_path, capfd):
    assert "absent.png" in refused(capfd, "chat", "--workdir", run, "--image", tmp_path / "absent.png")
    assert "absent: no such checkpoint" in refused(capfd, "chat", "--workdir", "absent", "--prompt", "x")
