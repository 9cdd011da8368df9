"""Runs the points of a config's sweep(add), and compares them.

  python -m argenseg_jax sweep --config configs/sweep_example.py --workdir runs/sweep
  python -m argenseg_jax sweep --config configs/sweep_example.py --workdir gs://bucket/sweep \
      --launch jobset --out jobs.yaml

Each point is a `train` run in WORKDIR/NAME; with --data it is scored by `evaluate` too. A second
call resumes where the first one stopped. WORKDIR/sweep.md and sweep.svg show the metrics over the
swept values. --launch commands, slurm and jobset start nothing: they write shell lines, an array
job or JobSets, on stdout or to --out. When those have run, `--launch nothing` collects.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from absl import flags

from argenseg_jax import processes
from argenseg_jax.cli import common
from argenseg_jax.errors import UserError

FLAGS = common.FLAGS
common.define_config()
common.define_workdir("Directory of the sweep; every point has a folder in it.")
common.define_checksums()
flags.DEFINE_enum(
    "launch",
    "here",
    ["here", "commands", "slurm", "jobset", "nothing"],
    "Train here, one after another; or write what starts the points elsewhere; or only collect what there is.",
)
flags.DEFINE_string("out", None, "File that commands, array job or JobSets go to; default: stdout.")
flags.DEFINE_string("data", None, "Score each trained point on this data (see `evaluate --help`).")
flags.DEFINE_string("image_root", "", "Of `evaluate`.")
flags.DEFINE_string(
    "metric", None, "The number that decides and is plotted; default: the first of the config's metrics(), or loss."
)


def run() -> dict[str, Any]:
    """Returns {points, done, failed, metric, best, table, plot}, or {points, file}."""
    common.require("config", "workdir")
    from argenseg_jax import files
    from argenseg_jax.train import sweep

    config = FLAGS["config"]
    if FLAGS.out:
        common.check_outputs({"config": config.spec.partition(":")[0]}, {"out": [FLAGS.out]})
    points = sweep.expand(config.module, config.value)
    commands = [sweep.train_args(point, config.spec, config.overrides, FLAGS.workdir) for point in points]
    if FLAGS.launch in ("commands", "slurm", "jobset"):
        return {"points": len(points), "file": _write(commands)}
    failed = 0
    if FLAGS.launch == "here":
        from argenseg_jax import locks

        with locks.Lock(files.join(FLAGS.workdir, locks.FILE), FLAGS.workdir, common.log):
            failed = _train(points, commands)
    listed = sweep.listed_metrics(config.module)
    metrics = tuple(dict.fromkeys((FLAGS.metric or listed[0], *listed)))
    return _collect(points, metrics, failed)


def _write(commands: list[list[str]]) -> str | None:
    """Writes what starts the points elsewhere; returns the file, None for stdout."""
    from argenseg_jax import files
    from argenseg_jax.train import sweep

    write = {"commands": sweep.command_lines, "slurm": sweep.slurm_array, "jobset": sweep.job_sets}
    text = write[FLAGS.launch](commands)
    if FLAGS.out:
        files.write(FLAGS.out, text)
    else:
        print(text, end="")
    return FLAGS.out


def _train(points: list[Any], commands: list[list[str]]) -> int:
    """Trains, and scores, what is not done yet; returns how many points failed."""
    from etils import epath

    from argenseg_jax import files
    from argenseg_jax.train import sweep

    failed = 0
    for number, (point, args) in enumerate(zip(points, commands), 1):
        folder = epath.Path(FLAGS.workdir) / point.name
        title = f"[{number}/{len(points)}] {point.name}"
        trained = sweep.is_trained(folder, point)
        common.log(f"{title}: {'trained already' if trained else 'trains'}")
        try:
            if not trained:
                _call(args)
            if FLAGS.data and sweep.scores(folder, point, FLAGS.data) is None:
                scores = _call(
                    [
                        "evaluate",
                        f"--workdir={folder}",
                        f"--data={FLAGS.data}",
                        f"--image_root={FLAGS.image_root}",
                        "--previews=0",
                    ]
                )
                files.write(
                    folder / sweep.SCORES,
                    json.dumps({**scores, "data": FLAGS.data, "step": point.steps}, indent=1) + "\n",
                )
        except subprocess.CalledProcessError as error:
            failed += 1
            common.log(f"{title}: {error.cmd} failed with exit code {error.returncode}")
    return failed


def _call(args: list[str]) -> dict[str, Any]:
    """Runs a command as a process of its own, SIGTERM passed on; returns its JSON line.

    Raises CalledProcessError; exits where the command was told to stop.
    """
    options = [f"--cpu_devices={FLAGS.cpu_devices}"] if FLAGS.cpu_devices else []
    options += [] if FLAGS.checksums else ["--checksums=false"]
    child = subprocess.Popen(
        [sys.executable, "-m", "argenseg_jax", *args, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=processes.child_environment(),
    )
    asked: list[int] = []

    def stop(number: int, _: Any) -> None:
        asked.append(number)
        child.terminate()  # also for Ctrl-C: the terminal sends it to the child too, and `train` saves first

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        out, _ = child.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        common.log("stopped; the same command resumes")
        sys.exit(128 + asked[0])
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, args[0])
    return json.loads(out.splitlines()[-1])


def _collect(points: list[Any], metrics: tuple[str, ...], failed: int) -> dict[str, Any]:
    """Writes the table and the plot of what is trained."""
    from etils import epath

    from argenseg_jax import files
    from argenseg_jax.train import sweep

    root = epath.Path(FLAGS.workdir)
    rows = [sweep.numbers(root / point.name, point, FLAGS.data) for point in points]
    known = sorted({key for row in rows for key in row})
    if known and metrics[0] not in known:
        raise UserError(f"--metric {metrics[0]}: the points have {', '.join(known)}")
    text = sweep.table(points, rows, metrics)
    common.log(text)
    files.write(root / "sweep.md", text)
    files.write(root / "sweep.svg", sweep.plot(points, rows, metrics[0]))
    best = sweep.best(rows, metrics[0])
    return {
        "points": len(points),
        "done": sum(map(bool, rows)),
        "failed": failed,
        "metric": metrics[0],
        "best": None if best is None else {**points[best].settings, metrics[0]: rows[best][metrics[0]]},
        "table": str(root / "sweep.md"),
        "plot": str(root / "sweep.svg"),
        **({"ok": False} if failed else {}),
    }
