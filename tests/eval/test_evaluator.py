"""The evaluator on predictors whose answers are known, its baselines, and its records."""

import dataclasses
import json
import types

import numpy as np
import pytest

from argenseg_jax import distributed
from argenseg_jax.data.rle import decode_rle, encode_rle
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.synthetic.shapes import ShapesSource
from argenseg_jax.errors import UserError
from argenseg_jax.eval import evaluator
from argenseg_jax.eval.evaluator import Evaluator, constant_baseline
from argenseg_jax.eval.metrics.referring import iou
from argenseg_jax.eval.spool import Spool

SIDE = 8


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def sample(value: int, *masks: np.ndarray, text: str = "Segment it.", **meta) -> Sample:
    """A sample whose image is one grey value, by which a fake predictor knows it."""
    image = np.full((SIDE, SIDE, 3), value, np.uint8)
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Sure: " + "<mask>" * len(masks)}]
    return Sample(conversations=turns, images=(image,), masks=masks, meta=meta)


def answers(by_value):
    """A predict_fn that answers an image of grey value v with the masks by_value[v]."""

    def predict(requests):
        return [
            types.SimpleNamespace(masks=[m > 0 for m in by_value[int(r.image[0, 0, 0])]], text="Sure.", scales=[])
            for r in requests
        ]

    return predict


LEFT, RIGHT, ALL, NONE = box(0, 0, 8, 4), box(0, 4, 8, 8), box(0, 0, 8, 8), box(0, 0, 0, 0)


def test_first_mask_counts_and_no_mask_is_empty():
    source = [sample(0, LEFT), sample(1, LEFT), sample(2, NONE)]
    got = Evaluator(answers({0: [LEFT, RIGHT], 1: [], 2: []}), batch=2).run(source)
    assert [r.iou for r in got.records] == [1.0, 0.0, 1.0]
    assert [r.masks for r in got.records] == [2, 0, 0]
    assert got.scores["gIoU"] == pytest.approx(2 / 3)
    assert got.scores["cIoU"] == pytest.approx(32 / 64)
    assert got.scores["N-acc"] == 1.0 and got.scores["T-acc"] == 0.5


def test_union_of_masks():
    source = [sample(0, LEFT, RIGHT)]
    predict = answers({0: [LEFT, RIGHT]})
    assert Evaluator(predict, masks="union").run(source).scores["gIoU"] == 1.0
    assert Evaluator(predict, masks="first").run(source).scores["gIoU"] == 1.0
    assert Evaluator(answers({0: [ALL]}), masks="first").run(source).scores["gIoU"] == 0.5
    with pytest.raises(UserError, match="eval.masks"):
        Evaluator(predict, masks="second")


def test_limit_kinds_and_question():
    source = [sample(v, LEFT, kind="ab"[v % 2], text=f"Segment {v}.") for v in range(5)]
    got = Evaluator(answers({v: [LEFT if v % 2 else RIGHT] for v in range(5)})).run(source, limit=3)
    assert got.scores["n"] == 3
    assert got.scores["by_kind"] == {"a": {"n": 2, "gIoU": 0.0}, "b": {"n": 1, "gIoU": 1.0}}
    assert [r.question for r in got.records] == ["Segment 0.", "Segment 1.", "Segment 2."]


@pytest.mark.parametrize("n, batch", [(7, 4), (3, 8), (4, 2)])
def test_a_ragged_last_batch_counts_every_sample_once(n, batch):
    asked = []

    def predict(requests):
        asked.append([int(r.image[0, 0, 0]) for r in requests])
        return answers({v: [LEFT] for v in range(n)})(requests)

    got = Evaluator(predict, batch=batch).run([sample(v, LEFT) for v in range(n)])
    assert [v for values in asked for v in values] == list(range(n)) == [r.index for r in got.records]
    assert all(len(values) == batch for values in asked[:-1]) and got.scores["n"] == n


