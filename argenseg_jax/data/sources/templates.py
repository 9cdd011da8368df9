"""The questions and answers of samples that have no conversation: templates and how they are filled."""

from __future__ import annotations

import re
from collections.abc import Sequence

from argenseg_jax.errors import UserError

ANSWER = "Sure, the segmentation result: <mask>."
# {sents} is every expression as " s."; {sent} has them as "s. s", for use within a sentence.
PROMPTS = {
    "referring": "<image>\n Given the following instructions: {sents}; please perform referring "
    "segmentation on this image.",
    "semantic": "<image>\n Please segment {sent} in this image.",
    "reasoning": "<image>\n Please perform instance segmentation following the instructions below: {sents}.",
}
DEFAULT = "referring"


def question(sents: Sequence[str], prompt: str = "referring") -> str:
    """The human turn: `prompt` is a name in PROMPTS, or a text with {sent} or {sents}."""
    template = PROMPTS.get(prompt, prompt)
    if not isinstance(template, str) or not re.search(r"\{sents?\}", template):
        raise UserError(f"eval.prompt: '{prompt}' is none of {', '.join(PROMPTS)} and has no {{sent}}")
    listed = "".join(f" {s}." for s in sents)
    return template.replace("{sents}", listed).replace("{sent}", ". ".join(sents))


def class_prompt(prompt: str) -> str:
    """The prompt of data sets of classes: `semantic`, unless another than the default was chosen."""
    return "semantic" if prompt == DEFAULT else prompt


def turns(question: str, answer: str = ANSWER) -> list[dict[str, str]]:
    """A conversation of one question and one answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
