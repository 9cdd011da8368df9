"""The evaluate command on random weights: what it prints, what it writes, its exit codes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from argenseg_jax import files
from argenseg_jax.ckpt import checkpoint, orbax_io
from argenseg_jax.data.synthetic.shapes import ShapesSource
from argenseg_jax.eval.visualize import encode_png
from argenseg_jax.models import variants
from argenseg_jax.train.run import init_fn
from configs import nano

KEYS = {
    "n",
    "cIoU",
    "gIoU",
    "Pr@0.5",
    "Pr@0.6",
    "Pr@0.7",
    "Pr@0.8",
    "Pr@0.9",
    "gIoU_target",
    "N-acc",
    "T-acc",
    "baseline_gIoU",
    "baseline_cIoU",
    "seconds_per_image",
    "seconds",
}


def evaluate(*args):
    """(exit code, last line of stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "argenseg_jax", "evaluate", *map(str, args)], capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout.strip().split("\n")[-1], done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = nano.get_config().to_dict()
    config["decode"]["max_text_tokens"] = 8
    model = variants.build(config["model"])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init_fn(model), jax.random.key(0))
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
    orbax_io.save_params(str(folder / "checkpoints" / "1"), params)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint.tokenizer_for(model, None).save(folder / "tokenizer")
    return folder


def test_scores_files_and_report(workdir, tmp_path):
    """An official JSONL with its own image root, whose baseline comes from the training data, and questions
    about text, in one command."""
    source = ShapesSource("simple", "test")
    with (tmp_path / "val.jsonl").open("w") as file:
        for i in range(3):
            files.write(tmp_path / "root" / f"{i}.png", encode_png(source[i].images[0]))
            files.write(tmp_path / "root" / f"m{i}.png", encode_png(source[i].masks[0]))
            file.write(
                json.dumps(
                    {
                        "id": i,
                        "image": f"{i}.png",
                        "mask": f"m{i}.png",
                        "kind": "a",
                        "conversations": source[i].conversations,
                    }
                )
                + "\n"
            )
    code, line, errors = evaluate(
        "--workdir",
        workdir,
        "--data",
        tmp_path / "val.jsonl",
        "--data",
        "shapes-chat:simple:test:2",
        "--image-root",
        tmp_path / "root",
        "--batch",
        2,
        "--limit",
        3,
    )
    assert code == 0, errors
    both = json.loads(line)
    assert both["n"] == 5 and both["seconds"] > 0
    got, chat = both["data"].values()
    assert chat["metric"] == "exact" and chat["n"] == 2 and 0 <= chat["accuracy"] <= chat["baseline_accuracy"]
    table = (workdir / "table.md").read_text()
    assert "| score | accuracy | cIoU | gIoU |" in table and table in errors
    assert not list(workdir.rglob("partial"))
    assert KEYS <= set(got) and got["n"] == 3 and got["by_kind"]["a"]["n"] == 3
    assert got["baseline_gIoU"] > 0
    folder = workdir / "eval" / "val"
    records = [json.loads(text) for text in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [0, 1, 2]
    assert records[0]["prediction"]["size"] == [64, 64]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["gIoU"] == got["gIoU"]
    assert all((folder / "pictures" / row["file"]).exists() for row in scores["pictures"])
    assert "val" in (workdir / "report.html").read_text()
    assert len(json.loads((folder / "coco_results.json").read_text())) <= 3
    code, line, errors = evaluate("--rescore", folder / "predictions.jsonl")  # no model is named
    assert code == 0 and json.loads(line)["gIoU"] == got["gIoU"], errors


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "--data"),
        (("--data", "shapes:simple:test"), "--workdir"),
        (("--data", "shapes:simple:nowhere", "--workdir", "W"), "nowhere"),
        (("--data", "no/such.jsonl", "--workdir", "W"), "no/such.jsonl"),
        (("--rescore", "no/such.jsonl"), "no/such.jsonl"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(workdir, args, says):
    code, _, errors = evaluate(*(workdir if a == "W" else a for a in args))
    last = errors.strip().split("\n")[-1]
    assert code == 2 and last.startswith("error: ") and says in last and "Traceback" not in errors
