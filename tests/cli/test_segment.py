"""segment: the files it writes, pictures of extreme sizes, and each mistake as one clear line."""

import json

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.ckpt import checkpoint, orbax_io
from tests import tiny
from tests.cli.command import call, refused

WORDS = tiny.tokenizer()
GE, EOS = WORDS.vocab.ge_start, WORDS.vocab.eos
SURE, AND = WORDS.encode_text("It is")[0], WORDS.encode_text(".")[0]
SECTIONS = {"data": {"system": ""}, "decode": {"max_text_tokens": 4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of models whose answers hold one mask, two masks and none."""
    root = tmp_path_factory.mktemp("runs")
    texts = {"one": ([SURE, GE], [AND, EOS]), "two": ([GE], [GE]), "none": ([SURE, EOS], [])}
    return {name: tiny.workdir(root / name, tiny.answers(*text)[1], **SECTIONS) for name, text in texts.items()}


@pytest.fixture
def image(tmp_path):
    Image.fromarray(tiny.picture(0, 50, 23)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "image.png")


def test_one_mask_with_its_pictures(runs, image, tmp_path, capfd):
    code, out, err = call(
        capfd,
        "segment",
        "--workdir",
        runs["one"],
        "--image",
        image,
        "--prompt",
        "Segment it.",
        "--out",
        tmp_path / "new" / "m.png",
        "--overlay",
        tmp_path / "o.png",
        "--scales",
        tmp_path / "s.png",
    )
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["masks"] == 1 and "<mask>" in result["text"] and result["seconds"] > 0
    assert result["files"] == [str(tmp_path / n) for n in ("new/m.png", "o.png", "s.png")]
    mask = np.asarray(Image.open(tmp_path / "new" / "m.png"))
    assert mask.shape == (50, 23) and set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / "o.png").size == (23, 50)
    assert not [line for line in err if "rror" in line]


def test_several_masks_are_numbered_and_none_is_no_file(runs, image, tmp_path, capfd):
    code, out, _ = call(
        capfd,
        "segment",
        "--workdir",
        runs["two"],
        "--image",
        image,
        "--prompt",
        "Segment it.",
        "--out",
        tmp_path / "m.png",
        "--max_masks",
        2,
    )
    assert code == 0 and json.loads(out)["masks"] == 2
    assert files(tmp_path) == ["m.png", "m_1.png"]
    code, out, _ = call(
        capfd,
        "segment",
        "--workdir",
        runs["none"],
        "--image",
        image,
        "--prompt",
        "Segment it.",
        "--out",
        tmp_path / "none.png",
        "--max_masks",
        2,
    )
    assert code == 0 and json.loads(out)["masks"] == 0 and json.loads(out)["files"] == []
    assert files(tmp_path) == ["m.png", "m_1.png"]


def test_a_prompt_alone_becomes_a_picture(runs, tmp_path, capfd):
    """--raw writes what the model draws, at its own size; without it a picture is asked for."""
    args = (
        "segment",
        "--workdir",
        runs["one"],
        "--prompt",
        "Draw it.",
        "--out",
        tmp_path / "m.png",
        "--scales",
        tmp_path / "s.png",
    )
    assert "--image is missing" in refused(capfd, *args)
    code, out, _ = call(capfd, *args, "--raw", "--temperature", 1.0, "--top_k", 5)
    assert code == 0 and json.loads(out)["masks"] == 1
    picture = np.asarray(Image.open(tmp_path / "m.png"))
    assert picture.shape == (16, 16, 3) and len(np.unique(picture)) > 2
    assert "--overlay" in refused(capfd, *args, "--raw", "--overlay", tmp_path / "o.png")


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)])
def test_extreme_pictures(runs, size, tmp_path, capfd):
    Image.new("RGB", size, (200, 30, 30)).save(tmp_path / "image.png")
    code, out, _ = call(
        capfd,
        "segment",
        "--workdir",
        runs["one"],
        "--image",
        tmp_path / "image.png",
        "--prompt",
        "Segment it.",
        "--out",
        tmp_path / "m.png",
        "--overlay",
        tmp_path / "o.png",
        "--scales",
        tmp_path / "s.png",
    )
    assert code == 0 and json.loads(out)["masks"] == 1
    assert Image.open(tmp_path / "m.png").size == Image.open(tmp_path / "o.png").size == size
    width, height = Image.open(tmp_path / "s.png").size
    assert height == 192 and width < 10_000  # a strip stays a picture that can be looked at


@pytest.mark.parametrize(
    "change, says",
    [
        ({"--image": "text.png"}, "text.png: not a readable image"),
        ({"--image": "absent.png"}, "absent.png: cannot be read (No such file"),
        ({"--image": "."}, "cannot be read (Is a directory)"),
        ({"--image": "cut.png"}, "cut.png: not a readable image"),
        ({"--prompt": " "}, "--prompt is empty"),
        ({"--prompt": "red " * 3000}, "shorten the prompt"),
        ({"--prompt": "<image> and <image>"}, "2 <image> placeholders"),
        ({"--workdir": "absent"}, "absent: no such checkpoint"),
        ({"--workdir": "."}, "no checkpoint there"),
        ({"--checkpoint": "nano"}, "give one of --workdir and --checkpoint"),
        ({"--dtype": "int4"}, "dtype"),
        ({"--top_p": "2"}, "top_p"),
        ({"--max_masks": "0"}, "max_masks"),
        ({"--out": "file/mask.png"}, "file"),
        ({"--out": "."}, "--out"),
    ],
)
def test_mistakes_are_one_line(runs, image, tmp_path, capfd, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:200])
    before = files(tmp_path)
    args = {
        "--image": str(image),
        "--prompt": "Segment it.",
        "--out": "mask.png",
        "--workdir": str(runs["one"]),
    } | change
    assert says in refused(capfd, "segment", *(f"{k}={v}" for k, v in args.items()))
    assert files(tmp_path) == before


def broken(kind, runs, tmp_path):
    """A checkpoint that is broken in one way."""
    run = tmp_path / "run"
    if kind == "other sizes":
        return tiny.workdir(run, model={**tiny.config(), "llm": {**tiny.config()["llm"], "mlp": 40}})
    if kind == "other layers":
        return tiny.workdir(run, form="qwen, tied", model=tiny.config())
    if kind == "config":
        tiny.workdir(run)
        (run / orbax_io.CONFIG).write_text("{half")
        return run
    if kind == "no tokenizer":
        tiny.workdir(run)
        for file in (run / checkpoint.TOKENIZER).iterdir():
            file.unlink()
        (run / checkpoint.TOKENIZER).rmdir()
        return run
    if kind == "orbax":
        for file in (tiny.workdir(run) / "checkpoints" / "1" / "params").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[:10])
        return run
    folder = tiny.hf(tmp_path / "hf", runs["one"])
    weights = folder / "model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif kind == "index":
        (folder / "model.safetensors.index.json").write_text("{half")
    elif kind == "run config":
        (folder / checkpoint.RUN_CONFIG).write_text("{half")
    elif kind == "hf config":
        config = json.loads((folder / "config.json").read_text())
        config["llm_config"]["hidden_size"] = 40
        (folder / "config.json").write_text(json.dumps(config))
    elif kind == "empty config":
        (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "kind, says",
    [
        ("other sizes", "llm/layers/mlp/gate/kernel has shape (2, 32, 48), not (2, 32, 40)"),
        ("other layers", "missing llm/lm_head/kernel"),
        ("config", "config.json is no valid JSON"),
        ("no tokenizer", "tokenizer"),
        ("orbax", "checkpoints/1"),
        ("cut", "model.safetensors is broken or incomplete"),
        ("garbage", "model.safetensors is broken or incomplete"),
        ("index", "model.safetensors.index.json is no valid JSON"),
        ("run config", "run_config.json is no valid JSON"),
        ("hf config", "does not fit the model"),
        ("empty config", "config.json has no field 'vision_config'"),
    ],
)
def test_broken_checkpoints_are_one_line(runs, image, tmp_path, capfd, kind, says):
    folder = broken(kind, runs, tmp_path)
    out = tmp_path / "mask.png"
    assert says in refused(
        capfd, "segment", "--checkpoint", folder, "--image", image, "--prompt", "Segment it.", "--out", out
    )
    assert not out.exists()
