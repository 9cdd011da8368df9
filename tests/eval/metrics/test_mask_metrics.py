"""Scores of masks and pictures, by hand: gRefCOCO, classes, AP, AUROC, clicks, PSNR and SSIM; the table."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from argenseg_jax.data.rle import encode_rle
from argenseg_jax.data.sources.interactive import innermost
from argenseg_jax.errors import UserError
from argenseg_jax.eval.metrics import anomaly, fidelity, instances, interactive, referring, registry, text


def block(top, left, bottom, right, side=20):
    mask = np.zeros((side, side), bool)
    mask[top:bottom, left:right] = True
    return mask


NONE, TEN = block(0, 0, 0, 0), block(0, 0, 10, 10)


def test_grefcoco():
    speck, over = block(0, 0, 7, 7), block(0, 0, 5, 10)  # 49 and 50 pixels
    pairs = [(TEN, TEN), (over, TEN), (speck, TEN), (speck, NONE), (over, NONE)]
    got = referring.generalized(pairs)
    assert got["n"] == 5
    assert got["gIoU"] == pytest.approx((1 + 0.5 + 0 + 1 + 0) / 5)
    assert got["cIoU"] == pytest.approx((100 + 50) / (100 + 100 + 100 + 0 + 50))
    assert got["N-acc"] == 0.5 and got["T-acc"] == pytest.approx(2 / 3)
    assert got["Pr@0.5"] == pytest.approx(2 / 3)  # of samples with a target; exactly 0.5 counts here
    assert got["Pr@0.6"] == pytest.approx(1 / 3)


def test_mean_iou_by_class():
    got = referring.by_class([("sky", TEN, TEN), ("sky", NONE, TEN), ("road", TEN, NONE), ("sea", NONE, NONE)])
    assert got == {"n": 4, "classes": 2, "mIoU": 0.25, "IoU_by_class": {"road": 0.0, "sky": 0.5}}
    assert referring.by_class([])["mIoU"] is None


def instance(mask, **more):
    return {"segmentation": encode_rle(mask), **more}


def test_instance_ap():
    """Two objects of a class; the better-scored answer is wrong, the second right: AP is 0.25."""
    far = block(12, 12, 18, 18)
    row = {
        "image": "a.jpg",
        "kind": "cat",
        "truths": [instance(TEN), instance(far)],
        "instances": [instance(TEN, score=0.5), instance(block(0, 12, 8, 20), score=0.9)],
    }
    got = instances.instance_scores([row])
    # precision 1/2 up to recall 1/2 (51 of 101 points), 0 beyond
    assert got["AP50"] == pytest.approx(0.5 * 51 / 101) == got["AP"]
    assert got["AP_small"] == got["AP"] and got["AP_large"] is None
    crowd = {
        "image": "a.jpg",
        "kind": "dog",
        "truths": [instance(TEN), instance(far, iscrowd=1)],
        "instances": [instance(TEN, score=0.5), instance(far, score=0.9)],
    }
    assert instances.instance_scores([crowd])["AP"] == pytest.approx(1)  # what hits a crowd is free
    assert instances.instance_scores([{**row, "instances": []}])["AP"] == 0.0
    assert instances.instance_scores([])["AP"] is None
    with pytest.raises(UserError, match="finite"):
        instances.instance_scores([{**row, "instances": [instance(TEN, score=math.nan)]}])


def broken(counts, size=(20, 20)):
    return {"segmentation": {"size": list(size), "counts": counts}, "score": 0.5}


@pytest.mark.parametrize(
    "more,fault",
    [
        ({"instances": [broken("nan")]}, "key `instances`: an RLE whose counts end within a number"),
        ({"truths": [broken("1")]}, "key `truths`: an RLE of 1 pixels, not 400"),
        ({"truths": [broken([-5, 405])]}, "a run of -5 pixels"),
        ({"truths": [broken("", (0, 20))]}, "20x0 pixels"),
        ({"truths": [broken("1", (2**31, 2))]}, "pixels"),
        ({"truths": [broken("1", (1, 2**63))]}, "of size"),
        ({"instances": [broken([64], (8, 8))]}, r"masks of \[20, 20\] and of \[8, 8\] for one image"),
        ({"instances": [{"segmentation": None, "score": 1}]}, "not a COCO run length"),
        ({"instances": [{"score": 1}]}, "key `instances`: not a list of"),
        ({"instances": 5}, "a list of objects expected"),
        ({"truths": [5]}, "a list of objects expected"),
        ({"truths": [{**instance(TEN), "iscrowd": "x"}]}, "is 0 or 1"),
        ({"instances": [instance(TEN, score="1")]}, "finite score"),
        ({"instances": [instance(TEN, score=True)]}, "finite"),
        ({"image": []}, "key `image`"),
        ({"kind": {}}, "key `kind`"),
    ],
)
def test_instances_that_pycocotools_would_die_of(more, fault):
    row = {"image": "a.jpg", "kind": "cat", "truths": [instance(TEN)], "instances": [instance(TEN, score=0.5)]}
    with pytest.raises(UserError, match=fault) as caught:
        instances.instance_scores([row, {**row, **more}])
    assert "\n" not in str(caught.value)


def test_average_precision_is_pycocotools():
    """Equal to COCOeval bit by bit: crowds, equal scores, objects of all sizes, images in any order."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:150, :200]

    def blob():
        return (y - rng.integers(0, 150)) ** 2 + (x - rng.integers(0, 200)) ** 2 <= rng.integers(1, 60) ** 2

    rows = []
    for image in rng.permutation(12):
        for kind in range(3):
            truths = [blob() for _ in range(rng.integers(0, 5))]
            found = [np.roll(m, rng.integers(-3, 4, 2), (0, 1)) for m in truths for _ in range(rng.integers(0, 3))]
            rows.append(
                {
                    "image": f"{image}.jpg",
                    "kind": f"class {kind}",
                    "truths": [instance(m, iscrowd=int(rng.random() < 0.15)) for m in truths],
                    "instances": [
                        instance(m, score=float(rng.choice([0.1, 0.5, 0.5, rng.random()]))) for m in [*found, blob()]
                    ],
                }
            )
    rows = [rows[k] for k in rng.permutation(len(rows))]
    got = instances.instance_scores(rows)
    assert got == {"n": 36, **dict(zip(instances.NAMES, coco_eval(rows)))}
    assert 0.1 < got["AP"] < 0.9 and got["AP_small"] != got["AP_large"]
    crowded = {
        **rows[0],
        "truths": [instance(TEN)],
        "instances": [instance(block(0, 0, 10, 10 - k % 3), score=k / 200) for k in range(150)],
    }
    assert list(instances.instance_scores([crowded]).values())[1:3] == coco_eval([crowded])[:2]  # 100 of them


