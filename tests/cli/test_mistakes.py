"""train and evaluate as a user would break them: one line on stderr, exit code 2, nothing half-written."""

import json

import numpy as np
import pytest
from PIL import Image

from argenseg_jax.ckpt import orbax_io
from tests import tiny
from tests.cli.command import call, refused

TRAIN = (
    "train",
    "--config=tests/cli/tiny_config.py",
    "--config.mesh.data=-1",
    "--config.train.global_batch=8",
)  # the tests' process has eight devices


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.workdir(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def data(tmp_path):
    """Writes data.jsonl beside a picture, a mask and a mask of another size; returns its path."""
    Image.fromarray(tiny.picture(0)).save(tmp_path / "image.png")
    for name, size in (("mask", (30, 40)), ("small", (3, 4))):
        Image.new("L", size, 255).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")

    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
        return path

    return write


def line(image="image.png", mask="mask.png", question="<image>\nSegment it.", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "It is <mask>."}]
    return {"image": image, "mask": mask, "conversations": turns, **more}


BROKEN = [
    ("{half", "data.jsonl:2: malformed JSON"),
    ("[1]", "data.jsonl:2: not a sample"),
    ({"image": "image.png"}, "data.jsonl:2: not a sample (KeyError: 'conversations')"),
    (line(image="absent.png"), "absent.png: cannot be read"),
    (line(mask="absent.png"), "absent.png: cannot be read"),
    (line(image="text.png"), "text.png: not a readable image"),
    (line(mask="small.png"), "mask small.png is 3x4, its image 30x40"),
    (line(question="<image><image> Which?"), "data.jsonl:2: 2 <image> placeholders in the questions for 1"),
]


@pytest.mark.parametrize("bad, says", BROKEN)
def test_evaluate_names_the_line(run, data, tmp_path, capfd, bad, says):
    path = data(line(), bad)
    out = tmp_path / "out"
    message = refused(capfd, "evaluate", "--workdir", run, "--data", path, "--out", out)
    assert says in message and "data.jsonl:2" in message
    assert not out.exists()


def test_train_names_the_line_when_too_many_are_broken(data, tmp_path, capfd):
    """What else a line may lack: tests/data. The first batch is read before the first word is said."""
    path, workdir = data(line(mask=["mask.png"] * 2)), tmp_path / "w"
    message = refused(
        capfd, *TRAIN, f"--workdir={workdir}", "--config.data.max_broken=0.0", f"--config.data.sources=('{path}',)"
    )
    assert "data.jsonl:1: 1 <mask> placeholders in the answers for 2 masks" in message
    assert "samples are broken" in message and orbax_io.newest_step(workdir) is None


@pytest.mark.parametrize(
    "args, says",
    [
        (["--config.data.sources=('absent.jsonl',)"], "absent.jsonl: no such source"),
        (["--config.data.sources=()"], "data.sources is empty"),
        (["--config.data.sources=('EMPTY',)"], "no samples"),
        (["--config.data.sources=('shapes:hard:train',)"], "hard"),
        (["--config.model.variant=9b"], "model.variant='9b' is unknown"),
        (["--config.init_from=absent"], "absent: no such checkpoint"),
        (["--config.init_from=HERE"], "no checkpoint there"),
        (["--config.optim.name=sgd"], "optim.name"),
        (["--config.optim.schedule=sine"], "optim.schedule"),
        (["--config.train.dtype=float99"], "dtype 'float99' is unknown"),
        (["--config.train.remat=half"], "remat 'half' is unknown"),
        (["--config.mesh.data=3"], "mesh.data=3"),
        (["--config.train.global_batch=3"], "lm: sequences per forward pass"),
        (["--config.train.microbatch=5"], "microbatch 5 does not divide"),
        (["--config.train.steps=0"], "nothing to train"),
        (["--config.optim.freeze=('visoin/.*',)"], "visoin"),
        (["--config.train.loss.chunk=7"], "train.loss.chunk=7 does not divide data.max_labels=75"),
    ],
)
def test_train_names_the_key(data, tmp_path, capfd, args, says):
    empty, workdir = data(), tmp_path / "w"
    args = [a.replace("EMPTY", str(empty)).replace("HERE", str(tmp_path)) for a in args]
    assert says in refused(capfd, *TRAIN, f"--workdir={workdir}", *args)
    assert not workdir.exists()


