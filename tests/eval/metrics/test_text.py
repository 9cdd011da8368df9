"""Scores of text answers, by hand: POPE, VQA consensus and its normalisation, multiple choice, boxes."""

import numpy as np
import pytest

from argenseg_jax.errors import UserError
from argenseg_jax.eval.metrics import boxes, text
from argenseg_jax.eval.metrics.text import normalize, parse_choice, vqa_accuracy


def test_pope():
    said = ["Yes, there is.", "yes", "No, there is no dog.", "There is not any. Yes", "Yes"]
    got = text.pope(said, ["yes", "no", "no", "yes", "yes"])
    # yes: 1, 2, 5; true: 1, 4, 5
    assert got == pytest.approx(
        {"n": 5, "accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "yes_ratio": 3 / 5}
    )
    assert text.pope(["no"], ["no"])["precision"] is None
    assert text.pope([], [])["accuracy"] is None
    with pytest.raises(UserError, match="maybe"):
        text.pope(["no"], ["maybe"])


@pytest.mark.parametrize(
    "given,want",
    [
        ("The two dogs.", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("wouldntve", "wouldntve"),
        ("wouldnt've", "wouldn't've"),
        ("a/b", "b"),  # `a` is an article
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("well\nok", "well ok"),
        ("its", "its"),
        ("twas", "'twas"),
        ("e-mail", "e mail"),
        ("yes!", "yes"),
    ],
)
def test_vqa_normalisation(given, want):
    assert normalize(given) == want


def test_textvqa_splits_off_the_genitive():
    assert normalize("Levi's, store?", tokenize=True) == "levi 's store"


def test_vqa_consensus():
    five = ["red"] * 5 + ["Blue!"] + ["green"] * 4
    assert vqa_accuracy("red", five) == 1.0
    # one reference says blue: 9 of 10 leave-one-out sets hold it once, one set not at all
    assert vqa_accuracy("the blue", five) == pytest.approx(9 / 10 / 3)
    # two say it: 8 sets hold 2, two sets hold 1
    assert vqa_accuracy("x", ["x"] * 2 + ["y"] * 8) == pytest.approx((8 * 2 / 3 + 2 / 3) / 10)
    # three: 7 sets hold 3, three sets hold 2
    assert vqa_accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx((7 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("2", ["two"] * 10) == 0.0  # all agree: compared as they are
    assert vqa_accuracy("2", ["two"] * 10, tokenize=True) == 1.0
    assert text.vqa(["red", "pink"], [five, five])["accuracy"] == 0.5
    with pytest.raises(UserError, match="without reference"):
        vqa_accuracy("x", [])


@pytest.mark.parametrize(
    "response,want",
    [
        ("B", "B"),
        ("(C)", "C"),
        ("Answer: B.", "B"),
        ("It is (A), no, (B).", "B"),
        ("I think that the answer must be the dog here", "B"),
        ("the dog", None),  # too short for wordings
        ("first the cat, then of course the dog, then the cat", "A"),
        ("", None),
    ],
)
def test_multiple_choice(response, want):
    assert parse_choice(response, {"A": "cat", "B": "Dog", "C": "cow"}) == want


def test_mmmu():
    reference = {"answer": "B", "options": ["cat", "dog"]}
    assert text.mmmu(["B", "(A)", "none"], [reference] * 3)["accuracy"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="options"):
        text.mmmu(["B"], [{"answer": "B"}])


def test_exact():
    assert text.exact(["Three.", "4"], [3, "five"])["accuracy"] == 0.5


def test_boxes_from_text():
    text = "It is <ref>dog</ref><box>[[100, 200, 500.5, 1000]]</box> or <box>[[9,8,1,2],[0,0,1]]</box>"
    assert boxes.parse_boxes(text, 200, 100) == [(20, 20, 100.1, 100), (0.2, 0.2, 1.8, 0.8)]
    assert boxes.parse_boxes("no [[1,2,3,4]] <box>[[a,b,c,d]]</box>", 9, 9) == []
    assert boxes.format_box((20, 20, 100, 100), 200, 100) == "<box>[[100,200,500,1000]]</box>"
    assert boxes.parse_boxes(boxes.format_box((20, 30, 40, 50), 100, 100), 100, 100) == [(20, 30, 40, 50)]


def test_box_accuracy():
    mask = np.zeros((8, 10), bool)
    assert boxes.mask_box(mask) is None
    mask[2:4, 5] = mask[3, 7] = True
    assert boxes.mask_box(mask) == (5, 2, 8, 4)
    assert boxes.box_iou((0, 0, 2, 2), (0, 0, 2, 1)) == 0.5
    assert boxes.box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.box_iou((0, 0, 1, 1), (3, 3, 4, 4)) == 0 == boxes.box_iou((1, 1, 1, 1), (1, 1, 1, 1))
    whole = (0, 0, 2, 2)
    got = boxes.box_accuracy([(0, 0, 2, 1), (1, 1, 3, 3), None, None, whole], [whole, whole, whole, None, None])
    assert got == {"n": 5, "Acc@0.5": 2 / 5}  # the half counts, and so does silence without a target