def coco_eval(rows):
    """COCOeval.stats[:6] of rows, by pycocotools alone."""
    images, kinds = ([*dict.fromkeys(row[key] for row in rows)] for key in ("image", "kind"))
    truths, found = [], []
    for row in rows:
        ids = {"image_id": images.index(row["image"]) + 1, "category_id": kinds.index(row["kind"]) + 1}
        truths += [
            {
                **ids,
                **t,
                "id": len(truths) + k,
                "area": float(coco_mask.area(t["segmentation"])),
                "bbox": coco_mask.toBbox(t["segmentation"]).tolist(),
                "iscrowd": t.get("iscrowd", 0),
            }
            for k, t in enumerate(row["truths"], 1)
        ]
        found += [{**ids, **d} for d in row["instances"]]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        data.dataset = {
            "images": [{"id": k, "height": 1, "width": 1} for k in range(1, len(images) + 1)],
            "annotations": truths,
            "categories": [{"id": k} for k in range(1, len(kinds) + 1)],
        }
        data.createIndex()
        run = COCOeval(data, data.loadRes(found), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if v < 0 else v for v in run.stats[:6].tolist()]


def test_instances_of_other_tools():
    """Counts as a list, and with runs of no pixels, on which pycocotools' own intersection stops early."""
    whole = {"size": [20, 20], "counts": [0, 5, 0, 395]}
    row = {
        "image": 3,
        "kind": "cat",
        "truths": [{"segmentation": whole, "iscrowd": False}],
        "instances": [{"segmentation": {"size": [20, 20], "counts": [0, 5, 0, 395, 0]}, "score": 0.5}],
    }
    assert instances.instance_scores([row])["AP"] == pytest.approx(1)


