"""The command line: exit codes, one line per mistake, one JSON line per result, configs that lock."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from argenseg_jax.cli import __main__ as cli
from configs import common

ROOT = pathlib.Path(__file__).parent.parent.parent


def argenseg(*args, env=None):
    """The process of one command."""
    return subprocess.run(
        [sys.executable, "-m", "argenseg_jax", *map(str, args)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | (env or {}),
    )


def error_of(done):
    """The one line of a user error."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "args, text",
    [
        (["trian"], "unknown command 'trian'; there are train, evaluate"),
        (["train", "--workdir=w"], "--config is missing"),
        (["train", "--config=configs/none.py", "--workdir=w"], "no file 'configs/none.py'"),
        (["train", "--config=configs/nano.py:colour=1", "--workdir=w"], "unknown config argument 'colour'"),
        (["train", "--config=configs/nano.py", "--config.bad=1", "--workdir=w"], "--config.bad=1: no such config key"),
        (
            ["train", "--config=configs/nano.py", "--config.train.stepz=1", "--workdir=w"],
            "--config.train.stepz=1: no such config key: train.stepz; did you mean train.steps?",
        ),
        (["train", "--config", "configs/nano.py", "--config.train.steps=x", "--workdir=w"], "train.steps=x"),
        (["train", "--wrokdir=w"], "Unknown command line flag 'wrokdir'"),
        (["train", "now"], "unexpected argument 'now'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(args, text):
    assert text in error_of(argenseg(*args))


def test_help_and_usage():
    done = argenseg("--help")
    assert done.returncode == 0 and all(f"  {name}" in done.stderr for name in cli.COMMANDS)
    done = argenseg("train", "--help")
    assert done.returncode == 0 and "--workdir" in done.stderr and done.stdout == ""
    assert argenseg().returncode == 2


def test_debug_shows_the_traceback():
    done = argenseg("train", "--config=configs/none.py", "--workdir=w", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr


def test_a_result_is_one_json_line_and_a_failed_check_exits_1(monkeypatch, capsys):
    for result, code in (({"n": 1}, 0), ({"fits": False}, 0), ({"ok": True}, 0), ({"ok": False}, 1)):
        monkeypatch.setattr(
            cli.importlib,
            "import_module",
            lambda _, result=result: type("M", (), {"run": staticmethod(lambda: result)}),
        )
        assert cli.main(["verify"]) == code
        assert json.loads(capsys.readouterr().out) == result


def test_parse_arg():
    arg = common.parse_arg("res=448,fast,lr=1,name=a", res=224, fast=False, lr=0.1, name="", steps=5)
    assert arg.to_dict() == {"res": 448, "fast": True, "lr": 1.0, "name": "a", "steps": 5}
    assert common.parse_arg(None, on=True).on and not common.parse_arg("on=false", on=True).on
    for wrong in ("rse=1", "res=x", "res=1.5", "fast=2"):
        with pytest.raises(ValueError):
            common.parse_arg(wrong, res=224, fast=False)


def test_every_default_has_a_comment():
    source = (ROOT / "configs" / "common.py").read_text()
    body = source[source.index("def optimizer") :]
    bare = [
        line.strip()
        for line in body.splitlines()
        if line.strip().startswith('"')
        and '": ' in line
        and "#" not in line
        and "{" not in line
        and not line.strip().startswith('"""')
    ]
    assert not bare


@pytest.mark.slow
def test_train_and_train_on(tmp_path):
    """Two CPU devices from the config's mesh; the second call repeats what one long run does."""
    env = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def train(workdir, *flags):
        return argenseg(
            "train", "--config=tests/cli/tiny_config.py", f"--workdir={tmp_path / workdir}", *flags, env=env
        )

    def result(done):
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = result(train("run"))
    assert {"step", "loss", "text_loss", "gen_loss", "seconds"} <= first.keys() and first["step"] == 2
    more = train("run", "--config.train.steps=3")
    assert "resumed at step 2" in more.stderr
    whole = result(train("whole", "--config.train.steps=3"))
    assert (result(more)["loss"], whole["step"]) == (whole["loss"], 3)  # to the last bit
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert "optim.lr: 0.01 -> 7.0" in error_of(train("run", "--config.optim.lr=7.0"))