def test_baseline_of_shapes_is_the_mask_of_all_objects():
    source = ShapesSource("full", "test", size=30)
    got = Evaluator(lambda rs: [types.SimpleNamespace(masks=[], text="", scales=[]) for _ in rs]).run(source)
    want = [iou(np.asarray(s.meta["all_objects_mask"]) > 0, s.masks[0] > 0) for s in map(source.__getitem__, range(30))]
    assert got.scores["baseline_gIoU"] == pytest.approx(np.mean(want))
    assert got.scores["gIoU"] < got.scores["baseline_gIoU"]


def test_constant_baseline_per_class():
    train = (
        [sample(0, LEFT, text="Segment the sky in the image.")] * 3
        + [sample(0, RIGHT, text="Segment the road in the image.")] * 3
        + [sample(0, ALL, text="Segment the road sign in the image.")]
    )
    constant = constant_baseline([train], side=SIDE)
    assert np.array_equal(constant("<image> instructions: sky.; please segment"), LEFT > 0)
    assert np.array_equal(constant("Segment the road in the image."), RIGHT > 0)
    assert np.array_equal(constant("Segment the road sign, please."), ALL > 0)
    assert np.array_equal(constant("Segment the cat."), ALL > 0)  # mean of all: 4/7 and 4/7 > 0.2
    got = Evaluator(answers({0: []}), baseline=constant).run(train[:4])
    assert got.scores["baseline_gIoU"] == 1.0 and got.scores["gIoU"] == 0.0


def test_scores_of_text_and_of_pictures():
    """Answers by kind, beside the commonest answer; a generated picture against the true one."""
    source = [
        dataclasses.replace(
            sample(v, kind="count", metric="exact", reference=r),
            conversations=[{"from": "human", "value": "How many?"}, {"from": "gpt", "value": r}],
        )
        for v, r in enumerate("2210")
    ]
    says = lambda rs: [types.SimpleNamespace(masks=[], text="2", scales=[], images=[]) for _ in rs]
    got = Evaluator(says).run(source).scores
    assert got["accuracy"] == got["baseline_accuracy"] == 0.5
    assert got["by_kind"] == {"count": {"n": 4, "accuracy": 0.5}}
    picture = np.repeat(ALL[..., None], 3, -1)
    drawn = [dataclasses.replace(sample(0, np.tile(LEFT, (2, 2)), metric="fidelity"), images=())]
    images = lambda pixels: lambda rs: [types.SimpleNamespace(masks=[], text="", scales=[], images=pixels)]
    whole = np.tile(picture, (2, 2, 1))
    assert Evaluator(images([whole])).run(drawn).scores["PSNR"] == pytest.approx(10 * np.log10(2))
    assert Evaluator(images([])).run(drawn).scores["PSNR"] == pytest.approx(10 * np.log10(2))


def test_rle_round_trip_and_resize():
    mask = np.random.default_rng(0).random((5, 7)) < 0.5
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)
    assert evaluator.resize(LEFT > 0, (16, 32)).sum() == 16 * 16


def test_faulty_samples_are_named():
    run = Evaluator(answers({0: []})).run
    with pytest.raises(UserError, match="f.jsonl:7.*no mask"):
        run([sample(0, line="f.jsonl:7")])
    with pytest.raises(UserError, match="f.jsonl:8.*shape"):
        run([dataclasses.replace(sample(0, LEFT, line="f.jsonl:8"), images=(np.zeros((4, 4, 3), np.uint8),))])
    with pytest.raises(UserError, match="no sample"):
        run([])


@pytest.mark.parametrize(
    "bad, metric, says",
    [
        (dict(metric="pope"), "", "f.jsonl:1: metric 'pope' needs the key `reference`"),
        (dict(), "vqav2", "f.jsonl:1: metric 'vqav2' needs the key `reference`"),
        (dict(), "semantic", "f.jsonl:1: metric 'semantic' needs the key `kind`"),
        (dict(), "instances", "f.jsonl:1: metric 'instances' needs the key `image`"),
        (dict(metric="pope", reference="maybe"), "", "f.jsonl:1: key `reference`: 'yes' or 'no' expected"),
        (dict(reference="two"), "vqav2", "f.jsonl:1: key `reference`: a list of texts"),
        (dict(metric="spelling"), "", "metric 'spelling' is unknown"),
    ],
)
def test_a_metric_that_does_not_fit_is_found_before_the_model_answers(bad, metric, says):
    asked = []
    with pytest.raises(UserError, match=says):
        Evaluator(asked.append, metric=metric).run([sample(0, LEFT, line="f.jsonl:1", **bad)])
    assert not asked


