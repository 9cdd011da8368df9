"""Conversations -> token ids and labels: the `internvl2_5` template and the official label rules.

A turn is `<|im_start|>role\\n` text `<|im_end|>\\n`. Turns are tokenised one by one, and so are the texts
between control tokens in a turn (official preprocess_internvl2_5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from argenseg_jax.data.tokenizer import Tokenizer, TokenPiece
from argenseg_jax.errors import SampleError, brief
from argenseg_jax.vocab import IGNORE, IMG_END, IMG_START, MASK

OFFICIAL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
IMAGE = "<image>"  # a placeholder in a text, not a token
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # one of the two units of an emoji, as in truncated scraped texts
UNCONDITIONAL = "Please generate a picture about nothing."  # the unconditional prompt of classifier-free guidance

Conversations = Sequence[Mapping[str, str]]


def encode_training(
    conversations: Conversations,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    *,
    image_tokens: int,
    code_tokens: int,
    num_masks: int | None = None,
    system: str | None = None,
    image_last: bool = False,
    name: str = "sample",
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of one training sample.

    Args:
      conversations: [{'from': 'system'|'human'|'gpt', 'value': text}] with `<image>` in human and
        `<mask>` in gpt turns.
      tokenizer: vocabulary in use.
      tiles_per_image: tiles of each image, in the order of the `<image>` placeholders.
      image_tokens: `<IMG_CONTEXT>` tokens of one tile.
      code_tokens: N, codes of one mask.
      num_masks: masks that the sample has; None skips the check.
      system: system message; '' for none, None for the official one. That of the conversation has priority.
      image_last: moves the images after the text of their turn.
      name: names the sample in messages.

    Returns:
      tokens i32[T] and labels i32[T], unshifted: IGNORE, a text id, or `<MASK_CONTEXT>` at each of
      the N positions of the codes (the N-1 `<MASK_CONTEXT>` inputs and `<ge_end>`).

    Raises:
      SampleError: unknown roles, or placeholders that do not match the images and masks.
    """
    turns = _turns(conversations, len(tiles_per_image), system, image_last, name)
    if num_masks is not None:
        _check_masks(turns, num_masks, name)
    header = len(tokenizer.encode([tokenizer.im_start, "assistant\n"]))
    vocab = tokenizer.vocab
    tokens, labels = _start(tokenizer)
    images = [_image(tokenizer, n * image_tokens) for n in tiles_per_image]
    mask = [vocab.ge_start, *[vocab.mask_context] * (code_tokens - 1), vocab.ge_end]
    for role, text in turns:
        ids = tokenizer.encode(_turn_pieces(tokenizer, role, _text_pieces(role, text, images, mask)))
        tokens += ids
        if role == "assistant":
            labels += [IGNORE] * header + ids[header:-1] + [IGNORE]
        else:
            labels += [IGNORE] * len(ids)
    labels = np.asarray(labels, np.int32)
    labels[labels == vocab.ge_end] = vocab.mask_context
    return np.asarray(tokens, np.int32), labels


def encode_query(
    conversations: Conversations | str,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    *,
    image_tokens: int,
    system: str | None = None,
    image_last: bool = False,
    name: str = "query",
) -> np.ndarray:
    """Ids i32[T] of a question, up to and including `<|im_start|>assistant\\n`.

    A text is a single human turn. Earlier answers keep only their text, as in the reference.
    """
    if isinstance(conversations, str):
        conversations = [{"from": "human", "value": conversations}]
    turns = _turns(conversations, len(tiles_per_image), system, image_last, name)
    if not turns or turns[-1][0] != "user":
        raise SampleError(f"{name}: a query ends with a human turn")
    images = [_image(tokenizer, n * image_tokens) for n in tiles_per_image]
    tokens, _ = _start(tokenizer)
    for role, text in turns:
        tokens += tokenizer.encode(_turn_pieces(tokenizer, role, _text_pieces(role, text, images, [])))
    return np.asarray(tokens + tokenizer.encode([tokenizer.im_start, "assistant\n"]), np.int32)


def check(conversations: Conversations, num_images: int, num_masks: int, name: str = "sample") -> None:
    """SampleError where `encode_training` would raise one for the roles or the number of placeholders."""
    _check_masks(_turns(conversations, num_images, "", False, name), num_masks, name)