def test_auroc_and_f1():
    levels = np.array([[10, 200, 200, 90]], np.uint8)
    truth = np.array([[False, True, False, True]])
    counts = anomaly.level_counts(levels, truth)
    # pairs: 200 > 10, 200 = 200, 90 > 10, 90 < 200
    assert anomaly.auroc(counts) == (1 + 0.5 + 1 + 0) / 4
    assert anomaly.f1_max(counts) == pytest.approx(2 * 2 / (3 + 2))  # threshold 90
    assert np.array_equal(anomaly.dense(anomaly.sparse(counts)), counts)
    assert anomaly.auroc(counts[:, :50]) is None and anomaly.f1_max(counts * [[1], [0]]) is None
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 30, 200), rng.random(200) < 0.4
    pairs = np.sign(scores[labels][:, None] - scores[~labels][None])
    singles = anomaly.rank_counts(scores, labels)
    assert anomaly.auroc(singles) == pytest.approx((pairs + 1).mean() / 2)
    best = max(2 * (labels & (scores >= t)).sum() / ((scores >= t).sum() + labels.sum()) for t in range(30))
    assert anomaly.f1_max(singles) == pytest.approx(best)
    huge = np.array([[2**40, 0], [0, 2**40]])
    assert anomaly.auroc(huge) == 1.0  # 2**80 pairs


def test_anomaly_rows():
    good = {"levels": [[0, 90, 0], [30, 10, 0]]}
    bad = {"levels": [[0, 50, 0], [200, 0, 50]]}
    missed = {"levels": [[10, 90, 10]]}
    got = registry.score("anomaly", [good, bad, missed])
    assert got["image_AUROC"] == 0.5 and got["image_F1"] == pytest.approx(4 / 5)
    # 50 hits above all 240 quiet pixels; 10 above the 140 at 0, level with 90, below the 10 at 30
    assert got["pixel_AUROC"] == pytest.approx((50 * 240 + 10 * (140 + 45)) / (60 * 240))
    assert got["pixel_F1"] == pytest.approx(2 * 50 / (50 + 60))


def test_clicks():
    got = interactive.interactive([[0.5, 0.86, 0.95], [0.9], [0.1, 0.2, 0.3]])
    assert got["NoC@85"] == pytest.approx((2 + 1 + 20) / 3)
    assert got["NoC@90"] == pytest.approx((3 + 1 + 20) / 3)
    assert got["IoU@1"] == pytest.approx(0.5) and got["IoU@3"] == pytest.approx((0.95 + 0.9 + 0.3) / 3)
    assert "IoU@5" not in got


def test_where_the_next_click_goes():
    assert innermost(block(2, 4, 9, 11)) == (7, 5)
    assert innermost(NONE) is None
    ring = block(0, 0, 20, 20) & ~block(3, 3, 20, 20)
    x, y = innermost(ring)
    assert ring[y, x] and (x == 1 or y == 1)  # in the middle of its width, not in its hole
    assert interactive.next_click(NONE, TEN)[2] is True
    assert interactive.next_click(TEN | block(12, 12, 20, 20), TEN)[2] is False
    assert interactive.next_click(TEN, TEN) is None


def test_psnr_and_ssim():
    a = np.full((16, 16), 100, np.uint8)
    b = a + np.uint8(10)
    assert fidelity.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 100))
    assert fidelity.psnr(a, a) == fidelity.IDENTICAL and fidelity.ssim(a, a) == pytest.approx(1)
    c1 = 2.55**2  # flat pictures: only the means differ
    assert fidelity.ssim(a, b) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 11, 11, 1), np.uint8)  # one window
    g = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(g, g)[..., None] / g.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, vxy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    want = (2 * mx * my + c1) * (2 * vxy + 7.65**2) / ((mx**2 + my**2 + c1) * (vx + vy + 7.65**2))
    assert fidelity.ssim(x, y) == pytest.approx(want)
    with pytest.raises(ValueError, match="one shape"):
        fidelity.psnr(a, b[:8])


