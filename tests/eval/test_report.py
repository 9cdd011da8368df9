"""The report: complete, self-contained, escaped; and the pictures in it."""

import json
import re
import types

import numpy as np
from PIL import Image

from argenseg_jax import files
from argenseg_jax.data.synthetic.shapes import ShapesSource
from argenseg_jax.data.synthetic.shapes_tasks import TaskSource
from argenseg_jax.eval import report, visualize
from argenseg_jax.eval.evaluator import Evaluator


def predict(requests):
    """Answers everything with the upper half, and four scales."""
    masks = [np.arange(64)[:, None].repeat(64, 1) < 32 for _ in requests]
    scales = [np.full((4, 16, 16, 3), 255, np.uint8)]
    return [types.SimpleNamespace(masks=[m], text="Sure.", scales=scales) for m in masks]


def test_report_is_complete_and_self_contained(tmp_path):
    source = ShapesSource("full", "test", size=12)
    result = Evaluator(predict, preview_fn=predict, previews=2).run(source)
    folder = tmp_path / "eval" / "shapes_test"
    rows = report.save_images(folder / "pictures", source, result, each=3)
    assert [r["group"] for r in rows] == (["random"] * 3 + ["best"] * 3 + ["worst"] * 3 + ["scales"] * 2)
    best, worst = ([r["iou"] for r in rows if r["group"] == g] for g in ("best", "worst"))
    assert best == sorted(best, reverse=True) and min(best) >= max(worst)
    (folder / "scores.json").write_text(json.dumps({**result.scores, "pictures": rows}))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "phase": "lm", "loss": 3.0 / s, "gen_loss": None}) + "\n" for s in range(1, 40))
    )
    (tmp_path / "config.json").write_text('{"model": {"variant": "<nano>"}}')
    files.write(tmp_path / "pictures" / "a & b.png", visualize.encode_png(np.zeros((4, 4, 3), np.uint8)))

    page = report.write_report(tmp_path).read_text()
    assert "shapes_test" in page and "lm loss" in page and "gen_loss" not in page
    assert page.count("<img ") == 3 * 3 + 2 * 2 + 1
    assert not re.search(r"(src|href)=['\"]?(?!['\"]?data:)", page)  # nothing from outside
    assert "&lt;nano&gt;" in page and "<nano>" not in page and "a &amp; b" in page
    assert not list(tmp_path.rglob("*.part"))


def test_table_in_the_form_of_the_papers():
    found = {
        "refcoco val": {"metric": "referring", "cIoU": 0.8631, "gIoU": 0.9},
        "ade": {"metric": "semantic", "mIoU": None},
        "pairs": {"metric": "fidelity", "PSNR": 21.44, "SSIM": 0.5},
        "vqa": {"metric": "vqav2", "accuracy": 1.0},
    }
    assert report.paper_table(found).split("\n") == [
        "|  | refcoco val |  | ade | pairs |  | vqa |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| score | cIoU | gIoU | mIoU | PSNR | SSIM | accuracy |",
        "| value | 86.3 | 90.0 | – | 21.4 | 50.0 | 100.0 |",
    ]


def test_a_picture_of_a_described_scene_is_shown_without_an_image(tmp_path):
    source = TaskSource("draw", size=3)
    result = Evaluator(predict).run(source)
    assert [r.kind for r in result.records] == [source[i].meta["kind"] for i in range(3)]
    assert len(report.save_images(tmp_path, source, result, each=1)) == 3


def test_report_of_an_empty_workdir(tmp_path):
    assert "ARGenSeg" in report.write_report(tmp_path).read_text()


def test_overlay_lights_the_mask_and_draws_its_edge():
    image = np.full((9, 9, 3), (200, 100, 0), np.uint8)
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    got = visualize.overlay(image, mask, color=(1, 2, 3))
    assert (got[3:6, 3:6] == image[0, 0]).all()  # inside: as it was
    assert (got[2, 2:7] == (1, 2, 3)).all()  # the edge
    outside = got[~mask]
    assert (outside == outside[0, 0]).all() and outside[0, 0] < 100  # grey and dim


def test_comparison_keeps_the_aspect_ratio():
    image = np.zeros((40, 80, 3), np.uint8)
    mask = np.zeros((40, 80), bool)
    picture = visualize.comparison(image, mask, mask)
    assert isinstance(picture, Image.Image)
    assert picture.height == 200 and picture.width == 3 * 400 + 2 * visualize.GAP
