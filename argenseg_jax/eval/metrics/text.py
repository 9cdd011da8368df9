"""Scores of text answers: POPE, VQAv2 and TextVQA consensus, MMMU multiple choice.

Every score is a mean over samples, so shares of a data set are pooled by adding all of them.
"""

from __future__ import annotations

import array
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from argenseg_jax.errors import UserError

# ------------------------------------------------------------------------------- yes or no (POPE)


def yes_or_no(answer: str) -> bool:
    """The official reading of POPE: 'no' only where the first sentence has a `no` or `not`."""
    first = answer.split(".")[0].replace(",", "")
    return not {"no", "not"} & set(first.lower().split())


class Pope:
    """Accuracy, precision, recall and F1 of 'yes', and the share of answers that say yes."""

    def __init__(self):
        self._n = self._right = self._both = self._yes = self._true = 0

    def add(self, answer: str, label: str) -> None:
        """One answer to a question whose right answer is 'yes' or 'no'."""
        if label not in ("yes", "no"):
            raise UserError(f"POPE: a reference is 'yes' or 'no', not '{label}'")
        yes, true = yes_or_no(answer), label == "yes"
        self._n += 1
        self._right += yes == true
        self._both += yes and true
        self._yes += yes
        self._true += true

    def scores(self) -> dict[str, float | None]:
        """None where nothing can be divided by: precision without a yes, recall without a true yes."""
        return {
            "n": self._n,
            "accuracy": _share(self._right, self._n),
            "precision": _share(self._both, self._yes),
            "recall": _share(self._both, self._true),
            "F1": _share(2 * self._both, self._yes + self._true),
            "yes_ratio": _share(self._yes, self._n),
        }


class Accuracy:
    """The mean of `judge(answer, reference)`."""

    def __init__(self, judge: Callable[[str, Any], float]):
        self._judge, self._values = judge, array.array("d")

    def add(self, answer: str, reference: Any) -> None:
        """One answer."""
        self._values.append(self._judge(answer, reference))

    def scores(self) -> dict[str, float | None]:
        """{n, accuracy}; None without an answer."""
        return {"n": len(self._values), "accuracy": _share(sum(self._values), len(self._values))}


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float | None]:
    """`Pope` of all answers."""
    return _pooled(Pope(), answers, labels)


# --------------------------------------------------------------- consensus of ten people (VQA)

# The words that the official normalisation restores an apostrophe to. Forms whose bare spelling is
# another word (he'll, we're, it's, I'd, ...) are left alone there, and so they are here.
_RESTORED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()


def _bare_forms(word: str) -> list[str]:
    """The word with one of its apostrophes missing."""
    return [word[:k] + word[k + 1 :] for k, c in enumerate(word) if c == "'"]


CONTRACTIONS = {bare: word for word in _RESTORED for bare in _bare_forms(word)}
NUMBERS = {
    "none": "0",
    **{word: str(k) for k, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize(answer: str, tokenize: bool = False) -> str:
    """The official normalisation of VQA answers: punctuation, number words, articles, contractions.

    Args:
      answer: as given.
      tokenize: first drop commas and question marks and split off 's, as the TextVQA evaluator does.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    if tokenize:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    given, thousands = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:  # a mark inside a word becomes a space, one beside a space vanishes
        loose = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if loose or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str], tokenize: bool = False) -> float:
    """min(1, equal references among the others / 3), averaged over leaving out each reference.

    As officially in VQAv2, references that all agree are compared as they are; TextVQA (`tokenize`)
    normalises always.
    """
    if not references:
        raise UserError("VQA: a question without reference answers")
    given, known = answer.strip(), list(references)
    if tokenize or len(set(known)) > 1:
        given = normalize(given, tokenize)
        known = [normalize(reference, tokenize) for reference in known]
    hits = [reference == given for reference in known]
    if len(hits) == 1:
        return float(hits[0])
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def vqa(answers: Sequence[str], references: Sequence[Sequence[str]], tokenize: bool = False) -> dict[str, float | None]:
    """Mean of `vqa_accuracy`."""
    return _pooled(Accuracy(functools.partial(vqa_accuracy, tokenize=tokenize)), answers, references)


# ------------------------------------------------------------------------- multiple choice (MMMU)


def parse_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response chooses, or None.

    Tried in turn, as MMMU does: letters in brackets, letters alone, then in a long response the
    wording of an option. Of several the last one named counts. MMMU guesses at random where nothing
    fits; here that is None, which counts as wrong, so a score never depends on luck.

    Args:
      response: the model's text.
      options: letter -> wording.
    """
    text = f" {response.strip(',.!?;:' + chr(39))} "
    low = text.lower()
    tried: list[dict[str, str]] = [{f"({k})": k for k in options}, {f" {k} ": k for k in options}]
    for forms in tried:
        found = {text.rfind(form): letter for form, letter in forms.items() if form in text}
        if found:
            return found[max(found)]
    if len(text.split()) <= 5:
        return None
    found = {low.rfind(wording.lower()): letter for letter, wording in options.items() if wording.lower() in low}
    return found[max(found)] if found else None


def chooses(answer: str, reference: Mapping[str, Any]) -> bool:
    """Whether an answer names the right letter of {'answer': letter, 'options': {letter: wording}}.

    `options` may be a list of wordings, lettered from A.
    """
    try:
        options = reference["options"]
        if not isinstance(options, Mapping):
            options = dict(zip(map(chr, itertools.count(ord("A"))), options))
        wanted = reference["answer"]
    except (KeyError, TypeError) as error:
        raise UserError(f"MMMU: a reference needs `answer` and `options` ({error})") from None
    return parse_choice(answer, options) == wanted


def mmmu(answers: Sequence[str], references: Sequence[Mapping[str, object]]) -> dict[str, float | None]:
    """Accuracy of multiple choice; see `chooses`."""
    return _pooled(Accuracy(chooses), answers, references)


def equals(answer: str, reference: Any) -> bool:
    """Whether an answer is its reference after `normalize`."""
    return normalize(answer) == normalize(str(reference))


def exact(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Share of answers that equal their reference (counting, short answers)."""
    return _pooled(Accuracy(equals), answers, references)


def _pooled(tally: Pope | Accuracy, answers: Sequence[str], references: Sequence[Any]) -> dict[str, float | None]:
    for pair in zip(answers, references, strict=True):
        tally.add(*pair)
    return tally.scores()


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