def test_agreement_with_torchmetrics():
    """Where it is installed; the cases by hand above need nothing."""
    tm, torch = pytest.importorskip("torchmetrics.functional"), pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 256, (2, 32, 24, 3), np.uint8)
    px, py = (torch.tensor(v.transpose(2, 0, 1)[None].astype(np.float64)) for v in (x, y))
    assert fidelity.psnr(x, y) == pytest.approx(
        float(tm.image.peak_signal_noise_ratio(px, py, data_range=255.0)), rel=1e-5
    )
    full = tm.image.structural_similarity_index_measure(px, py, data_range=255.0, return_full_image=True)[1]
    inside = full[..., 5:-5, 5:-5]  # theirs goes on to the edge, by reflection
    assert fidelity.ssim(x, y) == pytest.approx(float(inside.mean()), abs=1e-6)
    scores, labels = rng.integers(0, 256, 400), rng.random(400) < 0.3
    want = float(tm.classification.binary_auroc(torch.tensor(scores / 255), torch.tensor(labels * 1)))
    assert anomaly.auroc(anomaly.rank_counts(scores, labels)) == pytest.approx(want, abs=1e-6)
    precision, recall, _ = tm.classification.binary_precision_recall_curve(
        torch.tensor(scores / 255), torch.tensor(labels * 1)
    )
    best = float((2 * precision * recall / (precision + recall)).nan_to_num().max())
    assert anomaly.f1_max(anomaly.rank_counts(scores, labels)) == pytest.approx(best, abs=1e-6)
    maps = rng.integers(0, 4, (2, 6, 20, 20))
    each = tm.classification.multiclass_jaccard_index(
        torch.tensor(maps[0]), torch.tensor(maps[1]), num_classes=4, average="none"
    )
    ours = referring.by_class((str(c), said == c, true == c) for said, true in zip(*maps) for c in range(4))
    assert list(ours["IoU_by_class"].values()) == pytest.approx(each.tolist(), abs=1e-6)
    masks = rng.random((2, 20, 20)) < [[[0.3]], [[0.6]]]
    assert referring.iou(*masks) == pytest.approx(
        float(tm.classification.binary_jaccard_index(torch.tensor(masks[0]), torch.tensor(masks[1] * 1))), abs=1e-6
    )
    said, true = rng.random((2, 200)) < 0.6
    got = text.pope(["yes" if v else "no" for v in said], ["yes" if v else "no" for v in true])
    for key, name in (
        ("accuracy", "binary_accuracy"),
        ("precision", "binary_precision"),
        ("recall", "binary_recall"),
        ("F1", "binary_f1_score"),
    ):
        want = getattr(tm.classification, name)(torch.tensor(said * 1), torch.tensor(true * 1))
        assert got[key] == pytest.approx(float(want), abs=1e-6)


def mask_row(prediction, truth, **more):
    return {"answer": "Sure.", "prediction": encode_rle(prediction), "truth": encode_rle(truth), **more}


def test_table():
    rows = [mask_row(TEN | block(12, 12, 20, 20), TEN, ignore=encode_rle(block(12, 0, 20, 20))), mask_row(NONE, TEN)]
    assert registry.score("referring", rows)["gIoU"] == 0.5  # what lies on ignored pixels is free
    assert registry.score("referring", rows)["cIoU"] == 0.5
    assert registry.score("grefcoco", rows)["T-acc"] == 0.5
    boxed = [mask_row(NONE, TEN, answer="<box>[[0,0,500,500]]</box>"), mask_row(TEN, TEN)]
    boxed = [{"answer": "", **r} for r in boxed]
    assert registry.score("boxes", boxed)["Acc@0.5"] == 1.0
    assert registry.score("boxes", rows)["Acc@0.5"] == 0.0
    said = [{"answer": "yes", "reference": "yes"}, {"answer": "no", "reference": "yes"}]
    assert registry.score("pope", said)["recall"] == 0.5
    assert registry.score("fidelity", [{"psnr": 30, "ssim": 0.5}, {"psnr": 20, "ssim": 1}]) == {
        "n": 2,
        "PSNR": 25.0,
        "SSIM": 0.75,
    }
    with pytest.raises(UserError, match="'nonsense' is unknown; there are referring"):
        registry.score("nonsense", rows)
    with pytest.raises(UserError, match=r"p.jsonl:1: metric 'semantic' needs the key `kind`"):
        registry.score("semantic", rows, "p.jsonl")
