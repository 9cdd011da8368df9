"""evaluate on several hosts: each has its share, one writes, and the results are those of one process."""

import json
import signal
import time

import pytest

from tests import processes, tiny
from tests.cli.command import call

pytestmark = pytest.mark.slow


def test_two_processes_give_the_results_of_one(tmp_path, capfd):
    """Also where one of them was killed, and the command comes again."""
    run = tiny.workdir(tmp_path / "run")
    args = (
        "evaluate",
        "--workdir",
        run,
        "--data",
        "shapes:simple:test",
        "--limit",
        7,
        "--batch",
        2,
        "--previews",
        0,
        "--save_every",
        0,
    )
    code, out, err = call(capfd, *args, "--out", tmp_path / "one")
    assert code == 0, err
    whole = json.loads(out.splitlines()[-1])

    both = processes.start(2, "argenseg_jax", *args, "--distributed", "--out", tmp_path / "two")
    partial = tmp_path / "two" / "eval" / "shapes-simple-test" / "partial"
    while not list(partial.glob("*.jsonl")) and both[1].poll() is None:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGKILL)
    assert [code != 0 for code, *_ in processes.finish(both)] == [True, True]

    first, second = processes.run(2, "argenseg_jax", *args, "--distributed", "--out", tmp_path / "two")
    assert (first[0], second[0], "{" in second[1]) == (0, 0, False), (first, second)
    said = json.loads(first[1].splitlines()[-1])
    different = ("seconds", "seconds_per_image", "predictions", "report")
    assert {k: v for k, v in said.items() if k not in different} == {
        k: v for k, v in whole.items() if k not in different
    }
    for name in ("predictions.jsonl", "coco_results.json"):
        one, two = ((tmp_path / k / "eval" / "shapes-simple-test" / name).read_text() for k in ("one", "two"))
        assert one == two
    assert not partial.exists() and (tmp_path / "two" / "report.html").exists()