def check_turns(conversations: Conversations, name: str = "sample") -> None:
    """SampleError unless every turn has a known role and a text."""
    _roles(conversations, name)


def is_human(turn: Mapping[str, str]) -> bool:
    """Whether a turn is the user's ("human" in the official data, "user" elsewhere)."""
    who = turn.get("from") if isinstance(turn, Mapping) else None
    return isinstance(who, str) and ROLES.get(who) == "user"


def query_turns(conversations: Conversations, name: str = "sample") -> list[Mapping[str, str]]:
    """The turns before the first answer with a mask (before the last answer where none has one)."""
    roles = _roles(conversations, name)
    answers = [k for k, (role, _) in enumerate(roles) if role == "assistant"]
    masked = [k for k in answers if MASK in roles[k][1]]
    if not answers:
        return list(conversations)
    turns = list(conversations[: (masked or answers[-1:])[0]])
    if not turns:
        raise SampleError(f"{name}: the answer comes before any question")
    return turns


def _turns(conversations, num_images, system, image_last, name) -> list[tuple[str, str]]:
    """[(role, text)] with the system turn first and every `<image>` at its position."""
    turns = _roles(conversations, name)
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    elif system is None:
        system = OFFICIAL_SYSTEM
    users = [k for k, (role, _) in enumerate(turns) if role == "user"]
    count = sum(turns[k][1].count(IMAGE) for k in users)
    if users and num_images and not count:
        turns[users[0]] = ("user", f"{IMAGE}\n" * num_images + turns[users[0]][1])
    elif count != num_images:
        raise SampleError(f"{name}: {count} {IMAGE} placeholders in the questions for {num_images} images")
    if image_last:
        turns = [(role, _image_last(text) if role == "user" else text) for role, text in turns]
    return ([("system", system)] if system else []) + turns


def _check_masks(turns: Sequence[tuple[str, str]], num_masks: int, name: str) -> None:
    count = sum(text.count(MASK) for role, text in turns if role == "assistant")
    if count != num_masks:
        raise SampleError(f"{name}: {count} {MASK} placeholders in the answers for {num_masks} masks")


def _roles(conversations: Conversations, name: str) -> list[tuple[str, str]]:
    """[(role, text)], checked."""
    turns = []
    for turn in conversations:
        try:
            turns.append((ROLES[turn["from"]], turn["value"]))
        except (KeyError, TypeError):
            turns.append((None, None))
        if not isinstance(turns[-1][1], str):
            raise SampleError(
                f"{name}: a turn must be {{'from': system|human|gpt, 'value': text}}, not {brief(turn, 80)}"
            )
        if half := LONE_SURROGATE.search(turns[-1][1]):
            raise SampleError(
                f"{name}: the text holds half a character (the lone surrogate "
                f"U+{ord(half[0]):04X}), which no tokenizer encodes"
            )
    return turns


def _image_last(text: str) -> str:
    """'<image>\\nSegment it.' -> 'Segment it.\\n<image>'; images inside a sentence stay there."""
    leading = re.match(rf"(?:{IMAGE}\s*)+", text)
    if leading is None:
        return text
    images = leading[0].count(IMAGE)
    return "\n".join([text[leading.end() :].rstrip(), *[IMAGE] * images])


def _start(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return ([], []) if tokenizer.bos is None else ([tokenizer.bos], [IGNORE])


def _image(tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    vocab = tokenizer.vocab
    return [vocab.id(IMG_START), *[vocab.img_context] * num_tokens, vocab.id(IMG_END)]


def _turn_pieces(tokenizer: Tokenizer, role: str, text: Sequence[TokenPiece]) -> list[TokenPiece]:
    return [tokenizer.im_start, f"{role}\n", *text, tokenizer.vocab.eos, "\n"]


def _text_pieces(role: str, text: str, images: list[list[int]], mask: Sequence[int]) -> list[TokenPiece]:
    """Splits a text at its placeholders; removes the images that it uses from the list."""
    if role == "user":
        first, *rest = text.split(IMAGE)
        return [first, *(piece for after in rest for piece in (*images.pop(0), after))]
    if role == "assistant":
        first, *rest = text.split(MASK)
        return [first, *(piece for after in rest for piece in (*mask, after))]
    return [text]