def test_a_later_sample_without_a_key_is_found_when_it_is_answered():
    source = [
        sample(0, LEFT, kind="a", line="f.jsonl:1"),
        sample(1, LEFT, line="f.jsonl:2"),
        sample(2, LEFT, kind="a", line="f.jsonl:3"),
    ]
    asked = []

    def predict(requests):
        asked.append(requests)
        return answers({v: [LEFT] for v in range(3)})(requests)

    with pytest.raises(UserError, match="f.jsonl:2: metric 'semantic' needs the key `kind`"):
        Evaluator(predict, batch=1, metric="semantic").run(source)
    assert len(asked) == 2


@pytest.mark.parametrize("role", ["human", "user"])
def test_turns_of_the_user_by_either_name(role):
    """The question, and with it the constant answer of the class."""

    def named(value, mask, text):
        one = sample(value, mask, text=text)
        return dataclasses.replace(one, conversations=[{**one.conversations[0], "from": role}, one.conversations[1]])

    train = [named(0, LEFT, "Segment the sky."), named(0, RIGHT, "Segment the road.")]
    got = Evaluator(answers({0: [LEFT]}), baseline=constant_baseline([train], side=SIDE)).run(train)
    assert [r.question for r in got.records] == ["Segment the sky.", "Segment the road."]
    assert got.scores["baseline_gIoU"] == 1.0


def test_records_of_many_samples_wait_on_disk(monkeypatch):
    monkeypatch.setattr(evaluator, "GATHERED", 2)
    source = [sample(v, LEFT, id=f"{v}" * 1000) for v in range(9)]
    monkeypatch.setattr(evaluator, "Spool", lambda count: Spool(count, memory=1000))
    got = Evaluator(answers({v: [LEFT] for v in range(9)}), batch=4).run(source)
    assert [r.id for r in got.records] == [f"{v}" * 1000 for v in range(9)] and got.scores["gIoU"] == 1.0
    assert [json.loads(line)["index"] for line in got.records.spool.lines()] == list(range(9))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_scores_do_not_depend_on_the_number_of_processes(monkeypatch, processes):
    """Each in turn, as in a job of several: what they gather goes through JSON, as it does there."""
    source = [sample(i, box(0, 0, 8, 1 + i), kind="ab"[i % 2], id=f"s{i}") for i in range(6)]
    predict = answers({i: [box(i, 0, 8, 3)] for i in range(6)})
    whole = Evaluator(predict, batch=2, baseline=lambda text: LEFT > 0).run(source)
    shares = []

    class Gathered(Exception):
        """Ends a process where it would wait for the others."""

    def hand_over(value):
        shares.append(json.loads(json.dumps(value)))
        raise Gathered

    monkeypatch.setattr(distributed, "gather", hand_over)
    for p in range(processes):
        monkeypatch.setattr(distributed, "share", lambda count, p=p: range(p, count, processes))
        with pytest.raises(Gathered):
            Evaluator(predict, batch=2, baseline=lambda text: LEFT > 0).run(source)
    monkeypatch.setattr(distributed, "gather", lambda value: shares)
    got = Evaluator(predict, batch=2, baseline=lambda text: LEFT > 0).run(source)
    assert [r.to_dict() for r in got.records] == [r.to_dict() for r in whole.records]
    assert got.scores.pop("seconds_per_image") > 0 and whole.scores.pop("seconds_per_image") > 0
    assert got.scores == whole.scores and got.scores["by_kind"]["a"]["n"] == 3