def test_train_refuses_the_workdir_of_another_run(run, capfd):
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    assert "no run can resume" in refused(capfd, *TRAIN, f"--workdir={run}")
    assert before == {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "args, says",
    [
        (["--workdir=RUN", "--checkpoint=RUN", "--data=shapes:test"], "one of --workdir and --checkpoint"),
        (["--workdir=RUN"], "--data is missing"),
        (["--workdir=RUN", "--data=EMPTY"], "no samples"),
        (["--workdir=RUN", "--data=absent.json"], "absent.json: no such source"),
        (["--workdir=absent", "--data=shapes:test"], "absent: no such checkpoint"),
        (["--workdir=RUN", "--data=shapes:test", "--batch=0"], "batch"),
        (["--workdir=RUN", "--data=PSALM", "--eval_prompt=none"], "eval.prompt: 'none'"),
        (["--workdir=RUN", "--data=PSALM", "--config.eval.prompt=none"], "eval.prompt: 'none'"),
        (["--workdir=RUN", "--data=PSALM", "--config.eval.prompt", "none"], "eval.prompt: 'none'"),
        (["--workdir=RUN", "--data=shapes:test", "--eval_masks=last"], "one of <first|union>"),
        (["--workdir=RUN", "--data=shapes:test", "--config.eval.masks=last"], "one of <first|union>"),
        (["--workdir=RUN", "--data=shapes:test", "--config.eval.word=1"], "config.eval.word"),
        (["--workdir=RUN", "--data=shapes:test", "--limit=1", "--out=EMPTY"], "cannot be written"),
    ],
)
def test_evaluate_names_the_flag(run, data, tmp_path, capfd, args, says):
    empty = data()
    (tmp_path / "psalm.json").write_text("[]")
    names = {"RUN": run, "EMPTY": empty, "PSALM": tmp_path / "psalm.json"}
    for name, path in names.items():
        args = [a.replace(f"={name}", f"={path}") for a in args]
    code, out, err = call(capfd, "evaluate", *args)
    assert (code, out) == (2, "") and err[-1].startswith("error: ") and says in err[-1], err


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"masks": "x"}, "eval.masks 'x' is unknown"),
        ({"data": [5]}, "eval.data="),
        ({"data": 5}, "eval.data=5"),
        ({"metric": "x"}, "metric 'x' is unknown"),
    ],
)
def test_a_saved_config_that_evaluate_cannot_use(tmp_path, capfd, wrong, says):
    saved = tiny.workdir(tmp_path / "run", eval=wrong)
    data = [] if "data" in wrong else ["--data=shapes:test"]
    assert says in refused(capfd, "evaluate", "--workdir", saved, *data)


def test_a_prompt_beyond_the_model_is_named_in_evaluate(run, data, tmp_path, capfd):
    path = data(line(question="<image>\n" + "red " * 3000))
    code, out, err = call(capfd, "evaluate", "--workdir", run, "--data", path, "--out", tmp_path / "o")
    assert (code, out) == (2, "") and "shorten the prompt" in err[-1]
    assert not (tmp_path / "o").exists()


def test_one_line_of_a_real_process(run, tmp_path):
    """Nothing else reaches stderr: no warning of a library, no traceback."""
    from tests.cli.test_cli import argenseg, error_of

    np.save(tmp_path / "a.npy", np.zeros(3))
    done = argenseg("segment", f"--workdir={run}", f"--image={tmp_path / 'a.npy'}", "--prompt=It.")
    assert "a.npy: not a readable image" in error_of(done)
    done = argenseg(*TRAIN[:2], f"--workdir={run}")
    assert "no run can resume" in error_of(done)
