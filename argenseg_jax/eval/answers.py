"""Scores of text answers: POPE, VQAv2 and TextVQA consensus, MMMU multiple choice.

Every function takes the answers and their references and is a mean over samples, so shares of a
data set are pooled by concatenating them.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from argenseg_jax.errors import UserError

# ------------------------------------------------------------------------------- yes or no (POPE)


def yes_or_no(answer: str) -> bool:
    """The official reading of POPE: 'no' only where the first sentence has a `no` or `not`."""
    first = answer.split(".")[0].replace(",", "")
    return not {"no", "not"} & set(first.lower().split())


def pope(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float | None]:
    """Accuracy, precision, recall and F1 of 'yes', and the share of answers that say yes.

    None where nothing can be divided by: precision without a yes, recall without a true yes.
    """
    if bad := sorted({str(x) for x in labels} - {"yes", "no"}):
        raise UserError(f"POPE: a reference is 'yes' or 'no', not '{bad[0]}'")
    pairs = [(yes_or_no(a), label == "yes") for a, label in zip(answers, labels, strict=True)]
    both = sum(said and true for said, true in pairs)
    said, true = sum(s for s, _ in pairs), sum(t for _, t in pairs)
    return {"n": len(pairs), "accuracy": _share(sum(s == t for s, t in pairs), len(pairs)),
            "precision": _share(both, said), "recall": _share(both, true),
            "F1": _share(2 * both, said + true), "yes_ratio": _share(said, len(pairs))}


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
    return [word[:k] + word[k + 1:] for k, c in enumerate(word) if c == "'"]


CONTRACTIONS = {bare: word for word in _RESTORED for bare in _bare_forms(word)}
NUMBERS = {"none": "0", **{word: str(k) for k, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"


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


def vqa(answers: Sequence[str], references: Sequence[Sequence[str]],
        tokenize: bool = False) -> dict[str, float | None]:
    """Mean of `vqa_accuracy`."""
    each = [vqa_accuracy(a, r, tokenize) for a, r in zip(answers, references, strict=True)]
    return {"n": len(each), "accuracy": sum(each) / len(each) if each else None}


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
    found = {low.rfind(wording.lower()): letter
             for letter, wording in options.items() if wording.lower() in low}
    return found[max(found)] if found else None


def mmmu(answers: Sequence[str], references: Sequence[Mapping[str, object]]) -> dict[str, float | None]:
    """Accuracy of multiple choice; a reference is {'answer': letter, 'options': {letter: wording}}.

    `options` may be a list of wordings, lettered from A.
    """
    right = 0
    for answer, reference in zip(answers, references, strict=True):
        try:
            options = reference["options"]
            if not isinstance(options, Mapping):
                options = dict(zip(map(chr, itertools.count(ord("A"))), options))
            wanted = reference["answer"]
        except (KeyError, TypeError) as error:
            raise UserError(f"MMMU: a reference needs `answer` and `options` ({error})") from None
        right += parse_choice(answer, options) == wanted
    return {"n": len(answers), "accuracy": _share(right, len(answers))}


def exact(answers: Sequence[str], references: Sequence[str]) -> dict[str, float | None]:
    """Share of answers that equal their reference after `normalize` (counting, short answers)."""
    right = sum(normalize(a) == normalize(str(r)) for a, r in zip(answers, references, strict=True))
    return {"n": len(answers), "accuracy": _share(right, len(answers))}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
