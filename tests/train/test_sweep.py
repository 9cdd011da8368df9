"""A sweep's points, the jobs that it writes, its table and plot; and the command on a tiny model."""

import json
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from argenseg_jax import config_files
from argenseg_jax.errors import UserError
from argenseg_jax.train import sweep
from configs import common, sweep_example
from tests.cli import command

CONFIG = "configs/sweep_example.py"


def expand(*settings):
    def add_all(add):
        for s in settings:
            add(**s)

    return sweep.expand(types.SimpleNamespace(__file__="x.py", sweep=add_all), common.base())


def test_points_are_named_after_their_settings():
    points = sweep.expand(config_files.load_module(CONFIG), sweep_example.get_config())
    assert len(points) == 6 and points[1].name == "optim.lr=0.001,seed=1"
    assert points[0].steps == sweep_example.get_config().train.steps
    assert expand({"train.steps": 7})[0].steps == 7
    a, b = expand({"init_from": "a/b"}, {"init_from": "a_b"})
    assert re.fullmatch(r"init_from=a_b-[0-9a-f]{8}", a.name) and b.name == "init_from=a_b"


@pytest.mark.parametrize(
    "settings, text",
    [
        ([], "adds no point"),
        ([{"seed": 1}, {"seed": 1}], "'seed=1' twice"),
        ([{"train.stepz": 1}], "stepz"),
        ([{"seed": "one"}], "seed"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_sweep_is_said(settings, text):
    with pytest.raises(UserError, match=text):
        expand(*settings)
    with pytest.raises(UserError, match="no sweep"):
        sweep.expand(config_files.load_module("configs/nano.py"), common.base())


def commands():
    points = expand({"data.sources": ("a b*2", "c'd"), "seed": 1}, {"optim.name": "muon"})
    return [sweep.train_args(p, "c.py:x=1", {"train.steps": 3, "seed": 9}, "gs://b/root/") for p in points]


def test_a_point_overrides_the_command_line():
    assert commands()[0][:5] == [
        "train",
        "--config=c.py:x=1",
        "--config.train.steps=3",
        "--config.seed=1",
        """--config.data.sources=('a b*2', "c'd")""",
    ]
    assert commands()[1][-1] == "--workdir=gs://b/root/optim.name=muon"


def test_a_slurm_array_runs_each_point(tmp_path):
    """A stand-in for srun prints what the task would start."""
    text = sweep.slurm_array(commands())
    assert text.index("#SBATCH --array=0-1") < text.index("set -euo pipefail")
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    for i, args in enumerate(commands()):
        done = subprocess.run(
            ["bash", "-c", text],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": ".", "SLURM_ARRAY_TASK_ID": str(i)},
        )
        assert done.stdout.splitlines()[1:] == ["-m", "argenseg_jax", *args, "--distributed"]


def test_job_sets_hold_the_arguments():
    sets = list(yaml.safe_load_all(sweep.job_sets(commands())))
    assert [s["metadata"]["name"] for s in sets] == ["argenseg-0", "argenseg-1"]
    for one, args in zip(sets, commands()):
        assert one["kind"] == "JobSet"
        pod = one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"] == ["python", "-m", "argenseg_jax", *args, "--distributed"]


def test_table_and_plot():
    points = expand(*({"optim.lr": lr, "optim.name": name} for lr in (0.1, 0.001) for name in ("muon", "adamw")))
    rows = [{"loss": 3.0, "gIoU": 0.2}, {"loss": 2.0, "gIoU": 0.6}, {}, {"loss": None}]
    lines = sweep.table(points, rows, ("loss", "gIoU")).splitlines()
    assert lines[0] == "| optim.lr | optim.name | loss | gIoU |"
    assert lines[3] == "| 0.1 | adamw | **2** | **0.6** |" and lines[4] == "| 0.001 | muon | - | - |"
    assert sweep.best(rows, "loss") == 1 == sweep.best(rows, "gIoU") and sweep.best(rows, "x") is None
    svg = ElementTree.fromstring(sweep.plot(points, rows, "loss"))
    circles = svg.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * 2  # two panels of two trained points
    ElementTree.fromstring(sweep.plot(points, [{}] * 4, "loss"))


def test_the_axis_is_logarithmic_over_a_decade():
    assert sweep._axis([1, 100, 10]) == ([1, 10, 100], pytest.approx([0, 0.5, 1]))
    assert sweep._axis([1, 3, 2]) == ([1, 2, 3], [0, 0.5, 1])
    assert sweep._axis(["b", "a"]) == (["a", "b"], [0, 1]) and sweep._axis([5]) == ([5], [0.5])


def test_the_command_writes_jobs_and_collects_nothing(tmp_path, capfd):
    code, out, _ = command.call(
        capfd, "sweep", "--config", CONFIG, "--workdir", tmp_path / "s", "--config.train.steps=2", "--launch=commands"
    )
    lines = out.splitlines()
    assert code == 0 and len(lines) == 7 and json.loads(lines[-1]) == {"points": 6, "file": None}
    assert "--config.train.steps=2 --config.optim.lr=0.001 --config.seed=0" in lines[0]
    code, out, _ = command.call(capfd, "sweep", "--config", CONFIG, "--workdir", tmp_path / "s", "--launch=nothing")
    assert code == 0 and json.loads(out)["done"] == 0 and (tmp_path / "s" / "sweep.svg").exists()


@pytest.mark.slow
def test_a_sweep_trains_resumes_and_names_the_best(tmp_path):
    """The second call trains nothing, and finds what the first one left."""
    config = tmp_path / "configs" / "two.py"
    config.parent.mkdir()
    config.write_text(
        "from tests.cli.tiny_config import get_config\n"
        "def sweep(add):\n    add(seed=1)\n    add(**{'train.global_batch': 3})\n"
    )

    def run():
        done = subprocess.run(
            [sys.executable, "-m", "argenseg_jax", "sweep", f"--config={config}", f"--workdir={tmp_path / 's'}"],
            capture_output=True,
            text=True,
            check=False,
        )
        return done, json.loads(done.stdout.splitlines()[-1])

    done, result = run()
    assert done.returncode == 1 and "train.global_batch=3" in done.stderr, done.stderr
    assert (result["points"], result["done"], result["failed"]) == (2, 1, 1)
    assert result["best"]["seed"] == 1 and "**" in (tmp_path / "s" / "sweep.md").read_text()
    done, again = run()
    assert "seed=1: trained already" in done.stderr and again["best"] == result["best"]
